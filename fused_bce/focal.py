"""The sigmoid focal loss, as a function and as a module."""

from typing import ClassVar

from torch import Tensor
from torch.fx import Proxy

from fused_bce.checks import check_reduction
from fused_bce.dtypes import REDUCTIONS
from fused_bce.extras import Extras
from fused_bce.pointwise import PointwiseModule, evaluate, find_loss
from fused_bce.registrations import record_call
from fused_bce.scalars import is_constant, scalar_operand
from fused_bce.scripting import make_forward, make_scriptable
from fused_bce.sparse import SparseTarget


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor | SparseTarget,
    alpha: float | Tensor = 0.25,
    gamma: float | Tensor = 2,
    reduction: str = "none",
    *,
    gamma_neg: float | Tensor | None = None,
    entropy_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
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
        entropy_smoothing: label smoothing of ce alone, in [0, 1], as effdet has it: its targets t
            become t (1 - entropy_smoothing) + entropy_smoothing / 2, but not those of the other
            factors, as by ``label_smoothing``.
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        pos_weight: weight of the cross entropy of positives; broadcasts into the shape of the
            logits. For an alpha of each class pass ``alpha=-1, weight=1 - alpha,
            pos_weight=alpha / (1 - alpha)``.
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
    if not isinstance(alpha, Tensor) and is_constant(alpha) and not alpha >= 0:
        alpha = -1.0
    gamma_neg = _exponent_of_negatives(gamma, gamma_neg, inputs)
    _SMOOTHING.check_of_call(entropy_smoothing)
    numbers = (alpha, gamma, gamma_neg, entropy_smoothing)
    extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
    return evaluate(_LOSS, inputs, targets, weight, pos_weight, numbers, reduction, extras)


def _exponent_of_negatives(gamma, gamma_neg, inputs: Tensor):
    """As the operators take it: a tensor in the place of gamma alone stands for both."""
    is_number = not isinstance(gamma, Tensor) and is_constant(gamma)
    if gamma_neg is None or gamma_neg is gamma:
        return gamma if is_number else 0.0
    if is_number or isinstance(gamma_neg, Tensor) or not isinstance(inputs, Tensor):
        return gamma_neg
    return scalar_operand(gamma_neg, inputs)


_LOSS = find_loss("sigmoid_focal_loss")
_SMOOTHING = _LOSS.parameters[-1]


make_scriptable(sigmoid_focal_loss, _LOSS)


class SigmoidFocalLoss(PointwiseModule):
    """The focal loss of dense detection, computed with its gradient in one pass: the module of
    :func:`fused_bce.functional.sigmoid_focal_loss`.

    Args:
        alpha, gamma: see the function.
        reduction: ``"mean"`` (the default, as of torch's modules), ``"batchmean"``, ``"sum"`` or
            ``"none"``.
        weight, pos_weight: see the function; buffers.
        gamma_neg, entropy_smoothing: see the function.
        label_smoothing, ignore_index, validate_targets, recompute: see the function.

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

    __constants__: ClassVar = _LOSS.constants

    alpha: float
    gamma: float
    gamma_neg: float | None
    entropy_smoothing: float
    pos_weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        gamma_neg: float | None = None,
        entropy_smoothing: float = 0.0,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | float | None = None,
        validate_targets: bool = False,
        recompute: bool = False,
    ):
        numbers = (alpha, gamma, gamma_neg, entropy_smoothing)
        extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
        super().__init__(_LOSS, numbers, reduction, extras, weight, pos_weight)

    def extra_repr(self) -> str:
        always = "alpha", "gamma", "reduction"
        return self._describe(always, gamma_neg=None, entropy_smoothing=0.0)

    forward = make_forward(sigmoid_focal_loss)
