"""Backward passes: again and again, from any gradient of the loss, in training.

What is stored and what is recomputed depends on the dtype (float16) and on the reduction (none).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from autograd_cases import DOUBLE, by_target_grad, problem, same_for_both
from helpers import (
    assert_double_close,
    assert_no_worse,
    by_dtype,
    by_reduction,
    by_weights,
    dtype_name,
    evaluate,
    fused,
    is_fused,
    make_weights,
    reference,
    torch_bce,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@by_dtype
@by_reduction
@by_target_grad
def test_backward_again_and_again(target_grad, reduction, dtype, device):
    logits, target = problem(device, dtype, target_grad)
    leaves = (logits, target) if target_grad else (logits,)
    loss = fused(logits, target, reduction=reduction)
    grad_loss = torch.full_like(loss, 3.0)
    first, second, third = (
        torch.autograd.grad(loss, leaves, grad_loss, retain_graph=True) for _ in range(3)
    )
    assert_no_worse(
        first[0],
        evaluate(torch_bce, logits, target, grad_loss=grad_loss, reduction=reduction).grad_logits,
        reference(logits, target, grad_loss=grad_loss, reduction=reduction).grad_logits,
    )
    # Recomputed with another order of roundings: grad_loss meets 1/N before the gradient, not after
    torch.testing.assert_close(second, first)
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


@by_reduction
def test_second_backward_needs_retain_graph(reduction, device):
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


@by_reduction
def test_different_grad_loss_each_time(reduction, device):
    # A stored gradient that has been scaled once must not be scaled again.
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction)
    unit = evaluate(torch_bce, logits, target, reduction=reduction).grad_logits
    for scale in (2.0, 0.5, 1.0, -4.0):
        grad_loss = torch.full_like(loss, scale)
        (grad,) = torch.autograd.grad(loss, logits, grad_loss, retain_graph=True)
        assert_double_close(grad, scale * unit)


GRAD_LOSSES = {
    "random": lambda t: torch.rand_like(t),
    "expanded_number": lambda t: torch.tensor(2.0, dtype=t.dtype, device=t.device).expand(t.shape),
    "expanded_row": lambda t: torch.rand(4, dtype=t.dtype, device=t.device).expand(t.shape),
    "expanded_column": lambda t: torch.rand(3, 1, dtype=t.dtype, device=t.device).expand(t.shape),
    "transposed": lambda t: torch.rand(4, 3, dtype=t.dtype, device=t.device).t(),
    "sliced": lambda t: torch.rand(3, 8, dtype=t.dtype, device=t.device)[:, 1::2],
    "flipped_sign_view": lambda t: torch._neg_view(torch.rand_like(t)),
    "zeros_without_memory": lambda t: torch._efficientzerotensor(
        t.shape, dtype=t.dtype, device=t.device
    ),
    "nan": lambda t: torch.full_like(t, torch.nan),
}


@by_dtype
@pytest.mark.parametrize("make", GRAD_LOSSES.values(), ids=GRAD_LOSSES)
def test_grad_loss_of_any_layout(make, dtype, device):
    logits, target = problem(device, dtype, target_grad=True)
    with torch.no_grad():
        grad_loss = make(target)
    grads = [
        torch.autograd.grad(f(logits, target, reduction="none"), (logits, target), grad_loss)
        for f in (fused, torch_bce)
    ]
    exact = reference(logits, target, grad_loss=grad_loss, reduction="none")
    if grad_loss.isnan().any():
        assert all(g.isnan().all() for g in grads[0])
    else:
        assert_no_worse(grads[0][0], grads[1][0], exact.grad_logits)
        assert_no_worse(grads[0][1], grads[1][1], exact.grad_target)


@by_reduction
@pytest.mark.parametrize("make", [torch._neg_view, torch.zeros_like], ids=["neg_view", "zero"])
def test_unusual_numbers_as_grad_loss(make, reduction, device):
    logits, target = problem(device)

    def compute(function):
        loss = function(logits, target, reduction=reduction)
        return torch.autograd.grad(loss, logits, make(torch.ones_like(loss)))

    same_for_both(compute)


@by_reduction
@by_weights
def test_none_then_reduced_by_hand(weights, reduction, device):
    # The usual way to mask: the gradient of the sum is a number expanded to the whole shape.
    logits, target = problem(device)
    mask = torch.rand(3, 4, device=device) < 0.5
    weights = make_weights(weights, 4, device, DOUBLE)

    def compute(function):
        losses = function(logits, target, reduction="none", **weights)
        loss = {"none": losses * mask, "mean": losses.mean(), "sum": losses.sum()}[reduction]
        return torch.autograd.grad(loss.sum(), logits)

    same_for_both(compute)


@by_dtype
@by_reduction
@by_weights
def test_gradient_of_the_target_alone(weights, reduction, dtype, device):
    logits = torch.randn(3, 4, device=device).to(dtype)
    target = torch.rand(3, 4, device=device).to(dtype).requires_grad_()
    options = {"reduction": reduction, **make_weights(weights, 4, device, dtype)}
    losses = [f(logits, target, **options) for f in (fused, torch_bce)]
    assert is_fused(losses[0])
    ours, theirs = (torch.autograd.grad(loss.sum(), target)[0] for loss in losses)
    assert logits.grad is None
    assert_no_worse(ours, theirs, reference(logits, target, **options).grad_target)


@by_reduction
def test_one_gradient_at_a_time(reduction, device):
    # Asked for the target's gradient first, the node keeps or drops what it stored for the logits.
    logits, target = problem(device, target_grad=True)

    def compute(function):
        loss = function(logits, target, reduction=reduction).sum()
        order = (target, logits, target, logits)
        return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in order]

    same_for_both(compute)


@by_reduction
def test_accumulation(reduction, device):
    # Two losses of the same logits, on top of a gradient that is already there.
    logits, target = problem(device)
    other = torch.rand_like(target)

    def compute(function):
        logits.grad = torch.full_like(logits, 7.0)
        function(logits, target, reduction=reduction).sum().backward()
        first = logits.grad.clone()
        both = function(logits, target, reduction=reduction) * 2
        (both + function(logits, other, reduction=reduction)).sum().backward()
        return first, logits.grad

    same_for_both(compute)


def test_hooks_on_logits_may_replace_the_gradient(device):
    logits, target = problem(device)
    hidden = logits * 2

    def compute(function):
        handle = hidden.register_hook(lambda g: g.mul(10))
        loss = function(hidden, target)
        grads = torch.autograd.grad(loss, (logits, hidden), retain_graph=True)
        handle.remove()
        return grads

    same_for_both(compute)


def test_hooks_on_the_node(device):
    logits, target = problem(device)
    seen = []

    def compute(function):
        loss = function(logits, target)
        loss.grad_fn.register_prehook(lambda grad_loss: (grad_loss[0] * 5,))
        loss.grad_fn.register_hook(lambda grads, grad_losses: seen.append(grads[0].clone()))
        loss.register_hook(lambda grad_loss: grad_loss * 3)
        return torch.autograd.grad(loss, logits)

    (ours,) = same_for_both(compute)
    assert_double_close(seen[0], ours)
    assert_double_close(ours, 15 * evaluate(torch_bce, logits, target).grad_logits)


@pytest.mark.parametrize("scale", [1.0, 256.0, 65536.0], ids=["no_scale", "256", "65536"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_half_precision_with_a_loss_scale(dtype, reduction, scale, device):
    # As GradScaler does: the mean of 2^20 float16 gradients underflows unless the scale is in time.
    numel = 2**20 if reduction == "mean" else 2**10
    scale = scale if reduction == "mean" else min(scale, 256.0)
    logits = torch.randn(numel, device=device).to(dtype).requires_grad_()
    target = torch.randint(2, (numel,), device=device).float()
    loss = fused(logits, target, reduction=reduction)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, scale))
    grad_loss = torch.full_like(loss, scale)
    exact = reference(logits, target, grad_loss=grad_loss, reduction=reduction).grad_logits
    rounding = torch.finfo(dtype).eps / 2
    # Stored rounded and then scaled, or the other way round: two roundings at most; below the
    # smallest normal float16 the spacing is fixed.
    spacing = 2.0**-24 if dtype is torch.float16 else 0.0
    assert ((grad.cpu().double() - exact).abs() <= 2 * rounding * exact.abs() + spacing).all()
    assert grad.dtype == dtype


def teacher_problem(device):
    """A task that a small network can learn."""
    samples = torch.randn(512, 20)
    target = (samples @ torch.randn(20, 10) > 0).float()
    return samples.to(device), target.to(device)


def train(function, half, device, steps=60):
    """Losses of a small network, under autocast and with a loss scale if ``half``."""
    torch.manual_seed(0)
    samples, target = teacher_problem(device)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=half)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16, enabled=half):
            logits = model(samples)
            loss = function(logits, target)
        assert logits.dtype == (torch.float16 if half else torch.float32)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def test_training_with_a_loss_scale(device):
    half, single, theirs = (
        train(function, half, device)
        for function, half in ((fused, True), (fused, False), (torch_bce, False))
    )
    assert single == pytest.approx(theirs, rel=1e-4)
    # Matrix products of float16 have 11 bits.
    assert half == pytest.approx(single, rel=1e-2)
    assert half[-1] < 0.5 * half[0]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@by_reduction
def test_no_gradient_wanted(context, reduction, device):
    logits, target = problem(device)
    # Allowed here, since nothing is differentiated.
    weight = torch.rand(4, dtype=DOUBLE, device=device, requires_grad=True)
    expected = fused(logits, target, weight.detach(), reduction=reduction).detach()
    with context():
        loss = fused(logits, target, weight, reduction=reduction)
        assert torch.equal(loss, expected)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert loss.is_inference() == (context is torch.inference_mode)


def test_inference_tensors(device):
    with torch.inference_mode():
        logits, target = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    torch.testing.assert_close(fused(logits, target), torch_bce(logits, target))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        fused(torch.zeros(3, 4, device=device, requires_grad=True), target)


def test_constant_logits_have_no_graph(device):
    loss = fused(torch.zeros(3, device=device), torch.ones(3, device=device))
    assert not loss.requires_grad
    assert loss.grad_fn is None


@by_reduction
def test_concurrent_backwards(reduction, device):
    # Several threads ask one node for its gradient; one of them gets the stored one.
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction).sum()
    unit = evaluate(torch_bce, logits, target, reduction=reduction).grad_logits

    def backward(scale):
        grad_loss = torch.full_like(loss, scale)
        return torch.autograd.grad(loss, logits, grad_loss, retain_graph=True)[0]

    with ThreadPoolExecutor(4) as pool:
        for scale, grad in enumerate(pool.map(backward, range(20))):
            assert_double_close(grad, scale * unit)


class KeepResults(TorchDispatchMode):
    """As a debugger does, of every operator."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.kept += tree_leaves(result)
        return result


def test_a_gradient_that_somebody_keeps_is_not_scaled(device):
    logits, target = problem(device)
    with KeepResults() as mode:
        loss = fused(logits, target, reduction="sum")
    kept = [result for result in mode.kept if result.shape == logits.shape]
    copies = [result.clone() for result in kept]
    assert copies
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 3.0))
    assert_double_close(grad, 3 * evaluate(torch_bce, logits, target, reduction="sum").grad_logits)
    assert all(map(torch.equal, kept, copies))


def test_anomaly_mode(device):
    logits, target = problem(device)
    with torch.autograd.set_detect_anomaly(True):
        (grad,) = torch.autograd.grad(fused(logits, target), logits)
    assert_double_close(grad, evaluate(torch_bce, logits, target).grad_logits)


def test_backward_inside_and_outside_autocast(device):
    # Backward must not depend on the autocast state of the caller.
    logits, target = problem(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = torch.autograd.grad(fused(logits, target), logits)[0]
        loss = fused(logits, target, reduction="none")
    outside = torch.autograd.grad(loss.sum(), logits)[0]
    exact = reference(logits, target)
    sums = reference(logits, target, reduction="none")
    torch.testing.assert_close(inside.cpu().double(), exact.grad_logits, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(outside.cpu().double(), sums.grad_logits, rtol=1e-5, atol=1e-7)
