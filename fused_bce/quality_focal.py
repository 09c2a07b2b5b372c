"""The quality focal loss, as a function and as a module."""

from typing import ClassVar

from torch import Tensor
from torch.fx import Proxy

from fused_bce.extras import Extras
from fused_bce.pointwise import PointwiseModule, evaluate, find_loss
from fused_bce.registrations import record_call
from fused_bce.scripting import make_forward, make_scriptable
from fused_bce.sparse import SparseTarget

_LOSS = find_loss("quality_focal_loss")


def quality_focal_loss(
    input: Tensor,
    target: Tensor | SparseTarget,
    beta: float | Tensor = 2.0,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The quality focal loss of dense detection (`Li et al., 2020
    <https://arxiv.org/abs/2006.04388>`_), whose target is the quality of a box, computed with its
    gradient in one pass over memory.

    With the cross entropy ce of a logit x and a target t, the loss of an element is ::

        abs(t - sigmoid(x))^beta ce

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the same shape, any of these dtypes, bool, uint8, int8, int16, int32 or int64,
            usually in [0, 1] (not checked). Or sparse ones, see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.
        beta: exponent, in [0, 1e6]; 0 is cross entropy. A tensor that broadcasts with the logits is
            computed as ATen operations, and gets a gradient if it requires one.
        reduction: ``"mean"``, ``"batchmean"``, the sum over the size of the first dimension,
            ``"sum"`` or ``"none"``.
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        label_smoothing, ignore_index, validate_targets, recompute: see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.

    Returns:
        One number, or the shape of the logits for ``"none"``; in the wider dtype of logits and
        targets, in that of the logits if the targets are of integers; under autocast float32,
        unless that is float64.

    Raises:
        ValueError: for an exponent out of range, an unknown reduction, different sizes, a bad
            ``label_smoothing`` or ``ignore_index``, an invalid target.
        RuntimeError: for a weight that does not broadcast or is complex.
        NotImplementedError: for logits that are no floats, and complex targets.
        TypeError: for what should be a tensor or a number and is not.

    Example:
        >>> import torch
        >>> from fused_bce.functional import quality_focal_loss
        >>> logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        >>> loss = quality_focal_loss(logits, torch.tensor([0.7, 0.0, 1.0]), reduction="sum")
        >>> loss.backward()
        >>> loss, logits.grad
        (tensor(0.0282, grad_fn=<...>), tensor([-0.0232,  0.0526, -0.0049]))
    """
    if isinstance(input, Proxy) or isinstance(target, Proxy):
        return record_call(quality_focal_loss, locals())
    numbers = (beta,)
    _LOSS.check_numbers(numbers)
    extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
    return evaluate(_LOSS, input, target, weight, None, numbers, reduction, extras)


make_scriptable(quality_focal_loss, _LOSS)


class QualityFocalLoss(PointwiseModule):
    """The quality focal loss of dense detection, computed with its gradient in one pass:
    the module of :func:`fused_bce.functional.quality_focal_loss`.

    Args:
        beta: see the function.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``.
        weight: rescales each element's loss; a buffer.
        label_smoothing, ignore_index, validate_targets, recompute: see the function.

    Shape:
        - input: logits, any shape, float16, bfloat16, float32 or float64.
        - target: the same shape, any of these dtypes, bool or integers, usually in [0, 1] (not
          checked).
        - output: one number, or the shape of the logits for ``"none"``; the wider dtype of both.

    Example:
        >>> import torch
        >>> from fused_bce import QualityFocalLoss
        >>> QualityFocalLoss()(torch.full((10, 64), 1.5), torch.full((10, 64), 0.3))
        tensor(0.3352)
    """

    __constants__: ClassVar = _LOSS.constants

    beta: float

    def __init__(
        self,
        beta: float = 2.0,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | float | None = None,
        validate_targets: bool = False,
        recompute: bool = False,
    ):
        numbers = (beta,)
        extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
        super().__init__(_LOSS, numbers, reduction, extras, weight)

    forward = make_forward(quality_focal_loss)
