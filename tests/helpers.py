"""What the tests share: torch's own function as the reference, inputs, and comparisons."""

import itertools
import math
import os
import shlex
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

import fused_bce
from fused_bce.extras import Extras

# Whether, in this build, the CUDA kernels run in the place of the CPU's: tests/emulator
EMULATES_CUDA = (
    fused_bce.build_info()["cuda_archs"] == ["emulated"] and "EMULATOR_OFF" not in os.environ
)

fused = fused_bce.functional.binary_cross_entropy_with_logits
torch_bce = torch.nn.functional.binary_cross_entropy_with_logits

# Seconds after which something hangs: on no machine, however slow or busy, does it take so long.
HANGS = 600

REDUCTIONS = ("none", "mean", "sum")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Of a test that compiles: with warnings that are torch's own, in its compiler and in torch.export
IN_COMPILERS = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)"),
]

by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def quoted_folder_of_torch() -> str:
    """TORCH_LIB_PATH as a command must have it."""
    folder = cpp_extension.TORCH_LIB_PATH
    return shlex.quote(folder) if torch.__version__ < "2.14" else folder


def why_no_cuda() -> str | None:
    """Why nothing can be tested on a GPU here; None if it can."""
    if EMULATES_CUDA or not torch.cuda.is_available():
        return "no CUDA device"
    if fused_bce.build_info()["cuda_archs"] is None:
        return "there is a GPU, but this build has no CUDA kernels: rebuild with FORCE_CUDA=1"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
by_dtype_pair = pytest.mark.parametrize(
    ("logits_dtype", "target_dtype"),
    [
        pytest.param(a, b, id=f"{dtype_name(a)}_logits-{dtype_name(b)}_target")
        for a, b in itertools.product(FLOATS, FLOATS)
    ],
)
by_weights = pytest.mark.parametrize(
    "weights",
    [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")],
    ids=["unweighted", "weight", "pos_weight", "both_weights"],
)


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As a kernel rounds a float64 tensor to that dtype; the gradient passes unchanged."""
    return t + (t.detach().to(dtype).double() - t.detach())


def make_weights(names: tuple[str, ...], channels: int, device, dtype=torch.float32) -> dict:
    """Weights in [0.5, 2.5) for each channel, as keyword arguments."""
    return {n: (torch.rand(channels, device=device) * 2 + 0.5).to(dtype) for n in names}


class Result(NamedTuple):
    loss: Tensor
    grad_logits: Tensor
    grad_target: Tensor | None


def is_ignored(target, ignore_index) -> Tensor:
    return target.isnan() if math.isnan(ignore_index) else target == ignore_index


def by_torch(
    input, target, *, reduction="mean", label_smoothing=0.0, ignore_index=None, **weights
) -> Tensor:
    """torch's function, and around it, by hand, what it does not take."""
    ignored = torch.zeros_like(target, dtype=torch.bool)
    if ignore_index is not None:
        ignored = is_ignored(target, ignore_index)
        input, target = input.masked_fill(ignored, 0), target.masked_fill(ignored, 0)
    if not target.is_floating_point():
        autocast = torch.is_autocast_enabled(input.device.type)
        target = target.to(
            torch.promote_types(input.dtype, torch.float32) if autocast else input.dtype
        )
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / 2
    if ignore_index is None:
        return torch_bce(input, target, reduction=reduction, **weights)
    losses = torch_bce(input, target, reduction="none", **weights).masked_fill(ignored, 0)
    count = (~ignored).sum().clamp(min=1) if reduction == "mean" else 1
    return losses if reduction == "none" else losses.sum() / count


def evaluate(
    function, logits: Tensor, target: Tensor, *, grad_loss=None, target_grad=False, **options
) -> Result:
    """Loss and gradients of ``function``, of leaves with the layouts of the arguments.

    ``grad_loss`` is None for ones: the gradient of the sum of the losses.
    """
    logits = logits.detach().requires_grad_()
    target = target.detach().requires_grad_(target_grad)
    loss = function(logits, target, **options)
    if grad_loss is None:
        grad_loss = torch.ones_like(loss)
    leaves = (logits, target) if target_grad else (logits,)
    grads = torch.autograd.grad(loss, leaves, grad_loss.to(loss.dtype))
    return Result(loss.detach(), grads[0], grads[1] if target_grad else None)


def reference(logits: Tensor, target: Tensor, *, grad_loss=None, **options) -> Result:
    """What torch makes of it in float64, without autocast, on the CPU, of contiguous copies."""

    def widen(value):
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("cpu", torch.float64, copy=True).contiguous()

    options = {name: widen(value) for name, value in options.items()}
    with torch.autocast("cpu", enabled=False):
        return evaluate(
            by_torch,
            widen(logits),
            widen(target),
            grad_loss=widen(grad_loss),
            target_grad=True,
            **options,
        )


def error(got: Tensor, exact: Tensor) -> float:
    """The largest error, as a part of the largest exact value."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.cpu()
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((got.cpu().double() - exact).abs().max() / scale).item()


def assert_no_worse(got: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """``got`` is as near to the float64 value as torch's own result in the same dtype is.

    Twice torch's error, since both round; and 4 ULP, the goal of the kernels, since torch's may be
    0 by chance. In float64 it always is 0, the reference being that very result: 8 ULP, for the
    errors of both.
    """
    assert got.shape == theirs.shape
    assert got.dtype == theirs.dtype
    slack = (8 if got.dtype is torch.float64 else 4) * torch.finfo(got.dtype).eps
    assert error(got, exact) <= 2 * error(theirs, exact) + slack


def assert_results_no_worse(got: Result, theirs: Result, exact: Result) -> None:
    for g, t, e in zip(got, theirs, exact, strict=True):
        assert (g is None) == (t is None)
        if g is not None:
            assert_no_worse(g, t, e)


def draw(shape, device, logits_dtype=torch.float32, target_dtype=torch.float32):
    """Logits with tails, and targets of which half are hard."""
    logits = (torch.randn(shape) * 4).to(device, logits_dtype)
    target = torch.where(torch.rand(shape) < 0.5, torch.rand(shape), torch.rand(shape).round())
    return logits, target.to(device, target_dtype)


def draw_weights(names, shape, device, dtype=torch.float32):
    return {name: (torch.rand(shape) * 3 + 0.1).to(device, dtype) for name in names}


def check(logits, target, grad_loss=None, **options):
    options = options | {"target_grad": True, "grad_loss": grad_loss}
    ours = evaluate(fused, logits, target, **options)
    theirs = evaluate(torch_bce, logits, target, **options)
    options.pop("target_grad")
    assert_results_no_worse(ours, theirs, reference(logits, target, **options))
    return ours


def assert_double_close(got, expected) -> None:
    """Equal but for the rounding of a few operations in float64."""
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


class Outcome(NamedTuple):
    """What a call did: its value or its error, and its warnings."""

    value: object
    error: tuple[type, str] | None
    warnings: list[tuple[type, str]]


def outcome(function, *args, **kwargs) -> Outcome:
    value = error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = function(*args, **kwargs)
        except Exception as exception:
            error = (type(exception), str(exception))
    return Outcome(value, error, [(w.category, str(w.message)) for w in caught])


def is_fused(loss: Tensor) -> bool:
    return "BCEWithLogitsFunction" in loss.grad_fn.name()


def eager_loss(input, target, weight=None, pos_weight=None, *, reduction="mean", **extras):
    """What the quick way gives, None where it leaves the call to Python."""
    given = Extras(**extras)
    return fused_bce._C.eager_loss(
        input, target, weight, None, None, reduction, pos_weight, given, Extras()
    )


def as_rows_with_nan_again(dense: Tensor) -> fused_bce.SparseTarget:
    """Unsorted rows that name each nan three times, once as a number, over which nan prevails."""
    rows, columns = dense.nonzero().t()
    missing = dense.isnan().nonzero().t()
    rows, columns = (
        torch.cat([all_places, of_nan, of_nan])
        for all_places, of_nan in zip((rows, columns), missing, strict=True)
    )
    values = dense[rows, columns]
    values[len(values) - missing.shape[1] :] = 0.25
    order = torch.randperm(len(rows))
    return fused_bce.SparseTarget.from_coo(
        rows[order], columns[order], tuple(dense.shape), values[order]
    )
