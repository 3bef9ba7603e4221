"""Imports go down: every module stands on a floor, and imports only what is listed before it.

The floors are those of CONTRIBUTING.md. Imports within functions and for type checkers count like others.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastsam

ROOT = Path(fastsam.__file__).parent
FLOORS = {  # from the bottom; what is listed first on a floor may be imported by what follows
    "bases": ("lion", "rules", "fallback"),
    "ops": (
        *(
            "formats",
            "local",
            "tables",
            "numbers",
            "reference_rules",
            "reference",
            "native",
            "graphs",
            "triton_rules",
            "triton_kernels",
            "triton_tables",
            "triton",
        ),
        "",  # the package's own file: names and choice of the backends
    ),
    "memory": (
        *("placements", "ranks", "segments", "shared", "pages", "placing", "gradients", "vectors", "state", "writes"),
        *("flat", "bucket", "grouping", "buckets", "directions", "averages", "checkpoint"),
    ),
    "": (
        *(
            "batches",
            "generators",
            "step_graphs",
            "radius",
            "schedules",
            "when",
            "checks",
            "closures",
            "scaling",
            "stats",
            "progress",
            "saving",
            "algebra",
            "steering",
            "averaging",
            "passes",
            "step_order",
        ),
        *("optimizer", "training"),
    ),
    "methods": (
        *("checks", "esam", "friendly", "gsam", "looksam", "msam", "preconditioned", "sparse", "vasso", "wsam"),
        "",  # the package's own file: all of them
    ),
    "losses": ("trajectory", "saf", "mesa", ""),
    "top": ("joint_checks", "joint_state", "joint", "wrappers", "sam_step", "registry"),
    "integrations": (
        "",  # the package's own file: what its modules share
        *("lightning_parts", "lightning", "pytorch_lightning", "transformers", "accelerate", "timm"),
    ),
    "analysis": (
        *("extras", "objective", "results", "measures", "hessian", "landscapes", "plots"),
        "",  # the package's own file: what is public
    ),
    "commands": ("diagnosis", "demo_training", "demo_results", "demo", "methods"),
}
TOP = ("", "top")  # what lies in the package itself: below the methods, and above
ORDER = [f"{'' if wing in TOP else wing}.{name}".strip(".") for wing, names in FLOORS.items() for name in names] + [
    "__main__"
]
EMPTY = ("", "bases", "memory", "commands")  # these packages' own files only say what is in them, or name it again


def modules():
    """Each module's name within the package, and its file."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).replace("__init__", "").strip("."): path
        for path in ROOT.rglob("*.py")
    }


def imported(path, known):
    """The modules of the package that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {
                member if member.removeprefix("fastsam.") in known else node.module
                for member in (f"{node.module}.{alias.name}" for alias in node.names)
            }
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name.removeprefix("fastsam.") for name in names} & known


def test_every_module_stands_on_a_floor():
    assert sorted(ORDER) == sorted(set(modules()) - set(EMPTY))


def test_imports_go_down():
    known = set(modules())
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name not in EMPTY
        for other in imported(path, known) - {""}
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not upward


def test_an_upward_import_is_seen(tmp_path):
    file = tmp_path / "lion.py"
    file.write_text("def f():\n    from fastsam.memory import buckets\n    from fastsam.memory.bucket import Bucket\n")
    assert imported(file, set(modules())) == {"memory.buckets", "memory.bucket"}


FRAMEWORKS = ("accelerate", "lightning", "peft", "pytorch_lightning", "timm", "transformers")


def test_frameworks_are_imported_on_demand():
    code = (
        f"import fastsam, sys; print([name for name in {(*FRAMEWORKS, 'fastsam.integrations')} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning", "timm", "transformers"])
def test_a_framework_that_is_missing_is_named_with_the_extra(name, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"fastsam.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name}.* must be importable.*pip install 'fastsam\[integrations\]'"):
        importlib.import_module(f"fastsam.integrations.{name}")
