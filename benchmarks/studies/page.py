"""docs/studies/: a page a study, made of the JSON files that are committed, and nothing else."""

import json
import shutil

from benchmarks.studies import NAMES
from benchmarks.studies.framework import PAGES, RESULTS, page, study, title

INDEX = """# Studies

What SAM does on data and networks small enough for a laptop, each from one command. Where it does not help, the table
says so. `python -m benchmarks.studies NAME --quick` repeats one in a minute, and its options run it on Fashion-MNIST,
CIFAR or a folder of images. `python -m benchmarks.studies page` makes these pages from the results that are committed.

"""


def write_pages() -> None:
    """Write a page for each study that has results, and the list of them."""
    PAGES.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in NAMES:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        shutil.copyfile(file.with_suffix(".png"), PAGES / f"{name}.png")
        text = page(json.loads(file.read_text()), f"{name}.png", f"benchmarks/results/studies/{name}.json")
        (PAGES / f"{name}.md").write_text(text)
        lines.append(f"- [{title(study(name))}]({name}.md)")
    (PAGES / "index.md").write_text(INDEX + "\n".join(lines) + "\n")
    print(f"{len(lines)} pages are in {PAGES}")
