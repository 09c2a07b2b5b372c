"""Accuracy in units in the last place (ULP), over the whole range of float32 and float64.

The true values come from formulas other than ours: float64 logaddexp and sigmoid for float32,
50-digit mpmath for float64. torch's own float64 loss cannot serve in the tails, where it has lost
its digits.
"""

import math
import os

import mpmath
import numpy as np
import pytest
import torch
from helpers import torch_bce

NONE, MEAN, SUM = range(3)
forward_op = torch.ops.fused_bce.binary_cross_entropy_with_logits
backward_op = torch.ops.fused_bce._binary_cross_entropy_with_logits_backward
POS_WEIGHTS = [None, 0.01, 0.3, 1.0, 3.7, 100.0]
# Emulated with a seed, each of CUDA's two approximations is off by up to what is documented, 2 and
# 1 ULP.
MAX_ULP = 7.0 if os.environ.get("EMULATOR_SEED") else 4.0
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def losses_and_gradients(logits, target, pos_weight, device):
    """Loss and gradient of each element, as numpy arrays."""
    losses, grads = compute_elements(torch.as_tensor(logits), target, pos_weight, device)
    return losses.numpy(), grads.numpy()


def compute_elements(logits, target, pos_weight, device):
    """Loss and gradient of each element, on the CPU."""
    logits = logits.to(device)
    target = torch.full_like(logits, target) if isinstance(target, float) else target.to(device)
    if pos_weight is not None:
        pos_weight = torch.tensor(pos_weight, dtype=logits.dtype, device=device)
    losses = forward_op(logits, target, None, pos_weight, NONE)
    ones = torch.ones_like(losses)
    grads = backward_op(ones, logits, target, None, pos_weight, NONE)
    return losses.cpu(), grads.cpu()


def ulp_errors(result, true, negligible):
    """|result - true| in units of the last place of true; 0 where exp(-|x|) has underflowed, but
    there the result must be about 0."""
    smallest = np.finfo(result.dtype).tiny
    unit = np.spacing(np.maximum(np.abs(true), smallest).astype(result.dtype))
    errors = np.abs(result.astype(np.float64) - true) / unit
    assert (np.abs(result[negligible]) <= 128 * smallest).all()
    return np.where(negligible, 0.0, errors)


def float32_points():
    """Three million logits: all finite bit patterns alike, and dense near 0 and in the tails."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    parts = [
        patterns[np.isfinite(patterns)],
        random.uniform(-1, 1, 500_000),
        random.uniform(-20, 20, 1_000_000),
        random.uniform(-104, 104, 500_000),
        random.uniform(-1, 1, 200_000) * 2.0 ** random.uniform(-30, 0, 200_000),
        [0.0, -0.0],
    ]
    return np.concatenate(parts).astype(np.float32)


def test_float32_hard_targets(kernel_device, request, capsys):
    logits = float32_points()
    x = logits.astype(np.float64)
    underflow = np.abs(x) > -math.log(SMALLEST_NORMAL[torch.float32])
    largest = {"loss": 0.0, "gradient": 0.0}
    for target in (0.0, 1.0):
        for pos_weight in POS_WEIGHTS:
            p = 1.0 if pos_weight is None else float(np.float32(pos_weight))
            # The sign under which this target is on the side of the logit
            side, scale = (-x, p) if target else (x, 1.0)
            true_loss = scale * np.logaddexp(0, side)
            true_grad = scale * torch.sigmoid(torch.from_numpy(side)).numpy()
            loss, grad = losses_and_gradients(logits, target, pos_weight, kernel_device)
            with np.errstate(over="ignore"):
                overflow = np.isinf(true_loss.astype(np.float32))
            assert np.isinf(loss[overflow]).all()
            loss_errors = ulp_errors(
                loss[~overflow], true_loss[~overflow], (underflow & (side < 0))[~overflow]
            )
            grad_errors = ulp_errors(
                grad if target == 0 else -grad, true_grad, underflow & (side < 0)
            )
            largest["loss"] = max(largest["loss"], loss_errors.max())
            largest["gradient"] = max(largest["gradient"], grad_errors.max())
    report(request, capsys, "float32", largest, f"{len(logits):,} logits")


def test_hardest_weighted_gradient(kernel_device):
    # One rounding more than without pos_weight, each as unlucky as the other: in CUDA's PTX,
    # approximations rounded correctly, it was off by 4.17 units before c became e - e c.
    logits = np.array([7.609456539154053], dtype=np.float32)
    weight = 0.060518521815538406
    _, grad = losses_and_gradients(logits, 1.0, weight, kernel_device)
    true = -weight / (1 + math.exp(float(logits[0])))
    assert ulp_errors(grad, np.array([true]), np.array([False])).max() <= MAX_ULP


def test_float64_hard_targets(kernel_device, request, capsys):
    random = np.random.default_rng(1)
    parts = [
        random.uniform(-1, 1, 1000),
        random.uniform(-40, 40, 2000),
        random.uniform(-708, 708, 500),
        random.uniform(-1, 1, 300) * 2.0 ** random.uniform(-60, 0, 300),
        [0.0, -0.0],
    ]
    logits = np.concatenate(parts)
    with mpmath.workdps(50):
        softplus = [mpmath.log1p(mpmath.exp(x)) for x in map(mpmath.mpf, logits)]
        sigmoid = [1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in logits]
        loss, grad = losses_and_gradients(logits, 0.0, None, kernel_device)
        largest = {
            "loss": largest_ulp_mpmath(loss, softplus),
            "gradient": largest_ulp_mpmath(grad, sigmoid),
        }
        # The other target is the mirror image, weighted.
        loss, grad = losses_and_gradients(-logits, 1.0, 3.7, kernel_device)
        largest["loss"] = max(
            largest["loss"], largest_ulp_mpmath(loss, [mpmath.mpf(3.7) * s for s in softplus])
        )
        largest["gradient"] = max(
            largest["gradient"], largest_ulp_mpmath(-grad, [mpmath.mpf(3.7) * s for s in sigmoid])
        )
    report(request, capsys, "float64", largest, f"{2 * len(logits):,} logits")


def largest_ulp_mpmath(result, true):
    units = np.spacing(np.array([float(t) for t in true]))
    return max(
        float(abs(mpmath.mpf(r) - t) / mpmath.mpf(u))
        for r, t, u in zip(result, true, units, strict=True)
    )


def report(request, capsys, dtype, largest, points):
    kernel = request.node.callspec.params["kernel_device"]
    with capsys.disabled():
        print(
            f"\n  largest error, {dtype} on {kernel}: loss {largest['loss']:.2f} ULP, "
            f"gradient {largest['gradient']:.2f} ULP ({points}, hard targets)"
        )
    assert largest["loss"] <= MAX_ULP
    assert largest["gradient"] <= MAX_ULP


@pytest.mark.parametrize("pos_weight", [None, 0.01, 100.0])
def test_soft_targets(kernel_device, pos_weight):
    """Near its zero the gradient of a soft target is a difference: bounded in absolute error."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1_000_000, generator=generator) * 6
    target = torch.rand(1_000_000, generator=generator)
    _, grad = losses_and_gradients(logits, target, pos_weight, kernel_device)
    x, t = logits.double().numpy(), target.double().numpy()
    p = 1.0 if pos_weight is None else float(np.float32(pos_weight))
    sigmoid = torch.sigmoid(logits.double()).numpy()
    true = (1 - t) * sigmoid - p * t * torch.sigmoid(torch.from_numpy(-x)).numpy()
    # Wider by as much as MAX_ULP where approximations err on purpose.
    assert np.abs(grad - true).max() <= 1.5e-7 * max(1.0, p) * MAX_ULP / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_float32_rounded_once(kernel_device, dtype):
    """Every finite bit pattern of the type, subnormal ones too."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = patterns[patterns.isfinite()]
    for target in (0.0, 0.25, 1.0):
        t = torch.full_like(logits, target)
        loss, grad = (torch.from_numpy(a) for a in half_as_float32(logits, t, kernel_device))
        wide = losses_and_gradients(logits.float(), t.float(), None, kernel_device)
        assert torch.equal(loss, torch.from_numpy(wide[0]).to(dtype).float())
        assert torch.equal(grad, torch.from_numpy(wide[1]).to(dtype).float())


def half_as_float32(logits, target, device):
    logits, target = logits.to(device), target.to(device)
    losses = forward_op(logits, target, None, None, NONE)
    grads = backward_op(torch.ones_like(losses), logits, target, None, None, NONE)
    return losses.float().cpu().numpy(), grads.float().cpu().numpy()


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
def test_double_is_rounded_once_to_a_narrower_loss(kernel_device, narrow):
    """float64 logits with a narrower target: the loss goes from double to the target's dtype."""
    logits = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    target = (torch.arange(20_001) % 2).to(narrow)
    wide = losses_and_gradients(logits, target.double(), None, kernel_device)[0]
    loss = forward_op(logits.to(kernel_device), target.to(kernel_device), None, None, NONE).cpu()
    assert loss.dtype == narrow
    # numpy has no bfloat16; its float16 and float32 conversions round once.
    if narrow is torch.bfloat16:
        unit = torch.finfo(narrow).eps * 2.0 ** torch.from_numpy(wide).log2().floor()
        assert (loss.double() - torch.from_numpy(wide)).abs().le(unit / 2).all()
    else:
        expected = wide.astype({torch.float16: np.float16, torch.float32: np.float32}[narrow])
        assert np.array_equal(loss.numpy(), expected)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_double_beside_a_tie(kernel_device, narrow, side):
    """Losses that would be halfway between two numbers if they were rounded to float32 first."""
    unit = 64 * torch.finfo(narrow).eps
    below = torch.arange(64, 128, unit, dtype=torch.float64)
    # Their exp(-x) is too small to count: the loss of a negative is the logit.
    logits = (below + unit / 2 + side * 2.0**-40).to(kernel_device)
    loss = forward_op(logits, torch.zeros_like(logits, dtype=narrow), None, None, NONE)
    assert loss.dtype == narrow
    assert torch.equal(loss.double().cpu(), below if side < 0 else below + unit)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("numel", [10**4, 10**6, pytest.param(10**8, marks=pytest.mark.large)])
def test_sums_are_exact_to_the_last_digit(device, reduction, numel):
    """Partial sums in float over short runs, combined in double: an error of one rounding."""
    generator = torch.Generator().manual_seed(numel)
    logits = torch.randn(numel, generator=generator) * 4
    target = torch.rand(numel, generator=generator).round()
    chunks = zip(logits.split(10**6), target.split(10**6), strict=True)
    true = sum(np.logaddexp(0, np.where(t > 0, -x.double(), x.double())).sum() for x, t in chunks)
    if reduction == "mean":
        true /= numel
    code = {"mean": MEAN, "sum": SUM}[reduction]
    operands = logits.to(device), target.to(device), None, None, code
    assert abs(forward_op(*operands).item() - true) <= 1.2e-7 * true
    # Without that rounding there is what the short runs leave.
    assert abs(forward_op(*operands, dtype=torch.float64).item() - true) <= 2e-8 * true


def test_runs_are_short(kernel_device):
    """Equal numbers are rounded to the same side one after the other: at most 32 of them are added
    up in float, which takes up to 4.8e-7, where 128 take 1.8e-6."""
    for logit in torch.linspace(0.5, 2, 64).tolist():
        operands = torch.full((2048,), logit), torch.zeros(2048)
        operands = *(t.to(kernel_device) for t in operands), None, None
        true = forward_op(*operands, NONE).double().sum().item()
        result = forward_op(*operands, SUM, dtype=torch.float64).item()
        assert abs(result - true) <= 6e-7 * true


def test_infinite_logits(kernel_device):
    """The limits, where torch gives nan for most."""
    inf = math.inf
    logits = torch.tensor([inf, inf, inf, -inf, -inf, -inf])
    target = torch.tensor([0.0, 0.25, 1.0, 0.0, 0.25, 1.0])
    loss, grad = losses_and_gradients(logits, target, None, kernel_device)
    assert loss.tolist() == [inf, inf, 0.0, 0.0, inf, inf]
    assert grad.tolist() == [1.0, 0.75, 0.0, 0.0, -0.25, -1.0]
    loss, grad = losses_and_gradients(logits, target, 2.0, kernel_device)
    assert loss.tolist() == [inf, inf, 0.0, 0.0, inf, inf]
    assert grad.tolist() == [1.0, 0.75, 0.0, 0.0, -0.5, -2.0]


INFINITE_PRODUCTS = [(math.inf, 1.0), (math.inf, 0.25), ("largest", 2.0)]


@pytest.mark.parametrize(("pos_weight", "target"), INFINITE_PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinite_products_of_pos_weight_and_target(kernel_device, dtype, pos_weight, target):
    """The limit, infinity; nan where the formula multiplies 0 by infinity: docs/accuracy.md."""
    if pos_weight == "largest":
        if dtype is torch.float16:
            pytest.skip("in float32 twice its largest number is finite")
        pos_weight = torch.finfo(dtype).max
    edge = 700.0 if dtype is torch.float64 else 87.0
    ordinary = [0.0, 1.0, 16.0, edge, -1e-3, -1.0, -16.0, -edge]
    corners = [-0.0, edge + 15, -edge - 15, -1e4]
    logits = torch.tensor(ordinary + corners, dtype=torch.float64)
    limits = torch_bce(
        logits,
        torch.full_like(logits, target),
        pos_weight=torch.tensor(math.inf).double(),
        reduction="none",
    )
    assert (limits == math.inf).all()
    loss, grad = compute_elements(logits.to(dtype), target, pos_weight, kernel_device)
    assert loss[: len(ordinary)].isposinf().all()
    assert loss[len(ordinary) :].isnan().all()
    assert not grad.isfinite().any()  # torch's is nan


@pytest.mark.parametrize("logit", [-1e4, -1.0, 0.0, 1.0, 1e4])
def test_infinite_pos_weight_without_positives(kernel_device, logit):
    x, zero, inf = torch.tensor([logit]), torch.zeros(1), torch.tensor(math.inf)
    loss, grad = losses_and_gradients(x, zero, math.inf, kernel_device)
    assert np.isnan(loss).all()
    assert np.isnan(grad).all()
    assert torch_bce(x, zero, pos_weight=inf).isnan()


def test_infinite_weight(kernel_device):
    """Of a loss that has underflowed the product is nan."""
    logits = torch.tensor([1.0, -1.0, -87.0, -89.0, -1e4], device=kernel_device)
    target, weight = torch.zeros_like(logits), torch.full_like(logits, math.inf)
    loss = forward_op(logits, target, weight, None, NONE)
    grad = backward_op(torch.ones_like(loss), logits, target, weight, None, NONE)
    expected = torch.tensor([math.inf] * 3 + [math.nan] * 2)
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)
    torch.testing.assert_close(grad.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("position", [0, 7, 15, 16, 40])
@pytest.mark.parametrize("operand", ["logits", "target", "weight", "pos_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_reaches_its_element_only(kernel_device, operand, position, dtype):
    """Vector minimum and maximum swallow nan; every lane and the tail are tried."""
    operands = {name: torch.ones(41, dtype=dtype) for name in ("logits", "target")}
    operands |= {name: torch.ones(41, dtype=dtype) for name in ("weight", "pos_weight")}
    operands[operand][position] = math.nan
    arguments = [
        operands[k].to(kernel_device) for k in ("logits", "target", "weight", "pos_weight")
    ]
    expected = torch.arange(41) == position
    losses = forward_op(*arguments, NONE)
    grads = backward_op(torch.ones_like(losses), *arguments, NONE)
    assert torch.equal(losses.isnan().cpu(), expected)
    assert torch.equal(grads.isnan().cpu(), expected)
