"""Transformers' Trainer: the step of the whole batch, with accumulation, clipping, dropout, resuming."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path

import pytest
import torch
from plain import BATCH, LOSS, OPTIONS, STEPS, data, loader, network, optimizer_of, same, state, train, train_protected
from torch import nn

import fastsam

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

from fastsam.integrations.transformers import SAMCallback, SAMTrainerMixin  # noqa: E402


class SAMTrainer(SAMTrainerMixin, Trainer):
    """As users write it."""


class Wrapped(nn.Module):
    """The network of the other tests, with its loss in it."""

    def __init__(self, **make):
        super().__init__()
        self.net = network(**make)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": LOSS(logits, labels), "logits": logits}


def rows():
    x, y = data()
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def arguments(path, **options):
    quiet = dict(report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", use_cpu=True)
    schedule = dict(lr_scheduler_type="constant", max_grad_norm=0.0, num_train_epochs=1)
    batches = dict(per_device_train_batch_size=BATCH, train_sampling_strategy="sequential")
    return TrainingArguments(str(path), **{**quiet, **schedule, **batches, **options})


def trained(path, cls=SAMTrainer, model=None, sam=None, callback=False, resume=None, dataset=None, **options):
    model = Wrapped() if model is None else model
    if sam is None:
        made = {"optimizers": (optimizer_of(model), None)}
    else:
        made = {"optimizer_cls_and_kwargs": (fastsam.FusedSAM, sam)}
    trainer = cls(model, arguments(path, **options), train_dataset=rows() if dataset is None else dataset, **made)
    if callback:
        trainer.add_callback(SAMCallback(trainer))
    torch.manual_seed(9)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_it_is_the_plain_loop(tmp_path):
    trainer = trained(tmp_path)
    same(state(trainer.model.net), train())
    assert trainer.state.global_step == STEPS


def test_the_callback_does_the_same_to_a_trainer_that_is_there(tmp_path):
    trainer = trained(tmp_path, cls=Trainer, callback=True)
    assert isinstance(trainer, Trainer) and isinstance(trainer, SAMTrainerMixin)
    same(state(trainer.model.net), train())


def test_without_them_the_optimizer_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match="SAM takes two gradients a step"):
        trained(tmp_path, cls=Trainer)


def test_the_optimizer_may_be_made_by_the_trainer(tmp_path):
    options = {**OPTIONS, "base_optimizer": torch.optim.SGD}
    trainer = trained(tmp_path, sam=options, weight_decay=0.3)
    names, expected = {id(p): name for name, p in trainer.model.named_parameters()}, Wrapped()
    groups = [  # with and without weight decay, as the Trainer splits them
        {"params": [expected.get_parameter(names[id(p)]) for p in group["params"]], "weight_decay": decay}
        for group, decay in zip(trainer.optimizer.param_groups, (0.3, 0.0), strict=True)
    ]
    train(model=expected.net, optimizer=fastsam.FusedSAM(groups, **options))
    same(state(trainer.model), state(expected))


def test_dropout_and_running_statistics(tmp_path):
    trainer = trained(tmp_path, model=Wrapped(norm=True, dropout=0.3))
    same(state(trainer.model.net), train_protected())
    assert trainer.model.net[1].num_batches_tracked == STEPS


@pytest.mark.parametrize("callback", [False, True])
def test_accumulation_is_the_step_of_the_whole_batch(tmp_path, callback):
    trainer = trained(
        tmp_path,
        cls=Trainer if callback else SAMTrainer,
        callback=callback,
        model=Wrapped(norm=True, dropout=0.3),
        gradient_accumulation_steps=2,
    )
    assert trainer.state.global_step == STEPS // 2
    # To rounding: SAMStep's second parts begin at other addresses, where sums may be taken in another order.
    same(state(trainer.model.net), train_protected(micro_batches=2), rtol=1e-6, atol=1e-7)


def test_a_last_step_of_fewer_micro_batches(tmp_path):
    trainer = trained(tmp_path, gradient_accumulation_steps=3)
    model, batches = network(), list(loader())
    optimizer = optimizer_of(model)
    for part in (batches[:3], batches[3:]):
        for second in (False, True):
            for x, y in part:
                (LOSS(model(x), y) / len(part)).backward()
            if not second:
                optimizer.first_step(zero_grad=True)
        optimizer.step()
        optimizer.zero_grad()
    same(state(trainer.model.net), state(model))


def test_the_second_gradients_are_clipped_and_their_norm_is_logged(tmp_path):
    trainer = trained(tmp_path, max_grad_norm=0.1, logging_strategy="steps", logging_steps=1)
    model, norms, losses = network(), [], []
    optimizer = optimizer_of(model)
    for x, y in loader():
        losses.append(LOSS(model(x), y))
        losses[-1].backward()
        optimizer.first_step(zero_grad=True)
        LOSS(model(x), y).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    same(state(trainer.model.net), state(model))
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(norms)
    assert [entry["loss"] for entry in logged] == pytest.approx([loss.item() for loss in losses], abs=1e-4)


def test_clipping_under_a_loss_scaler(tmp_path, monkeypatch):
    """As in fp16, which the Trainer has on GPUs alone: here in float32, where a power of two as scale loses nothing."""
    model = Wrapped()
    sam = optimizer_of(model)
    trainer = SAMTrainer(model, arguments(tmp_path, max_grad_norm=0.1), train_dataset=rows(), optimizers=(sam, None))
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    class Unscaling(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # when the model has no autocast any more
            monkeypatch.setattr(trainer.accelerator, "native_amp", True)
            monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")

    trainer.add_callback(Unscaling())
    trainer.train()
    assert scaler.get_scale() == 2.0**10
    plain = network()
    optimizer = optimizer_of(plain)
    for x, y in loader():
        LOSS(plain(x), y).backward()
        optimizer.first_step(zero_grad=True)
        LOSS(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    same(state(model.net), state(plain))


def test_an_exception_brings_the_weights_back(tmp_path):
    class Failing(Wrapped):
        def forward(self, x, labels):
            if self.optimizer.perturbed:
                raise KeyError("in the second pass")
            return super().forward(x, labels)

    model = Failing()
    before = state(model)
    optimizer = model.optimizer = optimizer_of(model)
    trainer = SAMTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(KeyError):
        trainer.train()
    same(state(model), before)
    assert not optimizer.perturbed


def test_some_steps_have_one_pass(tmp_path):
    model, options = Wrapped(), dict(when=fastsam.when.every(2))
    trainer = SAMTrainer(
        model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer_of(model, **options), None)
    )
    trainer.train()
    plain = network()
    same(state(model.net), train(model=plain, optimizer=optimizer_of(plain, **options)))


def test_other_optimizers_are_left_alone(tmp_path):
    results = []
    for cls in (Trainer, SAMTrainer):
        model = Wrapped(dropout=0.3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = cls(model, arguments(tmp_path), train_dataset=rows(), optimizers=(sgd, None))
        torch.manual_seed(9)
        trainer.train()
        results.append(state(model))
    same(*results)
    trainer.add_callback(SAMCallback(trainer))
    with pytest.raises(ValueError, match="must be a FusedSAM whose steps have two passes, got SGD"):
        trainer.train()


# BERT


def bert():
    torch.manual_seed(2)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=3, **sizes)
    return BertForSequenceClassification(config)


def tokens(count=24):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 30, (count, 8), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


SCHEDULE = dict(lr_scheduler_type="linear", learning_rate=3e-3, warmup_steps=1, num_train_epochs=2)
ADAMW = dict(base_optimizer=torch.optim.AdamW, betas=(0.8, 0.95), weight_decay=0.1, rho=0.1)


def test_bert_resumes_half_way(tmp_path):
    options = dict(sam=ADAMW, dataset=tokens(), max_grad_norm=0.5, gradient_accumulation_steps=2, **SCHEDULE)
    whole = trained(tmp_path / "a", model=bert(), save_strategy="steps", save_steps=2, **options)
    assert whole.state.global_step == 4
    resumed = trained(tmp_path / "b", model=bert(), resume=str(tmp_path / "a" / "checkpoint-2"), **options)
    assert resumed.state.global_step == 4
    same(state(resumed.model), state(whole.model))
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        same(a, b)


def test_bert_is_the_hand_written_loop(tmp_path):
    trainer = trained(tmp_path, model=bert(), sam=ADAMW, dataset=tokens(), max_grad_norm=0.5, **SCHEDULE)
    model = bert()
    grouped = SAMTrainer(model, arguments(tmp_path, **SCHEDULE), optimizer_cls_and_kwargs=(fastsam.FusedSAM, ADAMW))
    optimizer, scheduler = grouped.create_optimizer(), grouped.create_scheduler(8, grouped.optimizer)
    model.train()
    torch.manual_seed(9)

    def backward(batch):
        loss = model(**batch).loss
        loss.backward()

    batches = torch.utils.data.DataLoader(tokens(), batch_size=BATCH)  # which draws a number for each epoch
    for batch in itertools.chain(batches, batches):
        begun = torch.get_rng_state()
        backward(batch)
        optimizer.first_step(zero_grad=True)
        ended = torch.get_rng_state()
        torch.set_rng_state(begun)
        backward(batch)
        torch.set_rng_state(ended)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    same(state(trainer.model), state(model))


def test_the_example():
    path = Path(__file__).parents[2] / "examples" / "trainer.py"
    assert 0 < runpy.run_path(str(path))["main"]() < math.log(3)
