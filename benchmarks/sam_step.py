#!/usr/bin/env python3
"""What `fastsam.SAMStep` costs beside the loop that it replaces: whole training steps of the demo's network on a CPU.

    python benchmarks/sam_step.py [--steps 400] [--processes 3]

Both loops train twins of one network on the same batches and must end with the same weights, bit for bit, before a time
is printed. Steps alternate; the ratio is that of the medians, and the middle one of several processes is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import fastsam
from fastsam.commands.demo_training import network


def by_hand(model, optimizer, images, labels):
    """What a user writes without SAMStep, with the same care."""
    begun = torch.get_rng_state()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    ended = torch.get_rng_state()
    optimizer.first_step(zero_grad=True)
    torch.set_rng_state(begun)
    with fastsam.freeze_running_stats(model):
        F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    torch.set_rng_state(ended)
    return loss.detach()


def measure(steps):
    """Median seconds of a step, by hand and by SAMStep."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    models = [network(0)]
    models.append(copy.deepcopy(models[0]))
    hand, ours = (
        fastsam.FusedSAM(m.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4, rho=0.05)
        for m in models
    )
    step = fastsam.SAMStep(models[1], ours, F.cross_entropy)
    loops = [lambda: by_hand(models[0], hand, images, labels), lambda: step(images, labels)]
    times = [[], []]
    for t in range(steps):
        for i in (0, 1) if t % 2 else (1, 0):
            start = time.perf_counter()
            loops[i]()
            times[i].append(time.perf_counter() - start)
    for p, q in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(p, q), "the two loops disagree"
    return [statistics.median(each[steps // 10 :]) for each in times]


def main():
    """Measure in fresh processes and print the middle ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(*measure(options.steps))
        return
    command = [sys.executable, __file__, "--alone", "--steps", str(options.steps)]
    found = []
    for _ in range(options.processes):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([float(seconds) for seconds in said.split()])
    ratios = sorted(ours / hand for hand, ours in found)
    hand, ours = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
    middle = statistics.median(ratios)
    print(f"by hand {hand:.2f} ms, SAMStep {ours:.2f} ms a step: {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
