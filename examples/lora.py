"""PEFT: only the adapters are perturbed and stepped, saved and loaded as ever."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastsam


def pretrained():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))


def main(steps=20):
    model = get_peft_model(
        pretrained(),
        LoraConfig(target_modules=["0"], modules_to_save=["2"], r=4, lora_alpha=8),
    )
    optimizer = fastsam.FusedSAM(
        model.parameters(), "adamw", lr=1e-2, weight_decay=0.01, rho=0.05
    )
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    for _ in range(steps):
        step(x, y)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(pretrained(), folder)
    with torch.no_grad():
        return nn.functional.cross_entropy(loaded(x), y).item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
