"""A few small steps on the CUDA kernels, to be run under compute-sanitizer by gpu.sh.

Every storage type; the rules with the most states; tensors with tails and misaligned gradients; a table of addresses
for more tensors than arguments hold. Everything is copied from the host: initcheck sees what has been written, and a
test's memory, filled with NaN, would hide from it what has not. The weights are compared with the reference's.
"""

import argparse

import torch
from devices import Cpu, device_named
from shapes import SHRUNK
from torch import Tensor

import fastsam

SIZES, MANY = ((1, 63), 50) if SHRUNK else ((1, 63, 2049, 8192, 8193, 20_001), 5000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
]


def step(
    device: Cpu,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    base: type[torch.optim.Optimizer],
    options: dict[str, float],
) -> None:
    """Two SAM steps on the GPU and on the host; the same weights."""
    start = [torch.linspace(-2, 2, n, dtype=torch.float64).to(dtype) for n in sizes]
    steps = []
    for where, backend in ((device.torch, device.backend), (torch.device("cpu"), "reference")):
        params = [torch.nn.Parameter(weight) for weight in sent(start, where, 0)]
        optimizer = fastsam.FusedSAM(params, base, rho=0.5, backend=backend, **options)
        for finish in (optimizer.first_step, optimizer.step) * 2:
            for param, gradient in zip(params, sent(start, where, 1), strict=True):
                param.grad = gradient
            finish()
        steps.append([param.detach().cpu() for param in params])
    tolerance = 1e-13 if dtype == torch.float64 else 0  # the reference's addcmul may round twice in float64
    for ours, theirs in zip(*steps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def sent(tensors: list[Tensor], device: torch.device, offset: int) -> list[Tensor]:
    """Copies, `offset` elements beyond a 16-byte boundary; thousands of them in one piece of memory, others apart."""
    if len(tensors) > 1000:
        memory = torch.cat([tensors[0][:offset], *tensors]).to(device, copy=True)
        return list(memory[offset:].split([len(tensor) for tensor in tensors]))
    return [torch.cat([tensor[:offset], tensor]).to(device, copy=True)[offset:] for tensor in tensors]


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = device_named(parser.parse_args().device)
    for dtype in DTYPES:
        for base, options in BASES:
            step(device, SIZES, dtype, base, options)
            print(dtype, base.__name__, flush=True)
    step(device, (3,) * MANY, torch.float32, *BASES[0])
    print(MANY, "tensors")


if __name__ == "__main__":
    main()
