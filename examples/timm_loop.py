"""timm: FusedSAM by name, in a loop that calls step() alone."""

import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

import fastsam
from fastsam.integrations.timm import register


def main(steps=6):
    register()
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, 16, 16), torch.arange(12) % 3
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = timm.optim.create_optimizer_v2(
        model, "fastsamsgd", lr=0.05, weight_decay=1e-4, rho=0.05
    )
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)

    def second_pass():  # with the batch that x and y are then
        with fastsam.freeze_running_stats(model):
            nn.functional.cross_entropy(model(x), y).backward()

    fastsam.unwrap(optimizer).attach_second_pass(second_pass)
    for i in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()  # climbs, runs the second pass, steps
        scheduler.step_update(i + 1)
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
