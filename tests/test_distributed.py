"""DTensors (FSDP2, HSDP, tensor parallelism), `norm_group=` and their checkpoints, in two and then in four processes."""

from processes import run_in_processes

BOTH = ("steps", "by_hand", "models", "weights_come_back", "overflow", "sam_step", "parts", "gradients_elsewhere")
ONLY = {
    2: ("same_size", "fsdp1", "zero", "joint", "refusals", "replaced", "cast", "low_precision"),
    4: ("other_sizes",),
}


def test_in_processes(tmp_path):
    """Two processes leave checkpoints that four load."""
    for world_size, names in ONLY.items():
        folder = tmp_path / str(world_size)
        folder.mkdir()
        said = run_in_processes("distributed_processes.py", world_size, folder, str(tmp_path), seconds=240)
        assert {f"check_{name}" for name in BOTH + names} <= set(said.split())
