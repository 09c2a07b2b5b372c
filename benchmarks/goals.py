"""The goals for the CPU: which cases they need, and whether the measured rows meet them."""

from dataclasses import dataclass

import torch
from cases import Case
from results import Row

SMALL_SIZES = (1, 16, 64, 128, 640)
PEAK = "peak / logits"


@dataclass(frozen=True)
class Goal:
    """A bound on a quotient of two contenders' times, or on the peak memory of the fused loss."""

    case: Case
    measure: str  # "eager / fused" and the like, or PEAK
    bound: str  # ">=" or "<="
    value: float
    stretch: float | None = None

    def measured(self, rows: dict[str, Row]) -> float | None:
        """The value in these rows, one for each contender; None if they do not tell."""
        if self.measure == PEAK:
            return peak_multiple(rows["fused"])
        above, below = self.measure.split(" / ")
        if above not in rows or below not in rows:
            return None
        return rows[above].median_seconds / rows[below].median_seconds

    def is_met(self, measured: float, stretch: bool = False) -> bool:
        """Whether the goal, or what was set beyond it, is reached."""
        value = self.stretch if stretch else self.value
        if value is None:
            return False
        return measured >= value if self.bound == ">=" else measured <= value


def peak_multiple(row: Row) -> float | None:
    """Peak memory in multiples of the logits, without the few bytes of the loss and its sums."""
    if row.peak_bytes is None:
        return None
    return round(row.peak_bytes / (row.numel * getattr(torch, row.dtype).itemsize), 2)


def cpu_case(
    numel: int,
    mode: str = "fwd+bwd",
    dtype: str = "float32",
    reduction: str = "mean",
    weights: str = "none",
) -> Case:
    return Case(numel, "cpu", mode, dtype, dtype, reduction, weights)


def cpu_goals() -> list[Goal]:
    return [*plain_goals(), *forward_goals(), *variant_goals(), *small_goals()]


def plain_goals() -> list[Goal]:
    goals = []
    for numel, eager, compiled in [(2**20, 6, 4.5), (2**24, 10, 4), (2**26, 10, 4)]:
        case = cpu_case(numel)
        goals += [Goal(case, "eager / fused", ">=", eager)]
        goals += [Goal(case, "compile / fused", ">=", compiled)]
        if numel > 2**20:
            goals += [Goal(case, "fused / stream", "<=", 1.6)]
        goals += [Goal(case, PEAK, "<=", 1)]
    return goals


def forward_goals() -> list[Goal]:
    medium, large = cpu_case(2**20, mode="fwd"), cpu_case(2**24, mode="fwd")
    return [
        Goal(medium, "eager / fused", ">=", 5),
        Goal(large, "eager / fused", ">=", 12),
        Goal(large, "fused / stream", "<=", 1.5),
    ]


def variant_goals() -> list[Goal]:
    variants = [
        ({"weights": "pos_weight"}, 2.5),
        ({"weights": "weight"}, 2.5),
        ({"reduction": "none"}, 2),
        ({"dtype": "bfloat16"}, 2.5),
        ({"dtype": "float16"}, 2.5),
        ({"dtype": "float64"}, 2),
    ]
    goals = []
    for options, compiled in variants:
        for numel in (2**20, 2**24):
            case = cpu_case(numel, **options)
            goals += [Goal(case, "eager / fused", ">=", 4)]
            goals += [Goal(case, "compile / fused", ">=", compiled)]
    return goals


def small_goals() -> list[Goal]:
    return [
        Goal(cpu_case(numel), "fused / eager", "<=", 0.85, stretch=0.7) for numel in SMALL_SIZES
    ]
