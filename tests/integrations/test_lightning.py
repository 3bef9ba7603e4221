"""Lightning and Fabric: the weights of the plain loop, bit for bit, in every way to train."""

from __future__ import annotations

import importlib
import math
import runpy
from pathlib import Path

import pytest
import torch
from plain import LOSS, STEPS, loader, network, optimizer_of, same, state, train, train_protected
from torch import nn

import fastsam

L = pytest.importorskip("lightning.pytorch")
PL = pytest.importorskip("pytorch_lightning")
PACKAGES = {"lightning": L, "pytorch_lightning": PL}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
]


def ours(package="lightning"):
    return importlib.import_module(f"fastsam.integrations.{package}")


def module_class(pl=L):
    class Module(pl.LightningModule):
        """Automatic optimization."""

        def __init__(self, schedule=False, **make):
            super().__init__()
            self.net, self.schedule, self.options = network(**make), schedule, {}
            self.seen, self.steps, self.zeroed, self.before = [], 0, 0, 0

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = LOSS(self.net(x), y)
            self.steps += 1
            self.seen.append((self.optimizers().perturbed, loss.item()))
            self.log("both", loss, on_step=True, on_epoch=True)
            if not self.optimizers().perturbed:
                self.log("first", loss, on_step=False, on_epoch=True)
            return loss

        def on_before_zero_grad(self, optimizer):
            self.zeroed += 1

        def on_before_optimizer_step(self, optimizer):
            self.before += 1

        def configure_optimizers(self):
            optimizer = optimizer_of(self.net, **self.options)
            if not self.schedule:
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Module


Module = module_class()


def trainer_of(pl=L, **kwargs):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(**{**quiet, "accelerator": "cpu", "max_epochs": 1, "devices": 1, **kwargs})


def fit(module=None, data=None, pl=L, **kwargs):
    module = Module() if module is None else module
    trainer = trainer_of(pl, **kwargs)
    trainer.fit(module, loader() if data is None else data)
    return module, trainer


# automatic optimization


@pytest.mark.parametrize("package", PACKAGES)
def test_automatic_optimization_is_the_plain_loop(package):
    module, trainer = fit(module_class(PACKAGES[package])(), pl=PACKAGES[package])
    same(state(module.net), train())
    assert trainer.global_step == STEPS
    assert module.steps == module.zeroed == module.before == 2 * STEPS


@pytest.mark.parametrize("protected", [False, True])
def test_what_is_logged(protected):
    module, trainer = fit(callbacks=[ours().SAMCallback()] if protected else [])
    assert [perturbed for perturbed, _ in module.seen] == [False, True] * STEPS
    first, second = ([loss for perturbed, loss in module.seen if perturbed is which] for which in (False, True))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["first"] == pytest.approx(sum(first) / STEPS)
    assert metrics["both_epoch"] == pytest.approx(sum(first + second) / (2 * STEPS))
    assert metrics["both_step"] == pytest.approx(second[-1])


def test_schedulers_and_loggers(tmp_path):
    logger = L.loggers.CSVLogger(tmp_path)
    monitor = L.callbacks.LearningRateMonitor("step")
    module, _ = fit(Module(schedule=True), logger=logger, callbacks=[monitor], log_every_n_steps=1)
    same(state(module.net), train(schedule=True))
    assert "lr-FusedSAM" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_clipping():
    module, _ = fit(gradient_clip_val=0.1)
    same(state(module.net), train(clip=0.1))


@pytest.mark.parametrize("precision, options", [("bf16-mixed", {"autocast": torch.bfloat16}), ("64-true", {})])
def test_precision(precision, options):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module, _ = fit(data=loader(dtype=dtype), precision=precision)
    same(state(module.net), train(dtype=dtype, **options))


def test_clipping_in_bfloat16():
    plugin = ours().SAMMixedPrecision("bf16-mixed", "cpu")
    module, _ = fit(plugins=[plugin], gradient_clip_val=0.1)
    same(state(module.net), train(clip=0.1, autocast=torch.bfloat16))


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_training_resumes_from_a_checkpoint_half_way(tmp_path):
    checkpoint = L.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    half_and_all = dict(callbacks=[checkpoint], enable_checkpointing=True, max_epochs=2)
    fit(Module(schedule=True), **half_and_all)
    half = tmp_path / f"epoch=0-step={STEPS}.ckpt"
    resumed = Module(schedule=True)
    for param in resumed.parameters():
        nn.init.zeros_(param)
    trainer = trainer_of(**half_and_all)
    trainer.fit(resumed, loader(), ckpt_path=half)
    assert trainer.global_step == 2 * STEPS and resumed.steps == 2 * STEPS
    same(state(resumed.net), train(schedule=True, epochs=2))


def test_some_steps_have_one_pass():
    module = Module()
    module.options = dict(when=fastsam.when.every(2))
    _, trainer = fit(module)
    model = network()
    same(state(module.net), train(model=model, optimizer=optimizer_of(model, when=fastsam.when.every(2))))
    assert trainer.global_step == STEPS and module.steps == STEPS + 2


# the callback


@pytest.mark.parametrize("package", PACKAGES)
def test_the_callback_protects_running_statistics_and_dropout(package):
    pl = PACKAGES[package]
    module = module_class(pl)(norm=True, dropout=0.3)
    torch.manual_seed(9)
    fit(module, pl=pl, callbacks=[ours(package).SAMCallback()])
    same(state(module.net), train_protected())
    assert module.net[1].num_batches_tracked == STEPS


def test_the_callback_leaves_the_optimizer_as_it_was():
    class Kept(Module):
        def configure_optimizers(self):
            self.kept = super().configure_optimizers()
            return self.kept

    module, _ = fit(Kept(), callbacks=[ours().SAMCallback()])
    assert not module.kept._optimizer_step_pre_hooks


def test_the_callback_wants_a_fusedsam():
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            return LOSS(self.net(batch[0]), batch[1])

    with pytest.raises(ValueError, match="must give a FusedSAM whose steps have two passes, got SGD"):
        fit(Plain(), callbacks=[ours().SAMCallback()])


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"must be 1, got 2: .*replay_micro_batches=True.*manual_backward"):
        fit(callbacks=[ours().SAMCallback()], accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="does not clear the gradients"):  # without the callback, too
        fit(accumulate_grad_batches=2)


def test_micro_batches_are_run_again():
    module = Module(norm=True, dropout=0.3)
    torch.manual_seed(9)
    callback = ours().SAMCallback(replay_micro_batches=True)
    fit(module, callbacks=[callback], accumulate_grad_batches=2)
    # To rounding: SAMStep's second parts begin at other addresses, where sums may be taken in another order.
    same(state(module.net), train_protected(micro_batches=2), rtol=1e-6, atol=1e-7)
    assert module.steps == 2 * STEPS


def test_an_exception_brings_the_weights_back():
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if self.optimizers().perturbed:
                self.kept = self.optimizers().optimizer
                raise KeyError("in the second pass")
            return super().training_step(batch, batch_idx)

    module = Failing()
    before = state(module.net)
    with pytest.raises(KeyError):
        fit(module, callbacks=[ours().SAMCallback()])
    same(state(module.net), before)
    assert not module.kept.perturbed


# float16


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_float16_needs_the_plugin(package, clip):
    pl = PACKAGES[package]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = ours(package).SAMMixedPrecision("16-mixed", "cpu", scaler)
    module, trainer = fit(module_class(pl)(), pl=pl, plugins=[plugin], gradient_clip_val=clip)
    assert trainer.global_step == STEPS and module.steps == 2 * STEPS and module.before == STEPS
    # A power of two as loss scale loses nothing but small float16 gradients, which these are not.
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = optimizer_of(model)
    for x, y in loader():
        for last in (False, True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = LOSS(model(x), y)
            scaler.scale(loss).backward()
            if not last:
                optimizer.first_step()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    same(state(module.net), state(model))
    same(state(module.net), train(clip=clip), rtol=0.02, atol=5e-3)  # float16 has 11 bits


def test_float16_without_the_plugin_is_refused():
    stock = L.plugins.precision.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="first_step"):
        fit(plugins=[stock])


def test_float16_protected_with_an_overflow_in_the_second_pass():
    class Overflowing(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.optimizers().perturbed and batch_idx == 1 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = ours().SAMMixedPrecision("16-mixed", "cpu", scaler)
    module = Overflowing(norm=True)
    fit(module, plugins=[plugin], callbacks=[ours().SAMCallback()])
    assert scaler.get_scale() == 2.0**7
    assert module.net[1].num_batches_tracked == STEPS
    assert all(value.isfinite().all() for value in state(module.net).values())


# manual optimization


class Manual(Module):
    """The ways to write a step by hand."""

    def __init__(self, way, **make):
        super().__init__(**make)
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch, batch_idx):
        optimizer, (x, y) = self.optimizers(), batch

        def closure():
            optimizer.zero_grad()
            loss = LOSS(self.net(x), y)
            self.manual_backward(loss)
            return loss

        if self.way == "closure":
            optimizer.step(closure)
        elif self.way == "micro-batches":

            def micro_batches():
                optimizer.zero_grad()
                for part in range(2):
                    self.manual_backward(LOSS(self.net(x[part::2]), y[part::2]) / 2)

            optimizer.step(micro_batches)
        elif self.way == "forgotten":
            closure()
            optimizer.step()
        else:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            getattr(optimizer, self.way)()


@pytest.mark.parametrize("way", ["step", "second_step", "closure"])
def test_manual_optimization(way):
    module, trainer = fit(Manual(way))
    same(state(module.net), train())
    assert trainer.global_step == STEPS


def test_manual_micro_batches():
    module, trainer = fit(Manual("micro-batches"))
    same(state(module.net), train(), rtol=1e-5, atol=1e-6)  # halves are summed in another order
    assert trainer.global_step == STEPS


@pytest.mark.parametrize("way", ["step", "closure"])
def test_manual_optimization_with_the_callback(way):
    module = Manual(way, norm=way == "closure", dropout=0.3 if way == "closure" else 0.0)
    torch.manual_seed(9)
    fit(module, callbacks=[ours().SAMCallback()])
    same(state(module.net), train_protected() if way == "closure" else train())


def test_the_callback_refuses_a_manual_step_without_first_step():
    with pytest.raises(RuntimeError, match="SAM takes two gradients a step"):
        fit(Manual("forgotten"), callbacks=[ours().SAMCallback()])


@pytest.mark.parametrize("way", ["step", "closure"])
def test_manual_optimization_in_float16(way):
    plugin = ours().SAMMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    module, trainer = fit(Manual(way), plugins=[plugin])
    same(state(module.net), train(), rtol=0.02, atol=5e-3)
    assert trainer.global_step == STEPS


# Fabric


@pytest.mark.parametrize("way", ["closure", "first_step", "SAMStep"])
def test_fabric(way):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    raw = optimizer_of(model)
    model, optimizer = fabric.setup(model, raw)
    before = set(vars(optimizer))
    assert fastsam.unwrap(optimizer) is raw
    step = fastsam.SAMStep(model, optimizer, LOSS)
    for x, y in fabric.setup_dataloaders(loader()):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            fabric.backward(loss)
            return loss

        if way == "closure":
            optimizer.step(closure)
        elif way == "first_step":
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.step()
        else:
            step(x, y)
    same(state(model.module), train())
    assert set(vars(optimizer)) == before and "grad_scale" not in vars(raw)


@pytest.mark.parametrize("name", ["lightning_auto.py", "lightning_manual.py"])
def test_examples(name):
    path = Path(__file__).parents[2] / "examples" / name
    assert 0 < runpy.run_path(str(path))["main"]() < math.log(3)
