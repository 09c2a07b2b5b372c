"""The loss in plain torch, for calls that the kernels do not cover: torch's own function, and
around it what this package takes beyond. It can be scripted. (csrc/composite.cpp has the same for
the focal loss, an operator.)"""

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
    smoothing: Tensor | None,
    ignore_index: int | float | None,
) -> Tensor:
    """As :func:`fused_bce.functional.binary_cross_entropy_with_logits`."""
    ignored = None if ignore_index is None else is_ignored(target, ignore_index)
    target = smoothed(with_floats(target, input), smoothing)
    batchmean = reduction == "batchmean"
    if batchmean:
        reduction = "sum"
    if ignored is None or target.size() != input.size():
        loss = torch_bce(input, target, weight, reduction=reduction, pos_weight=pos_weight)
        return loss / input.size(0) if batchmean else loss
    losses = loss_of_kept(input, target, ignored, weight, pos_weight)
    reduction_number = _reduction.get_enum(reduction)
    if reduction_number == 0:
        return losses
    total = sum_of(losses)
    if reduction_number == 1:
        total = total / (~ignored).sum().clamp(min=1)
    elif batchmean:
        total = total / input.size(0)
    return total.to(losses.dtype)


def smoothing_tensor(label_smoothing: float) -> Tensor | None:
    if label_smoothing == 0.0:
        return None
    return torch.scalar_tensor(label_smoothing, dtype=torch.float64)


def smoothed(target: Tensor, smoothing: Tensor | None) -> Tensor:
    if smoothing is None:
        return target
    return (target * (1 - smoothing) + smoothing / 2).to(target.dtype)


def with_floats(target: Tensor, input: Tensor) -> Tensor:
    return target if target.is_floating_point() else target.to(with_autocast(input.dtype, input))


def loss_of_kept(
    input: Tensor,
    target: Tensor,
    ignored: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
) -> Tensor:
    """The loss of each element, 0 where it is ignored."""
    # Taken out of the operands as well, for 0 times the gradient at nan is nan.
    losses = torch_bce(
        input.masked_fill(ignored, 0.0),
        target.masked_fill(ignored, 0.0),
        weight,
        reduction="none",
        pos_weight=pos_weight,
    )
    return losses.masked_fill(ignored, 0.0)


def sum_of(losses: Tensor) -> Tensor:
    return losses.sum(dtype=torch.float64 if losses.dtype == torch.float64 else torch.float32)


def is_ignored(target: Tensor, ignore_index: int | float) -> Tensor:
    return target.isnan() if isinstance(ignore_index, float) else target == ignore_index


def with_autocast(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """What autocast makes of a dtype, to which integers become floats before it sees them."""
    if not torch.jit.is_scripting():
        # The meta device has no autocast to ask for.
        widened = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        return torch.promote_types(dtype, torch.float32) if widened else dtype
    return dtype
