"""Lightning: FusedSAM, and a callback for BatchNorm and dropout."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsam
from fastsam.integrations.lightning import SAMCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(20, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(32, 3),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        if not self.optimizers().perturbed:  # the first of the two passes, at w
            self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

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
    return trainer.callback_metrics["loss_epoch"].item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
