"""The focal losses as ATen operations, one after the other, as libraries write them."""

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

from contenders.losses import Loss


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def eager_loss(name: str) -> Loss:
    """In the place of the function of this name in fused_bce.functional."""
    return eager_focal_loss() if name == "sigmoid_focal_loss" else BY_HAND[name]


def eager_focal_loss() -> Loss:
    if has_torchvision():
        return importlib.import_module("torchvision.ops").sigmoid_focal_loss
    return focal_by_hand


def focal_by_hand(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    """With the terms of torchvision's, where that is not installed."""
    probability = logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    of_target = probability * target + (1 - probability) * (1 - target)
    losses = entropy * (1 - of_target) ** gamma
    if alpha >= 0:
        losses = losses * (alpha * target + (1 - alpha) * (1 - target))
    return reduced(losses, reduction)


def quality_focal_by_hand(
    logits: Tensor, target: Tensor, beta: float = 2, reduction: str = "mean"
) -> Tensor:
    """With the terms of mmdetection's, of dense targets."""
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return reduced((target - logits.sigmoid()).abs().pow(beta) * entropy, reduction)


def varifocal_by_hand(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.75,
    gamma: float = 2,
    reduction: str = "mean",
    detach_weight: bool = False,
) -> Tensor:
    """With the terms of mmdetection's; of RT-DETR's, if the weight is detached."""
    probability = logits.detach().sigmoid() if detach_weight else logits.sigmoid()
    is_negative = (target == 0).to(logits.dtype)
    weight = alpha * probability.pow(gamma) * is_negative + target
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return reduced(weight * entropy, reduction)


def asymmetric_by_hand(
    logits: Tensor,
    target: Tensor,
    gamma_neg: float = 4,
    gamma_pos: float = 1,
    clip: float = 0.05,
    reduction: str = "mean",
    detach_weight: bool = False,
) -> Tensor:
    """With the terms of its authors', whose logarithms are of at least 1e-8."""
    positive = logits.sigmoid()
    negative = (1 - positive + clip).clamp(max=1)
    losses = target * positive.clamp(min=1e-8).log()
    losses = losses + (1 - target) * negative.clamp(min=1e-8).log()
    of_target = positive * target + negative * (1 - target)
    if detach_weight:
        of_target = of_target.detach()
    weight = (1 - of_target).pow(gamma_pos * target + gamma_neg * (1 - target))
    return reduced(-losses * weight, reduction)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else getattr(torch, reduction)(losses)


BY_HAND = {
    "quality_focal_loss": quality_focal_by_hand,
    "varifocal_loss": varifocal_by_hand,
    "asymmetric_loss": asymmetric_by_hand,
}
