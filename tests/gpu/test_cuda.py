"""What only a GPU has: streams, graphs, devices, launches, its memory."""

import pytest
import torch
from common import (
    CHUNK,
    DEVICE,
    assert_close_to_torch,
    assert_same_bits,
    by_extras,
    capture,
    check_result,
    expected_results,
    make_grad_loss,
    no_synchronisation,
    sync_debug_mode,
)
from helpers import (
    REDUCTIONS,
    Result,
    assert_no_worse,
    assert_results_no_worse,
    by_dtype,
    by_reduction,
    by_weights,
    check,
    draw,
    draw_weights,
    dtype_name,
    evaluate,
    fused,
    is_fused,
    outcome,
    reference,
    torch_bce,
)
from torch.profiler import ProfilerActivity, profile

from fused_bce import _C, why_not_fused

pytestmark = pytest.mark.gpu

SLEEP = 50_000_000  # cycles, some 30 ms: time for the host to fill the streams


# Streams


def fork(stream) -> None:
    """``stream`` goes on from here, but late: whoever does not wait for it is ahead of it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)


@by_dtype
@by_reduction
def test_side_stream(dtype, reduction):
    logits, target = draw((100_003,), DEVICE, dtype, dtype)
    options = {"grad_loss": make_grad_loss(logits, reduction), "reduction": reduction}
    late = torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    fork(stream)
    with torch.cuda.stream(stream):
        # A launch on any other stream would see the zeros.
        late.copy_(logits)
        got = evaluate(fused, late, target, **options)
    torch.cuda.current_stream().wait_stream(stream)
    check_result(got, logits, target, **options)


def replaying(compute):
    """compute, but from a graph."""
    graph, result = capture(compute)

    def run():
        for tensor in (result.loss, result.grad_logits):
            tensor.fill_(torch.nan)  # so that nothing is left of the last time
        graph.replay()
        return result

    return run


@pytest.fixture(params=[True, False], ids=["last_block", "second_kernel"])
def _either_adds_up(request):
    _C.add_up_in_last_block(request.param)
    yield
    _C.add_up_in_last_block(True)


@pytest.mark.usefixtures("_either_adds_up")
@pytest.mark.parametrize("way", [lambda compute: compute, replaying], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
def test_two_streams_at_once(dtype, way):
    """A ticket that both streams took from would let a sum end before it is complete."""
    problems = [draw((numel,), DEVICE, dtype, dtype) for numel in (300_007, 20 * CHUNK)]
    expected = [evaluate(fused, *problem) for problem in problems]
    runs = [way(lambda problem=problem: evaluate(fused, *problem)) for problem in problems]
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for stream in streams:
        fork(stream)
    for _ in range(200):
        for stream, run, one_by_one, count in zip(streams, runs, expected, wrong, strict=True):
            with torch.cuda.stream(stream):
                got = run()
                count += (got.loss != one_by_one.loss).sum()
                count += (got.grad_logits != one_by_one.grad_logits).sum()
    torch.cuda.synchronize()
    assert [count.item() for count in wrong] == [0, 0]
    for problem, result in zip(problems, expected, strict=True):
        check_result(result, *problem)


# Graphs


def assert_replays_as_eager(logits, target, compute, **options):
    """Replays follow what is copied into the inputs; the last one is compared with float64."""
    graph, static = capture(compute)
    for _ in range(3):
        fresh = draw(logits.shape, DEVICE, logits.dtype, target.dtype)
        logits.copy_(fresh[0])
        target.copy_(fresh[1])
        graph.replay()
        for got, eager in zip(static, compute(), strict=True):
            assert torch.equal(got, eager)
    theirs, exact = expected_results(logits, target, **options)
    for got, t, e in zip(static, theirs, exact, strict=False):
        assert_no_worse(got, t, e)


by_graph = pytest.mark.parametrize("numel", [1000, 100_003], ids=["one_block", "many_blocks"])
by_graph_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64], ids=dtype_name
)


def graph_problem(numel, dtype, reduction, weighted):
    logits, target = draw((numel,), DEVICE, dtype, dtype)
    options = {"reduction": reduction}
    if weighted:
        # A copy from the CPU's memory would read it again in every replay, when it may be gone.
        options["weight"] = torch.tensor(1.5)
        options |= draw_weights(["pos_weight"], (numel,), DEVICE)
    return logits, target, options


@pytest.mark.usefixtures("_either_adds_up")
@by_graph
@by_graph_dtype
@by_reduction
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_graph_of_forward(weighted, reduction, dtype, numel):
    logits, target, options = graph_problem(numel, dtype, reduction, weighted)
    assert_replays_as_eager(logits, target, lambda: [fused(logits, target, **options)], **options)


@by_graph
@by_graph_dtype
@by_reduction
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_graph_of_forward_and_backward(weighted, reduction, dtype, numel):
    logits, target, options = graph_problem(numel, dtype, reduction, weighted)
    options["grad_loss"] = make_grad_loss(logits, reduction)
    assert_replays_as_eager(
        logits, target, lambda: evaluate(fused, logits, target, **options)[:2], **options
    )


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@by_dtype
@by_reduction
@by_weights
def test_another_device_than_the_current_one(weights, reduction, dtype):
    second = torch.device("cuda", 1)
    logits, target = draw((31, 700), second, dtype, dtype)
    options = {"reduction": reduction, **draw_weights(weights, (700,), second)}
    options["grad_loss"] = make_grad_loss(logits, reduction)
    with torch.cuda.device(0):
        got = evaluate(fused, logits, target, **options)
        assert torch.cuda.current_device() == 0
    assert got.loss.device == got.grad_logits.device == second
    check_result(got, logits, target, **options)


@by_reduction
@by_weights
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_numbers_on_the_cpu(weight_dtype, weights, reduction):
    logits, target = draw((40, 30), DEVICE)
    options = {name: torch.tensor(3, dtype=weight_dtype) for name in weights}
    assert why_not_fused(logits, target, **options) is None
    check(logits, target, make_grad_loss(logits, reduction), reduction=reduction, **options)
    loss = fused(logits.requires_grad_(), target, reduction=reduction, **options)
    assert is_fused(loss)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("on", "target_on"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_target_on_another_device(on, target_on, requires_grad):
    for shape in ((3, 4), (1,), ()):
        logits = torch.randn(shape, device=on, requires_grad=requires_grad)
        target = torch.rand(shape, device=target_on)
        got, expected = (outcome(f, logits, target) for f in (fused, torch_bce))
        assert got.error == expected.error
        # Whatever torch makes of a target that is one number
        if expected.error is None:
            torch.testing.assert_close(got.value, expected.value)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize(
    ("on", "weight_on", "shape"),
    [
        (DEVICE, "cpu", (4,)),
        (DEVICE, "cpu", (1,)),
        ("cpu", DEVICE, (4,)),
        ("cpu", DEVICE, (1,)),
        ("cpu", DEVICE, ()),
    ],
)
def test_weight_on_another_device(on, weight_on, shape, name):
    logits, target = draw((3, 4), on)
    for reduction in REDUCTIONS:
        options = {name: torch.ones(shape, device=weight_on), "reduction": reduction}
        expected = outcome(torch_bce, logits, target, **options).error
        assert expected is not None
        assert outcome(fused, logits, target, **options).error == expected


# 2^31 + 17 elements: in five columns, so that vectors and periods of the weights never agree
HUGE = (2**31 + 17) // 5, 5


def huge_problem(rows):
    """Drawn by parts, in place: one part is all that is needed beside them."""
    logits = torch.empty(rows, 5, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(logits)
    for x, t in zip(logits.split(2**24), target.split(2**24), strict=True):
        x.normal_(std=4)
        t.uniform_()
    return logits, target


def mean_in_float64(logits, target, **weights):
    parts = zip(logits.split(2**24), target.split(2**24), strict=True)
    sums = [torch_bce(x.double(), t.double(), reduction="sum", **weights) for x, t in parts]
    return (sum(sums) / logits.numel()).item()


def check_rows(grad, logits, target, rows, **options):
    """The gradient of some rows of a mean over all of them, for grad_loss = 2."""
    part = reference(logits[rows], target[rows], reduction="sum", **options).grad_logits
    exact = 2 * part / logits.numel()
    # One rounding to bfloat16, and of the float32 before it where the gradient is a difference.
    slack = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6 / logits.numel()
    assert part.numel() > 0
    assert ((grad[rows].cpu().double() - exact).abs() <= slack).all()


def check_huge(rows, weights):
    logits, target = huge_problem(rows)
    options = {name: torch.rand(5, device=DEVICE) + 0.5 for name in weights}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # for a loss in float32
        got = evaluate(fused, logits, target, grad_loss=torch.tensor(2.0, device=DEVICE), **options)
    wide = {name: weight.double() for name, weight in options.items()}
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(mean_in_float64(logits, target, **wide), rel=1e-6)
    # The ends, both halves, and what lies around element 2^31 of as many
    for start in (0, rows // 4, rows // 2 - 50, rows * 3 // 4, max(rows - 200, 0)):
        check_rows(got.grad_logits, logits, target, slice(start, start + 200), **options)


@pytest.mark.large
@pytest.mark.parametrize("weights", [(), ("pos_weight",)], ids=["unweighted", "pos_weight"])
def test_more_than_2_31_elements(weights):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    rows, columns = HUGE
    assert rows * columns == 2**31 + 17
    check_huge(rows, weights)


# Memory, synchronisation, launches


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
def test_peak_memory(backward):
    """The gradient and nothing else of that size; without a gradient nothing at all."""
    logits, target = draw((2**22,), DEVICE)
    leaf = logits.clone().requires_grad_(backward)

    def step():
        loss = fused(leaf, target)
        if backward:
            loss.backward()
        return loss.detach()

    step()
    leaf.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = step()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = 4 * logits.numel() if backward else 0
    assert gradient <= peak <= gradient + 2 * 2**20
    theirs, exact = expected_results(logits, target)
    assert_no_worse(loss, theirs.loss, exact.loss)
    if backward:
        assert_no_worse(leaf.grad, theirs.grad_logits, exact.grad_logits)


def test_memory_is_that_of_torch():
    """All of it comes from the caching allocator, and goes back there."""
    logits, target = draw((100_003,), DEVICE)
    expected = evaluate(fused, logits, target)

    def many_steps():
        for _ in range(100):
            assert_same_bits(evaluate(fused, logits, target), expected)
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()

    before, after = many_steps(), many_steps()
    for name in ("allocation.all.current", "allocated_bytes.all.current", "num_device_alloc"):
        assert after[name] == before[name], name
    # The loss, the gradient and the sums of the blocks at least
    name = "allocation.all.allocated"
    assert after[name] - before[name] >= 3 * 100
    check_result(expected, logits, target)


@sync_debug_mode
def test_synchronisation_would_be_noticed():
    number = torch.ones((), device=DEVICE)
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()
    assert number.item() == 1


@sync_debug_mode
@by_reduction
@by_weights
@pytest.mark.parametrize("where", [DEVICE, "cpu"])
@pytest.mark.parametrize("grad_loss", [None, 2.5], ids=["ones", "not_one"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=dtype_name)
def test_no_synchronisation(dtype, grad_loss, where, weights, reduction):
    logits, target = draw((5, 3000), DEVICE, dtype, dtype)
    shape = (3000,) if where == DEVICE else ()
    options = {"reduction": reduction, **draw_weights(weights, shape, where)}
    if grad_loss is not None:
        options["grad_loss"] = make_grad_loss(logits, reduction)
    with no_synchronisation():
        got = evaluate(fused, logits, target, target_grad=True, **options)
    theirs = evaluate(torch_bce, logits, target, target_grad=True, **options)
    assert_results_no_worse(got, theirs, reference(logits, target, **options))


def kernels_of(step) -> list[str]:
    """The names of the kernels that step() launches; copies and fills with zero are none."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    return [
        event.name
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "kernel" in event.name.lower()
    ]


@pytest.fixture
def _records_kernels():
    """Skips where the driver or the build of torch hides kernels from the profiler."""
    # What is recorded the first time may lack some.
    seen = [kernels_of(lambda: torch.ones(3, device=DEVICE)) for _ in range(2)]
    if not seen[1]:
        pytest.skip("the profiler records no CUDA kernels here")


@pytest.mark.usefixtures("_records_kernels")
@pytest.mark.parametrize("numel", [1000, 100_003], ids=["one_block", "many_blocks"])
def test_launches(numel):
    """One kernel forward, one backward, and none of torch's."""
    logits, target = draw((numel,), DEVICE)
    logits.requires_grad_()
    one = torch.ones((), device=DEVICE)
    losses, grads = [], []
    forward = kernels_of(lambda: losses.append(fused(logits, target)))
    backward = kernels_of(lambda: grads.extend(torch.autograd.grad(losses[0], logits, one)))
    with torch.no_grad():
        without_gradient = kernels_of(lambda: losses.append(fused(logits, target)))
    for names, kernel in (
        (forward, "loss_kernel"),
        (backward, "scale_kernel"),
        (without_gradient, "loss_kernel"),
    ):
        assert len(names) == 1, names
        assert kernel in names[0]
    assert torch.equal(losses[1], losses[0])
    check_result(Result(losses[1], grads[0], None), logits, target)


# Targets of integers, ignore_index, label_smoothing


@sync_debug_mode
@by_reduction
@by_extras
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=dtype_name)
def test_no_synchronisation_with_extras(dtype, extras, reduction):
    logits = torch.randn(5, 3000, device=DEVICE).to(dtype)
    target = torch.randint(2, (5, 3000), device=DEVICE)
    with no_synchronisation():
        got = evaluate(fused, logits, target, reduction=reduction, **extras)
    assert_close_to_torch(got, logits, target, reduction=reduction, **extras)


@by_graph
@by_reduction
@by_extras
def test_graph_with_extras(extras, reduction, numel):
    # The number of ignored targets is another in every replay.
    logits = torch.randn(numel, device=DEVICE)
    target = torch.randint(2, (numel,), device=DEVICE, dtype=torch.uint8)

    def compute():
        return evaluate(fused, logits, target, reduction=reduction, **extras)[:2]

    graph, static = capture(compute)
    for share in (0.1, 0.9, 1.0):
        logits.normal_()
        target.copy_(torch.rand(numel, device=DEVICE) < share)
        graph.replay()
        for got, eager in zip(static, compute(), strict=True):
            assert torch.equal(got, eager)
        assert_close_to_torch(Result(*static, None), logits, target, reduction=reduction, **extras)


@pytest.mark.usefixtures("_records_kernels")
def test_launches_with_extras():
    """bool targets take no kernel more; ignore_index one, which counts."""
    logits = torch.randn(100_003, device=DEVICE, requires_grad=True)
    target = torch.randint(2, (100_003,), device=DEVICE).bool()
    names = kernels_of(lambda: fused(logits, target))
    assert len(names) == 1, names
    names = kernels_of(lambda: fused(logits, target, ignore_index=1))
    assert len(names) == 2, names
    assert sum("count_unignored_kernel" in name for name in names) == 1
