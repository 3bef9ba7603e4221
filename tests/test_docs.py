"""The documentation: code blocks run, it builds without a warning, and its figures are those of committed results."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsam
from fastsam import losses, methods

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="the tests are not run from a source tree")


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def run(*command: str, cwd: Path = ROOT, **env: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    return ran.stdout


@needs("pytest_markdown_docs")
def test_every_code_block_runs(tmp_path):
    found = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
    # Its blocks are examples, which the tests in integrations/ run where their frameworks are.
    pages = ["README.md", *(page for page in found if page != "docs/frameworks.md")]
    options = ["-q", "--markdown-docs", "-p", "markdown_names", "-o", f"cache_dir={tmp_path}"]
    options += ["-c", str(ROOT / "pyproject.toml"), *(str(ROOT / page) for page in pages)]
    told = run("-m", "pytest", *options, cwd=tmp_path, PYTHONPATH=f"{ROOT / 'tests'}{os.pathsep}{ROOT}")
    blocks = sum(len(re.findall("^```python", (ROOT / page).read_text(), re.MULTILINE)) for page in pages)
    assert f"{blocks} passed" in told


@needs("mkdocs", "material", "mkdocstrings")
def test_it_builds_without_a_warning(tmp_path):
    run("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path), NO_MKDOCS_2_WARNING="1")
    for page in tmp_path.rglob("*.html"):  # a product <a, b> that is not in backticks is a tag, which nobody sees
        assert not re.findall(r"<[A-Za-z][^<>=\"]*,[^<>=\"]*>", page.read_text()), page
    assert "Sharpness-Aware" in (tmp_path / "api" / "index.html").read_text()


def test_the_api_page_shows_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    modules = {"losses": losses, "methods": methods}
    names = [name for name in fastsam.__all__ if name not in (*modules, "__version__")]
    names += [name for module in modules.values() for name in module.__all__]
    integrations = [path.stem for path in (ROOT / "fastsam" / "integrations").glob("[!_]*.py")]
    names += [name for name in integrations if name != "lightning_parts"]
    assert set(names) <= {place.rpartition(".")[2] for place in shown}


@needs("matplotlib", "sklearn")
def test_tables_and_pictures_are_those_of_committed_results():
    run("benchmarks/pages.py", "--check")
