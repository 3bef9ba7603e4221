"""SAMStep: a whole training step in one call, with all that is easily wrong in one written by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastsam.algebra import Algebra
from fastsam.batches import Batch, count_samples, first_samples, mean_loss, samples_at, split
from fastsam.generators import Generators, GraphGenerator
from fastsam.joint import Joint
from fastsam.methods.looksam import LookSAM
from fastsam.methods.msam import MSAM
from fastsam.optimizer import FusedSAM
from fastsam.step_graphs import WARM_UP, CapturedStep, index_of, warm_up
from fastsam.training import freeze_running_stats
from fastsam.wrappers import innermost


class SAMStep:
    """Forward and backward passes, perturbation and update of one step: `loss = step(inputs, targets)`.

    In the second pass running statistics of normalisation layers are left alone and dropout draws the same masks, so
    that each batch counts once and both gradients are of one function. Afterwards the random generators are where one
    pass would have left them. If anything raises, the weights come back.

    Args:
        model: the module; inside DistributedDataParallel, if it is.
        optimizer: a FusedSAM or one of `fastsam.methods`, with `when`, clipping and all; or several under one norm,
            `fastsam.joint(...)`; or what a framework wrapped it in (`fastsam.unwrap`).
        loss_fn: `loss_fn(model(*inputs), targets)` for a call `step(*inputs, targets)`: the mean over the samples, or
            the loss of each, [batch], of which the mean is taken.
        forward_backward: instead of `loss_fn`, for several losses, several models or what else a batch needs:
            `forward_backward(backward, *batch)` calls `backward(loss)` in place of `loss.backward()`, as often as it
            likes, and returns what the step is to return.
        scaler: a GradScaler; it is called in the order that it wants, once a step.
        autocast: a dtype for `torch.autocast` around the forward passes, or None.
        micro_batches: in how many parts each batch is run, for want of memory. Parts are along the first dimension of
            every tensor of the batch and count by their samples.
        sharpness: what the perturbation is made for: "batch" (one perturbation from the gradient of all micro-batches,
            which are then run again) or "micro" (m-SAM: each micro-batch its own, and the step with the mean of the
            second gradients; arXiv 2010.01412, section 4.1). Smaller parts generalise better there.
        perturb: under DistributedDataParallel "global" (the first gradients are averaged over the ranks, as on one
            large GPU) or "local" (m-SAM: each rank perturbs by its own part, without communication in the first pass).
        ascent_fraction: the share of the batch, its first samples, that the first pass sees; in (0, 1].
        select: the share of the samples in the second pass, in (0, 1]: those whose loss the perturbation raises most
            (ESAM, arXiv 2110.03141), of those that the first pass saw; found by a third forward pass. Needs the loss of
            each sample.
        same_rng: whether the second pass draws the random numbers of the first, as the paper's code does.
        functional: Functional-SAM (arXiv 2502.02407): the second backward pass begins with the first pass's gradient
            of the loss with respect to the model's output.
        second_order: the exact gradient of the loss at w + e(w) with respect to w, by double backward (arXiv
            2010.01412, eq. 3 and appendix C.4), of which SAM leaves a term out: an experiment for small models, which
            keeps the graphs of both passes and of the first's gradient. For plain SAM, on one process.
        capture: run each step as one CUDA graph: the first three calls are ordinary steps, the next ones are captured
            (one graph for steps of two passes, one for those of one pass) and from then on replayed, with today's lr
            and rho. Batches must keep their shapes; other numbers are as they were captured. Each replay draws new
            random numbers on the GPU, with `same_rng` the same ones in all its passes. Not with a GradScaler,
            DistributedDataParallel, second_order, nor methods that draw on the host or have a term beside the base
            optimizer's step (ESAM, decoupled WSAM); nor, with `same_rng`, dropout between the layers of nn.LSTM and
            its like, which cuDNN draws from a state of its own.

    Raises:
        ValueError: options that contradict each other, or what the optimizer, the model or `capture` cannot do; the
            message says which and what to use instead.

    Example:
        >>> step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
        >>> for inputs, targets in loader:
        ...     loss = step(inputs, targets)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        forward_backward: Callable[..., Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        micro_batches: int = 1,
        sharpness: str = "batch",
        perturb: str = "global",
        ascent_fraction: float = 1.0,
        select: float = 1.0,
        same_rng: bool = True,
        functional: bool = False,
        second_order: bool = False,
        capture: bool = False,
    ) -> None:
        """See the class."""
        self.model: Any = model  # or a wrapper of one
        sam: FusedSAM | Joint = innermost(optimizer)
        self.optimizer, self.loss_fn, self.forward_backward = sam, loss_fn, forward_backward
        self._parts = sam.optimizers if isinstance(sam, Joint) else (sam,)
        self.scaler, self.autocast, self.micro_batches = scaler, autocast, micro_batches
        self.sharpness, self.perturb, self.same_rng = sharpness, perturb, same_rng
        self.ascent_fraction, self.select = ascent_fraction, select
        self.functional, self.second_order = functional, second_order
        self.capture = capture
        self._check()
        self._first_call, self._calls = True, 0
        self._graphs: dict[bool, CapturedStep] = {}  # by whether the step has two passes
        self._in_graph: GraphGenerator | None = None  # while one is captured

    def _check(self) -> None:
        if not isinstance(self.optimizer, (FusedSAM, Joint)):
            raise ValueError(
                f"SAMStep: optimizer must be a FusedSAM or a fastsam.joint of several, got "
                f"{type(self.optimizer).__name__}"
            )
        if (self.loss_fn is None) == (self.forward_backward is None):
            raise ValueError("SAMStep: give either loss_fn or forward_backward")
        if not isinstance(self.micro_batches, int) or self.micro_batches < 1:
            raise ValueError(f"SAMStep: micro_batches must be an integer >= 1, got {self.micro_batches!r}")
        for name, value, known in (
            ("sharpness", self.sharpness, ("batch", "micro")),
            ("perturb", self.perturb, ("global", "local")),
        ):
            if value not in known:
                raise ValueError(f"SAMStep: {name} must be one of {known}, got {value!r}")
        for name, share in (("ascent_fraction", self.ascent_fraction), ("select", self.select)):
            if not 0 < share <= 1:
                raise ValueError(f"SAMStep: {name} must be in (0, 1], got {share!r}")
        if self.perturb == "local" and hasattr(self.model, "set_requires_gradient_sync"):
            raise ValueError(
                "SAMStep: perturb='local' is not possible under FSDP2 (fully_shard): no rank has whole weights, and "
                "set_requires_gradient_sync(False) leaves p.grad None; use perturb='global', or DistributedDataParallel"
            )
        if self.perturb == "local" and not hasattr(self.model, "no_sync"):
            raise ValueError(
                "SAMStep: perturb='local' is for a model inside DistributedDataParallel; others have one part"
            )
        for name, asked in (
            ("select", self.select < 1),
            ("functional", self.functional),
            ("second_order", self.second_order),
        ):
            if asked and self.loss_fn is None:
                raise ValueError(f"SAMStep: {name} needs loss_fn: what forward_backward does is its own")
        if self.functional and self.select < 1:
            raise ValueError("SAMStep: functional and select exclude each other: the samples of the passes differ")
        if self.functional and self.ascent_fraction < 1:
            raise ValueError("SAMStep: functional needs ascent_fraction=1: the samples of the passes must be the same")
        if isinstance(self.optimizer, MSAM) and (
            self.select < 1 or self.ascent_fraction < 1 or self.functional or self.micro
        ):
            raise ValueError(
                "SAMStep: a step of MSAM has one pass, to which select, ascent_fraction, functional and "
                "sharpness='micro' mean nothing"
            )
        if self.micro and any(isinstance(part, LookSAM) for part in self._parts):
            raise ValueError(
                "SAMStep: LookSAM keeps one direction a step, which sharpness='micro' has several of; use 'batch'"
            )
        if self.micro and any(map(_adds_a_term, self._parts)):
            name = next(type(part).__name__ for part in self._parts if _adds_a_term(part))
            raise ValueError(
                f"SAMStep: {name} has a term beside the base optimizer's step, of which sharpness='micro' would need "
                "the mean; use sharpness='batch', or WSAM's decoupled=False"
            )
        if self.second_order:
            self._check_second_order()
        if self.capture:
            self._check_capture()

    def _check_capture(self) -> None:
        devices = list(dict.fromkeys(_devices_of(self.optimizer)))
        shared = self.micro and (self.select < 1 or self.ascent_fraction < 1)
        reasons = {
            "a GradScaler": self.scaler is not None,
            "DistributedDataParallel": hasattr(self.model, "no_sync"),
            "second_order=True": self.second_order,
            "same_rng=True and dropout between recurrent layers, which cuDNN draws from a state of its own": (
                self.same_rng and any(map(_drops_in_cudnn, self.model.modules()))
            ),
            "same_rng=True and sharpness='micro' with select or ascent_fraction below 1, whose passes over a part draw "
            "different amounts of numbers": self.same_rng and shared,
            f"parameters on {' and '.join(map(str, devices))}; they must be on one GPU": (
                len(devices) != 1 or devices[0].type != "cuda"
            ),
        }
        for part in self._parts:
            name = type(part).__name__
            measures = part.when is not None and part.when.measures
            reasons[f"when={part.when}, which measures on the host"] = measures
            reasons[f"{name}, which draws on the host"] = not part.capturable
            reasons[f"{name}'s term beside the base optimizer's step"] = _adds_a_term(part)
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            raise ValueError(f"SAMStep: capture=True cannot be with {', nor with '.join(found)}")

    @property
    def micro(self) -> bool:
        """Whether each micro-batch has a perturbation of its own."""
        return self.sharpness == "micro" and self.micro_batches > 1

    def __call__(self, *batch: Any) -> Any:
        """Take a step.

        Args:
            *batch: what the model takes, and last the targets; for `forward_backward` what it takes.

        Returns:
            The mean loss at w over what the first pass saw, detached; or what `forward_backward` returned, in the last
            part where there are several.
        """
        return self._replay(batch) if self.capture else self._run(batch)

    def _run(self, batch: Batch) -> Any:
        parts, optimizer = split(batch, self.micro_batches), self.optimizer
        optimizer.zero_grad()
        try:
            if isinstance(optimizer, MSAM):
                loss = self._pass(parts, synchronised=True)
            elif not optimizer.begin_step():
                loss = self._pass(parts, synchronised=True)
            elif self.second_order:
                loss = self._second_order_pass(parts)
            elif self.micro:
                loss = self._micro_passes(parts)
            else:
                loss = self._two_passes(parts)
            self._finish()
        except BaseException:
            if not isinstance(optimizer, MSAM):
                optimizer.restore()
            raise
        self._first_call = False
        return loss

    def _finish(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    # The passes.

    def _two_passes(self, parts: Sequence[Batch]) -> Any:
        """Both passes over all parts, with one perturbation between them."""
        ascent = [first_samples(part, self.ascent_fraction) for part in parts]
        rng = self._generators(parts)
        kept: list[Tensor] = []
        loss = self._pass(ascent, synchronised=self._synchronised(), keep=kept)
        rng.rewind()
        self.optimizer.first_step(scaler=self.scaler)
        self._clear_first_gradients()
        with freeze_running_stats(self.model):
            if self.select < 1:
                parts = self._selected(parts, kept)
                rng.rewind()
            again = self._pass(parts, synchronised=True, outputs_from=kept if self.functional else None)
        rng.forward()
        if self.select == self.ascent_fraction == 1 and not self.capture:  # both of the same samples
            for optimizer in self._parts:
                optimizer._sam.losses = loss, again
        return loss

    def _synchronised(self) -> bool:
        """Whether ranks average the first pass's gradients."""
        return self.perturb == "global" or self._learns_graph()

    def _learns_graph(self) -> bool:
        """Whether DistributedDataParallel learns the order of a static graph, which wants communication each time."""
        return self._first_call and bool(getattr(self.model, "static_graph", False))

    def _clear_first_gradients(self) -> None:
        """Clear what the first pass left.

        Where that did not communicate, DistributedDataParallel takes parameters that it used for used in the second
        pass, too, and fails if one of these has no gradient then; so they get zeros.
        """
        looks = bool(getattr(self.model, "find_unused_parameters", False))
        self.optimizer.zero_grad(set_to_none=self._synchronised() or not looks)

    def _micro_passes(self, parts: Sequence[Batch]) -> Any:
        """Both passes over each part, with a perturbation for each; the mean of what the base is to step with."""
        optimizer, total = self.optimizer, sum(map(count_samples, parts))
        mean: dict[Tensor, Tensor] = {}
        losses = []
        for part in parts:
            optimizer.zero_grad()
            kept: list[Tensor] = []
            rng = self._generators([part])
            losses.append(self._pass([first_samples(part, self.ascent_fraction)], self._synchronised(), kept))
            rng.rewind()
            optimizer._climb_again(self.scaler)
            self._clear_first_gradients()
            chosen = part
            with freeze_running_stats(self.model):
                if self.select < 1:
                    (chosen,) = self._selected([part], kept)
                    rng.rewind()
                self._pass([chosen], synchronised=True, outputs_from=kept if self.functional else None)
            rng.forward()
            share = count_samples(part) / total
            for param, direction in optimizer._take_direction():
                wide = direction.to(torch.promote_types(direction.dtype, torch.float32))
                mean[param] = mean[param].add_(wide, alpha=share) if param in mean else wide * share
        optimizer.zero_grad()
        for param, direction in mean.items():
            param.grad = direction.to(param.dtype)
        optimizer._step_with_gradients()
        return mean_loss(losses, parts)

    def _pass(
        self,
        parts: Sequence[Batch],
        synchronised: bool,
        keep: list[Tensor] | None = None,
        outputs_from: Sequence[Tensor] | None = None,
    ) -> Any:
        """Forward and backward of all parts, whose gradients add up to that of the mean over all samples.

        Args:
            parts: the micro-batches.
            synchronised: whether ranks average the gradients.
            keep: gets what a later pass needs of this one: each part's losses, or the gradients of its output.
            outputs_from: the gradients of the outputs to begin the backward passes with.
        """
        sizes = [1] if len(parts) == 1 else [count_samples(part) for part in parts]
        total = sum(sizes)
        losses: list[Any] = []
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with self._communicating((synchronised and last) or self._learns_graph()):
                weight = sizes[i] / total
                if self.forward_backward is not None:
                    losses.append(self.forward_backward(self._backward_of(weight), *part))
                    continue
                with self._autocast():
                    outputs = self.model(*part[:-1])
                    values = self._loss(outputs, part[-1])
                    loss = values.mean() if values.dim() > 0 else values
                losses.append(loss.detach())
                if outputs_from is not None:
                    torch.autograd.backward(outputs, outputs_from[i])
                    continue
                if keep is not None and self.functional:
                    if not isinstance(outputs, Tensor):
                        raise ValueError(
                            "SAMStep: functional needs a model whose output is one tensor, got "
                            f"{type(outputs).__name__}; wrap it in a module that returns what the loss is made of"
                        )
                    scaled = self._scaled(loss * weight)
                    (gradient,) = torch.autograd.grad(scaled, outputs, retain_graph=True)
                    keep.append(gradient)
                    torch.autograd.backward(outputs, gradient)
                    continue
                if keep is not None and self.select < 1:
                    keep.append(values.detach())
                torch.autograd.backward(self._scaled(loss * weight if weight != 1 else loss))
        return mean_loss(losses, parts)

    def _generators(self, parts: Sequence[Batch]) -> Generators:
        """What brings the random numbers of the first pass back, for the later passes over these parts."""
        if not self.same_rng or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return Generators(self.same_rng, ())
        devices = {leaf.device for leaf in tree_flatten(list(parts))[0] if isinstance(leaf, Tensor)}
        devices.add(next(_devices_of(self.optimizer), torch.device("cpu")))  # the batch may be moved by the model
        return Generators(self.same_rng, {index_of(d) for d in devices if d.type == "cuda"}, self._in_graph)

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        assert self.loss_fn is not None
        values = self.loss_fn(outputs, targets)
        if self.select < 1 and values.dim() != 1:
            raise ValueError(
                "SAMStep: select needs a loss_fn that gives the loss of each sample, [batch] (reduction='none'), got "
                f"shape {list(values.shape)}"
            )
        return values

    def _selected(self, parts: Sequence[Batch], before: Sequence[Tensor]) -> list[Batch]:
        """Of each part the samples whose loss the perturbation raises most."""
        chosen = []
        for whole, losses in zip(parts, before, strict=True):
            part = first_samples(whole, self.ascent_fraction)  # the losses of the others at w are not known
            with torch.no_grad(), self._autocast():
                raised = self._loss(self.model(*part[:-1]), part[-1]) - losses
            count = max(math.ceil(self.select * len(losses)), 1)
            places = raised.topk(count).indices.sort().values
            chosen.append(samples_at(part, places, count_samples(part)))
        return chosen

    def _backward_of(self, weight: float) -> Callable[..., None]:
        def backward(loss: Tensor, **kwargs: Any) -> None:
            torch.autograd.backward(self._scaled(loss * weight if weight != 1 else loss), **kwargs)

        return backward

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        return torch.autocast(device, dtype=self.autocast)

    @contextmanager
    def _communicating(self, synchronised: bool) -> Iterator[None]:
        """Forward and backward within the block; ranks average the gradients at its end, or do not."""
        with ExitStack() as stack:
            if not synchronised and hasattr(self.model, "no_sync"):
                stack.enter_context(self.model.no_sync())
            yield

    # CUDA graphs.

    def _replay(self, batch: Batch) -> Any:
        """A step as a graph, captured when it is first needed; the first ones are ordinary."""
        optimizer, device = self.optimizer, next(_devices_of(self.optimizer))
        self._calls += 1
        if self._calls <= WARM_UP:
            return warm_up(functools.partial(self._run, batch), device)
        two_passes = isinstance(optimizer, MSAM) or optimizer.begin_step()
        captured = self._graphs.get(two_passes)
        if captured is None:
            optimizer.refresh()
            captured = CapturedStep(batch, device, self._passes_again() if two_passes else 0)
            self._in_graph = captured.generator
            try:
                captured.capture(self._run)
            finally:
                self._in_graph = None
            self._graphs[two_passes] = captured
        captured.load(batch)
        optimizer.refresh()
        result = captured.replay()
        optimizer._end_replay()
        return result

    def _passes_again(self) -> int:
        """In how many passes of a step the random numbers of the first one are drawn again."""
        return (2 if self.select < 1 else 1) if self.same_rng and not isinstance(self.optimizer, MSAM) else 0

    # The second-order term.

    def _check_second_order(self) -> None:
        plain = all(
            type(part) is FusedSAM
            and (part.p, part.radius) == (2, None)
            and not (part.renormalize or part.perturb_with_weight_decay)
            for part in self._parts
        )
        adaptive = any(group["adaptive"] for group in self.optimizer.param_groups)
        if not plain or adaptive or self.micro_batches > 1 or self.scaler is not None or self.functional:
            raise ValueError(
                "SAMStep: second_order is for plain SAM with p=2, without adaptive groups, other methods, radius, "
                "renormalize, perturb_with_weight_decay, "
                "micro-batches, GradScaler and functional"
            )
        if self.select < 1 or self.ascent_fraction < 1 or hasattr(self.model, "no_sync"):
            raise ValueError("SAMStep: second_order takes the whole batch on one process")

    def _second_order_pass(self, parts: Sequence[Batch]) -> Tensor:
        """The gradient of L(w + rho g / (|g| + 1e-12)) with respect to w, g = grad L(w) a function of w."""
        (part,) = parts
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        rho_of = {
            id(p): group["rho"] if group["perturb"] else 0.0
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        rng = self._generators(parts)
        with self._autocast():
            loss = self._loss(self.model(*part[:-1]), part[-1]).mean()
        climbing = [p for p in named.values() if rho_of.get(id(p))]
        grads = torch.autograd.grad(loss, climbing, create_graph=True, allow_unused=True) if climbing else ()
        pairs = [(p, g) for p, g in zip(climbing, grads, strict=True) if g is not None]
        rng.rewind()
        squares = torch.stack([g.square().sum() for _, g in pairs] or [torch.zeros(())]).sum()
        n = torch.where(squares > 0, squares, 1.0).sqrt() + 1e-12  # sqrt has no derivative at 0, where e is 0
        moved = {id(p): p + g * (rho_of[id(p)] / n) for p, g in pairs}
        with freeze_running_stats(self.model), self._autocast():
            outputs = torch.func.functional_call(
                self.model, {name: moved.get(id(p), p) for name, p in named.items()}, part[:-1]
            )
            second = self._loss(outputs, part[-1]).mean()
        rng.forward()
        params = list(named.values())
        for p, g in zip(params, torch.autograd.grad(second, params, allow_unused=True), strict=True):
            p.grad = g
        self.optimizer._step_with_gradients()
        return loss.detach()


def _adds_a_term(optimizer: FusedSAM) -> bool:
    """Whether the weights move beside the base optimizer's step, as in decoupled WSAM."""
    return type(optimizer).after_update is not Algebra.after_update and bool(getattr(optimizer, "decoupled", True))


def _devices_of(optimizer: FusedSAM | Joint) -> Iterator[torch.device]:
    """The device of each parameter."""
    return (param.device for group in optimizer.param_groups for param in group["params"])


def _drops_in_cudnn(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1
