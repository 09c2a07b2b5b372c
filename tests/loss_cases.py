"""The pointwise losses as a table: whatever is tested of each of them takes its entries from here.

A definition is written once, for tensors of float64 and for numbers of mpmath. It is what the paper
or the authors' code says, term by term, never what the kernels compute.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import mpmath
import torch
from helpers import is_ignored

import fused_bce
from fused_bce import _C, functional


class TorchMath:
    log, where = torch.log, torch.where

    @staticmethod
    def at_most(value, bound):
        return value.clamp(max=bound)


class MpMath:
    log, at_most = mpmath.log, min

    @staticmethod
    def where(condition, value, other):
        return value if condition else other


def entropy(math, p, not_p, t, pos_weight=None):
    positive = t * math.log(p) if pos_weight is None else pos_weight * t * math.log(p)
    return -positive - (1 - t) * math.log(not_p)


# Of each loss its weight and the cross entropy that it weighs, whose product is the loss of an
# element: of p = sigmoid(x), not_p = 1 - p, and a target t.


def define_bce(math, p, not_p, t, *, pos_weight=None):
    return 1, entropy(math, p, not_p, t, pos_weight)


def define_focal(
    math,
    p,
    not_p,
    t,
    alpha=0.25,
    gamma=2.0,
    *,
    gamma_neg=None,
    entropy_smoothing=0,
    pos_weight=None,
):
    """torchvision.ops.sigmoid_focal_loss, with the exponents of Ben-Baruch et al., 2020, effdet's
    smoothing and kornia's pos_weight."""
    exponent = gamma if gamma_neg is None else gamma * t + gamma_neg * (1 - t)
    weight = (not_p * t + p * (1 - t)) ** exponent  # 1 - p_t
    if alpha >= 0:
        weight = weight * (alpha * t + (1 - alpha) * (1 - t))
    smoothed = t * (1 - entropy_smoothing) + entropy_smoothing / 2
    return weight, entropy(math, p, not_p, smoothed, pos_weight)


def define_quality_focal(math, p, not_p, t, beta=2.0):
    """mmdetection's quality_focal_loss_tensor_target"""
    return abs(t - p) ** beta, entropy(math, p, not_p, t)


def define_varifocal(math, p, not_p, t, alpha=0.75, gamma=2.0):
    """mmdetection's varifocal_loss; with a detached weight that of RT-DETR"""
    return math.where(t > 0, t, alpha * p**gamma), entropy(math, p, not_p, t)


def define_asymmetric(
    math, p, not_p, t, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, *, pos_weight=None
):
    """timm's AsymmetricLossMultiLabel, without its eps"""
    negative = math.at_most(not_p + clip, 1)
    wrong = 1 - p * t - negative * (1 - t)
    wrong = math.where(wrong > 0, wrong, 1e-300)  # powers of 0 have poles
    weight = wrong ** (gamma_pos * t + gamma_neg * (1 - t))
    return weight, entropy(math, p, negative, t, pos_weight)


@dataclasses.dataclass(frozen=True, eq=False)
class LossCase:
    """A loss, and which of its own arguments are tried."""

    function: Callable[..., torch.Tensor]
    module: type[torch.nn.Module]
    definition: Callable[..., tuple[Any, Any]]
    node: str  # of autograd, where the kernels compute it
    described: str  # the module's extra_repr, by default
    options: dict[str, dict[str, Any]]
    # What the kernels do not take; torchvision's function takes any number, and so does ours.
    out_of_range: tuple[dict[str, float], ...] = ()
    function_takes_any_number: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def errors(self) -> tuple[dict[str, float], ...]:
        """Numbers that the function does not take."""
        return () if self.function_takes_any_number else self.out_of_range

    @property
    def numbers(self) -> dict[str, Any]:
        """The loss's own, with their defaults."""
        signature = inspect.signature(self.function).parameters
        return {name: signature[name].default for name in self._parameters}

    @property
    def floats(self) -> list[str]:
        """The names of those in whose place a tensor may stand."""
        return [name for name, default in self.numbers.items() if not isinstance(default, bool)]

    @property
    def _parameters(self) -> list[str]:
        (names,) = (
            [p[0] for p in parameters] for n, _, parameters in _C.losses() if n == self.name
        )
        return names

    @property
    def takes_pos_weight(self) -> bool:
        return "pos_weight" in inspect.signature(self.function).parameters

    def is_fused(self, loss) -> bool:
        return self.node in loss.grad_fn.name()

    def own_operands(self, options) -> tuple:
        """What the operators take between the weight and the reduction."""
        numbers = self.numbers | {n: v for n, v in options.items() if n in self.numbers}
        if numbers.get("gamma_neg", 0) is None:
            numbers["gamma_neg"] = numbers["gamma"]
        pos_weight = (options.get("pos_weight"),) if self.takes_pos_weight else ()
        return *pos_weight, *map(float, numbers.values())

    def reference(
        self,
        input,
        target,
        *numbers,
        reduction="none",
        weight=None,
        label_smoothing=0.0,
        ignore_index=None,
        detach_weight=False,
        recompute=False,
        validate_targets=False,
        **own,
    ) -> torch.Tensor:
        """The loss by its definition, and around that, by hand, what all of them take."""
        ignored = torch.zeros_like(target, dtype=torch.bool)
        if ignore_index is not None:
            ignored = is_ignored(target, ignore_index)
            input, target = input.masked_fill(ignored, 0), target.masked_fill(ignored, 0)
        target = target.to(torch.promote_types(input.dtype, target.dtype))
        target = target * (1 - label_smoothing) + label_smoothing / 2
        p, not_p = torch.sigmoid(input), torch.sigmoid(-input)
        weights, losses = self.definition(TorchMath, p, not_p, target, *numbers, **own)
        losses = losses * (weights.detach() if detach_weight else weights)
        if weight is not None:
            losses = losses * weight
        losses = losses.masked_fill(ignored, 0)
        if reduction == "batchmean":
            return losses.sum() / len(input)
        if reduction == "mean":
            count = losses.numel() if ignore_index is None else (~ignored).sum().clamp(min=1)
            return losses.sum() / count
        return losses if reduction == "none" else losses.sum()

    def exact(self, x: float, t: float, options) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
        """Loss, derivative and weight of one element to 40 digits, for a finite logit."""
        return _exact(self.definition, x, t, tuple(sorted(options.items())))


@functools.cache
def _exact(definition, x, t, options):
    options = dict(options)
    detach_weight = options.pop("detach_weight", False)
    step = mpmath.mpf(2) ** -100  # of a central difference, whose error is its square

    def terms(x):
        p, not_p = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
        return definition(MpMath, p, not_p, mpmath.mpf(t), **options)

    # The step takes 30 digits, its square 60; a difference as 1 - p half of those of |x|.
    with mpmath.workdps(110 + int(abs(x) / 2)):
        x = mpmath.mpf(x)
        (weight, losses), after, before = terms(x), terms(x + step), terms(x - step)
        if detach_weight:
            slope = weight * (after[1] - before[1])
        else:
            slope = after[0] * after[1] - before[0] * before[1]
        return +(weight * losses), +(slope / (2 * step)), +mpmath.mpf(weight)


POS_WEIGHT = torch.linspace(0.5, 2, 5)

BCE = LossCase(
    functional.binary_cross_entropy_with_logits,
    fused_bce.BCEWithLogitsLoss,
    define_bce,
    node="BCEWithLogitsFunction",
    described="",
    options={
        "plain": {},
        "pos_weight": {"pos_weight": POS_WEIGHT},
        "weights": {"weight": torch.linspace(1, 3, 6)[:, None], "pos_weight": POS_WEIGHT},
    },
)
FOCAL = LossCase(
    functional.sigmoid_focal_loss,
    fused_bce.SigmoidFocalLoss,
    define_focal,
    node="SigmoidFocalFunction",
    described="alpha=0.25, gamma=2.0, reduction='mean'",
    options={
        "plain": {},
        "power": {"alpha": 0.5, "gamma": 1.7},
        "no alpha": {"alpha": -1, "gamma": 1},
        "gamma_neg": {"gamma": 0.5, "gamma_neg": 3},
        "gamma 0": {"gamma": 0},
        "pos_weight": {"pos_weight": POS_WEIGHT, "gamma": 1},
        "smoothed entropy": {"entropy_smoothing": 0.1, "pos_weight": POS_WEIGHT, "gamma": 1.7},
    },
    out_of_range=(
        {"alpha": 1.5},
        {"gamma": -1},
        {"gamma": float("inf")},
        {"gamma_neg": float("nan")},
    ),
    function_takes_any_number=True,
)
QUALITY_FOCAL = LossCase(
    functional.quality_focal_loss,
    fused_bce.QualityFocalLoss,
    define_quality_focal,
    node="PointwiseFunction<fused_bce::QualityFocal>",
    described="beta=2.0, reduction='mean'",
    options={
        "plain": {},
        "beta 0": {"beta": 0},
        "beta 1": {"beta": 1},
        "power": {"beta": 1.7},
        "large power": {"beta": 5},
    },
    out_of_range=({"beta": -1}, {"beta": float("nan")}, {"beta": 2e6}),
)
VARIFOCAL = LossCase(
    functional.varifocal_loss,
    fused_bce.VarifocalLoss,
    define_varifocal,
    node="PointwiseFunction<fused_bce::Varifocal>",
    described="alpha=0.75, gamma=2.0, detach_weight=False, reduction='mean'",
    options={
        "plain": {},
        "power": {"alpha": 2, "gamma": 2.5},
        "gamma 0": {"gamma": 0},
        "gamma 1": {"alpha": 0.2, "gamma": 1},
        "detached": {"detach_weight": True},
        "detached power": {"gamma": 0.5, "detach_weight": True},
    },
    out_of_range=({"alpha": -0.1}, {"alpha": float("nan")}, {"gamma": -1}, {"gamma": 2e6}),
)
ASYMMETRIC = LossCase(
    functional.asymmetric_loss,
    fused_bce.AsymmetricLoss,
    define_asymmetric,
    node="PointwiseFunction<fused_bce::Asymmetric>",
    described="gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach_weight=False, reduction='mean'",
    options={
        "plain": {},
        "no clip": {"clip": 0, "gamma_neg": 2},
        "powers": {"gamma_neg": 2.5, "gamma_pos": 0.5, "clip": 0.2},
        "exponents 0": {"gamma_neg": 0, "gamma_pos": 0, "pos_weight": POS_WEIGHT},
        "pos_weight": {"pos_weight": POS_WEIGHT, "clip": 0},
        "detached": {"detach_weight": True, "pos_weight": POS_WEIGHT},
    },
    out_of_range=(
        {"gamma_neg": -1},
        {"gamma_pos": float("inf")},
        {"clip": -0.1},
        {"clip": 1.5},
        {"clip": float("nan")},
    ),
)
# Those that weigh the cross entropy
LOSSES = (FOCAL, QUALITY_FOCAL, VARIFOCAL, ASYMMETRIC)
