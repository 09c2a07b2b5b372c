"""The focal loss in torch's operations."""

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def eager_focal_loss():
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
    return losses if reduction == "none" else getattr(torch, reduction)(losses)
