"""What memory is spent on: backups of what is perturbed, states of what is updated, nothing else and nothing twice."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from torch.nn import Parameter

from fastsam import FusedSAM
from fastsam.memory import bucket as bucket_module

pytestmark = pytest.mark.filterwarnings(cases.NO_GRADIENTS)
ADAM = cases.Config("adam", torch.optim.Adam, dict(lr=0.01, rho=0.3))


@pytest.fixture
def pages(monkeypatch):
    """The sizes of the pieces of each page that a bucket asks for."""
    asked, page = [], bucket_module.page

    def noted(sizes, dtype, device):
        asked.append(list(sizes))
        return page(sizes, dtype, device)

    monkeypatch.setattr(bucket_module, "page", noted)
    return asked


def segment_of(opt, param):
    return next(s for s in opt._sam.buckets.segments() if s.param is param)


def kept(opt, param):
    """Whether there is a backup, and how many states."""
    segment = segment_of(opt, param)
    return segment.backup is not None, sum(state is not None for state in segment.states)


def step(opt, params):
    """One step in which these parameters have gradients."""

    def closure():
        opt.zero_grad()
        for p in params:
            p.grad = torch.ones_like(p)

    opt.step(closure)


def make(backend, device, **second):
    a, b, c = (Parameter(torch.ones(n, device=device)) for n in (3, 70, 9))
    groups = [dict(params=[a, b]), dict(params=[c], **second)]
    return FusedSAM(groups, torch.optim.Adam, rho=0.3, lr=0.01, backend=backend), a, b, c


def test_a_group_that_is_not_perturbed_has_no_backup_until_it_is(backend, device, pages):
    opt, a, b, c = make(backend, device, perturb=False)
    step(opt, [a, b, c])
    assert kept(opt, c) == (False, 2) and kept(opt, a) == (True, 2)
    before, places = len(pages), opt._sam.buckets.items[0].gradients.host_segment_table.clone()
    step(opt, [a, b, c])
    assert len(pages) == before
    opt.param_groups[1]["perturb"] = True
    step(opt, [a, b, c])
    assert pages[before:] == [[9]] and kept(opt, c) == (True, 2)
    now = opt._sam.buckets.items[0].gradients.host_segment_table
    assert bool((now == places)[places != 0].all()), "a page moved"


def test_parameters_without_gradients_cost_nothing_and_newcomers_share_a_page(backend, device, pages):
    opt, a, b, c = make(backend, device)
    step(opt, [a])
    assert pages == [[3], [3], [3]], "one backup, two states"
    assert kept(opt, b) == kept(opt, c) == (False, 0) and b not in opt.state
    step(opt, [a])
    assert len(pages) == 3
    step(opt, [a, b, c])
    assert pages[3:] == [[70, 9]] * 3
    step(opt, [b])
    assert len(pages) == 6


def test_a_gradient_in_one_pass_only(backend, device):
    opt, a, b, c = make(backend, device)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    opt.first_step(zero_grad=True)
    a.grad, c.grad = torch.ones_like(a), torch.ones_like(c)
    opt.second_step()
    assert [kept(opt, p) for p in (a, b, c)] == [(True, 2), (True, 0), (False, 2)]


def test_prepare_allocates_all_but_backups_of_groups_that_are_not_perturbed(backend, device, pages, monkeypatch):
    opt, a, b, c = make(backend, device, perturb=False)
    opt.prepare()
    assert [kept(opt, p) for p in (a, b, c)] == [(True, 2), (True, 2), (False, 2)] and not opt.state
    before = len(pages)
    with monkeypatch.context() as patch:
        patch.setattr(bucket_module.Bucket, "_refuse_capture", lambda self: pytest.fail("allocates"))
        for some in ([a, b, c], [b], [a, c]):
            step(opt, some)
    opt.prepare()
    assert len(pages) == before


def test_memory_for_newcomers_is_refused_in_a_capture(backend, device, monkeypatch):
    opt, a, b, c = make(backend, device, perturb=False)
    step(opt, [a, c])
    refused = r"optimizer\.prepare\(\)|capture with backend="  # whichever a backend meets first
    before = [oracle.bits(p) for p in (a, b, c)]
    with monkeypatch.context() as patch:
        patch.setattr("fastsam.memory.bucket.graphs.capturing", lambda device: True)
        a.grad, b.grad = None, torch.ones_like(b)
        with pytest.raises(RuntimeError, match=refused):
            opt.first_step()
        b.grad = None
        opt.param_groups[1]["perturb"] = True
        with pytest.raises(RuntimeError, match=refused):
            opt.first_step()
    assert [oracle.bits(p) for p in (a, b, c)] == before and not opt.perturbed
    step(opt, [a, b, c])


def test_state_that_somebody_puts_there_gets_memory(backend, device):
    opt, a, b, c = make(backend, device)
    step(opt, [a])
    opt.state[b] = dict(step=torch.tensor(3.0), exp_avg=torch.full_like(b, 0.5), exp_avg_sq=torch.full_like(b, 0.25))
    saved = opt.state_dict()["state"]
    assert set(saved) == {0, 1} and bool((saved[1]["exp_avg"] == 0.5).all())
    assert kept(opt, b) == (False, 2) and kept(opt, c) == (False, 0)


@pytest.mark.parametrize("config", [ADAM, cases.SGD_CONFIGS[-1]], ids=["adam", "groups"])
def test_steps_with_gaps_and_changing_groups_are_sam_by_hand(backend, device, config):
    """Gradients that come and go in either pass, and `perturb` switched on and off in between."""
    names = ["matrix", "63", "1025", "64", "transposed", "scalar", "never a gradient"]
    ours, theirs = cases.make_params(names=names, device=device), cases.make_params(names=names)
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    for number in range(cases.STEPS):
        for group, sam in zip(opt.param_groups, hand.sam, strict=True):
            group["perturb"] = sam["perturb"] = (number + len(group["params"])) % 3 != 0
        for params, first, second in ((ours, opt.first_step, opt.second_step), (theirs, hand.climb, hand.descend)):
            cases.set_gradients(params, number, 1, names)
            first()
            cases.set_gradients(params, number, 2, names)
            second()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach())
    assert kept(opt, ours[-1]) == (False, 0)
