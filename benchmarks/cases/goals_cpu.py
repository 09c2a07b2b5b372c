"""The goals for the CPU."""

from functools import partial

from cases.base import Case
from cases.goal import PEAK, Goal

SMALL_SIZES = (1, 16, 64, 128, 640)

cpu_case = partial(Case, device="cpu")


def cpu_goals() -> list[Goal]:
    return [*backward_goals(), *forward_goals(), *variant_goals(), *small_goals()]


def backward_goals() -> list[Goal]:
    goals = []
    for numel, eager, compiled in [(2**20, 6, 4.5), (2**24, 10, 4), (2**26, 10, 4)]:
        case = cpu_case(numel)
        goals += [Goal(case, "eager / fused", ">=", eager)]
        goals += [Goal(case, "compile / fused", ">=", compiled)]
        if numel > 2**20:
            goals += [Goal(case, "fused / stream", "<=", 1.4)]
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
    # At least so many times as fast as eager and as compile, at 2^20 and at 2^24
    variants = [
        ({"weights": "pos_weight"}, (4, 2.5), (4, 2.5)),
        ({"weights": "weight"}, (4, 2.5), (4, 2.5)),
        ({"reduction": "none"}, (4, 3), (4, 2)),
        ({"dtype": "bfloat16"}, (4.5, 3.5), (4, 2.5)),
        ({"dtype": "float16"}, (4, 2.8), (4, 2.5)),
        ({"dtype": "float64"}, (4, 2), (4, 2)),
    ]
    goals = []
    for variant, *bounds in variants:
        for numel, (eager, compiled) in zip((2**20, 2**24), bounds, strict=True):
            case = cpu_case(numel, **variant)
            goals += [Goal(case, "eager / fused", ">=", eager)]
            goals += [Goal(case, "compile / fused", ">=", compiled)]
    return goals


def small_goals() -> list[Goal]:
    steps = [
        Goal(cpu_case(numel), "fused / eager", "<=", 0.78, stretch=0.7) for numel in SMALL_SIZES
    ]
    calls = [Goal(cpu_case(numel, mode="fwd"), "fused / eager", "<=", 0.6) for numel in SMALL_SIZES]
    return steps + calls
