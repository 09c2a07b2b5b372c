"""Accuracy of every pointwise loss in units in the last place, against its definition at 40 digits,
by each instruction set; and the limits where logits are large or infinite."""

import functools
import math

import mpmath
import numpy as np
import pytest
import torch
from helpers import dtype_name, evaluate
from loss_cases import ASYMMETRIC, BCE, FOCAL, LOSSES, QUALITY_FOCAL, VARIFOCAL

# The goal. Three factors, each with errors of one to three units, for exponents up to 5: a power
# multiplies the error of what it is a power of.
MAX_ULP = 10
# By how many units exp(-|x|) may be off.
UNITS_OF_EXP = 4
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
# Where exp(-|x|) stays a normal number.
LARGEST = {torch.float32: 87.0, torch.float64: 707.0}

# The kernels have code of their own for the exponents 0, 1 and 2.
NUMBERS = {
    BCE: [{}],
    FOCAL: [{"gamma": g} for g in (0, 1, 2, 0.5, 4)] + [{"gamma": 1, "gamma_neg": 2.5}],
    QUALITY_FOCAL: [{"beta": b} for b in (0, 1, 2, 0.5, 2.5, 5)],
    VARIFOCAL: [{"gamma": g} for g in (0, 1, 2, 0.5, 5)] + [{"alpha": 2, "detach_weight": True}],
    ASYMMETRIC: [
        {},
        {"clip": 0, "gamma_neg": 0, "gamma_pos": 0},
        {"clip": 0, "gamma_neg": 2.5, "gamma_pos": 0.5},
        {"clip": 0, "gamma_neg": 5, "gamma_pos": 2},
        {"clip": 0.3, "gamma_neg": 0.5, "gamma_pos": 4, "detach_weight": True},
    ],
}
CASES = [
    pytest.param(case, numbers, id=f"{case.name}-{list(numbers.values())}")
    for case, sets in NUMBERS.items()
    for numbers in sets
]
by_numbers = pytest.mark.parametrize(("case", "numbers"), CASES)
# Cross entropy is torch's own function where kernels do not compute it.
by_numbers_of_losses = pytest.mark.parametrize(
    ("case", "numbers"), [c for c in CASES if c.values[0] is not BCE]
)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
by_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)


@functools.cache
def points(dtype) -> torch.Tensor:
    """Logits dense near 0, and in both tails."""
    random = np.random.default_rng(0)
    parts = [
        random.uniform(-1, 1, 40),
        random.uniform(-20, 20, 60),
        random.uniform(-LARGEST[dtype], LARGEST[dtype], 60),
        random.uniform(-1, 1, 20) * 2.0 ** random.uniform(-30, 0, 20),
        [0.0, -0.0],
    ]
    return torch.from_numpy(np.concatenate(parts)).to(dtype)


def soft_targets(logits) -> torch.Tensor:
    """Anywhere, nearly hard, and near the prediction."""
    random = torch.Generator().manual_seed(0)
    target = torch.rand(len(logits), generator=random, dtype=torch.float64)
    target[::4] *= 2.0**-10
    target[1::4] = 1 - target[1::4] * 2.0**-10
    near = torch.sigmoid(logits[2::4].double()) + (target[2::4] - 0.5) / 64
    target[2::4] = near.clamp(2.0**-20, 1 - 2.0**-20)
    return target.to(logits.dtype)


def loss_and_grad(case, logits, target, numbers, device):
    result = evaluate(
        case.function, logits.to(device), target.to(device), reduction="none", **numbers
    )
    return result.loss.cpu(), result.grad_logits.cpu()


def units(got, value, dtype, slack=0) -> float:
    """The error beyond the slack in units of the last place of the true value. What is below the
    smallest normal number must be about 0."""
    if abs(value) < SMALLEST_NORMAL[dtype]:
        return 0.0 if abs(got) <= 2 * SMALLEST_NORMAL[dtype] else math.inf
    if not math.isfinite(got):
        return math.inf
    narrow = np.float32 if dtype is torch.float32 else np.float64
    with mpmath.workdps(40):
        error = abs(mpmath.mpf(got) - value) - slack
    return float(error) / float(np.spacing(narrow(abs(value))))


def hard_points(case, numbers, t, dtype):
    """Where nothing cancels in the definition, as p - clip does."""
    logits = points(dtype)
    clip = numbers.get("clip", case.numbers.get("clip", 0))
    if t == 0 and clip:
        p = torch.sigmoid(logits.double())
        logits = logits[(p < 0.99 * clip) | (p > 2 * clip)]
    return logits


@by_dtype
@by_numbers
def test_hard_targets(kernel_device, case, numbers, dtype):
    """Each element of loss and gradient, to its last digits in the tails."""
    for t in (0.0, 1.0):
        logits = hard_points(case, numbers, t, dtype)
        true = [case.exact(x, t, numbers)[:2] for x in logits.tolist()]
        results = loss_and_grad(case, logits, torch.full_like(logits, t), numbers, kernel_device)
        for result, values in zip(results, zip(*true, strict=True), strict=True):
            for x, got, value in zip(logits.tolist(), result.tolist(), values, strict=True):
                assert units(got, value, dtype) <= MAX_ULP, (t, x, got, float(value))


@by_dtype
@by_numbers
def test_soft_targets(kernel_device, case, numbers, dtype):
    """Here terms cancel: t - p where the prediction is right, p - clip, and the two halves of a
    gradient, which has a zero. No arithmetic on a rounded p has digits there. What is claimed is
    that the result is exact for a logit that is off by so little as changes exp(-|x|) in its last
    places, and then rounded. The weight is an exponential, of whose exponent the rounding errors
    are units of the result: half of one by a logarithm, a mean of exponents, a product."""
    logits = points(dtype)[::2]
    target = soft_targets(logits)
    results = loss_and_grad(case, logits, target, numbers, kernel_device)
    shift = UNITS_OF_EXP * torch.finfo(dtype).eps
    for x, t, *got in zip(*(v.tolist() for v in (logits, target, *results)), strict=True):
        *true, weight = case.exact(x, t, numbers)
        most = MAX_ULP + 1.5 * abs(math.log(max(weight, 1e-300)))
        shifted = [case.exact(x + by, t, numbers)[:2] for by in (shift, -shift)]
        for one, value, *others in zip(got, true, *shifted, strict=True):
            slack = max(abs(other - value) for other in others)
            assert units(one, value, dtype, slack) <= most, (x, t, one, float(value))


@by_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_half_types_are_float32_rounded_once(kernel_device, case, dtype):
    """Every finite bit pattern of the type, subnormal ones too."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = patterns[patterns.isfinite()]
    for t, numbers in zip((0.0, 0.25, 1.0), NUMBERS[case][1:], strict=False):
        target = torch.full_like(logits, t)
        narrow = loss_and_grad(case, logits, target, numbers, kernel_device)
        wide = loss_and_grad(case, logits.float(), target.float(), numbers, kernel_device)
        for got, want in zip(narrow, wide, strict=True):
            assert got.dtype is dtype
            assert torch.equal(got, want.to(dtype))


def as_aten(case, logits, target, **options):
    """The same as ATen operations: the kernels give a weight no gradient."""
    weight = torch.ones((), device=logits.device, requires_grad=True)
    return case.function(logits, target, weight=weight, **options)


def by_all_paths(case, logits, target, numbers):
    """Loss and gradient by kernels, where it can be differentiated, and as ATen operations."""
    numbers = numbers | {"reduction": "none"}
    yield evaluate(case.function, logits, target, **numbers)[:2]
    leaf = logits.detach().requires_grad_()
    loss = case.function(leaf, target, **numbers)
    yield loss, *torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    yield evaluate(functools.partial(as_aten, case), logits, target, **numbers)[:2]


@pytest.mark.parametrize("size", [1e4, math.inf])
@by_dtype
@by_numbers_of_losses
def test_limits(kernel_device, case, numbers, dtype, size):
    """What is predicted rightly costs nothing; what is predicted wrongly as much as its logit is
    large, times the limit of the weight."""
    for x, t in ((size, 1.0), (-size, 0.0), (-size, 1.0), (size, 0.0)):
        logits = torch.full((5,), x, dtype=dtype, device=kernel_device)
        expected = limits(case, numbers, size, t, is_right=(x > 0) == (t == 1))
        for results in by_all_paths(case, logits, torch.full_like(logits, t), numbers):
            for got, want in zip(results, expected, strict=True):
                torch.testing.assert_close(
                    got.detach().double(),
                    torch.full_like(got, want, dtype=torch.float64),
                    rtol=8 * torch.finfo(dtype).eps,
                    atol=2 * SMALLEST_NORMAL[dtype],
                )


def limits(case, numbers, size, t, *, is_right):
    numbers = case.numbers | numbers
    if is_right:
        return 0.0, 0.0
    if numbers.get("clip") and t == 0:  # the probability is bounded
        return (1 - numbers["clip"]) ** numbers["gamma_neg"] * -math.log(numbers["clip"]), 0.0
    weight = 1.0
    if case is FOCAL:
        weight = numbers["alpha"] if t else 1 - numbers["alpha"]
    elif case is VARIFOCAL and t == 0:
        weight = numbers["alpha"]
    return weight * size, weight * (1 - 2 * t)


@by_numbers_of_losses
def test_soft_targets_of_large_logits(kernel_device, case, numbers):
    """A loss and a finite gradient: never nan, however large the terms, or small the targets, of
    which a power underflows."""
    sizes = torch.tensor([100.0, 1e4, 1e9, 1e30, math.inf], device=kernel_device)
    logits = torch.cat([sizes, -sizes])
    for t in (1e-45, 1e-30, 2.0**-10, 0.05, 0.5, 1 - 2.0**-24):
        for loss, grad in by_all_paths(case, logits, torch.full_like(logits, t), numbers):
            assert (loss >= 0).all()
            assert loss[: len(loss) // 2 - 1].isfinite().all()
            assert grad.isfinite().all()


NO_EXPONENTS = ("alpha", "clip", "entropy_smoothing")


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 2.5])
@by_dtype
@by_loss
def test_paths_agree_in_the_tails(case, gamma, dtype, device):
    logits = torch.tensor([-60.0, -21, -17, 17, 21, 60], dtype=dtype, device=device)
    numbers = {name: gamma for name in case.floats if name not in NO_EXPONENTS}
    if case is ASYMMETRIC:
        # Else autograd takes a slope below the last place of p for 0.
        numbers["clip"] = 0
    for t in (0.0, 1.0):
        target = torch.full_like(logits, t)
        kernel, *others = by_all_paths(case, logits, target, numbers)
        for other in others:
            for got, want in zip(other, kernel, strict=True):
                # The exponent of a power is up to 150, of which a unit is as many of the power.
                rtol, atol = 200 * torch.finfo(dtype).eps, 8 * SMALLEST_NORMAL[dtype]
                torch.testing.assert_close(got.detach(), want.detach(), rtol=rtol, atol=atol)


@by_numbers
@pytest.mark.parametrize("position", [0, 40])
@pytest.mark.parametrize("operand", [0, 1])
def test_nan_reaches_its_element_only(kernel_device, operand, position, case, numbers):
    operands = torch.ones(2, 41)
    operands[operand][position] = math.nan
    expected = torch.arange(41) == position
    for result in loss_and_grad(case, *operands, numbers, kernel_device):
        assert torch.equal(result.isnan(), expected)
