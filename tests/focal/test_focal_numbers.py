"""alpha and the exponents as torchvision takes them: tensors, learnable, and any number."""

import math

import pytest
import torch
from focal_reference import by_torchvision
from helpers import assert_double_close, draw, evaluate
from torch.nn import Parameter

import fused_bce
from fused_bce import SigmoidFocalLoss
from fused_bce.functional import sigmoid_focal_loss

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")

DOUBLE = torch.float64
SHAPE = (6, 5)
TENSORS = {
    "gamma": {"gamma": torch.tensor(2.0)},
    "gamma of one element": {"gamma": torch.full((1,), 1.5)},
    "gamma of columns": {"gamma": torch.linspace(0.5, 3, 5)},
    "gamma of elements": {"gamma": torch.linspace(0.5, 3, 30).reshape(SHAPE)},
    "gamma that broadcasts the logits": {"gamma": torch.linspace(1, 2, 60).reshape(2, *SHAPE)},
    "alpha": {"alpha": torch.tensor(0.4), "gamma": 1.5},
    "both": {"alpha": torch.tensor(0.4), "gamma": torch.tensor(0.5)},
    "gamma_neg": {"gamma": 1.0, "gamma_neg": torch.tensor(3.0)},
    "gamma beside gamma_neg": {"gamma": torch.tensor(1.0), "gamma_neg": 3.0},
    "both exponents": {"gamma": torch.tensor(1.0), "gamma_neg": torch.linspace(1, 4, 5)},
}


def batch(device):
    """Without tails, where torchvision's arithmetic loses digits also in float64."""
    logits, target = draw(SHAPE, device, DOUBLE, DOUBLE)
    return (logits / 4).requires_grad_(), target


def assert_same(got, want):
    """As assert_double_close, where both may be nan."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("numbers", TENSORS.values(), ids=TENSORS)
def test_tensors(numbers, device):
    """Loss and all gradients are torchvision's in float64."""
    logits, target = batch(device)
    results = []
    for loss in (sigmoid_focal_loss, by_torchvision):
        learned = {
            name: Parameter(value.to(device, DOUBLE)) if torch.is_tensor(value) else value
            for name, value in numbers.items()
        }
        leaves = [logits, *(v for v in learned.values() if torch.is_tensor(v))]
        losses = loss(logits, target, **learned)
        weights = torch.linspace(0.5, 2, losses.numel(), device=device).reshape(losses.shape)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert_double_close(got, want)


def test_a_learned_gamma(device):
    """Values of torchvision 0.29"""
    logits = torch.tensor([0.5, -1.0, 2.0], device=device)
    target = torch.tensor([1.0, 0.0, 1.0], device=device)
    gamma = Parameter(torch.tensor(2.0, device=device))
    loss = sigmoid_focal_loss(logits, target, gamma=gamma, reduction="sum")
    loss.backward()
    assert round(loss.item(), 4) == 0.0343
    assert round(gamma.grad.item(), 4) == -0.0397


def test_an_alpha_for_each_element(device):
    """Which torchvision does not take: as one call for each."""
    logits, target = batch(device)
    alphas = torch.linspace(-0.3, 1.2, 5, dtype=DOUBLE, device=device)
    want = [by_torchvision(logits[:, i], target[:, i], a) for i, a in enumerate(alphas.tolist())]
    assert_double_close(sigmoid_focal_loss(logits, target, alphas), torch.stack(want, 1))


NUMBERS = {
    "alpha above 1": {"alpha": 1.5},
    "alpha between -1 and 0": {"alpha": -0.5},
    "alpha nan": {"alpha": math.nan},
    "gamma -1": {"gamma": -1},
    "gamma -0.5": {"gamma": -0.5},
    "gamma nan": {"gamma": math.nan},
    "gamma infinite": {"gamma": math.inf},
    "gamma 2e6": {"gamma": 2e6},
    "gamma_neg -1": {"gamma_neg": -1},
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_numbers_out_of_range(compiled, numbers, device):
    logits, target = batch(device)

    def loss(x, t):
        return sigmoid_focal_loss(x, t, **numbers)

    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = evaluate(loss, logits, target)
    want = evaluate(by_torchvision, logits, target, **numbers)
    assert_same(got.loss, want.loss)
    assert_same(got.grad_logits, want.grad_logits)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_tails_of_a_tensor(gamma, device):
    """As exact as with a number, where a power below 1 or 2 has poles at 0."""
    logits = torch.tensor([-60.0, -17, 17, 60], device=device)
    for t in (0.0, 1.0):
        target = torch.full_like(logits, t)
        by_number = evaluate(sigmoid_focal_loss, logits, target, gamma=gamma)
        tensor = torch.tensor(gamma, device=device, requires_grad=True)
        by_tensor = evaluate(sigmoid_focal_loss, logits, target, gamma=tensor)
        for got, want in zip(by_tensor[:2], by_number[:2], strict=True):
            # Of an exponent of up to 87 the rounding error is some 2^-18.
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-37)
        (slope,) = torch.autograd.grad(
            sigmoid_focal_loss(logits, target, gamma=tensor).sum(), tensor
        )
        assert slope.isfinite()


@pytest.mark.parametrize("gamma", [2.0, 3.0, 1.5])
def test_tensors_and_targets_outside(gamma, device):
    """A negative 1 - p_t has powers of whole numbers, also where these are tensors."""
    logits = torch.tensor([-3.0, 0.5, 3], dtype=DOUBLE, device=device)
    target = torch.full_like(logits, 2)
    got = evaluate(sigmoid_focal_loss, logits, target, gamma=torch.tensor(gamma, device=device))
    want = evaluate(by_torchvision, logits, target, gamma=gamma)
    assert_same(got.loss, want.loss)
    assert_same(got.grad_logits, want.grad_logits)


def test_dtype_of_the_loss(device):
    """torch's promotion: a tensor of one number has no say."""
    logits, target = draw(SHAPE, device)
    gamma = torch.tensor(2.0, dtype=DOUBLE, device=device)
    for one in (gamma, gamma.expand(5)):
        want = by_torchvision(logits, target, gamma=one)
        got = sigmoid_focal_loss(logits, target, gamma=one)
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # float32 on both sides


def test_what_the_log_says(caplog, monkeypatch):
    monkeypatch.setattr(fused_bce.coverage, "_logged", {})
    logits, target = draw(SHAPE, "cpu")
    with caplog.at_level("INFO", "fused_bce"):
        for gamma in (torch.tensor(2.0), torch.tensor(1.0), -1.0, -2.0):
            sigmoid_focal_loss(logits, target, gamma=gamma)
    assert [record.getMessage() for record in caplog.records] == [
        "not fused: gamma is a tensor",
        "not fused: gamma is out of the range of the kernels",
    ]


def test_a_module_that_learns_its_gamma(device):
    logits, target = batch(device)
    module = SigmoidFocalLoss(reduction="sum").to(device)
    module.gamma = Parameter(torch.tensor(2.0, dtype=DOUBLE, device=device))
    (slope,) = torch.autograd.grad(module(logits, target), module.parameters())
    gamma = module.gamma.detach().requires_grad_()
    (want,) = torch.autograd.grad(by_torchvision(logits, target, gamma=gamma).sum(), gamma)
    assert_double_close(slope, want)
