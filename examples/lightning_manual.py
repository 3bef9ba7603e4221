"""Lightning by hand: a closure accumulates micro-batches, and runs twice a step."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsam
from fastsam.integrations.lightning import SAMCallback


class Classifier(pl.LightningModule):
    def __init__(self, micro_batches=4):
        super().__init__()
        self.automatic_optimization = False
        self.micro_batches = micro_batches
        self.model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch, batch_idx):
        optimizer, (x, y) = self.optimizers(), batch

        def closure():
            optimizer.zero_grad()
            loss = 0.0
            for inputs, targets in zip(
                x.chunk(self.micro_batches), y.chunk(self.micro_batches), strict=True
            ):
                part = (
                    nn.functional.cross_entropy(self.model(inputs), targets)
                    / self.micro_batches
                )
                self.manual_backward(part)
                loss += part.detach()
            return loss

        self.log("loss", optimizer.step(closure))  # at w

    def configure_optimizers(self):
        return fastsam.FusedSAM(
            self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05
        )


def main(epochs=3):
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(64, 20), torch.randint(0, 3, (64,)))
    quiet = dict(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[SAMCallback()], **quiet
    )
    trainer.fit(Classifier(), DataLoader(dataset, batch_size=16))
    return trainer.callback_metrics["loss"].item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
