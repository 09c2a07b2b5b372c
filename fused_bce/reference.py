"""The loss in plain torch, for calls that the kernels do not cover: torch's own function, and
around it what this package takes beyond that. It can be scripted."""

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    ignore_index: int | None,
) -> Tensor:
    """As :func:`fused_bce.functional.binary_cross_entropy_with_logits`."""
    ignored = None if ignore_index is None else target == ignore_index
    if not target.is_floating_point():
        target = target.to(_dtype_for_integers(input))
    if label_smoothing != 0.0:
        target = target * (1 - label_smoothing) + label_smoothing / 2
    if ignored is None or target.size() != input.size():
        return torch_bce(input, target, weight, reduction=reduction, pos_weight=pos_weight)
    reduction_number = _reduction.get_enum(reduction)
    # Taken out of the operands as well, for 0 times the gradient at nan is nan.
    losses = torch_bce(
        input.masked_fill(ignored, 0.0),
        target.masked_fill(ignored, 0.0),
        weight,
        reduction="none",
        pos_weight=pos_weight,
    ).masked_fill(ignored, 0.0)
    if reduction_number == 0:
        return losses
    total = losses.sum(dtype=torch.float64 if losses.dtype == torch.float64 else torch.float32)
    if reduction_number == 1:
        total = total / (~ignored).sum().clamp(min=1)
    return total.to(losses.dtype)


def _dtype_for_integers(input: Tensor) -> torch.dtype:
    """What targets of integers become: autocast would widen them after they were smoothed."""
    if not torch.jit.is_scripting():
        widened = torch.is_autocast_enabled(input.device.type)
        return torch.promote_types(input.dtype, torch.float32) if widened else input.dtype
    return input.dtype
