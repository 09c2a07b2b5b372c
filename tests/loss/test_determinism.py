"""The same bits from run to run and for any number of threads."""

import os

import pytest
import torch
from helpers import evaluate, fused

SIZES = [1000, 16_385, 100_003, 2**20 + 5]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("numel", SIZES)
def test_any_number_of_threads(set_threads, numel, dtype, reduction):
    logits = (torch.randn(numel) * 4).to(dtype)
    target = torch.rand(numel).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(evaluate(fused, logits, target, reduction=reduction))
    for other in results[1:]:
        assert torch.equal(results[0].loss, other.loss)
        assert torch.equal(results[0].grad_logits, other.grad_logits)


@pytest.mark.parametrize("numel", SIZES)
def test_repeats(device, numel):
    logits = torch.randn(numel, device=device) * 4
    target = torch.rand(numel, device=device)
    first = evaluate(fused, logits, target)
    for _ in range(20):
        again = evaluate(fused, logits, target)
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(first.grad_logits, again.grad_logits)


def test_threads_share_the_work(set_threads):
    """With two threads, two of them run: at::parallel_for is silently serial without OpenMP."""
    if torch.get_num_threads() < 2:
        pytest.skip("one processor")
    set_threads(2)
    logits, target = torch.randn(2**22), torch.rand(2**22)
    fused(logits, target)
    before = thread_times()
    for _ in range(100):
        fused(logits, target)
    busy = [after - before.get(thread, 0) for thread, after in thread_times().items()]
    assert sorted(busy)[-2] > 0.2 * max(busy)


def thread_times() -> dict[str, int]:
    """Clock ticks that each thread of this process has run."""
    times = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        times[thread] = int(fields[11]) + int(fields[12])
    return times
