"""`python -m fastsam`: the diagnosis tells the truth in its exit status, the demo does the main job on real data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

from fastsam import ops
from fastsam.__main__ import main
from fastsam.commands import demo_results, demo_training, diagnosis

DEMO_FILES = {"table.txt", "results.json", "runs.csv", "demo.png"}
QUICK = demo_training.Settings(seeds=1, epochs=1)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small, and threads that wait for each other on a busy machine cost seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_diagnosis():
    """`python -m fastsam` as a user runs it."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "fastsam"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


# --- diagnosis -------------------------------------------------------------------------------------------------------


def test_the_diagnosis_names_every_backend_and_exits_with_0():
    done = run_diagnosis()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    first_words = [line[0] for line in lines if line]
    for name, reason in ops.backends().items():
        assert first_words.count(name) >= 2  # what it is, and why a device gets it or not
        assert reason is None or reason in done.stdout
    assert torch.__version__ in done.stdout
    assert "All backends agree." in done.stdout


def available(device="cpu"):
    cpu = torch.device(device)
    return [n for n, why in ops.backends().items() if why is None and ops.choose(n, cpu, torch.float32)]


@pytest.mark.parametrize("backend", ops.NAMES)
@pytest.mark.parametrize("operation", ["grad_norm", "perturb_", "update_"])
def test_a_backend_that_computes_something_else_is_found(monkeypatch, capsys, backend, operation):
    if backend not in available():
        pytest.skip(f"{backend}: {ops.backends()[backend] or 'does not serve CPU tensors'}")
    twins = ops.backend_named(backend).operations
    original = getattr(twins, operation)

    def wrong(tables, grads, *rest, **options):
        original(tables, grads, *rest, **options)
        if operation == "grad_norm":
            rest[0][tables.slot] *= 1.01
        else:
            tables.segments[0].param.detach().add_(1e-3)

    monkeypatch.setattr(twins, operation, wrong)
    cases.stand_in(monkeypatch, backend, twins)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "DISAGREES" in out
    assert "Backends disagree" in out


@pytest.mark.parametrize(("backend", "judgement"), [("cpu", "DISAGREES"), ("triton", "agrees")])
def test_on_a_cpu_only_tritons_interpreter_may_round_otherwise(monkeypatch, backend, judgement):
    """That of Triton 3.6 rounds a product and its sum twice."""
    right = diagnosis.fused_result

    def fused_result(case, name, device):
        found = right(case, "reference", device)
        return found if name == "reference" else [value * (1 + 2**-22) for value in found]

    monkeypatch.setattr(diagnosis, "fused_result", fused_result)
    assert diagnosis.compare(backend, torch.device("cpu"))[-1] == judgement


def test_a_backend_that_raises_is_a_failure_with_its_message(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ops.backend_named("reference").operations, "perturb_", broken)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "RuntimeError: no such instruction" in out


def test_a_nan_or_a_missing_tensor_is_no_agreement():
    one = [torch.ones(2)]
    assert diagnosis.difference(one, one) == 0
    assert diagnosis.difference(one, [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert diagnosis.difference(one, one * 2) == float("inf")
    assert not diagnosis.close(one, one * 2)


def test_a_wish_that_cannot_be_met_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("FASTSAM_BACKEND", "abacus")
    assert main([]) == 1
    assert "FASTSAM_BACKEND=abacus" in capsys.readouterr().out


def test_a_wish_that_can_be_met_is_named_as_the_reason(monkeypatch, capsys):
    monkeypatch.setenv("FASTSAM_BACKEND", "reference")
    assert main([]) == 0
    assert "FASTSAM_BACKEND=reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record, capability, expected",
    [
        ("sm_80 sm_90 compute_80", (9, 0), "served by machine code, sm_90"),
        ("sm_80 sm_86 compute_80", (8, 9), "served by machine code, sm_86; to have its own: "),
        ("sm_90 compute_80", (8, 0), "served through PTX, compute_80: "),
        ("compute_75", (12, 1), "served through PTX, compute_75: "),
        ("sm_120 compute_80 compute_120", (11, 0), "served through PTX, compute_80: "),
        ("sm_90", (8, 0), "not served, "),
        ("sm_90", (10, 0), "not served, "),
        ("sm_86", (8, 0), "not served, "),
        ("sm_90a compute_90a", (9, 0), "served by machine code, sm_90a"),
        ("sm_100a compute_90a", (10, 3), "not served, "),
        ("compute_75", (7, 0), "not served: the kernels need compute capability 7.5"),
    ],
)
def test_the_diagnosis_says_what_a_gpu_gets(record, capability, expected):
    found = diagnosis.served(f"built with gcc\nCUDA kernels: nvcc 13.0, {record} (TORCH_CUDA_ARCH_LIST=x)", capability)
    assert found.startswith(expected)
    best = expected.endswith(record.split()[-1]) or "machine code, sm_90" in expected or capability == (7, 0)
    assert best == ("TORCH_CUDA_ARCH_LIST" not in found)
    assert best or f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}" pip install -e .' in found


def test_a_gpu_that_loads_no_kernel_is_told_why(monkeypatch):
    monkeypatch.setattr(ops, "backends", lambda: dict.fromkeys(ops.NAMES))
    monkeypatch.setattr(ops, "choose", lambda asked, *_: "triton" if asked == "auto" else None)
    monkeypatch.setattr(ops, "device_reason", lambda name, _: "no kernel image" if name == "cuda" else None)
    rows = dict(diagnosis._choices("auto", torch.device("cuda", 0)))
    assert rows["cuda"] == "no: no kernel image" and rows["triton"] == "taken" and "does not serve" in rows["cpu"]


def test_the_diagnosis_has_a_line_for_each_gpu_and_one_without(monkeypatch):
    record = "CUDA kernels: nvcc 13.0, sm_80 compute_80 (TORCH_CUDA_ARCH_LIST=8.0+PTX)"
    monkeypatch.setattr(diagnosis, "devices", lambda: [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 0), (9, 0)][device.index])
    first, second = diagnosis._served(record)
    assert first == "GPU 0 (compute capability 8.0): served by machine code, sm_80"
    assert second.startswith("GPU 1 (compute capability 9.0): served through PTX")
    monkeypatch.setattr(diagnosis, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(diagnosis, "_output", lambda command: "8.6\n")  # a GPU that this torch cannot use
    assert diagnosis._served(record)[0].startswith("GPU 0 (compute capability 8.6): served by machine code, sm_80; ")
    monkeypatch.setattr(diagnosis, "_output", lambda command: "")
    (line,) = diagnosis._served(record)
    assert "machine code is there for compute capability 8.0; any other of compute capability 8.0 or newer" in line
    assert "about 6 s" in line
    assert diagnosis._served("CUDA kernels: none") == []


# --- demo ------------------------------------------------------------------------------------------------------------


def test_the_demo_writes_table_plot_and_results(tmp_path, capsys):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path / "new" / "folder")]) == 0
    out = capsys.readouterr().out
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == DEMO_FILES
    table = (folder / "table.txt").read_text()
    assert table.strip() in out
    assert "Clean training labels" in table and "30 % of the training labels wrong" in table
    assert "nan" not in table
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert [r["optimizer"] for r in results["summary"]] == ["SGD", "SAM", "ASAM"] * 2
    assert len(results["runs"]) == 6
    with (folder / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    out = capsys.readouterr().out
    options = ["seeds", "epochs", "base", "rho", "asam-rho", "asam-eta", "noise", "backend", "threads", "output"]
    assert [option for option in options if f"  --{option} " not in out] == []
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module, package", [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"), ("rich", "rich")]
)
def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert package in message and "pip install -e '.[demo]'" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["--noise 1.5", "--seeds 0", "--epochs -1", "--rho -1", "--rho nan", "--base lion"]
)
def test_values_out_of_range_are_refused(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments.split()])
    assert "error: argument" in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_refused(capsys):
    missing = [name for name in ops.NAMES if name not in available()]
    if not missing:
        pytest.skip("every backend serves this CPU")
    assert main(["demo", "--backend", missing[0]]) == 1
    assert missing[0] in capsys.readouterr().err


@pytest.mark.parametrize("method", QUICK.methods)
def test_a_seed_gives_the_same_run_whatever_ran_before(method):
    first = demo_training.train(method, 0.3, 7, QUICK, lambda: None)
    torch.manual_seed(99)
    second = demo_training.train(method, 0.3, 7, QUICK, lambda: None)
    assert (first.accuracies, first.losses) == (second.accuracies, second.losses)


def test_a_split_has_that_many_wrong_labels_and_no_test_image_in_training():
    images, labels = demo_training.digits()
    assert images.shape == (1797, 1, 8, 8)
    clean = demo_training.split(images, labels, 0.0, torch.Generator().manual_seed(3))
    noisy = demo_training.split(images, labels, 0.3, torch.Generator().manual_seed(3))
    assert torch.equal(clean.train_images, noisy.train_images)
    assert len(clean.train_images) == 400 and len(clean.test_images) == 1397
    assert (clean.train_labels != noisy.train_labels).sum() == 120
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(labels, demo_training.digits()[1])


def test_the_network_starts_the_same_for_a_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, other = demo_training.network(1), demo_training.network(1), demo_training.network(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert sum(p.numel() for p in one.parameters()) == 14458 and len(list(one.parameters())) == 11


def test_the_verdict_says_when_sam_does_not_win():
    record = {"optimizer": "SAM", "gain": -0.3, "gain_se": 0.4, "better": 2, "worse": 3}
    assert "no clear difference" in demo_results.verdict(record, "SGD", 5)
    assert demo_results.verdict({**record, "gain_se": 0.1}, "SGD", 5).endswith("a loss")
    assert demo_results.verdict({**record, "gain": 2.0}, "SGD", 5).endswith("a gain")
    assert "one seed" in demo_results.verdict({**record, "gain_se": float("nan")}, "SGD", 1)


def test_the_loss_along_the_gradient_leaves_the_model_as_it_was():
    model = demo_training.network(0)
    images, labels = demo_training.digits()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = demo_training.losses_along_gradient(model, images[:50], labels[:50], rho=0.5)
    assert len(losses) == demo_training.RADII and losses[1] > losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("epochs, expected", [(1, [1]), (2, [2]), (5, [2, 4, 5]), (20, list(range(2, 21, 2)))])
def test_the_last_epoch_is_looked_at(epochs, expected):
    assert demo_training.evaluated(epochs) == expected


@pytest.mark.parametrize("base", demo_training.RECIPES)
def test_timing_compares_optimizers_that_agree(base):
    timings = demo_training.time_optimizers(demo_training.Settings(base=base), rounds=3)
    assert list(timings) == list(demo_training.Settings(base=base).methods)
    assert all(t.ours > 0 for t in timings.values())
