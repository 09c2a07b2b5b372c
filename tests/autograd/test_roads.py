"""One number by every road: the gradient has the same bits whether it was stored in forward or is
computed in backward, once or again, eagerly or compiled."""

import math

import pytest
import torch
from helpers import (
    FLOATS,
    REDUCTIONS,
    by_dtype,
    by_reduction,
    dtype_name,
    evaluate,
    fused,
    reference,
)

import fused_bce

# More than a chunk of the sum on either device, and an end that fills no vector.
SHAPE = (331, 67)

OPTIONS = {
    "plain": (),
    "weight": ("weight",),
    "pos_weight": ("pos_weight",),
    "both weights": ("weight", "pos_weight"),
    "smoothed": ("label_smoothing",),
    "ignored": ("ignore_index",),
    "all": ("weight", "pos_weight", "label_smoothing", "ignore_index"),
}
by_options = pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)


def draw(dtype, device, names, target_dtype=None):
    """Logits with tails, soft and hard targets, and the options of these names."""
    logits = (torch.randn(SHAPE) * 6).to(device, dtype)
    target = torch.where(torch.rand(SHAPE) < 0.5, torch.rand(SHAPE), torch.rand(SHAPE).round())
    target[torch.rand(SHAPE) < 0.2] = 1
    options = {
        "weight": (torch.rand(SHAPE[0], 1) + 0.5).to(device, dtype),
        "pos_weight": (torch.rand(SHAPE[1]) * 3 + 0.1).to(device, dtype),
        "label_smoothing": 0.1,
        "ignore_index": 1,
    }
    return logits, target.to(device, target_dtype or dtype), {n: options[n] for n in names}


def grad_losses(loss):
    """Ones; a number that no dtype holds; and if there are several losses one for each of them."""
    yield torch.ones_like(loss)
    yield torch.full_like(loss, 0.3)
    # As the sum of the losses passes it on.
    yield torch.full((), 0.3, device=loss.device).to(loss.dtype).expand(loss.shape)
    if loss.dim():
        yield torch.randn(loss.shape, dtype=torch.float64).to(loss)


def stored(call, logits, grad_loss):
    (grad,) = torch.autograd.grad(call(logits), logits, grad_loss)
    return grad


def second(call, logits, grad_loss):
    loss = call(logits)
    torch.autograd.grad(loss, logits, torch.full_like(loss, 7), retain_graph=True)
    (grad,) = torch.autograd.grad(loss, logits, grad_loss)
    return grad


def recomputed(call, logits, grad_loss):
    (grad,) = torch.autograd.grad(call(logits, recompute=True), logits, grad_loss)
    return grad


def under_hooks(call, logits, grad_loss):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss = call(logits)
    (grad,) = torch.autograd.grad(loss, logits, grad_loss)
    return grad


ROADS = (second, recomputed, under_hooks)


def assert_same_bits(got, expected, case):
    # nan is equal to nothing, and has many bits.
    assert got.dtype == expected.dtype
    assert got.stride() == expected.stride()
    assert torch.equal(got.isnan(), expected.isnan()), case
    assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0)), case


def check(logits, target, options, reduction):
    logits.requires_grad_()

    def call(logits, **more):
        return fused(logits, target, reduction=reduction, **options, **more)

    for i, grad_loss in enumerate(grad_losses(call(logits).detach())):
        expected = stored(call, logits, grad_loss)
        for road in ROADS:
            assert_same_bits(road(call, logits, grad_loss), expected, f"{road.__name__} {i}")


@by_options
@by_reduction
@by_dtype
def test_same_bits(dtype, reduction, names, device):
    check(*draw(dtype, device, names), reduction)


@pytest.mark.parametrize("target_dtype", [*FLOATS, torch.bool, torch.int64], ids=dtype_name)
@by_reduction
@by_dtype
def test_same_bits_in_every_pairing(dtype, target_dtype, reduction, device):
    logits, target, options = draw(dtype, device, ("pos_weight",), torch.float32)
    if not target_dtype.is_floating_point:
        target = target.round()
    check(logits, target.to(target_dtype), options, reduction)


@by_reduction
@by_dtype
def test_same_bits_in_other_layouts(dtype, reduction, device):
    logits, target, options = draw(dtype, device, ("weight",))
    check(logits.t(), target.t(), {"weight": options["weight"].t()}, reduction)
    check(logits[:, 1:].detach(), target[:, 1:], options, reduction)


@by_reduction
def test_same_bits_of_numbers_that_are_none(reduction, device):
    logits, target, options = draw(torch.float32, device, ("ignore_index",))
    logits.view(-1)[::97] = math.nan
    logits.view(-1)[1::97] = math.inf
    logits.view(-1)[2::97] = -math.inf
    check(logits, target, options, reduction)


# The graph depends on whether forward stores the gradient, which it does not for float16, and on
# the reduction; inductor, which takes seconds, keeps our operators as they are in it.
@pytest.mark.parametrize(
    ("backend", "dtype", "reduction"),
    [("aot_eager", dtype, r) for dtype in (torch.float16, torch.bfloat16) for r in REDUCTIONS]
    + [("aot_eager", torch.float32, "none"), ("aot_eager", torch.float64, "mean")]
    + [
        ("inductor", torch.float32, "mean"),
        pytest.param("inductor", torch.float16, "none", marks=pytest.mark.large),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.*` is (deprecated|not supported)"
)  # the compiler's own
def test_same_bits_when_compiled(dtype, reduction, backend, device):
    torch.compiler.reset()
    logits, target, options = draw(dtype, device, ("pos_weight", "ignore_index"))
    logits.requires_grad_()

    def call(logits, recompute=False):
        return fused(logits, target, reduction=reduction, recompute=recompute, **options)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for grad_loss in grad_losses(call(logits).detach()):
        expected = stored(call, logits, grad_loss)
        for road in (stored, recomputed):
            got = road(compiled, logits, grad_loss)
            assert_same_bits(got, expected, f"{road.__name__}")


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 0.0, -2.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@by_dtype
def test_ignored_whatever_grad_loss_is(dtype, reduction, factor, device):
    logits, target, options = draw(dtype, device, ("ignore_index",))
    logits.requires_grad_()
    ignored = target == 1

    def call(logits, recompute=False):
        return fused(logits, target, reduction=reduction, recompute=recompute, **options)

    loss = call(logits).detach()
    for grad_loss in (torch.full_like(loss, factor), torch.tensor(factor).to(loss).expand_as(loss)):
        for road in (stored, *ROADS):
            grad = road(call, logits, grad_loss)
            assert (grad[ignored] == 0).all(), road.__name__
            # Of float32, where no gradient here underflows to 0.
            if dtype is torch.float32 and not math.isfinite(factor):
                assert not grad[~ignored].isfinite().any(), road.__name__
    with torch.no_grad():
        assert (loss[ignored] == 0).all() if reduction == "none" else loss.isfinite()


def test_rounded_once_and_once_more(device):
    # With a grad_loss other than 1 the stored gradient is rounded before and after the product:
    # bfloat16 is off by up to 1.5 units in the last place, not 0.5: half a unit of a number just
    # above a power of two is a whole one of its product just below the next.
    logits, target, _ = draw(torch.bfloat16, device, ())
    grad_loss = torch.tensor(0.3, device=device)
    exact = reference(logits, target, reduction="sum", grad_loss=grad_loss)
    got = evaluate(fused, logits, target.float(), reduction="sum", grad_loss=grad_loss)
    assert got.grad_logits.dtype is torch.bfloat16
    unit = torch.ldexp(
        torch.full_like(exact.grad_logits, torch.finfo(torch.bfloat16).eps),
        torch.frexp(exact.grad_logits).exponent - 1,
    )
    error = ((got.grad_logits.cpu().double() - exact.grad_logits).abs() / unit).max()
    assert 0.5 < error <= 1.5


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_recompute_of_the_module(reduction, device):
    logits, target, _ = draw(torch.float32, device, ())
    logits.requires_grad_()
    plain = fused_bce.BCEWithLogitsLoss(reduction=reduction)
    waits = fused_bce.BCEWithLogitsLoss(reduction=reduction, recompute=True)
    converted = fused_bce.convert(torch.nn.BCEWithLogitsLoss(reduction=reduction), recompute=True)
    assert "recompute=True" in repr(waits)
    assert "recompute=True" in repr(converted)
    (expected,) = torch.autograd.grad(plain(logits, target).sum(), logits)
    for module in (waits, converted):
        loss = module(logits, target).sum()
        assert_same_bits(torch.autograd.grad(loss, logits)[0], expected, module)
