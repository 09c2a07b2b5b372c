"""What the tests of the focal loss share: torchvision's arithmetic, and the loss to 40 digits."""

import mpmath
from loss_cases import FOCAL

GAMMAS = (0, 0.5, 1, 2, 2.5, 4)
ALPHAS = (0.25, 1, -1)

by_torchvision = FOCAL.reference


def to_40_digits(x: float, t: float, gamma: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Loss and derivative of one element without alpha, for a finite logit."""
    loss, slope, _ = FOCAL.exact(x, t, {"alpha": -1, "gamma": gamma})
    return loss, slope


def alpha_of(alpha: float, t: float) -> float:
    return 1.0 if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)
