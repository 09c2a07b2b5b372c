"""Derivatives of the first to the third order."""

import pytest
import torch
from autograd_cases import DOUBLE, by_target_grad, problem, same_for_both
from helpers import by_reduction, by_weights, fused, is_fused, make_weights

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")


@by_reduction
@by_weights
@by_target_grad
def test_gradcheck(target_grad, weights, reduction, device):
    logits, target = problem(device, target_grad=target_grad, shape=(2, 3))
    weights = make_weights(weights, 3, device, DOUBLE)

    def loss(logits, target):
        return fused(logits, target, reduction=reduction, **weights)

    assert is_fused(loss(logits, target))
    torch.autograd.gradcheck(loss, (logits, target), check_forward_ad=True, check_batched_grad=True)


@by_reduction
@by_weights
@by_target_grad
def test_gradgradcheck(target_grad, weights, reduction, device):
    logits, target = problem(device, target_grad=target_grad, shape=(2, 3))
    weights = make_weights(weights, 3, device, DOUBLE)
    torch.autograd.gradgradcheck(
        lambda logits, target: fused(logits, target, reduction=reduction, **weights),
        (logits, target),
        gen_non_contig_grad_outputs=True,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recompute"])
@pytest.mark.parametrize("weights", [(), ("weight", "pos_weight")], ids=["unweighted", "both"])
@by_reduction
def test_gradcheck_in_fast_mode(reduction, weights, recompute, device):
    # It calls backward twice with a random grad_loss, and wants the same bits.
    logits, target = problem(device)
    weights = make_weights(weights, 4, device, DOUBLE)

    def loss(logits):
        return fused(logits, target, reduction=reduction, recompute=recompute, **weights)

    for fast_mode in (False, True):
        torch.autograd.gradcheck(loss, logits, fast_mode=fast_mode, nondet_tol=0)
        torch.autograd.gradgradcheck(loss, logits, fast_mode=fast_mode, nondet_tol=0)


@by_reduction
def test_gradcheck_of_large_logits(reduction, device):
    # On both branches of the formula, away from the kink of |x| at 0.
    logits = torch.tensor([-30.0, -5.0, -0.5, 0.5, 5.0, 30.0], dtype=DOUBLE, device=device)
    target = torch.tensor([0.0, 1.0, 0.3, 0.7, 0.0, 1.0], dtype=DOUBLE, device=device)
    inputs = (logits.requires_grad_(), target.requires_grad_())
    torch.autograd.gradcheck(lambda x, t: fused(x, t, reduction=reduction), inputs)
    torch.autograd.gradgradcheck(lambda x, t: fused(x, t, reduction=reduction), inputs)


@by_reduction
def test_gradient_at_zero_is_smooth(reduction, device):
    # |x| has a kink at 0; the loss has none.
    logits = torch.zeros(3, 4, dtype=DOUBLE, device=device, requires_grad=True)
    target = torch.rand(3, 4, dtype=DOUBLE, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x, t: fused(x, t, reduction=reduction), (logits, target))
    torch.autograd.gradgradcheck(lambda x, t: fused(x, t, reduction=reduction), (logits, target))


@by_reduction
@by_weights
@by_target_grad
def test_gradient_penalty(target_grad, weights, reduction, device):
    # WGAN-GP and its kin: a gradient stored as a constant would give second derivatives of 0.
    logits, target = problem(device, target_grad=target_grad)
    weights = make_weights(weights, 4, device, DOUBLE)
    leaves = (logits, target) if target_grad else (logits,)

    def compute(function):
        loss = function(logits, target, reduction=reduction, **weights)
        first = torch.autograd.grad((loss**2).sum(), leaves, create_graph=True)
        penalty = sum((g**2).sum() for g in first)
        return (*first, *torch.autograd.grad(penalty, leaves))

    second = same_for_both(compute)[len(leaves)]
    assert second.abs().max() > 0


@by_reduction
def test_create_graph_then_a_plain_backward(reduction, device):
    logits, target = problem(device, target_grad=True)

    def compute(function):
        loss = function(logits, target, reduction=reduction).sum()
        (penalty,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(loss + penalty.pow(2).sum(), (logits, target))

    same_for_both(compute)


def test_third_derivative(device):
    logits, target = problem(device)

    def compute(function):
        value = function(logits, target, reduction="sum")
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, logits, create_graph=True)
            value = grad.sum()
        return grad.detach()

    same_for_both(compute)


def test_grad_loss_that_requires_grad(device):
    # The gradient is linear in grad_loss, which may be a variable of its own.
    logits, target = problem(device)
    vector = torch.rand(3, 4, dtype=DOUBLE, device=device, requires_grad=True)

    def compute(function):
        loss = function(logits, target, reduction="none")
        (grad,) = torch.autograd.grad(loss, logits, vector, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (vector, logits))

    same_for_both(compute)
