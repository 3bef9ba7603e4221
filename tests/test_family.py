"""What the table of methods says is true: passes, memory and what is saved are measured; the documentation has it."""

import gc
import inspect
import re
import textwrap
import types
from pathlib import Path

import methods_by_hand as by_hand
import pytest
import torch
from torch import nn

import fastsam
from fastsam import asam_groups, methods, norm_layers_only, training, when
from fastsam.__main__ import main
from fastsam.commands import methods as command

ROOT = Path(fastsam.__file__).parents[1]
STEPS = 10  # two rounds of k = 5
IDS = [method.name for method in command.FAMILY]
SHORT = [  # as they are, but SAM begins within the steps that are taken here
    method._replace(options={"when": when.after(4)}) if method.passes == "1, then 2" else method
    for method in command.FAMILY
]
TOLD = {"1": "One pass a step", "2": "Two passes a step", "1 + 1/k": "1 + 1/k passes a step"}
COPIES = {1: "one copy", 2: "two", 3: "three", 1.25: "a quarter of a copy of the weights"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 300), nn.LayerNorm(300), nn.ReLU(), nn.Linear(300, 200))


def built(method, model, cls=None, **options):
    """The optimizer as its row says, or another with the same parameters and base optimizer."""
    groups = {"params": lambda: model.parameters(), "asam_groups(model)": lambda: asam_groups(model)}
    groups["norm_layers_only(model)"] = lambda: norm_layers_only(model)
    momentum = {"momentum": 0.9} if method.base == "sgd" else {}
    options = options if cls else dict(method.options)
    return (cls or method.cls)(groups[method.params](), method.base, lr=0.01, **momentum, **options)


def trained(model, optimizer, steps=STEPS):
    """Passes of each step."""
    generator = torch.Generator().manual_seed(1)
    passes = []
    for step in range(steps):
        x = torch.randn(8, 200, generator=generator) * (1 + step % 3)
        passes.append(0)

        def closure(x=x):
            passes[-1] += 1
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    return passes


@pytest.mark.parametrize("method", SHORT, ids=IDS)
def test_passes_are_those_that_are_told(method):
    model = network()
    passes = trained(model, built(method, model))
    options = {**method.options, **getattr(method.options.get("when"), "parameters", {})}
    if method.passes == "1 to 2":
        assert set(passes) == {1, 2}
    elif method.passes == "1, then 2":
        assert passes == [1] * 4 + [2] * (STEPS - 4)
    elif method.passes == "1 + p":
        decided = [options["when"].decide(step) for step in range(2000)]
        assert passes == [1 + decision for decision in decided[:STEPS]]
        assert abs(sum(decided) / 2000 - options["p"]) < 0.03
    else:
        assert sum(passes) == pytest.approx(STEPS * eval(method.passes, {}, options))


def held_bytes(*roots):
    """Bytes of all tensors that can be reached from objects, memory that several share counted once."""
    seen, todo, spans = set(), list(roots), []
    skipped = (type, types.ModuleType, types.FunctionType, types.FrameType, types.BuiltinFunctionType)
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, skipped):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        else:
            todo += gc.get_referents(found)
    total, end = 0, 0
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0)
        end = max(end, last)
    return total


@pytest.mark.parametrize("method", SHORT, ids=IDS)
def test_memory_is_what_is_told(method):
    held = []
    for cls in (None, fastsam.FusedSAM):
        model = network()
        optimizer = built(method, model, cls)
        trained(model, optimizer)
        optimizer.zero_grad()
        held.append(held_bytes(optimizer))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert (held[0] - held[1]) / weights == pytest.approx(method.memory, abs=0.02)


def test_what_is_held_is_seen():
    """SAM: weights, momentum and backup; in SAM-ON the backup is that of the normalisation layer."""
    copies = {}
    for name in ("SAM", "SAM-ON"):
        model = network()
        optimizer = built(command.FAMILY[IDS.index(name)], model)
        trained(model, optimizer)
        optimizer.zero_grad()
        copies[name] = held_bytes(optimizer) / 4 / sum(p.numel() for p in model.parameters())
    assert copies["SAM"] == pytest.approx(3, abs=0.05) and copies["SAM-ON"] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("method", command.FAMILY, ids=IDS)
def test_what_is_saved_is_what_is_told(method):
    saved = []
    for cls in (None, fastsam.FusedSAM):
        model = network()
        optimizer = built(method, model, cls)
        trained(model, optimizer)
        if isinstance(optimizer, methods.MSAM):
            optimizer.eval()
        state = optimizer.state_dict()
        saved.append({*state["state"][0], *state["state"][2], *state["param_groups"][0]})
    assert saved[0] - saved[1] == set(method.saved) and saved[1] <= saved[0]


def test_every_class_is_there():
    classes = {c for _, c in inspect.getmembers(methods, inspect.isclass) if issubclass(c, fastsam.FusedSAM)}
    assert classes == {method.cls for method in command.FAMILY} - {fastsam.FusedSAM}
    rules = {"always", "never", "between"}  # the first two are no methods, the third is told as after()
    public = {name for name, f in inspect.getmembers(when, inspect.isfunction) if not name.startswith(("_", "as_"))}
    told = " ".join(method.written for method in command.FAMILY)
    assert public - rules == set(re.findall(r"when\.(\w+)\(", told))
    radii = inspect.getmembers(fastsam.radius, inspect.isfunction)
    assert {name for name, _ in radii} == set(re.findall(r"radius\.(\w+)\(", told))


@pytest.mark.parametrize("method", command.FAMILY, ids=IDS)
def test_what_is_written_can_be_run(method):
    model = network()
    names = {**vars(fastsam), "model": model, "params": model.parameters()}
    text = method.written[:-1] + ", lr=0.01, momentum=0.9)" if method.base == "sgd" else method.written
    optimizer = eval(text, names)
    assert type(optimizer) is method.cls
    for name, value in method.options.items():
        assert getattr(optimizer, name) == value or repr(getattr(optimizer, name)) == repr(value)


@pytest.mark.parametrize("method", command.FAMILY, ids=IDS)
def test_docstrings_tell_the_same(method):
    """Papers, passes and memory of a class; of an option, the paper."""
    if method.cls is fastsam.FusedSAM:
        modules = {"radius": fastsam.radius, "when": when, "params": training}
        option = next(iter(method.options), "params" if "norm" in method.params else "")
        text = inspect.getsource(modules.get(option, fastsam.optimizer))
    else:
        text = method.cls.__doc__
        assert TOLD[method.passes] in text and COPIES[method.memory] in text
    assert all(paper in text for paper in method.papers)


def test_msam_trains_on_after_a_checkpoint_that_was_refused():
    models = [network(), network()]
    optimizers = [methods.MSAM(m.parameters(), "adamw", rho=0.3, lr=0.05) for m in models]
    for t in range(3):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if t == 2 and i == 0:
                with pytest.raises(ValueError, match="parameter group"):
                    optimizer.load_state_dict(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict())
            for p in model.parameters():
                p.grad = (0.3 * p + (t + 1) / p.numel()).detach()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options", [dict(radius=fastsam.radius.unnormalized()), dict(renormalize=True), dict(when=when.by_grad_norm())]
)
def test_msam_refuses_what_goes_by_a_first_pass(options):
    with pytest.raises(ValueError, match="MSAM does not have"):
        methods.MSAM(network().parameters(), "sgd", lr=0.1, momentum=0.9, **options)


def documented(page):
    path = ROOT / "docs" / "methods" / page
    if not path.is_file():
        pytest.skip("the tests are not run from a source tree")
    return path.read_text()


def test_the_documentation_has_the_table():
    expected = f"<!-- methods -->\n{command.markdown()}\n<!-- /methods -->"
    assert expected in documented("index.md"), "`python benchmarks/pages.py` puts it there"


def test_the_command_prints_it(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(method.name in out and method.written in out for method in command.FAMILY)
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == command.markdown() + "\n"


@pytest.mark.parametrize(
    "rule",
    ["always()", "never()", "every(k=5)", "after(3)", "between(2, 7)", "randomly(p=0.2, seed=3)"],
)
def test_a_rule_shows_how_it_was_asked_for(rule):
    assert repr(eval(rule, vars(when))) == rule


# --- a method of one's own -------------------------------------------------------------------------------------------


class HalfByHand(by_hand.ByHand):
    def descent(self, g2):
        return by_hand.add((0.5, g2), (0.5, self.g1))


def example_in_the_docstring():
    return textwrap.dedent(methods.__doc__[methods.__doc__.index("    class Half") :])


def example_in_the_documentation():
    (example,) = re.findall(r"```python\n(class Half.*?)```", documented("own.md"), re.DOTALL)
    return example


@pytest.mark.parametrize("example", [example_in_the_docstring, example_in_the_documentation])
@pytest.mark.parametrize("base", ["sgd", "adamw", "adamax"])  # the last steps by itself
def test_the_example_of_an_own_method_does_what_it_says(example, base):
    names = {"FusedSAM": fastsam.FusedSAM}
    exec(example(), names)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}
    options = {"lr": 0.03, "weight_decay": 0.01} | ({"momentum": 0.9} if base == "sgd" else {"eps": 1e-4})
    models = [network().double() for _ in range(2)]
    optimizer = names["Half"](models[0].parameters(), kinds[base], rho=0.3, **options)
    hand = HalfByHand([{"params": list(models[1].parameters())}], kinds[base], 0.3, foreach=False, **options)

    def gradients(model, x):
        loss = (model(x) - x).square().mean()
        return dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True))

    for step in range(5):
        x = torch.randn(8, 200, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

        def closure(x=x):
            for p, g in gradients(models[0], x).items():
                p.grad = g

        optimizer.step(closure)
        hand.step(torch.enable_grad()(lambda k, x=x: gradients(models[1], x)))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
