"""What this loss takes beyond torch's: bool and integer targets, label smoothing, ignore_index,
validation of the targets."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EMULATES_CUDA,
    FLOATS,
    REDUCTIONS,
    assert_double_close,
    assert_results_no_worse,
    by_dtype,
    by_reduction,
    by_torch,
    by_weights,
    draw_weights,
    dtype_name,
    evaluate,
    fused,
    is_fused,
    is_ignored,
    outcome,
    reference,
    torch_bce,
)

import fused_bce
from fused_bce import BCEWithLogitsLoss

# torch's own, of forward-mode differentiation too.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")

NAN, INF = math.nan, math.inf
DOUBLE = torch.float64
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TARGETS = INTEGERS + FLOATS

by_integer = pytest.mark.parametrize("target_dtype", INTEGERS, ids=dtype_name)
weighted_or_not = pytest.mark.parametrize(
    "weights", [(), ("weight", "pos_weight")], ids=["unweighted", "both_weights"]
)
by_target = pytest.mark.parametrize("target_dtype", TARGETS, ids=dtype_name)


def hard(shape, device, dtype=torch.bool):
    return torch.randint(2, torch.Size([shape]) if isinstance(shape, int) else shape).to(
        device, dtype
    )


def logits_of(shape, device, dtype=torch.float32):
    return (torch.randn(shape) * 4).to(device, dtype)


def check_as_floats(logits, target, **options):
    """What torch makes of the same targets as numbers of the logits' dtype."""
    ours = evaluate(fused, logits, target, **options)
    theirs = evaluate(torch_bce, logits, target.to(logits.dtype), **options)
    exact = reference(logits, target, **options)._replace(grad_target=None)
    assert_results_no_worse(ours, theirs, exact)
    return ours


# bool and integer targets


@by_weights
@by_reduction
@by_dtype
@by_integer
def test_integer_targets(target_dtype, dtype, reduction, weights, device):
    logits, target = logits_of((7, 33), device, dtype), hard((7, 33), device, target_dtype)
    options = {"reduction": reduction, **draw_weights(weights, (33,), device)}
    got = check_as_floats(logits, target, **options)
    assert is_fused(fused(logits.requires_grad_(), target, **options))
    # Bit for bit what the same numbers give in the dtype of the arithmetic, but for its dtype; on a
    # GPU a sum depends on how many targets are read at a time.
    wide = evaluate(fused, logits, target.to(torch.promote_types(dtype, torch.float32)), **options)
    by_vectors = reduction != "none" and (EMULATES_CUDA or device == "cuda")
    rtol = 2 * torch.finfo(dtype).eps if by_vectors else 0
    torch.testing.assert_close(got.loss, wide.loss.to(dtype), rtol=rtol, atol=0)
    assert torch.equal(got.grad_logits, wide.grad_logits)


@by_integer
def test_every_tail(target_dtype, device):
    for n in (*range(70), 255, 511, 512, 513, 8191, 8193, 16385):
        check_as_floats(logits_of(n, device), hard(n, device, target_dtype), reduction="none")
        if n:
            check_as_floats(logits_of(n, device), hard(n, device, target_dtype))


@pytest.mark.parametrize("large", [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**52 + 1])
def test_int64_targets_beyond_int32(large, device):
    # One among many that are read by their low halves, and many of them.
    logits = logits_of(1000, device)
    for places in (slice(700, 701), slice(None, None, 3)):
        target = hard(1000, device, torch.int64)
        target[places] = large
        check_as_floats(logits, target, reduction="none")


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
}


@by_reduction
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@by_integer
def test_layouts_of_integers(target_dtype, layout, reduction, device):
    logits, target = logits_of((6, 5), device), hard((6, 5), device, target_dtype)
    plain = evaluate(fused, logits, target, reduction=reduction)
    for x, t in ((logits, layout(target)), (layout(logits), layout(target))):
        got = check_as_floats(x, t, reduction=reduction)
        if layout is not LAYOUTS["expanded"]:
            torch.testing.assert_close(got, plain)
        if reduction == "none" and layout is LAYOUTS["transposed"]:
            assert got.loss.stride() == t.stride()


def test_a_byte_that_is_not_zero_is_true(device):
    target = torch.tensor([0, 1, 2, 255], dtype=torch.uint8, device=device).view(torch.bool)
    logits = logits_of(4, device)
    expected = torch_bce(logits, target.float(), reduction="none")
    torch.testing.assert_close(fused(logits, target, reduction="none"), expected)
    ignoring = fused(logits, target, ignore_index=1)
    torch.testing.assert_close(ignoring, expected[0])


@by_integer
def test_integers_beyond_the_unit_interval(target_dtype, device):
    # Unchecked, as floats are.
    if target_dtype is torch.bool:
        pytest.skip("a bool is 0 or 1")
    target = torch.tensor([2, 100, 3, 0]).to(device, target_dtype)
    check_as_floats(logits_of(4, device), target, reduction="none")


@by_reduction
@by_dtype
def test_integer_target_backward_again(dtype, reduction, device):
    # float16 recomputes its gradient; the derivative of the gradient is in torch's operations.
    logits, target = logits_of((5, 6), device, dtype).requires_grad_(), hard((5, 6), device)
    loss = fused(logits, target, reduction=reduction)
    ones = torch.ones_like(loss)
    first, second = (
        torch.autograd.grad(loss, logits, ones, retain_graph=True)[0] for _ in range(2)
    )
    (differentiable,) = torch.autograd.grad(loss, logits, ones, create_graph=True)
    rtol = 4 * torch.finfo(dtype).eps
    for other in (second, differentiable):
        torch.testing.assert_close(other, first, rtol=rtol, atol=rtol * first.abs().max().item())


@by_integer
def test_integer_target_under_autocast(target_dtype, device):
    logits = logits_of((5, 6), device, torch.bfloat16).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fused(logits, hard((5, 6), device, target_dtype))
        of_double = fused(logits.double(), hard((5, 6), device, target_dtype))
    assert loss.dtype is torch.float32
    assert of_double.dtype is DOUBLE
    loss.backward()
    assert logits.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64], ids=dtype_name)
def test_other_targets_raise_as_torch_does(dtype, device):
    logits, target = logits_of(4, device), torch.ones(4, device=device).to(dtype)
    expected = outcome(torch_bce, logits, target).error
    assert outcome(fused, logits, target).error == expected


def test_integer_target_of_another_size(device):
    with pytest.raises(ValueError, match=r"Target size \(torch.Size\(\[3\]\)\) must be the same"):
        fused(logits_of(4, device), hard(3, device), ignore_index=0)


# Label smoothing


def check_extras(logits, target, grad_loss=None, **options):
    """The same as by torch in float64, up to some roundings of the dtypes."""
    got = evaluate(
        fused,
        logits,
        target,
        target_grad=target.is_floating_point(),
        grad_loss=grad_loss,
        **options,
    )
    for g, e in zip(got, reference(logits, target, grad_loss=grad_loss, **options), strict=True):
        if g is not None and e.numel():
            # Smoothed targets round in the arithmetic's dtype, and near 0 gradients cancel.
            rtol = 8 * torch.finfo(g.dtype).eps
            atol = rtol * max(1.0, e.abs().max().item())
            torch.testing.assert_close(g.cpu().double(), e, rtol=rtol, atol=atol)
    return got


@weighted_or_not
@by_reduction
@by_target
@by_dtype
def test_label_smoothing(dtype, target_dtype, reduction, weights, device):
    logits, target = logits_of((7, 33), device, dtype), hard((7, 33), device, target_dtype)
    options = {"reduction": reduction, **draw_weights(weights, (33,), device)}
    for label_smoothing in (0.1, 0.75):
        check_extras(logits, target, label_smoothing=label_smoothing, **options)


def test_label_smoothing_of_nothing_is_exact(device):
    logits, target = logits_of((7, 33), device), torch.rand(7, 33, device=device)
    got = evaluate(fused, logits, target, label_smoothing=0.0, ignore_index=None)
    torch.testing.assert_close(got, evaluate(fused, logits, target), rtol=0, atol=0)


# ignore_index


def with_ignored(shape, ignore_index, device, dtype):
    # float32 holds every number that is ignored here, nan included.
    target = torch.randint(2, shape).float()
    target[torch.rand(shape) < 0.3] = ignore_index
    return target.to(device, dtype)


def ignored_by(extras, shape, device, dtype):
    """Targets of which some are what the extras ignore, or -1; of floats if that is nan."""
    ignore_index = extras.get("ignore_index", -1)
    if math.isnan(ignore_index) and not dtype.is_floating_point:
        dtype = DOUBLE
    return with_ignored(shape, ignore_index, device, dtype)


def an_ignored_value(dtype) -> int:
    return {torch.bool: 1, torch.uint8: 255}.get(dtype, -100)


def ignored_values(dtype) -> list:
    return [an_ignored_value(dtype), *([NAN] if dtype.is_floating_point else [])]


by_target_and_index = pytest.mark.parametrize(
    ("target_dtype", "ignore_index"),
    [
        pytest.param(dtype, value, id=f"{dtype_name(dtype)}-{value}")
        for dtype in TARGETS
        for value in ignored_values(dtype)
    ],
)


@weighted_or_not
@by_reduction
@by_target_and_index
@by_dtype
def test_ignore_index(dtype, target_dtype, ignore_index, reduction, weights, device):
    target = with_ignored((7, 33), ignore_index, device, target_dtype)
    ignored = is_ignored(target, ignore_index)
    logits = logits_of((7, 33), device, dtype)
    # Whatever the logit is.
    logits[ignored] = torch.tensor([NAN, INF, -INF, 3.0], device=device, dtype=dtype).repeat(99)[
        : int(ignored.sum())
    ]
    weights = draw_weights(weights, (7, 33), device)
    for weight in weights.values():
        weight[ignored] = NAN
    for label_smoothing in (0.0, 0.2):
        extras = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        got = check_extras(logits, target, reduction=reduction, **extras, **weights)
        assert (got.grad_logits[ignored] == 0).all()
        assert (got.grad_logits[~ignored] != 0).any()
        if reduction == "none":
            assert (got.loss[ignored] == 0).all()


@pytest.mark.parametrize("ignore_index", [-1, NAN])
@by_reduction
@by_dtype
def test_nothing_left(dtype, reduction, ignore_index, device):
    target = torch.full((3, 5), float(ignore_index), device=device).to(dtype)
    logits = torch.full((3, 5), NAN, device=device).to(dtype)
    for shape in ((3, 5), (0, 5)):
        x, t = logits[: shape[0]], target[: shape[0]]
        got = evaluate(fused, x, t, reduction=reduction, ignore_index=ignore_index)
        assert (got.loss == 0).all()
        assert (got.grad_logits == 0).all()
        with torch.no_grad():
            assert (fused(x, t, reduction=reduction, ignore_index=ignore_index) == 0).all()


def test_a_nan_that_is_not_ignored_stays(device):
    logits = torch.tensor([NAN, 1.0, NAN], device=device)
    target = torch.tensor([1, 1, 5], dtype=torch.uint8, device=device)
    got = evaluate(fused, logits, target, reduction="none", ignore_index=5)
    assert got.loss.isnan().tolist() == [True, False, False]
    assert got.grad_logits.isnan().tolist() == [True, False, False]


def test_float_targets_are_compared_exactly(device):
    target = torch.tensor([1.0, 1 + 2**-52, 0.0, -0.0, NAN], device=device, dtype=DOUBLE)
    logits = torch.ones(5, device=device, dtype=DOUBLE)
    losses = fused(logits, target, reduction="none", ignore_index=1)
    assert (losses == 0).tolist() == [True, False, False, False, False]
    losses = fused(logits, target, reduction="none", ignore_index=0)
    assert (losses == 0).tolist() == [False, False, True, True, False]


@by_target_and_index
def test_count_kept(target_dtype, ignore_index, device):
    nan = math.isnan(ignore_index)

    def count_kept(target):
        return torch.ops.fused_bce._count_unignored(target, None if nan else ignore_index, nan)

    for shape in ((0,), (), (1,), (33,), (300, 67), (16385,)):
        target = with_ignored(shape, ignore_index, device, target_dtype)
        layouts = [target, target.flatten()[1:]]
        if target.dim() == 2:
            layouts += [target.t(), target[:, ::3], target[:1].expand(5, -1)]
        for t in layouts:
            count = count_kept(t)
            assert (count.dtype, count.shape, count.device) == (DOUBLE, (), t.device)
            assert count.item() == int((~is_ignored(t, ignore_index)).sum())


def test_a_given_divisor_is_not_counted_anew(device):
    """The operator's, of a shard: what is ignored elsewhere counts, too."""
    operator = torch.ops.fused_bce.binary_cross_entropy_with_logits
    logits, target = logits_of((6, 5), device), hard((6, 5), device, torch.uint8)
    target[0] = 255
    divisor = torch.tensor(400.0, device=device)

    def mean(x, t):
        return operator(x, t, None, None, 1, divisor=divisor, ignore_index=255)

    got = evaluate(mean, logits, target)
    whole = evaluate(fused, logits, target, reduction="sum", ignore_index=255)
    torch.testing.assert_close(got.loss, whole.loss / 400)
    torch.testing.assert_close(got.grad_logits, whole.grad_logits / 400)


@by_dtype
def test_count_kept_of_unusual_numbers(dtype, device):
    count_kept = torch.ops.fused_bce._count_unignored
    numbers = [0.0, -0.0, 1.0, NAN, -NAN, INF, -INF]
    target = torch.tensor(numbers, device=device).to(dtype)
    assert count_kept(target, 0).item() == 5
    assert count_kept(target, None, True).item() == 5
    assert count_kept(target, 0, True).item() == 3
    assert count_kept(target, None).item() == 7


def test_ignoring_is_deterministic(device):
    logits = logits_of(300_000, device)
    target = with_ignored((300_000,), 255, device, torch.uint8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(evaluate(fused, logits, target, ignore_index=255))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@by_reduction
@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
def test_backward_again(create_graph, reduction, device):
    target = with_ignored((6, 5), -1, device, DOUBLE)
    logits = logits_of((6, 5), device, DOUBLE)
    logits[target == -1] = NAN
    logits.requires_grad_()
    extras = {"ignore_index": -1, "label_smoothing": 0.1}
    loss = fused(logits, target, reduction=reduction, **extras)
    grad_loss = torch.rand_like(loss)
    first, second = (
        torch.autograd.grad(
            loss, logits, grad_loss, retain_graph=True, create_graph=create_graph and again
        )[0]
        for again in (False, True)
    )
    assert_double_close(second, first)


EXTRAS = {
    "label_smoothing": {"label_smoothing": 0.3},
    "ignore_index": {"ignore_index": -1},
    "both": {"label_smoothing": 0.3, "ignore_index": -1},
    "nan": {"label_smoothing": 0.3, "ignore_index": NAN},
}
by_extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)


# Where torch's function takes the kernel's place


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_nothing_left_to_torch(reduction, device):
    """0, as the kernels' loss: a mean of no elements would be nan."""
    logits, target = logits_of((3, 4), device), torch.ones(3, 4, device=device)
    options = {"reduction": reduction, "ignore_index": 1}
    grad, loss = torch.func.grad_and_value(lambda x: fused(x, target, **options))(logits)
    assert loss == fused(logits, target, **options) == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("extras", [{}, {"ignore_index": 1}], ids=["plain", "ignore_index"])
def test_batchmean_left_to_torch(extras, device):
    """The sum by the number of rows."""
    logits, target = logits_of((3, 4), device, DOUBLE), hard((3, 4), device, torch.int64)
    loss = torch.func.grad_and_value(lambda x: fused(x, target, reduction="batchmean", **extras))
    total = torch.func.grad_and_value(lambda x: by_torch(x, target, reduction="sum", **extras))
    for got, exact in zip(loss(logits), total(logits), strict=True):
        assert_double_close(got, exact / 3)


@by_reduction
@by_extras
def test_vmap(extras, reduction, device):
    target = ignored_by(extras, (3, 4), device, torch.int8)
    logits = logits_of((3, 4), device, DOUBLE)
    got = torch.vmap(lambda x, t: fused(x, t, reduction=reduction, **extras))(logits, target)
    rows = [
        by_torch(x, t, reduction=reduction, **extras) for x, t in zip(logits, target, strict=True)
    ]
    assert_double_close(got, torch.stack(rows))


@by_extras
def test_left_to_torch_under_autocast(extras, device):
    # Integers are smoothed in float32 there, too, whatever the dtype of the logits is.
    target = ignored_by(extras, (6, 5), device, torch.int8)
    logits = logits_of((6, 5), device, torch.bfloat16)
    negated = torch._neg_view(-logits)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = fused(negated, target, **extras)
        torch.testing.assert_close(got, fused(logits, target, **extras))
    assert fused_bce.why_not_fused(negated, target) is not None


# Validation


@by_target_and_index
def test_valid_targets(target_dtype, ignore_index, device):
    logits, target = logits_of((3, 4), device), hard((3, 4), device, target_dtype)
    torch.testing.assert_close(
        fused(logits, target, validate_targets=True), fused(logits, target), rtol=0, atol=0
    )
    ignored = with_ignored((3, 4), ignore_index, device, target_dtype)
    fused(logits, ignored, ignore_index=ignore_index, validate_targets=True)


INVALID = {
    "above": (torch.tensor([[0.5, 1.0], [1.5, -3.0]]), r"target\[1, 0\] is 1.5, outside \[0, 1\]"),
    "below": (torch.tensor([0, -1, 2]), r"target\[1\] is -1, outside"),
    "nan": (torch.tensor([0.0, NAN], dtype=torch.float16), r"target\[1\] is nan, outside"),
    "number": (torch.tensor(7, dtype=torch.uint8), r"target is 7, outside"),
    "channels_last": (
        torch.ones(2, 3, 2, 2)
        .index_fill(1, torch.tensor(2), 4.0)
        .to(memory_format=torch.channels_last),
        r"target\[0, 2, 0, 0\] is 4.0, outside",
    ),
}


@pytest.mark.parametrize(("target", "message"), INVALID.values(), ids=INVALID)
def test_invalid_targets(target, message, device):
    target = target.to(device)
    logits = logits_of(target.shape, device)
    with pytest.raises(ValueError, match=message):
        fused(logits, target, validate_targets=True)
    loss = BCEWithLogitsLoss(validate_targets=True)
    with pytest.raises(ValueError, match=message):
        loss(logits, target)
    with pytest.raises(Exception, match=r"a target lies outside \[0, 1\]"):
        torch.jit.script(loss)(logits, target)
    # Only when asked for.
    fused(logits, target)


def test_invalid_targets_that_are_ignored(device):
    target = torch.tensor([1, 255, 3], dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"target\[2\] is 3, outside"):
        fused(logits_of(3, device), target, ignore_index=255, validate_targets=True)


def test_invalid_targets_inside_torch_func(device):
    logits, target = logits_of((2, 3), device), torch.full((2, 3), 2.0, device=device)
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 2.0, outside"):
        torch.vmap(lambda x, t: fused(x, t, validate_targets=True))(logits, target)


# Errors

BAD_SMOOTHING = {"negative": -0.1, "one": 1.0, "above": 7, "nan": NAN}
BAD_INDEX = {
    "float": (TypeError, 1.0, torch.float32),
    "bool": (TypeError, True, torch.float32),
    "text": (TypeError, "1", torch.float32),
    "tensor": (TypeError, torch.tensor(1), torch.float32),
    "nan for bool": (ValueError, math.nan, torch.bool),
    "nan for int64": (ValueError, math.nan, torch.int64),
    "too large": (ValueError, 2**24, torch.float32),
    "too small": (ValueError, -(2**24), torch.int64),
    "no bool": (ValueError, 255, torch.bool),
    "no uint8": (ValueError, -1, torch.uint8),
    "no int8": (ValueError, 255, torch.int8),
    "no int16": (ValueError, 40_000, torch.int16),
    "no float16": (ValueError, 2049, torch.float16),
    "no bfloat16": (ValueError, 257, torch.bfloat16),
}


@pytest.mark.parametrize("value", BAD_SMOOTHING.values(), ids=BAD_SMOOTHING)
def test_bad_label_smoothing(value, device):
    logits = logits_of(3, device)
    for call in (fused, lambda x, t, **extras: BCEWithLogitsLoss(**extras)(x, t)):
        with pytest.raises(ValueError, match=f"label_smoothing must .* {value}"):
            call(logits, logits, label_smoothing=value)
    with pytest.raises(ValueError, match="label_smoothing must"):
        torch.ops.fused_bce._binary_cross_entropy_with_logits_with_grad(
            logits, logits, None, None, 1, label_smoothing=torch.tensor(float(value))
        )


@pytest.mark.parametrize(("error", "value", "dtype"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_bad_ignore_index(error, value, dtype, device):
    logits, target = logits_of(3, device), hard(3, device, dtype)
    for call in (fused, lambda x, t, **extras: BCEWithLogitsLoss(**extras)(x, t)):
        with pytest.raises(error, match=f"ignore_index .*{value}"):
            call(logits, target, ignore_index=value)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_label_smoothing_is_no_tensor(requires_grad, device):
    # Its gradient would be lost; torch's cross_entropy refuses one, too.
    logits = logits_of(3, device)
    smoothing = torch.tensor(0.1, device=device, requires_grad=requires_grad)
    for call in (fused, lambda x, t, **extras: BCEWithLogitsLoss(**extras)(x, t)):
        with pytest.raises(TypeError, match="label_smoothing must be a number"):
            call(logits, logits, label_smoothing=smoothing)
    if requires_grad:
        with pytest.raises(RuntimeError, match=r"not differentiable .* 'label_smoothing'"):
            torch.ops.fused_bce.binary_cross_entropy_with_logits(
                logits, logits, label_smoothing=smoothing
            )


@pytest.mark.parametrize("scalar", [np.int64, np.int8, np.uint8], ids=lambda t: t.__name__)
def test_ignore_index_of_numpy(scalar, device):
    logits, target = logits_of((3, 4), device), hard((3, 4), device)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "validate_targets": True}
        got = fused(logits, target, ignore_index=scalar(1), **options)
        assert torch.equal(got, fused(logits, target, ignore_index=1, **options))


def test_ignore_index_that_just_fits(device):
    for dtype, value in itertools.chain(
        ((torch.int64, s * (2**24 - 1)) for s in (1, -1)),
        ((torch.float16, s * 2048) for s in (1, -1)),
        ((torch.int8, -128), (torch.uint8, 255), (torch.int16, 32767)),
    ):
        target = torch.tensor([value, 1, 0], device=device).to(dtype)
        losses = fused(logits_of(3, device), target, reduction="none", ignore_index=value)
        assert (losses == 0).tolist() == [True, False, False]


def test_neighbours_of_a_large_ignore_index(device):
    # Integers that float32 does not tell apart lie beyond what ignore_index may be.
    largest = 2**24 - 1
    target = torch.tensor([largest, largest + 1, largest + 2, largest - 1], device=device)
    losses = fused(logits_of(4, device), target, reduction="none", ignore_index=largest)
    assert (losses == 0).tolist() == [True, False, False, False]
    assert torch.ops.fused_bce._count_unignored(target, largest).item() == 3


# Module


def test_module(device):
    options = {"label_smoothing": 0.1, "ignore_index": 255}
    loss = BCEWithLogitsLoss(pos_weight=torch.ones(4), validate_targets=True, **options).to(device)
    assert repr(loss) == (
        "BCEWithLogitsLoss(label_smoothing=0.1, ignore_index=255, validate_targets=True)"
    )
    assert set(loss.state_dict()) == {"pos_weight"}
    logits, target = logits_of((3, 4), device), hard((3, 4), device, torch.uint8)
    target[0] = 255
    expected = fused(logits, target, pos_weight=loss.pos_weight, **options)
    for twin in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(logits, target), expected)


def test_arguments_are_keywords_only(device):
    logits = logits_of(3, device)
    with pytest.raises(TypeError):
        fused(logits, logits, None, None, None, "mean", None, 0.1)
    with pytest.raises(TypeError):
        BCEWithLogitsLoss(None, None, None, "mean", None, 0.1)


def test_patched_and_converted(device):
    logits, target = logits_of((3, 4), device).requires_grad_(), hard((3, 4), device)
    loss = torch.nn.BCEWithLogitsLoss()
    expected = fused(logits, target)
    with fused_bce.patch():
        assert torch.equal(loss(logits, target), expected)
        smoothed = F.binary_cross_entropy_with_logits(logits, target, label_smoothing=0.5)
        assert torch.equal(smoothed, fused(logits, target, label_smoothing=0.5))
    converted = fused_bce.convert(loss)
    assert torch.equal(converted(logits, target), expected)
    converted.ignore_index = 0
    assert torch.equal(converted(logits, target), fused(logits, target, ignore_index=0))


def test_apply(device):
    logits, target = logits_of((3, 4), device).requires_grad_(), hard((3, 4), device, torch.int8)
    loss = fused_bce.BCEWithLogitsFunction.apply(
        logits, target, None, None, 1, None, label_smoothing=torch.tensor(0.25), ignore_index=1
    )
    assert torch.equal(loss, fused(logits, target, label_smoothing=0.25, ignore_index=1))
