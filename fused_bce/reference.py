"""The losses in plain torch, for calls that the kernels do not cover: torch's own function, or for
the focal loss its operations, and around them what this package takes beyond. They can be
scripted."""

import math

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


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    gamma_neg: float | None,
    reduction: str,
    smoothing: Tensor | None,
    ignore_index: int | float | None,
) -> Tensor:
    """As :func:`fused_bce.functional.sigmoid_focal_loss`, but for an ``alpha`` of None in the place
    of -1. In compiled code the numbers may be tensors."""
    check_focal_operands(input, target)
    dtype = with_autocast(torch.promote_types(input.dtype, target.dtype), input)
    ignored = None if ignore_index is None else is_ignored(target, ignore_index)
    if ignored is not None:
        input, target = input.masked_fill(ignored, 0.0), target.masked_fill(ignored, 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    target = smoothed(target.to(wide), smoothing)
    losses = sigmoid_focal_losses(input.to(wide), target, alpha, gamma, gamma_neg)
    if weight is not None:
        if weight.is_complex():
            raise RuntimeError(f"weight must be real, not {weight.dtype}")
        losses = losses * weight.expand(input.size())
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    if reduction == "mean" and ignored is not None:
        losses = losses.sum() / (~ignored).sum().clamp(min=1)
    elif reduction == "mean":
        losses = losses.mean()
    elif reduction == "sum":
        losses = losses.sum()
    elif reduction == "batchmean":
        losses = losses.sum() / input.size(0)
    return losses.to(dtype)


def check_focal_operands(input: Tensor, target: Tensor) -> None:
    # A trace would make a constant of the answer, and warn.
    if not torch.jit.is_tracing() and target.size() != input.size():
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    if not input.is_floating_point():
        raise NotImplementedError(f"inputs must be of floats, not {input.dtype}")
    if target.is_complex():
        raise NotImplementedError(f"targets must be real, not {target.dtype}")


def sigmoid_focal_losses(
    x: Tensor,
    t: Tensor,
    alpha: float | None,
    gamma: float,
    gamma_neg: float | None,
) -> Tensor:
    """The loss of each element, in the terms of csrc/formulas/focal.h, and so that all of its
    derivatives are finite: for a hard target 1 - p_t is exp(-a) times ``base``, whose powers have
    no pole."""
    u = 1 - t
    negative = x < 0
    a = torch.where(negative, -x, x)  # |x|, but for its slope at 0
    q, rest = torch.where(negative, t, u), torch.where(negative, u, t)
    e = torch.exp(-a)
    hard = q == 0
    # 0 at an infinite logit on the side of its target
    ce = a.masked_fill(hard & a.isinf(), 0.0) * q + torch.log1p(e)
    bounded = a.clamp(max=709.0 if x.dtype == torch.float64 else 88.0)
    minus_log_size = bounded.masked_fill(~hard, 0.0)
    # q is 0 where it is hard; this is for the derivative by the target.
    at_hard = rest + q.masked_fill(~hard, 0.0) * torch.exp(bounded)
    base = torch.where(hard, at_hard, q + rest * e) / (1 + e)
    if gamma_neg is None:
        power = base**gamma * torch.exp(-gamma * minus_log_size)
    else:
        g = gamma * t + gamma_neg * u
        power = base.masked_fill(base < 0, math.nan) ** g * torch.exp(-g * minus_log_size)
    losses = power * ce
    return losses if alpha is None else losses * (alpha * t + (1 - alpha) * u)


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
