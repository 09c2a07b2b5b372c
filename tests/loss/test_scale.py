"""More elements than 32 bits can count."""

from pathlib import Path

import pytest
import torch
from helpers import evaluate, fused, reference, torch_bce

ROWS, COLUMNS = 429_496_733, 5
CHUNK = 2**21  # rows that are taken to float64 at a time
# Logits, target and gradient are 4 GiB each, bool targets 2, and the numbers of a chunk in float64
# less than one.
NEEDED = 16 * 2**30

pytestmark = pytest.mark.large


def available_memory() -> int:
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


@pytest.fixture(scope="module")
def problem():
    """Logits and targets of 2^31 + 17 elements."""
    assert ROWS * COLUMNS == 2**31 + 17
    if available_memory() < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of memory")
    torch.manual_seed(0)
    logits = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    target = torch.empty_like(logits)
    for rows in chunks():
        logits[rows] = torch.randn(logits[rows].shape) * 4
        target[rows] = torch.rand(target[rows].shape).round()
    return logits, target


def chunks():
    return [slice(start, min(start + CHUNK, ROWS)) for start in range(0, ROWS, CHUNK)]


# The ends, a quarter, the middle, where a 32-bit count of bytes or of elements would begin anew
SPOTS = [slice(max(row - 100, 0), row + 100) for row in (0, ROWS // 4, ROWS // 2, ROWS)]


def in_rows(rows, weights):
    """Of each weight what belongs to these rows; one for each column belongs to all."""
    return {name: w[rows] if w.dim() == 2 else w for name, w in weights.items()}


@pytest.fixture(scope="module")
def sums(problem):
    """In float64, of the losses in each column, all of them and those of positives."""
    logits, target = problem
    of_all, of_positives = torch.zeros(COLUMNS).double(), torch.zeros(COLUMNS).double()
    for rows in chunks():
        t = target[rows].double()
        losses = torch_bce(logits[rows].double(), t, reduction="none")
        of_all += losses.sum(0)
        of_positives += (losses * t).sum(0)
    return of_all, of_positives


@pytest.mark.parametrize(
    "case", ["unweighted", "bool targets", "pos_weight of a column", "weight of an element"]
)
def test_mean(problem, sums, case):
    logits, target = problem
    pos_weight = torch.rand(COLUMNS) + 0.5
    of_all, of_positives = sums
    weights, exact = {
        "unweighted": ({}, of_all),
        "bool targets": ({}, of_all),
        # Of positives and negatives, for each target is one of them.
        "pos_weight of a column": (
            {"pos_weight": pos_weight},
            of_all + of_positives * (pos_weight.double() - 1),
        ),
        # Any numbers, and no more memory
        "weight of an element": ({"weight": target}, of_positives),
    }[case]
    if case == "bool targets":
        target = target.bool()
    # For a loss in float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(fused, logits, target, grad_loss=torch.tensor(2.0), **weights)
    assert got.loss.dtype == torch.float32
    mean = exact.sum().item() / logits.numel()
    assert got.loss.item() == pytest.approx(mean, rel=torch.finfo(torch.float32).eps)
    for rows in SPOTS:
        part = reference(
            logits[rows], target[rows], reduction="sum", **in_rows(rows, weights)
        ).grad_logits
        assert_rounded_once(got.grad_logits[rows].double() * logits.numel() / 2, part)


def test_none(problem):
    logits, target = problem
    losses = fused(logits, target, reduction="none")
    assert losses.shape == logits.shape
    for rows in SPOTS:
        exact = reference(logits[rows], target[rows], reduction="none").loss
        assert_rounded_once(losses[rows], exact)


def assert_rounded_once(got, exact):
    """To bfloat16, after a few operations in float32."""
    eps = torch.finfo(torch.bfloat16).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert ((got.double() - exact).abs() <= eps * exact.abs()).all()
