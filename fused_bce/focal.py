"""The sigmoid focal loss, as a function and as a module."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function

from fused_bce import reference
from fused_bce.checks import (
    check_focal_numbers,
    check_ignore_index,
    check_ignore_index_of_rows,
    check_label_smoothing,
    check_options,
    check_reduction,
    check_targets,
    is_invalid,
)
from fused_bce.dispatch import log_once, why_not_dense
from fused_bce.scalars import (
    batch_size_operand,
    divisor_operand,
    index_or_nan,
    may_differ_from_zero,
    scalar_operand,
)
from fused_bce.sparse import SparseTarget, as_sparse

_loss = torch.ops.fused_bce.sigmoid_focal_loss.default
# torch.nn._reduction's numbers
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "batchmean": 1}


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor | SparseTarget,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    gamma_neg: float | None = None,
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
        alpha: in [0, 1], weight of positives; -1 for no such weights.
        gamma: exponent, in [0, 1e6]; 0 is cross entropy.
        reduction: ``"none"``, ``"mean"``, ``"sum"``, or ``"batchmean"``, the sum over the size of
            the first dimension.
        gamma_neg: another exponent for negatives, where positives are few (`Ben-Baruch et al., 2020
            <https://arxiv.org/abs/2009.14119>`_); that of a target t is then gamma t + gamma_neg
            (1 - t).
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        label_smoothing, ignore_index, validate_targets, recompute: see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.

    Returns:
        One number, or the shape of the logits for ``"none"``; in the wider dtype of logits and
        targets, in that of the logits if the targets are of integers; under autocast float32,
        unless that is float64.

    Raises:
        ValueError: for ``alpha``, ``gamma``, ``gamma_neg`` or ``label_smoothing`` out of range, an
            unknown reduction, different sizes, a bad ``ignore_index``, an invalid target.
        RuntimeError: for a weight that does not broadcast or is complex.
        NotImplementedError: for logits that are no floats, and complex targets.
        TypeError: for one of the numbers if it is a tensor, and what should be a tensor and is not.

    What the kernels do not cover is computed in torch's operations: see
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
    if isinstance(targets, SparseTarget):
        check_ignore_index_of_rows(ignore_index, targets)
        targets = targets.to_dense()
    reason = why_not_dense(inputs, targets, weight, None)
    if reason is not None and (isinstance(inputs, Proxy) or isinstance(targets, Proxy)):
        return handle_torch_function(
            sigmoid_focal_loss,
            (inputs, targets, weight),
            inputs,
            targets,
            alpha,
            gamma,
            reduction,
            gamma_neg=gamma_neg,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            validate_targets=validate_targets,
            recompute=recompute,
        )
    if reason is not None and isinstance(sparse := as_sparse(targets), SparseTarget):
        check_ignore_index_of_rows(ignore_index, sparse)
        targets = sparse.to_dense()
        reason = why_not_dense(inputs, targets, weight, None)
    check_focal_numbers(alpha, gamma, gamma_neg)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {[*_REDUCTIONS]}, not {reduction!r}")
    if ignore_index is not None:
        ignore_index = check_ignore_index(ignore_index, targets)
    if validate_targets:
        check_targets(targets, ignore_index)
    compiling = torch.compiler.is_compiling()
    smooths = may_differ_from_zero(label_smoothing) if compiling else label_smoothing != 0
    if smooths:
        check_label_smoothing(label_smoothing)
    if compiling and reason is None and not _are_constant(alpha, gamma, gamma_neg):
        reason = "alpha or gamma varies in compiled code"
    if reason is not None:
        if not compiling:
            log_once(reason)
        return _in_torch(
            inputs,
            targets,
            weight,
            alpha,
            gamma,
            gamma_neg,
            reduction,
            label_smoothing,
            ignore_index,
        )
    number = _REDUCTIONS[reduction]
    divisor: Tensor | None
    if reduction == "batchmean":
        divisor = batch_size_operand(inputs)
    else:
        divisor = divisor_operand(inputs, targets, weight, None, number, ignore_index)
    exponents = gamma, gamma if gamma_neg is None else gamma_neg
    return _loss(
        inputs,
        targets,
        weight,
        alpha,
        *exponents,
        number,
        None,
        scalar_operand(label_smoothing, inputs) if smooths else None,
        *index_or_nan(ignore_index),
        divisor,
        recompute,
    )


def _are_constant(*numbers: float | None) -> bool:
    """In compiled code: whether it is guarded by these, so that an operator may take them."""
    # Imported here, as in scalars.py.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(number is None or has_static_value(number) for number in numbers)


def _in_torch(inputs, targets, weight, alpha, gamma, gamma_neg, *rest):
    for name, value in (("inputs", inputs), ("targets", targets), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    alpha = None if alpha == -1 else alpha
    if not torch.compiler.is_compiling():
        gamma_neg = None if gamma_neg == gamma else gamma_neg
    else:
        alpha, gamma, gamma_neg = (
            number if _are_constant(number) else scalar_operand(number, inputs)
            for number in (alpha, gamma, gamma_neg)
        )
    return reference.sigmoid_focal_loss(inputs, targets, weight, alpha, gamma, gamma_neg, *rest)


def _scripted(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    gamma_neg: float | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """What torch.jit.script compiles in its place, without keyword-only arguments, which it cannot
    compile."""
    check_focal_numbers(alpha, gamma, gamma_neg)
    check_label_smoothing(label_smoothing)
    if reduction not in ["none", "mean", "sum", "batchmean"]:
        raise ValueError("reduction must be none, mean, sum or batchmean")
    if validate_targets and bool(is_invalid(targets, ignore_index).any()):
        raise ValueError("a target lies outside [0, 1]")
    return reference.sigmoid_focal_loss(
        inputs,
        targets,
        weight,
        None if alpha == -1 else alpha,
        gamma,
        gamma_neg,
        reduction,
        label_smoothing,
        ignore_index,
    )


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
        check_reduction(reduction, tuple(_REDUCTIONS))
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
