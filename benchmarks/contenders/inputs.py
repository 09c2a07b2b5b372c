"""Logits, targets and weights, drawn at random."""

import math

import torch
from torch import Tensor

from cases.base import Case

Inputs = tuple[Tensor, Tensor, Tensor | None]  # logits, target, grad_loss

# More than any L2: on the GPU the inputs rotate through this much, so that each call finds them
# in memory. The limit on their number is for small cases, which launches dominate anyhow.
ROTATED_BYTES = 100e6
MOST_ROTATED = 256


def count_rotated(case: Case) -> int:
    if case.device == "cpu":
        return 1
    return min(math.ceil(ROTATED_BYTES / (case.bytes_per_element * case.numel)), MOST_ROTATED)


def make_inputs(case: Case) -> Inputs:
    """Logits, target, and the gradient that the backward pass of a loss for each element needs."""
    dtype, target_dtype = getattr(torch, case.dtype), getattr(torch, case.target_dtype)
    layout = {"device": case.device, "memory_format": case.memory_format}
    logits = torch.empty(case.shape, dtype=dtype, **layout).normal_(std=3)
    target = torch.empty(case.shape, dtype=target_dtype, **layout).bernoulli_()
    if case.mode == "fwd":
        return logits, target, None
    grad_loss = torch.ones_like(target) if case.reduction == "none" else None
    return logits, target, grad_loss


def make_weights(case: Case) -> dict[str, Tensor]:
    """Between 1 and 5 for positive targets, 0.5 and 1.5 for all."""
    ranges = {"weight": (0.5, 1.5), "pos_weight": (1, 5)}
    options = {"device": case.device, "dtype": getattr(torch, case.target_dtype)}
    return {
        name: torch.empty(shape, **options).uniform_(*ranges[name])
        for name, shape in case.weight_shapes.items()
    }
