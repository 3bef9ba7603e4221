"""Every example runs, learns something, and stands in the documentation word for word."""

import math
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
PARALLEL = ("data_parallel.py", "big_model.py", "fsdp2.py", "tensor_parallel.py")
NEEDS_A_GPU = ("cuda_graph.py",)
# These are run by the tests in integrations/, each in the process that imports its framework anyway.
FRAMEWORKS = (
    *("lightning_auto.py", "lightning_manual.py", "trainer.py", "accelerate_loop.py", "timm_loop.py", "lora.py"),
)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in PARALLEL + FRAMEWORKS])
def test_example(name):
    if name in NEEDS_A_GPU and not torch.cuda.is_available():
        pytest.skip("a CUDA graph needs a GPU")
    loss = runpy.run_path(str(ROOT / "examples" / name))["main"]()
    assert 0 < loss < math.log(3)  # below that of guessing one of three classes


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_example(name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = [sys.executable, *launcher, "--master-port", str(port), str(ROOT / "examples" / name)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stderr
    assert 0 < float(ran.stdout.split()[-1]) < math.log(50)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documentation_shows_it(name):
    shown = f"```python\n{(ROOT / 'examples' / name).read_text()}```"
    assert any(shown in page.read_text() for page in (ROOT / "docs").rglob("*.md"))


def test_the_tail_is_warmed_up_again():
    from fastsam import schedules

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = schedules.rewarmed_tail(optimizer, 100, 60, warmup=10, peak=0.4, least=0.05)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 2.0 and rates[30] == pytest.approx(2 * (0.05 + 0.95 / 2))
    assert rates[60] == pytest.approx(0.1) and rates[70] == pytest.approx(0.8)
    assert rates[85] == pytest.approx(2 * (0.05 + 0.35 / 2)) and rates[99] < 0.11
    assert rates[:60] == sorted(rates[:60], reverse=True) and rates[70:] == sorted(rates[70:], reverse=True)
    for wrong in (dict(begins=95, warmup=10), dict(begins=5, warmup=2, peak=0.0)):
        with pytest.raises(ValueError, match="rewarmed_tail: .* must hold, got"):
            schedules.rewarmed_tail(optimizer, 100, **wrong)
