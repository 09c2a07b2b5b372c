"""The varifocal loss, as a function and as a module."""

from typing import ClassVar

from torch import Tensor
from torch.fx import Proxy

from fused_bce.extras import Extras
from fused_bce.pointwise import PointwiseModule, evaluate, find_loss
from fused_bce.registrations import record_call
from fused_bce.scripting import make_forward, make_scriptable
from fused_bce.sparse import SparseTarget

_LOSS = find_loss("varifocal_loss")


def varifocal_loss(
    input: Tensor,
    target: Tensor | SparseTarget,
    alpha: float | Tensor = 0.75,
    gamma: float | Tensor = 2.0,
    reduction: str = "mean",
    *,
    detach_weight: bool = False,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The varifocal loss of dense detection (`Zhang et al., 2021
    <https://arxiv.org/abs/2008.13367>`_), whose target is 0, or the quality of a box, computed with
    its gradient in one pass over memory.

    With the cross entropy ce of a logit x and a target t, the loss of an element is ::

        t ce                       where t > 0
        alpha sigmoid(x)^gamma ce  where t = 0

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the same shape, any of these dtypes, bool, uint8, int8, int16, int32 or int64,
            usually in [0, 1] (not checked). Or sparse ones, see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.
        alpha: weight of negatives, in [0, 1e6].
        gamma: exponent, in [0, 1e6]. Tensors that broadcast with the logits are computed as ATen
            operations, and get a gradient if they require one.
        detach_weight: takes the weight for a constant in backward, as RT-DETR does.
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
        ValueError: for a number out of range, an unknown reduction, different sizes, a bad
            ``label_smoothing`` or ``ignore_index``, an invalid target.
        RuntimeError: for a weight that does not broadcast or is complex.
        NotImplementedError: for logits that are no floats, and complex targets.
        TypeError: for what should be a tensor or a number and is not.

    Example:
        >>> import torch
        >>> from fused_bce.functional import varifocal_loss
        >>> logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        >>> loss = varifocal_loss(logits, torch.tensor([0.7, 0.0, 1.0]), reduction="sum")
        >>> loss.backward()
        >>> loss, logits.grad
        (tensor(0.5808, grad_fn=<...>), tensor([-0.0543,  0.0394, -0.1192]))
    """
    if isinstance(input, Proxy) or isinstance(target, Proxy):
        return record_call(varifocal_loss, locals())
    numbers = (alpha, gamma, float(detach_weight))
    _LOSS.check_numbers(numbers)
    extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
    return evaluate(_LOSS, input, target, weight, None, numbers, reduction, extras)


make_scriptable(varifocal_loss, _LOSS)


class VarifocalLoss(PointwiseModule):
    """The varifocal loss of dense detection, computed with its gradient in one pass:
    the module of :func:`fused_bce.functional.varifocal_loss`.

    Args:
        alpha, gamma, detach_weight: see the function.
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
        >>> from fused_bce import VarifocalLoss
        >>> VarifocalLoss()(torch.full((10, 64), 1.5), torch.zeros(10, 64))
        tensor(0.8530)
    """

    __constants__: ClassVar = _LOSS.constants

    alpha: float
    gamma: float
    detach_weight: bool

    def __init__(
        self,
        alpha: float = 0.75,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        detach_weight: bool = False,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | float | None = None,
        validate_targets: bool = False,
        recompute: bool = False,
    ):
        numbers = (alpha, gamma, bool(detach_weight))
        extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
        super().__init__(_LOSS, numbers, reduction, extras, weight)

    forward = make_forward(varifocal_loss)
