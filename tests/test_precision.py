"""Low precision: masters, stochastic rounding, bfloat16 states; the reference against the plan, and the optimizer."""

import pytest
import rounding
import test_native
import torch
from rounding import (
    FIRST_DRAW,
    MASTERS,
    OPTIONS,
    SEED,
    STOCHASTIC,
    at_every_magnitude,
    draw,
    drawn,
    fresh_bucket,
    label,
)

from fastsam.ops import reference
from fastsam.segments import Segment, layout


@pytest.fixture
def plain_torch(monkeypatch):
    """Buckets made by hand go through the reference."""

    def run_reference(bucket, *grads, **options):
        bucket.device = torch.device("cpu")
        bucket.counts = [bucket.rule.counters or row.beta1 != 0 for row in bucket.rows]
        bucket.segments, chunk = [], 0
        for i, param in enumerate(bucket.params):
            chunks = slice(chunk, chunk := chunk - (-len(param) // rounding.CHUNK))
            kept = (None, bucket.masters[i]) if bucket.format.masters else (bucket.backups[i], None)
            place = layout(param), i % 3, len(param), True, rounding.index_of(i), chunks
            segment = Segment(param, *place, *kept, bucket.progress[i])
            used = test_native.slots_of(bucket.option)
            segment.states = [state[i] if k in used else None for k, state in enumerate(bucket.states)]
            bucket.segments.append(segment)
        return run(bucket, *grads, **options)

    run = rounding.run
    monkeypatch.setattr(rounding, "native", reference)
    monkeypatch.setattr(test_native, "run", run_reference)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_the_reference_follows_the_plan(plain_torch, format, option):
    bucket = fresh_bucket(option, format)
    bucket.option = option
    test_native.check_steps(bucket, option)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_rounds_stochastically_at_every_magnitude(dtype):
    x, low, up = at_every_magnitude(dtype)
    noise = draw(len(x), SEED, 1, FIRST_DRAW, 2)
    rounded = reference.round_stochastically(x, torch.from_numpy(noise.astype("int64")), dtype)
    torch.testing.assert_close(rounded, drawn(x.numpy(), dtype, noise), rtol=0, atol=0, equal_nan=True)
    assert ((rounded[: len(low)] == low) | (rounded[: len(low)] == up)).all()
