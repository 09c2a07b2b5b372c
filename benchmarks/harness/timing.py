"""Seconds and bytes of steps that are measured side by side."""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Step = Callable[[], object]
Sample = tuple[float, float]  # seconds a call: on the device's clock, on the wall clock
Sampler = Callable[[Step, int], Sample]

# Long against the resolution of the clocks; on the GPU also against the synchronisation before a
# sample, after which it waits some 30 us for the first kernel.
SAMPLE_SECONDS = {"cpu": 2e-3, "cuda": 20e-3}
WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    median: float
    iqr: float
    wall_median: float


def calls_per_sample(steps: dict[str, Step], device: str) -> dict[str, int]:
    """Warms the steps up and counts how many calls of each make a sample long enough."""
    return {
        name: count_calls(step, sampler(device), SAMPLE_SECONDS[device])
        for name, step in steps.items()
    }


def count_calls(step: Step, take_sample: Sampler, seconds: float) -> int:
    calls = 1
    while min(take_sample(step, calls)[1] for _ in range(WARM_UPS)) * calls < seconds:
        calls *= 2
    return calls


def time_alternating(
    steps: dict[str, Step], calls: dict[str, int], device: str, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Times the steps in turns, so that a change of the machine's speed meets all of them.

    Each round takes one sample of each; there are at least so many rounds, and more while the
    seconds last.
    """
    take_sample = sampler(device)
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    order = list(steps)
    end = time.perf_counter() + seconds
    done = 0
    gc.disable()
    try:
        while done < rounds or time.perf_counter() < end:
            for name in order:
                # The caches are then as this contender leaves them, not its predecessor.
                if calls[name] > 1:
                    steps[name]()
                samples[name].append(take_sample(steps[name], calls[name]))
            order.reverse()
            done += 1
    finally:
        gc.enable()
    return {name: summarise(taken) for name, taken in samples.items()}


def sampler(device: str) -> Sampler:
    return cuda_sample if device == "cuda" else cpu_sample


def cpu_sample(step: Step, calls: int) -> Sample:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    seconds = (time.perf_counter() - start) / calls
    return seconds, seconds


def cuda_sample(step: Step, calls: int) -> Sample:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    for _ in range(calls):
        step()
    last.record()
    last.synchronize()
    wall = (time.perf_counter() - start) / calls
    return first.elapsed_time(last) / 1e3 / calls, wall


def summarise(samples: list[Sample]) -> Timing:
    device, wall = np.array(samples).T
    low, median, high = np.percentile(device, [25, 50, 75]).tolist()
    return Timing(median, high - low, float(np.median(wall)))


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that one step holds beyond what is there before it.

    Call it with a new step of a loss that has run: a step that has a gradient to free first would
    hide as much of its peak. What does not come from torch's allocators, such as a few kilobytes of
    partial sums, is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # What was asked for: allocated blocks are larger, by how much depends on those before.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        step()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    # The allocator's own record, event by event: the resident set (VmHWM) would miss whatever fits
    # into pages that the process has kept from earlier steps.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line at start and stop
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return int(np.cumsum([0] + [nbytes for _, nbytes in changes]).max())
