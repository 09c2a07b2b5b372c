"""Where torchvision's arithmetic loses its digits or gives nan, on every road: by the kernels,
differentiated twice, and in torch's operations."""

import math

import mpmath
import pytest
import torch
from focal_reference import by_torchvision
from helpers import evaluate

from fused_bce.functional import sigmoid_focal_loss

# Of torch's, on its way to forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")

GAMMAS = (0, 0.3, 0.5, 1, 2, 2.5)
by_gamma = pytest.mark.parametrize("gamma", GAMMAS)


def in_torch(logits, target, **options):
    """The same, left to torch's operations: the kernels give a weight no gradient."""
    weight = torch.ones((), device=logits.device, requires_grad=True)
    return sigmoid_focal_loss(logits, target, weight=weight, **options)


def differentiable_grad(loss, logits):
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    return grad


def second_derivative(x: float, gamma: float) -> float:
    """Of the loss of a negative, by differences in 80 digits."""

    def loss(x):
        return (1 / (1 + mpmath.exp(-x))) ** gamma * mpmath.log(1 + mpmath.exp(x))

    with mpmath.workdps(80):
        return float(mpmath.diff(loss, mpmath.mpf(x), 2))


SECOND_DERIVATIVES = {
    "create_graph": lambda loss, x: torch.autograd.grad(differentiable_grad(loss(x), x).sum(), x)[
        0
    ],
    "hessian": lambda loss, x: torch.func.hessian(lambda x: loss(x).sum())(x).diagonal(),
    "grad of grad": lambda loss, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: loss(x).sum())(x).sum()
    )(x),
}


@pytest.mark.parametrize("by", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)
@by_gamma
def test_second_derivatives(gamma, by, device):
    """Powers below 1 and 2 have poles at 0, and what is 1 less a sigmoid has no digits there."""
    away = [-80.0, -60, -30, -17, -3, 0, 3, 17, 30]
    true = torch.tensor([second_derivative(x, gamma) for x in away], dtype=torch.float64)
    for t in (0.0, 1.0):
        logits = torch.tensor(away, device=device) * (1 - 2 * t)
        target = torch.full_like(logits, t)
        got = by(lambda x, t=target: sigmoid_focal_loss(x, t, -1, gamma), logits.requires_grad_())
        # Some twenty roundings; on the wrong side, of terms up to 30 times as large. What
        # underflows may be 0.
        torch.testing.assert_close(got.cpu().double(), true, rtol=4e-5, atol=1e-37)


@by_gamma
def test_gradients_at_infinite_logits(gamma, device):
    """The limits, also where the gradient is differentiable."""
    inf = math.inf
    logits = torch.tensor([inf, inf, inf, -inf, -inf, -inf], device=device, requires_grad=True)
    target = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.5, 1.0], device=device)
    half = 0.5**gamma / 2
    expected = torch.tensor([1, half, 0, 0, -half, -1], device=device)
    loss = sigmoid_focal_loss(logits, target, -1, gamma)
    torch.testing.assert_close(differentiable_grad(loss, logits), expected)
    assert in_torch(logits, target, alpha=-1, gamma=gamma).tolist() == loss.tolist()


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 2.5, 3, 4])
@pytest.mark.parametrize("t", [2.0, -1.0, 255.0, -0.5, 1.25])
def test_targets_outside(t, gamma, kernel_device):
    """They follow the formula, as upstream's: a negative 1 - p_t has powers, some of them nan."""
    x = torch.tensor([-3.0, -0.5, 0, 0.5, 3, 30], device=kernel_device)
    target = torch.full_like(x, t)
    options = {"alpha": -1, "gamma": gamma}
    want = evaluate(by_torchvision, x.cpu().double(), target.cpu().double(), **options)
    logits = x.clone().requires_grad_()
    grad = differentiable_grad(sigmoid_focal_loss(logits, target, **options), logits)
    by_kernel = evaluate(sigmoid_focal_loss, x, target, **options)
    by_torch = evaluate(in_torch, x, target, **options)
    losses, grads = (by_kernel.loss, by_torch.loss), (by_kernel.grad_logits, by_torch.grad_logits)
    for results, expected in ((losses, want.loss), ((*grads, grad), want.grad_logits)):
        for result in results:
            # A gradient is a difference here, too, of terms up to a power of the target.
            scale = max(1, abs(t)) ** gamma
            torch.testing.assert_close(
                result.detach().cpu().double(),
                expected,
                rtol=2e-5,
                atol=2e-6 * scale,
                equal_nan=True,
            )


def test_targets_outside_with_two_exponents(device):
    x, target = torch.zeros(2, device=device), torch.tensor([0.5, 4.0], device=device)
    for loss in (sigmoid_focal_loss, in_torch):
        assert loss(x, target, gamma=1, gamma_neg=2).isnan().tolist() == [False, False]
        assert loss(x + 3, target, gamma=1, gamma_neg=2).isnan().tolist() == [False, True]


def test_a_large_power_is_infinite(kernel_device):
    x, target = torch.zeros(3, device=kernel_device), torch.full((3,), -9.0, device=kernel_device)
    x += 5
    want = by_torchvision(x.cpu(), target.cpu(), -1, 100.5)
    assert want.isinf().all()
    assert torch.equal(sigmoid_focal_loss(x, target, -1, 100.5).cpu(), want)
