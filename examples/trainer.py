"""Transformers: a Trainer that takes SAM steps, with clipping and a schedule."""

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import fastsam
from fastsam.integrations.transformers import SAMTrainerMixin


class SAMTrainer(SAMTrainerMixin, Trainer):
    pass


def main(epochs=3):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, num_labels=3, **sizes)
    )
    dataset = [
        {"input_ids": torch.randint(20, (8,)), "labels": torch.tensor(i % 3)}
        for i in range(18)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=6,
            max_grad_norm=1.0,  # of the second gradients
            learning_rate=2e-2,
            weight_decay=0.01,
            num_train_epochs=epochs,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        sam = (fastsam.FusedSAM, dict(base_optimizer=torch.optim.AdamW, rho=0.05))
        trainer = SAMTrainer(
            model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=sam
        )
        return trainer.train().training_loss


if __name__ == "__main__":
    print(f"loss {main():.3f}")
