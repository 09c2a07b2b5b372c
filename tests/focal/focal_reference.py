"""What the tests of the focal loss share: torchvision's arithmetic, and the loss to 40 digits."""

import functools

import mpmath
import torch
from helpers import is_ignored
from torch.nn.functional import binary_cross_entropy_with_logits

GAMMAS = (0, 0.5, 1, 2, 2.5, 4)
ALPHAS = (0.25, 1, -1)


def by_torchvision(
    inputs,
    targets,
    alpha=0.25,
    gamma=2,
    reduction="none",
    *,
    gamma_neg=None,
    weight=None,
    label_smoothing=0.0,
    ignore_index=None,
):
    """Term by term as torchvision writes it, and around it, by hand, what it does not take."""
    ignored = torch.zeros_like(targets, dtype=torch.bool)
    if ignore_index is not None:
        ignored = is_ignored(targets, ignore_index)
        inputs, targets = inputs.masked_fill(ignored, 0), targets.masked_fill(ignored, 0)
    targets = targets.to(torch.promote_types(inputs.dtype, targets.dtype))
    targets = targets * (1 - label_smoothing) + label_smoothing / 2
    p = torch.sigmoid(inputs)
    p_t = p * targets + (1 - p) * (1 - targets)
    exponent = gamma
    if gamma_neg is not None:
        exponent = gamma * targets + gamma_neg * (1 - targets)
    losses = binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    losses = losses * (1 - p_t) ** exponent
    if alpha >= 0:
        losses = losses * (alpha * targets + (1 - alpha) * (1 - targets))
    if weight is not None:
        losses = losses * weight
    losses = losses.masked_fill(ignored, 0)
    if reduction == "mean":
        count = losses.numel() if ignore_index is None else (~ignored).sum().clamp(min=1)
        return losses.sum() / count
    return losses if reduction == "none" else losses.sum()


@functools.cache
def to_40_digits(x: float, t: float, gamma: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Loss and derivative of one element without alpha, for a finite logit, from the definition:
    the derivative as mpmath's own, of -p_t's logarithm times a power of 1 - p_t."""
    with mpmath.workdps(40 + int(abs(x))):  # the difference 1 - p loses as many as |x| / 2.3
        x, t, g = mpmath.mpf(x), mpmath.mpf(t), mpmath.mpf(gamma)
        p = 1 / (1 + mpmath.exp(-x))
        wrong = 1 - p * t - (1 - p) * (1 - t)
        entropy = -t * mpmath.log(p) - (1 - t) * mpmath.log(1 - p)
        # By the chain rule over p: dp/dx = p (1 - p)
        by_p = wrong**g * ((1 - t) / (1 - p) - t / p)
        if g != 0:
            by_p += g * wrong ** (g - 1) * (1 - 2 * t) * entropy
        return +(wrong**g * entropy), +(by_p * p * (1 - p))


def alpha_of(alpha: float, t: float) -> float:
    return 1.0 if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)
