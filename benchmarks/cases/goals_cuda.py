"""The goals for a Hopper GPU, and the cases that are measured beside them."""

from functools import partial

from cases.base import Case
from cases.goal import PEAK, SHARE_OF_COPY, WALL, Goal

SMALL_SIZES = (1, 640, 2**12, 2**16)
LARGE_SIZES = (2**26, 2**28)

cuda_case = partial(Case, device="cuda")


def cuda_goals() -> list[Goal]:
    # float32 meets float32: cases in a row that differ in their size alone share a table.
    return [*small_goals(), *large_goals()]


def small_goals() -> list[Goal]:
    return [Goal(cuda_case(numel), "fused / eager" + WALL, "<=", 0.6) for numel in SMALL_SIZES]


def large_goals() -> list[Goal]:
    dtypes = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
    goals = []
    for dtype, target_dtype in dtypes:
        for numel in LARGE_SIZES:
            case = cuda_case(numel, dtype=dtype, target_dtype=target_dtype)
            goals += [Goal(case, SHARE_OF_COPY, ">=", 90)]
            if dtype == "float32":
                goals += [Goal(case, "eager / fused", ">=", 5.5)]
            goals += [Goal(case, "compile / fused", ">=", 1.5)]
            goals += [Goal(case, PEAK, "<=", 1)]
    return goals


def cases_without_goals() -> list[Case]:
    variants = [
        {"weights": "pos_weight"},
        {"reduction": "none"},
        {"dtype": "float16"},
        {"dtype": "float64"},
    ]
    return [cuda_case(2**26, **variant) for variant in variants]
