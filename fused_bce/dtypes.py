"""What the kernels read, and how reductions are numbered."""

import torch
from torch.nn import _reduction

from fused_bce import _C

TARGETS = frozenset(getattr(torch, name) for name in _C.dtypes())
FLOATS = frozenset(dtype for dtype in TARGETS if dtype.is_floating_point)
INTEGERS = TARGETS - FLOATS - {torch.bool}

NONE, MEAN, SUM = (_reduction.get_enum(name) for name in ("none", "mean", "sum"))
# batchmean is a mean with a divisor of its own.
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM, "batchmean": MEAN}


def number_of_reduction(reduction: str) -> int:
    """Raises torch's error for an unknown one."""
    return MEAN if reduction == "batchmean" else _reduction.get_enum(reduction)
