"""The sigmoid focal loss, as a function and as a module."""

import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.loss import _WeightedLoss

from fused_bce.checks import (
    check_focal_numbers,
    check_label_smoothing,
    check_options,
    check_reduction,
    is_invalid,
)
from fused_bce.dtypes import REDUCTIONS, SUM
from fused_bce.fallback import smoothing_tensor, with_autocast
from fused_bce.pointwise import Extras, PointwiseLoss, evaluate
from fused_bce.registrations import call_composite, ops, record_call
from fused_bce.scalars import index_or_nan, scalar_operand
from fused_bce.sparse import SparseTarget

# Of the kernels; beyond, nothing is left of any loss.
_LARGEST_EXPONENT = 1e6


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor | SparseTarget,
    alpha: float | Tensor = 0.25,
    gamma: float | Tensor = 2,
    reduction: str = "none",
    *,
    gamma_neg: float | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The focal loss of dense detection (`Lin et al., 2017 <https://arxiv.org/abs/1708.02002>`_): a
    drop-in for torchvision.ops.sigmoid_focal_loss, computed with its gradient in one pass over
    memory, to the last digits in the tails.

    With the cross entropy ce of a logit and a target t, and p_t = t sigmoid(x) + (1 - t)
    sigmoid(-x), the loss of an element is ::

        (alpha t + (1 - alpha) (1 - t)) (1 - p_t)^gamma ce

    Args:
        inputs: logits, any shape, float16, bfloat16, float32 or float64.
        targets: the same shape, any of these dtypes, bool, uint8, int8, int16, int32 or int64,
            usually in [0, 1] (not checked). Or sparse ones, see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.
        alpha: weight of positives, 1 - alpha that of negatives; below 0, as -1, for no such
            weights.
        gamma: exponent; 0 is cross entropy.
        reduction: ``"none"``, ``"mean"``, ``"sum"``, or ``"batchmean"``, the sum over the size of
            the first dimension.
        gamma_neg: another exponent for negatives, where positives are few (`Ben-Baruch et al., 2020
            <https://arxiv.org/abs/2009.14119>`_); that of a target t is then gamma t + gamma_neg
            (1 - t). The kernels take an alpha up to 1 and exponents in [0, 1e6]. Others, and
            tensors that broadcast with the logits, are computed as ATen operations; a tensor that
            requires a gradient gets one.
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        label_smoothing, ignore_index, validate_targets, recompute: see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.

    Returns:
        One number, or the shape of the logits for ``"none"``; in the wider dtype of logits and
        targets, in that of the logits if the targets are of integers; under autocast float32,
        unless that is float64.

    Raises:
        ValueError: for ``label_smoothing`` out of range, an unknown reduction, different sizes, a
            bad ``ignore_index``, an invalid target.
        RuntimeError: for a weight that does not broadcast or is complex.
        NotImplementedError: for logits that are no floats, and complex targets.
        TypeError: for a ``label_smoothing`` that is a tensor, and what should be a tensor and is
            not.

    What the kernels do not cover is computed as ATen operations: see
    :func:`fused_bce.why_not_fused`. So is a call in compiled code whose ``alpha`` or ``gamma``
    varies from step to step, for a kernel is chosen by them.

    Example:
        >>> import torch
        >>> from fused_bce.functional import sigmoid_focal_loss
        >>> logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        >>> loss = sigmoid_focal_loss(logits, torch.tensor([1.0, 0.0, 1.0]), reduction="sum")
        >>> loss.backward()
        >>> loss, logits.grad
        (tensor(0.0343, grad_fn=<...>), tensor([-0.0345,  0.0394, -0.0012]))
    """
    if isinstance(inputs, Proxy) or isinstance(targets, Proxy):
        return record_call(sigmoid_focal_loss, locals())
    check_reduction(reduction, tuple(REDUCTIONS))
    gamma_neg = gamma if gamma_neg is None else gamma_neg
    why_not = _why_not_numbers(alpha, gamma, gamma_neg)
    if why_not is None and not alpha >= 0:
        alpha = -1.0
    return evaluate(
        _LOSS,
        inputs,
        targets,
        weight,
        (alpha, gamma, gamma_neg),
        reduction,
        Extras(label_smoothing, ignore_index, validate_targets, recompute),
        why_not=why_not,
    )


def _why_not_numbers(alpha, gamma, gamma_neg) -> str | None:
    """Why the kernels, of which these numbers choose one, do not take them."""
    for name, number in (("alpha", alpha), ("gamma", gamma), ("gamma_neg", gamma_neg)):
        if isinstance(number, Tensor):
            return f"{name} is a tensor"
        if not _is_constant(number):
            return f"{name} varies in compiled code"
        if (number > 1) if name == "alpha" else not 0 <= number <= _LARGEST_EXPONENT:
            return f"{name} is out of the range of the kernels"
    return None


def _is_constant(number: float) -> bool:
    """Whether an operator may take it: compiled code must be guarded by it."""
    if not torch.compiler.is_compiling():
        return True
    # Imported here, as in scalars.py.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def _compute_composite(
    inputs, targets, weight, alpha, gamma, gamma_neg, reduction, smoothing, ignore_index
) -> Tensor:
    for name, value in (("inputs", inputs), ("targets", targets), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    dtype = with_autocast(torch.promote_types(inputs.dtype, targets.dtype), inputs)
    for number in (alpha, gamma, gamma_neg):
        if isinstance(number, Tensor) and number.dim() > 0:
            dtype = torch.promote_types(dtype, number.dtype)
    same = gamma_neg is gamma
    alpha, alphas = _split_number(alpha, inputs)
    gamma, gammas = _split_number(gamma, inputs)
    gamma_neg, gammas_neg = (gamma, None) if same else _split_number(gamma_neg, inputs)
    if not same and gammas is not None and gammas_neg is None:
        gammas_neg = scalar_operand(gamma_neg, inputs)
    by_size = reduction == "batchmean"
    op = ops._sigmoid_focal_loss_composite.default
    compute: Callable[..., Tensor] = op
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        compute = functools.partial(call_composite, op)
    loss = compute(
        *(alphas, gammas, gammas_neg, None),
        inputs,
        targets,
        weight,
        alpha,
        gamma,
        gamma_neg,
        SUM if by_size else REDUCTIONS[reduction],
        torch.promote_types(dtype, torch.float32) if by_size else dtype,
        smoothing,
        *index_or_nan(ignore_index),
    )
    return (loss / inputs.size(0)).to(dtype) if by_size else loss


def _split_number(number, beside: Tensor) -> tuple[float, Tensor | None]:
    """As the composite operator takes it: the tensor, if there is one, counts."""
    if isinstance(number, Tensor):
        return 0.0, number
    return (number, None) if _is_constant(number) else (0.0, scalar_operand(number, beside))


_LOSS = PointwiseLoss(ops.sigmoid_focal_loss.default, fallback=_compute_composite)


def _scripted(
    inputs: Tensor,
    targets: Tensor,
    alpha: int | float = 0.25,
    gamma: int | float = 2.0,
    reduction: str = "none",
    gamma_neg: int | float | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """What torch.jit.script compiles in its place, without keyword-only arguments, which it cannot
    compile."""
    check_label_smoothing(label_smoothing)
    if reduction not in ["none", "mean", "sum", "batchmean"]:
        raise ValueError("reduction must be none, mean, sum or batchmean")
    if validate_targets and bool(is_invalid(targets, ignore_index).any()):
        raise ValueError("a target lies outside [0, 1]")
    smoothing = smoothing_tensor(label_smoothing)
    index: int | None = None
    if isinstance(ignore_index, int):
        index = ignore_index
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    by_size = reduction == "batchmean"
    loss = torch.ops.fused_bce._sigmoid_focal_loss_composite(
        None,
        None,
        None,
        None,
        inputs,
        targets,
        weight,
        _as_float(alpha),
        _as_float(gamma),
        _as_float(gamma if gamma_neg is None else gamma_neg),
        2 if by_size else ["none", "mean", "sum"].index(reduction),
        torch.promote_types(dtype, torch.float32) if by_size else dtype,
        smoothing,
        index,
        isinstance(ignore_index, float),
    )
    return (loss / inputs.size(0)).to(dtype) if by_size else loss


def _as_float(number: int | float) -> float:
    return float(number) if isinstance(number, int) else number


sigmoid_focal_loss.__prepare_scriptable__ = lambda: _scripted  # type: ignore[attr-defined]


class SigmoidFocalLoss(_WeightedLoss):
    """The focal loss of dense detection, computed with its gradient in one pass: the module of
    :func:`fused_bce.functional.sigmoid_focal_loss`.

    Args:
        alpha, gamma: see the function.
        reduction: ``"mean"`` (the default, as of torch's modules), ``"batchmean"``, ``"sum"`` or
            ``"none"``.
        weight: rescales each element's loss; a buffer.
        gamma_neg, label_smoothing, ignore_index, validate_targets, recompute: see the function.

    Shape:
        - input: logits, any shape, float16, bfloat16, float32 or float64.
        - target: the same shape, any of these dtypes, bool or integers, usually in [0, 1] (not
          checked).
        - output: one number, or the shape of the logits for ``"none"``; the wider dtype of both.

    Example:
        >>> import torch
        >>> from fused_bce import SigmoidFocalLoss
        >>> SigmoidFocalLoss(gamma=1.5)(torch.full((10, 64), 1.5), torch.ones(10, 64))
        tensor(0.0039)
    """

    __constants__: ClassVar = [
        "alpha",
        "gamma",
        "gamma_neg",
        "ignore_index",
        "label_smoothing",
        "recompute",
        "reduction",
        "validate_targets",
    ]

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        gamma_neg: float | None = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | float | None = None,
        validate_targets: bool = False,
        recompute: bool = False,
    ):
        super().__init__(weight, reduction=reduction)
        # Before a parameter that was to be trained would become a number
        check_focal_numbers(alpha, gamma, gamma_neg)
        check_reduction(reduction, tuple(REDUCTIONS))
        # As torch.jit.script has them
        self.alpha = float(alpha)
        self.gamma = float(gamma)
        self.gamma_neg = None if gamma_neg is None else float(gamma_neg)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = check_options(label_smoothing, ignore_index)
        self.validate_targets = bool(validate_targets)
        self.recompute = bool(recompute)

    def extra_repr(self) -> str:
        defaults = {
            "gamma_neg": None,
            "label_smoothing": 0.0,
            "ignore_index": None,
            "validate_targets": False,
            "recompute": False,
        }
        names = ["alpha", "gamma", "reduction"]
        names += [n for n, default in defaults.items() if getattr(self, n) != default]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return sigmoid_focal_loss(
            input,
            target,
            self.alpha,
            self.gamma,
            self.reduction,
            gamma_neg=self.gamma_neg,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            validate_targets=self.validate_targets,
            recompute=self.recompute,
        )
