"""DTensors (FSDP2, HSDP, tensor parallelism), `norm_group=` and checkpoints, in two and then in four processes."""

from processes import run_in_processes

BOTH = "steps by_hand communication models weights_come_back overflow sam_step parts gradients_elsewhere".split()
OF_TWO = "same_size fsdp1 zero joint joint_parts refusals replaced cast low_precision".split()


def test_in_processes(tmp_path):
    """Two processes leave checkpoints that four load."""
    for world_size, names in ((2, BOTH + OF_TWO), (4, [*BOTH, "other_sizes"])):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        said = run_in_processes("distributed_processes.py", world_size, folder, str(tmp_path), seconds=240)
        assert {f"check_{name}" for name in names} <= set(said.split())
