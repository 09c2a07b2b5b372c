"""Derivatives of the first to the third order."""

import pytest
import torch
from autograd_cases import DOUBLE, problem, same_for_both
from helpers import by_reduction, fused

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")


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
