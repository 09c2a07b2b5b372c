"""What a step takes of memory, by the allocators' own record."""

import os
from typing import NamedTuple

import numpy as np
import torch


class Memory(NamedTuple):
    """Beyond what was there before."""

    held: float  # afterwards
    peak: float


def bytes_of(step, device) -> Memory:
    """What ``step`` returns counts as held."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del kept
        return Memory(held - before, peak - before)
    # The resident set would miss what fits into pages that the process kept.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = step()
    events = profile.kineto_results.events()
    del kept
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = np.cumsum([0, *(nbytes for _, nbytes in changes)])
    return Memory(int(held[-1]), int(held.max()))
