"""Accuracy of the focal loss in units in the last place, against its definition at 40 digits."""

import math

import mpmath
import numpy as np
import pytest
import torch
from focal_reference import ALPHAS, GAMMAS, alpha_of, to_40_digits
from helpers import EMULATES_CUDA, dtype_name

OPS = torch.ops.fused_bce
NONE = 0
# The goal. Three factors, each with errors of one to three units; up to a gamma of 4, since a power
# multiplies the error of what it is a power of.
MAX_ULP = 8
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
# Where exp(-|x|) stays a normal number.
LARGEST = {torch.float32: 87.0, torch.float64: 707.0}

by_gamma = pytest.mark.parametrize("gamma", [*GAMMAS, 1.3])


def evaluate(logits, target, alpha, gamma, device):
    """Loss and gradient of each element, on the CPU."""
    numbers = alpha, gamma, gamma
    results = OPS._sigmoid_focal_loss_with_grad(
        logits.to(device), target.to(device), None, None, *numbers, 0.0, NONE
    )
    return [result.cpu() for result in results]


def points(dtype) -> torch.Tensor:
    """Logits dense near 0, and in both tails."""
    random = np.random.default_rng(0)
    parts = [
        random.uniform(-1, 1, 100),
        random.uniform(-20, 20, 150),
        random.uniform(-LARGEST[dtype], LARGEST[dtype], 150),
        random.uniform(-1, 1, 50) * 2.0 ** random.uniform(-30, 0, 50),
        [0.0, -0.0],
    ]
    return torch.from_numpy(np.concatenate(parts)).to(dtype)


def largest_ulp(result, true, w: float) -> float:
    """From w times the true values, in units of the last place; what is below the smallest normal
    number must be about 0."""
    smallest = SMALLEST_NORMAL[result.dtype]
    numpy_dtype = result.numpy().dtype.type
    largest = 0.0
    for got, value in zip(result.tolist(), true, strict=True):
        want = float(w * value)
        if abs(want) < smallest:
            assert abs(got) <= 2 * smallest
            continue
        with mpmath.workdps(40):
            error = abs(mpmath.mpf(got) - w * value)
        largest = max(largest, float(error) / float(np.spacing(numpy_dtype(abs(want)))))
    return largest


@by_gamma
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_hard_targets(kernel_device, dtype, gamma, request, capsys):
    logits = points(dtype)
    loss_ulp = grad_ulp = 0.0
    for t in (0.0, 1.0):
        true = [to_40_digits(x, t, gamma) for x in logits.tolist()]
        for alpha in ALPHAS:
            loss, grad = evaluate(logits, torch.full_like(logits, t), alpha, gamma, kernel_device)
            w = alpha_of(alpha, t)
            loss_ulp = max(loss_ulp, largest_ulp(loss, [value for value, _ in true], w))
            grad_ulp = max(grad_ulp, largest_ulp(grad, [value for _, value in true], w))
    kernel = request.node.callspec.params["kernel_device"]
    with capsys.disabled():
        print(
            f"\n  focal, gamma {gamma}, {dtype_name(dtype)} on {kernel}: "
            f"loss {loss_ulp:.2f} ULP, gradient {grad_ulp:.2f} ULP"
        )
    assert loss_ulp <= MAX_ULP
    assert grad_ulp <= MAX_ULP


def ulp_of_hard_targets(x, t, alpha, gamma, device):
    """Of loss and gradient, against logarithms in float64, whose own errors are 1e-13."""
    loss, grad = evaluate(x, torch.full_like(x, t), alpha, gamma, device)
    away = (1 - 2 * t) * x.double()  # grows with the loss
    log_m, log_n = (torch.nn.functional.logsigmoid(s) for s in (away, -away))
    weighted = alpha_of(alpha, t) * torch.exp(gamma * log_m)
    true = weighted * -log_n
    true_grad = weighted * (gamma * log_n.exp() * -log_n + log_m.exp())
    largest = []
    for got, want in ((loss, true), ((1 - 2 * t) * grad, true_grad)):
        normal = want >= SMALLEST_NORMAL[torch.float32]
        unit = torch.from_numpy(np.spacing(want.float().numpy())).double()
        error = (got.double() - want).abs()
        largest.append((error / unit).where(normal, 0).max().item())
        assert not gamma or got.abs().where(~normal, 0).max() <= 2 * SMALLEST_NORMAL[torch.float32]
    return largest


@by_gamma
def test_many_hard_targets(kernel_device, gamma):
    x = (torch.rand(15_000, dtype=torch.float64) * 2 - 1) * 87
    # The worst that were found
    x[:6] = torch.tensor([-16.926586151123047, 0.06195836, 0.07004052, 0.1065069, -13.83281, 87])
    for t in (0.0, 1.0):
        assert max(ulp_of_hard_targets(x.float(), t, -1, gamma, kernel_device)) <= MAX_ULP
        assert max(ulp_of_hard_targets(x.float(), t, 0.25, gamma, kernel_device)) <= MAX_ULP


@pytest.mark.large
@by_gamma
def test_very_many_hard_targets(kernel_device, gamma, request, capsys):
    """One float in 37 of each sign from 2^-12 to 87: the figures in docs/focal.md."""
    first, last = (torch.tensor(x).view(torch.int32).item() for x in (2.0**-12, 87.0))
    largest = [0.0, 0.0]
    for begin in range(first, last, 37 << 20):
        bits = torch.arange(begin, min(begin + (37 << 20), last), 37, dtype=torch.int32)
        for x in (bits.view(torch.float32), -bits.view(torch.float32)):
            for alpha in (0.25, -1):
                ulp = ulp_of_hard_targets(x, 0.0, alpha, gamma, kernel_device)
                largest = [max(pair) for pair in zip(largest, ulp, strict=True)]
    kernel = request.node.callspec.params["kernel_device"]
    with capsys.disabled():
        print(f"\n  focal, gamma {gamma}, float32 on {kernel}: loss, gradient {largest}")
    assert max(largest) <= MAX_ULP


@by_gamma
@pytest.mark.parametrize("alpha", ALPHAS)
def test_soft_targets(kernel_device, alpha, gamma):
    """The loss in relative terms. The gradient is a difference, which has a zero: a few roundings
    of its largest term, which is below 4."""
    logits = points(torch.float32)[::8]
    target = torch.rand(len(logits), generator=torch.Generator().manual_seed(0))
    target[::3] *= 2.0**-10  # nearly hard
    target[1::3] = 1 - target[1::3] * 2.0**-10
    loss, grad = evaluate(logits, target, alpha, gamma, kernel_device)
    for x, t, got_loss, got_grad in zip(
        *map(torch.Tensor.tolist, (logits, target, loss, grad)), strict=True
    ):
        true_loss, true_grad = (float(v) * alpha_of(alpha, t) for v in to_40_digits(x, t, gamma))
        # As many units as for hard targets, in 2^-23; half of one from 1 - t; and those of a power
        # of 1 - p_t, of whose logarithm the rounding error counts gamma times.
        wrong = t / (1 + math.exp(x)) + (1 - t) / (1 + math.exp(-x))
        units = 10 - (0 if gamma in (0, 1, 2) else gamma * math.log(wrong) / 2)
        assert abs(got_loss - true_loss) <= units * 2.0**-23 * abs(true_loss)
        scale = max(1.0, abs(true_loss))
        assert abs(got_grad - true_grad) <= 10 * 2.0**-23 * scale


def test_almost_hard_targets(kernel_device):
    """What is left of a soft target's other half decides in the tail."""
    logits = torch.tensor([-60.0, -30, -15, 15, 30, 60])
    for t in (1e-30, 1e-10, 1e-5):
        target = torch.full_like(logits, t)
        loss, _ = evaluate(logits, target, -1, 0.5, kernel_device)
        for x, got in zip(logits.tolist(), loss.tolist(), strict=True):
            # A target of 1e-30 as a float32; the logarithm of 1 - p_t has units of 2^-18 there.
            true, _ = to_40_digits(x, float(target[0]), 0.5)
            assert abs(got - true) <= 2.0**-18 * true


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_gamma_0_is_weighted_cross_entropy(kernel_device, dtype, alpha):
    """To the bit; in CUDA's kernels weights take the arithmetic of a pos_weight, each to 4 ULP."""
    rtol = 8 * torch.finfo(dtype).eps if EMULATES_CUDA or kernel_device == "cuda" else 0
    logits = (torch.randn(1000) * 10).to(kernel_device, dtype)
    target = torch.rand(1000).round().to(kernel_device, dtype)
    weight = torch.ones_like(target) if alpha < 0 else target.where(target == 0, alpha)
    weight = weight.where(target == 1, weight + (0 if alpha < 0 else 1 - alpha))
    focal = OPS._sigmoid_focal_loss_with_grad(
        logits, target, None, None, alpha, 0.0, 0.0, 0.0, NONE
    )
    plain = OPS._binary_cross_entropy_with_logits_with_grad(logits, target, weight, None, NONE)
    for got, want in zip(focal, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=0)
