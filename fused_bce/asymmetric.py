"""The asymmetric loss, as a function and as a module."""

from typing import ClassVar

from torch import Tensor
from torch.fx import Proxy

from fused_bce.extras import Extras
from fused_bce.pointwise import PointwiseModule, evaluate, find_loss
from fused_bce.registrations import record_call
from fused_bce.scripting import make_forward, make_scriptable
from fused_bce.sparse import SparseTarget

_LOSS = find_loss("asymmetric_loss")


def asymmetric_loss(
    input: Tensor,
    target: Tensor | SparseTarget,
    gamma_neg: float | Tensor = 4.0,
    gamma_pos: float | Tensor = 1.0,
    clip: float | Tensor = 0.05,
    reduction: str = "mean",
    *,
    detach_weight: bool = False,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The asymmetric loss of multi-label classification (`Ridnik et al., 2021
    <https://arxiv.org/abs/2009.14119>`_), computed with its gradient in one pass over memory.

    With p = sigmoid(x) of a logit x and p_m = max(p - clip, 0), the loss of an element is ::

        (1 - p)^gamma_pos (-log(p))         where t = 1
        p_m^gamma_neg     (-log(1 - p_m))   where t = 0

    and of any target t, m^g ce with m = t (1 - p) + (1 - t) p_m, g = t gamma_pos + (1 - t)
    gamma_neg and ce = -t log(p) - (1 - t) log(1 - p_m).

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the same shape, any of these dtypes, bool, uint8, int8, int16, int32 or int64,
            usually in [0, 1] (not checked). Or sparse ones, see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.
        gamma_neg, gamma_pos: exponents of negatives and positives, in [0, 1e6].
        clip: in [0, 1]: how far the probability of a negative is shifted. Tensors that broadcast
            with the logits, in the place of these numbers, are computed as ATen operations, and get
            a gradient if they require one.
        detach_weight: takes m^g for a constant in backward, as the authors' code can.
        pos_weight: weight of the cross entropy of positives; broadcasts into the shape of the
            logits.
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
        >>> from fused_bce.functional import asymmetric_loss
        >>> logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        >>> loss = asymmetric_loss(logits, torch.tensor([1.0, 0.0, 1.0]), reduction="sum")
        >>> loss.backward()
        >>> loss, logits.grad
        (tensor(0.1947, grad_fn=<...>), tensor([-0.2539,  0.0026, -0.0275]))
    """
    if isinstance(input, Proxy) or isinstance(target, Proxy):
        return record_call(asymmetric_loss, locals())
    numbers = (gamma_neg, gamma_pos, clip, float(detach_weight))
    _LOSS.check_numbers(numbers)
    extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
    return evaluate(_LOSS, input, target, weight, pos_weight, numbers, reduction, extras)


make_scriptable(asymmetric_loss, _LOSS)


class AsymmetricLoss(PointwiseModule):
    """The asymmetric loss of multi-label classification, computed with its gradient in one pass:
    the module of :func:`fused_bce.functional.asymmetric_loss`.

    Args:
        gamma_neg, gamma_pos, clip, detach_weight, pos_weight: see the function.
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
        >>> from fused_bce import AsymmetricLoss
        >>> AsymmetricLoss()(torch.full((10, 64), 1.5), torch.ones(10, 64))
        tensor(0.0367)
    """

    __constants__: ClassVar = _LOSS.constants

    gamma_neg: float
    gamma_pos: float
    clip: float
    detach_weight: bool
    pos_weight: Tensor | None

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "mean",
        *,
        detach_weight: bool = False,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | float | None = None,
        validate_targets: bool = False,
        recompute: bool = False,
    ):
        numbers = (gamma_neg, gamma_pos, clip, bool(detach_weight))
        extras = Extras(label_smoothing, ignore_index, validate_targets, recompute)
        super().__init__(_LOSS, numbers, reduction, extras, weight, pos_weight)

    forward = make_forward(asymmetric_loss)
