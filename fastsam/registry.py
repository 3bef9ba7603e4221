"""Optimizers by name: `fastsam.create("gsam", "adamw", model, lr=...)`, with the groups that weight decay needs.

`METHODS` is the one place where a method has its name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam import methods, radius
from fastsam.bases.rules import NAMES
from fastsam.checks import REFUSED, check_name, did_you_mean, taken_apart
from fastsam.optimizer import FusedSAM
from fastsam.passes import OWN_KEYS
from fastsam.training import NORM_LAYERS, asam_groups, norm_layers_only

Groups = list[dict[str, Any]]


class Named(NamedTuple):
    """What a name stands for.

    Attributes:
        cls: the class.
        options: of it, which the name decides.
        groups: makes groups of a model; what it takes of the options it may complete there.
    """

    cls: type[FusedSAM]
    options: Mapping[str, Any] = MappingProxyType({})
    groups: Callable[[nn.Module, dict[str, Any]], Groups] | None = None


def _asam(model: nn.Module, options: dict[str, Any]) -> Groups:
    options.setdefault("rho", 0.5)
    options.setdefault("eta", 0.01)
    return asam_groups(model, rho=options["rho"], eta=options["eta"])


def _sam_on(model: nn.Module, options: dict[str, Any]) -> Groups:
    return norm_layers_only(model)


METHODS: Mapping[str, Named] = MappingProxyType(
    {
        "sam": Named(FusedSAM),
        "asam": Named(FusedSAM, MappingProxyType({"adaptive": True}), _asam),
        "gsam": Named(methods.GSAM),
        "wsam": Named(methods.WSAM),
        "looksam": Named(methods.LookSAM),
        "looklayersam": Named(methods.LookSAM, MappingProxyType({"layerwise": True})),
        "friendlysam": Named(methods.FriendlySAM),
        "vasso": Named(methods.VaSSO),
        "msam": Named(methods.MSAM),
        "esam": Named(methods.ESAM),
        "sparsesam": Named(methods.SparseSAM),
        "stablesam": Named(FusedSAM, MappingProxyType({"renormalize": True})),
        "samon": Named(FusedSAM, MappingProxyType({"perturb": True}), _sam_on),
        "unnormalizedsam": Named(FusedSAM, MappingProxyType({"radius": radius.unnormalized()})),
        "preconditionedsam": Named(methods.PreconditionedSAM),
    }
)
ONE_DIMENSIONAL, NORM = "1d", "norm"  # entries of `no_decay` that are no parts of names


def names(of: str = "methods") -> list[str]:
    """The names that `fastsam.create` knows; as `fastsam.list`.

    Args:
        of: "methods" or "base_optimizers".
    """
    if of == "methods":
        return list(METHODS)
    if of == "base_optimizers":
        refused = tuple(REFUSED)
        return sorted(
            name
            for name, cls in NAMES.items()
            if not issubclass(cls, refused) and not set(OWN_KEYS) & set(inspect.signature(cls).parameters)
        )
    raise ValueError(f'fastsam.list: of must be "methods" or "base_optimizers", got {of!r}')


def create(
    method: str,
    base_optimizer: str | type[Optimizer] | functools.partial[Optimizer],
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: Iterable[str] | None = ("bias", "norm"),
    **options: Any,
) -> FusedSAM:
    """Build an optimizer of the SAM family by name, for all parameters of a model.

    Args:
        method: one of `fastsam.list()`, in any case, with or without hyphens ("SAM-ON"). "asam" makes the groups of
            `asam_groups`, "samon" those of `norm_layers_only`.
        base_optimizer: one of `fastsam.list("base_optimizers")`, or a class or functools.partial as for FusedSAM.
        model: frozen parameters are kept, so that they can be thawed later; tied ones count once.
        weight_decay: of the parameters that decay; the base optimizer's default by default.
        no_decay: which parameters do not decay: a part of the name between dots ("bias", "pos_embed") or several
            ("head.weight"); "norm" for those of normalisation layers, which are torch's and all whose class has "norm"
            in its name; "1d" for those of less than two dimensions. Empty or None: all parameters decay.
        **options: of the method, of FusedSAM and of the base optimizer (rho, alpha, lr, momentum, when, ...).

    Returns:
        The optimizer. It has a group for each combination of what differs: one where nothing decays.

    Raises:
        ValueError: a name or an option that nobody knows; the message lists what is known.

    Example:
        >>> optimizer = fastsam.create("gsam", "adamw", model, lr=1e-3, weight_decay=0.1, rho=0.05, alpha=0.4)
    """
    name = _method_name(method)
    cls, decided, make_groups = METHODS[name]
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"fastsam.create: model must be a torch.nn.Module, got {type(model).__name__}; parameters alone do not "
            f"say which are those of norm layers. Give the model, frozen parameters included, or build "
            f"{cls.__name__}(params, ...) itself"
        )
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    base, keywords = _base_of(base_optimizer)
    _check_options(name, base, options)
    groups = [{"params": list(model.parameters())}] if make_groups is None else make_groups(model, options)
    if _decay_of(base, {**keywords, **options}):
        groups = _split(groups, _kept_from_decay(model, no_decay or ()))
    return cls(groups, base_optimizer, **{**options, **decided})


def _method_name(method: str) -> str:
    name = method.lower().translate(str.maketrans("", "", "-_ ")) if isinstance(method, str) else ""
    if name in METHODS:
        return name
    raise ValueError(
        f"fastsam.create: there is no method {method!r}; known are {', '.join(METHODS)}{did_you_mean([name], METHODS)}"
    )


def _base_of(base: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """The base optimizer's class, and the keywords of a partial."""
    keywords: dict[str, Any] = {}
    if isinstance(base, functools.partial):
        base, keywords = taken_apart(base, {})
    if isinstance(base, str):
        base = check_name(base)
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise ValueError(
            "fastsam.create: base_optimizer must be a name (fastsam.list('base_optimizers')), a torch.optim class or a "
            f"partial of one, got {base!r}; an instance has its groups already: give it to FusedSAM"
        )
    return base, keywords


def _keywords(cls: type) -> list[str]:
    """Names of a constructor's arguments, but the parameters and the base optimizer."""
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    arguments = inspect.signature(cls).parameters.items()
    return [key for key, value in arguments if value.kind not in kinds and key not in ("params", "base_optimizer")]


def _check_options(name: str, base: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse options that nobody knows, and those that the method's name decides."""
    cls, decided, _ = METHODS[name]
    taken = [key for key in decided if key in options]
    if taken:
        raise ValueError(f"fastsam.create: {name} decides {', '.join(taken)} itself; leave it out of the options")
    takes_any = any(
        value.kind is inspect.Parameter.VAR_KEYWORD for value in inspect.signature(base).parameters.values()
    )
    known = {owner.__name__: _keywords(owner) for owner in (cls, FusedSAM, base)}
    unknown = [key for key in options if not any(key in keys for keys in known.values())]
    if unknown and not takes_any:
        listed = "; ".join(f"{owner} has {', '.join(keys)}" for owner, keys in known.items())
        every = [key for keys in known.values() for key in keys]
        raise ValueError(
            f"fastsam.create: there is no option {', '.join(map(repr, unknown))}: {listed}"
            f"{did_you_mean(unknown, every)}"
        )


def _decay_of(base: type[Optimizer], options: Mapping[str, Any]) -> Any:
    """The weight decay of groups that say nothing of it; 0 where the base optimizer has none."""
    argument = inspect.signature(base).parameters.get("weight_decay")
    default = 0.0 if argument is None or argument.default is inspect.Parameter.empty else argument.default
    return options.get("weight_decay", default)


def _kept_from_decay(model: nn.Module, no_decay: Iterable[str]) -> set[Tensor]:
    """The parameters that `no_decay` names."""
    if isinstance(no_decay, str):
        raise ValueError(f"fastsam.create: no_decay must be several names, got {no_decay!r}; write ({no_decay!r},)")
    named = dict(model.named_parameters(remove_duplicate=False))
    kept: set[Tensor] = set()
    for entry in no_decay:
        if entry == NORM:
            kept |= {p for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
        elif entry == ONE_DIMENSIONAL:
            kept |= {param for param in named.values() if param.dim() < 2}
        else:
            found = {param for name, param in named.items() if f".{entry}." in f".{name}."}
            if not found and entry != "bias":
                parts = sorted({part for name in named for part in name.split(".") if not part.isdecimal()})
                raise ValueError(
                    f"fastsam.create: no_decay must name parameters, but none has the part {entry!r}; their names' "
                    f'parts are {", ".join(parts)}, and there are "{NORM}" and "{ONE_DIMENSIONAL}"'
                    f"{did_you_mean([str(entry)], [*parts, NORM, ONE_DIMENSIONAL])}"
                )
            kept |= found
    return kept


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORM_LAYERS) or "norm" in type(module).__name__.lower()


def _split(groups: Groups, kept: set[Tensor]) -> Groups:
    """Each group as two, the second without weight decay; one without parameters is left out."""
    halves = []
    for group in groups:
        halves.append({**group, "params": [param for param in group["params"] if param not in kept]})
        halves.append({**group, "params": [param for param in group["params"] if param in kept], "weight_decay": 0.0})
    return [group for group in halves if group["params"]]
