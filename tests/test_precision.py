"""Low precision: masters, stochastic rounding, bfloat16 states; the reference against the plan, and the optimizer."""

import pytest
import rounding
import test_native
import torch
from rounding import MASTERS, OPTIONS, STOCHASTIC, fresh_bucket, label

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
