"""The CUDA kernels on a GPU, against the reference on copies on the CPU: fp32 to the bit."""

import cases
import pytest
import torch

import fastsam
from fastsam import ops
from fastsam.ops.formats import MIXED_DTYPES

WHY = ops.backends()["cuda"]
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(WHY is not None, reason=f"no CUDA kernels: {WHY}")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PRECISIONS = [
    (torch.bfloat16, dict(master_weights=True)),
    (torch.float16, dict(master_weights=True)),
    (torch.bfloat16, dict(stochastic_rounding=True, rounding_seed=7)),
    (torch.float16, dict(stochastic_rounding=True, rounding_seed=2**40 + 7)),
    (torch.float32, dict(state_dtype=torch.bfloat16)),
    (torch.bfloat16, dict(state_dtype=torch.bfloat16, master_weights=True)),
    (torch.float16, dict(state_dtype=torch.bfloat16, master_weights=True)),
]
FAMILIES = [cases.SGD_CONFIGS, cases.ADAM_CONFIGS, cases.RMSPROP_CONFIGS, cases.ADAGRAD_CONFIGS]
FAMILIES += [cases.NADAM_CONFIGS, cases.RADAM_CONFIGS, cases.LION_CONFIGS]


def assert_same(ours, theirs, what):
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        # float64: the reference's addcmul may round twice.
        exact = dict(rtol=1e-13, atol=1e-15) if q.dtype == torch.float64 else dict(rtol=0, atol=0)
        message = f"{what}, tensor {i}"
        torch.testing.assert_close(p.cpu(), q, equal_nan=True, msg=lambda text, m=message: f"{m}: {text}", **exact)


def hand_over(ours, theirs, step, pass_, offset=0):
    """The same gradients for both; `offset` elements beyond a 16-byte boundary on the GPU."""
    cases.set_gradients(theirs, step, pass_)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = None
        if q.grad is not None:
            memory = torch.empty(q.numel() + offset, dtype=q.dtype, device="cuda")[offset:]
            p.grad = memory.as_strided(q.size(), q.stride(), offset).copy_(q.grad)


def check_steps(config, dtype, offset=0, **options):
    ours, theirs = cases.make_params(dtype, device="cuda"), cases.make_params(dtype)
    opt, reference = cases.fused(ours, config, "cuda", **options), cases.fused(theirs, config, **options)
    assert set(opt.backend.values()) == {"cuda"}
    for step in range(cases.STEPS):
        hand_over(ours, theirs, step, 1, offset)
        opt.first_step(), reference.first_step()
        assert_same(ours, theirs, f"perturbed weights of step {step}")
        hand_over(ours, theirs, step, 2, offset)
        opt.step(), reference.step()
        assert_same(ours, theirs, f"weights after step {step}")
    for p, q in zip(ours, theirs, strict=True):
        for name, value in reference.state.get(q, {}).items():
            assert_same([opt.state[p][name]], [value], name)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", **cases.ids(cases.CONFIGS))
def test_whole_steps_have_the_references_bits(config, dtype):
    check_steps(config, dtype)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_gradients(dtype, offset):
    check_steps(cases.SGD_CONFIGS[2], dtype, offset)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=str)
@pytest.mark.parametrize("config", **cases.ids([family[-1] for family in FAMILIES]))
def test_masters_and_random_numbers_have_the_references_bits(config, dtype, options):
    check_steps(config, dtype, **options)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=str)
def test_misaligned_gradients_with_masters_and_random_numbers(dtype, options, offset):
    for config in (cases.SGD_CONFIGS[2], cases.ADAM_CONFIGS[3]):
        check_steps(config, dtype, offset, **options)


@pytest.mark.parametrize("p", [1.5, float("inf")])
@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=str)
def test_another_norm_with_masters_and_random_numbers(dtype, options, p):
    """But for the few that the last bits of exp2 and log2 take across a boundary."""
    both = []
    for device, backend in (("cuda", "cuda"), ("cpu", "reference")):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 20000).to(device, dtype))
        opt = fastsam.FusedSAM([param], torch.optim.SGD, rho=30.0, p=p, lr=0.1, backend=backend, **options)
        param.grad = torch.linspace(1, -2, 20000).to(device, dtype)
        opt.first_step()
        both.append((param.detach().cpu().clone(), opt))
        opt.step()
    assert (both[0][0] != both[1][0]).sum() <= 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_at_every_magnitude(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    params = [torch.nn.Parameter(finite.to(device)) for device in ("cuda", "cpu")]
    for p, backend in zip(params, ("cuda", "reference"), strict=True):
        opt = fastsam.FusedSAM([p], torch.optim.SGD, rho=0.0, lr=0.07, backend=backend)
        p.grad = finite.flip(0).to(p.device)
        opt.base_step()
    assert_same(params[:1], params[1:], "weights")


def test_thousands_of_tensors_in_tables_and_many_groups():
    def build(device, backend):
        params = [torch.nn.Parameter(torch.full((i % 7 + 1,), 0.5, device=device)) for i in range(9000)]
        groups = [dict(params=params[k::40], lr=0.01 * (k + 1)) for k in range(40)]
        return params, fastsam.FusedSAM(groups, torch.optim.SGD, momentum=0.9, lr=0.1, backend=backend)

    both = [build("cuda", "cuda"), build("cpu", "reference")]
    for params, opt in both:
        for step in (opt.first_step, opt.step):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.001 * (i % 100))
            step()
    assert_same(both[0][0], both[1][0], "weights")


def test_two_dtypes_share_one_norm():
    def build(device, backend):
        torch.manual_seed(3)
        kinds = ((3000, torch.float32), (500, torch.float64))
        params = [torch.nn.Parameter(torch.randn(n, dtype=d).to(device)) for n, d in kinds]
        return params, fastsam.FusedSAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)

    both = [build("cuda", "cuda"), build("cpu", "reference")]
    for params, opt in both:
        for p in params:
            p.grad = torch.linspace(-1, 1, len(p), dtype=p.dtype).to(p.device)
        opt.first_step()
    torch.testing.assert_close([p.cpu() for p in both[0][0]], list(both[1][0]), rtol=1e-6, atol=1e-7)


def test_work_is_queued_on_the_current_stream():
    p = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    opt = fastsam.FusedSAM([p], torch.optim.SGD, rho=0.1, lr=1.0, backend="cuda")
    p.grad = torch.zeros_like(p)
    opt.prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        p.grad.fill_(1.0)
        opt.first_step()
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    assert (p == -1).all()  # the sleep's stream had the gradients


def test_overflow_under_a_grad_scaler():
    model = torch.nn.Linear(8, 4, device="cuda")
    before = [p.detach().clone() for p in model.parameters()]
    opt = fastsam.FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend="cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    for factor in (float("inf"), 1.0):
        x = torch.ones(2, 8, device="cuda")
        scaler.scale(model(x).square().mean()).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert same == (factor != 1.0)
    assert scaler.get_scale() == 2.0**3


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize(("dtype", "options"), PRECISIONS[1:3], ids=str)
def test_masters_and_random_numbers_under_a_grad_scaler_with_clipping(dtype, options):
    ours, theirs = cases.make_params(dtype, device="cuda"), cases.make_params(dtype)
    opt = cases.fused(ours, cases.ADAM_CONFIGS[-1], "cuda", max_grad_norm=0.5, **options)
    reference = cases.fused(theirs, cases.ADAM_CONFIGS[-1], max_grad_norm=0.5, **options)
    scalers = [torch.amp.GradScaler(device, init_scale=2.0**4) for device in ("cuda", "cpu")]
    for step in range(4):
        hand_over(ours, theirs, step, 1)
        opt.first_step(), reference.first_step()
        hand_over(ours, theirs, step, 2)
        for params, o, scaler in ((ours, opt, scalers[0]), (theirs, reference, scalers[1])):
            scaler.scale(torch.zeros((), device=params[0].device))  # makes the scaler's tensors
            if step == 2:
                next(p.grad for p in params if p.grad is not None and p.numel() > 0).fill_(float("inf"))
            scaler.step(o)
            scaler.update()
        assert_same(ours, theirs, f"weights after step {step}")
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**3
    for p, q in zip(ours, theirs, strict=True):
        for name, value in reference.state.get(q, {}).items():
            assert_same([opt.state[p][name]], [value], name)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_host_sync_and_no_allocation_after_the_first_step():
    params = cases.make_params(device="cuda")
    opt = cases.fused(params, cases.ADAM_CONFIGS[3], "cuda")
    grads = [cases.gradient(p, i) for i, p in enumerate(params)]

    def step():
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.first_step()
        opt.step()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# ---- CUDA graphs.


def graph_problem(base, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).cuda()
    x, y = torch.randn(8, 16, device="cuda"), torch.randn(8, 4, device="cuda")
    opt = fastsam.FusedSAM(model.parameters(), base, rho=0.05, backend="cuda", **options)

    def step():
        for finish in (opt.first_step, opt.step):
            opt.zero_grad(set_to_none=True)
            torch.nn.functional.mse_loss(model(x), y).backward()
            finish()

    return model, opt, step


@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, dict(lr=0.1, momentum=0.9)), (torch.optim.AdamW, dict(lr=0.01))],
    ids=["sgd", "adamw"],
)
def test_a_captured_step_follows_the_groups_values(base, options):
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is not for captures
    changes = [dict(lr=0.02, rho=0.1, weight_decay=0.3), dict(lr=0.3, rho=0.0, weight_decay=0.0), dict(rho=0.7)]
    results = []
    for captured in (False, True):
        model, opt, step = graph_problem(base, **options)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        run = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            opt.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        for change in changes:
            opt.param_groups[0].update(change)
            opt.refresh()
            run()
            run()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of a capture that is refused
def test_a_capture_that_would_allocate_or_read_old_values_is_refused():
    torch.use_deterministic_algorithms(False)
    p = torch.nn.Parameter(torch.ones(100, device="cuda"))
    opt = fastsam.FusedSAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, backend="cuda")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"prepare\(\)"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.first_step()
    opt.prepare()
    opt.param_groups[0]["lr"] = 0.7
    with pytest.raises(RuntimeError, match=r"refresh\(\)"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.first_step()


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_a_capture_after_prepare_reads_a_tensor_lr(lr_dtype):
    """No eager step before it, so that every kernel is launched for the first time while capturing."""
    torch.use_deterministic_algorithms(False)
    lr = torch.tensor(0.5, dtype=lr_dtype, device="cuda")
    p = torch.nn.Parameter(torch.zeros(1000, device="cuda"))
    opt = fastsam.FusedSAM([p], torch.optim.SGD, rho=0.1, lr=lr, backend="cuda")
    p.grad = torch.ones_like(p)
    opt.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.first_step()
        opt.step()
    opt.check_capture()
    graph.replay()
    assert (p == -0.5).all()
    lr.fill_(0.25)
    graph.replay()
    assert (p == -0.75).all()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="has its gradient elsewhere"):
        opt.check_capture()


@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=str)
def test_replays_draw_new_numbers_and_keep_masters(dtype, options):
    torch.use_deterministic_algorithms(False)
    params = [torch.nn.Parameter(torch.ones(20000, dtype=dtype, device=device)) for device in ("cuda", "cpu")]
    opts = [
        fastsam.FusedSAM([p], torch.optim.SGD, rho=0.3, lr=1e-4, momentum=0.9, backend=backend, **options)
        for p, backend in zip(params, ("cuda", "reference"), strict=True)
    ]
    for p in params:
        p.grad = torch.linspace(-1, 2, 20000).to(p)
    opts[0].prepare()
    opts[0].refresh()  # compares the masters with the weights, which a capture would put into every replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opts[0].first_step()
        opts[0].step()
    for step in range(4):  # the weights of bfloat16 move by a small part of their last place
        graph.replay()
        opts[1].first_step()
        opts[1].step()
        assert_same(params[:1], params[1:], f"weights after replay {step}")
    for name, value in opts[1].state[params[1]].items():
        assert_same([opts[0].state[params[0]][name]], [value], name)


def test_a_graph_outlives_the_tables_that_it_reads():
    torch.use_deterministic_algorithms(False)
    model, opt, step = graph_problem(torch.optim.SGD, lr=0.1, momentum=0.9)
    for p in model[2].parameters():
        p.requires_grad_(False)
    step()
    opt.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    frozen = [p.detach().clone() for p in model[2].parameters()]
    for p in model[2].parameters():
        p.requires_grad_(True)
    step()  # pages and tables for the thawed parameters
    thawed = [p.detach().clone() for p in model[2].parameters()]
    before = [p.detach().clone() for p in model[0].parameters()]
    torch.cuda.empty_cache()
    graph.replay()
    assert not any(torch.equal(a, b) for a, b in zip(frozen, thawed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(thawed, model[2].parameters(), strict=True))
    with pytest.raises(RuntimeError, match="capture it again"):
        opt.refresh()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_devices_share_one_norm_without_waiting():
    params = [torch.nn.Parameter(torch.full((5000,), 0.5, device=f"cuda:{i}")) for i in range(2)]
    opt = fastsam.FusedSAM(params, torch.optim.SGD, rho=1.0, lr=0.1, momentum=0.9, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.prepare()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.first_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.5 + 0.01))
    opt.step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.4))


@pytest.mark.parametrize(("dtype", "grad_dtype"), sorted(MIXED_DTYPES, key=str), ids=str)
def test_gradients_of_another_dtype(dtype, grad_dtype):
    for config in (cases.SGD_CONFIGS[-1], cases.ADAM_CONFIGS[-1]):
        ours, theirs = cases.make_params(dtype, device="cuda"), cases.make_params(dtype)
        opt, reference = cases.fused(ours, config, "cuda"), cases.fused(theirs, config)
        for step in range(3):
            for pass_, finish in ((1, "first_step"), (2, "step")):
                cases.set_gradients(theirs, step, pass_)
                for p, q in zip(ours, theirs, strict=True):
                    grad = None if q.grad is None else q.grad.to(grad_dtype)
                    p.grad = q.grad = None
                    p.grad_dtype = q.grad_dtype = grad_dtype
                    p.grad, q.grad = (None, None) if grad is None else (grad.cuda(), grad)
                for o in (opt, reference):
                    getattr(o, finish)()
                for q in theirs:  # so that the next pass can make some
                    q.grad, q.grad_dtype = None, dtype
                assert_same(ours, theirs, f"weights of pass {pass_} in step {step}")
