"""run.py runs and writes what its readers expect: ladders, variants, goals, memory, refusals."""

import dataclasses
import itertools
import math
import os
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import by_dtype, by_reduction, fused
from scripts import QUICK, ROOT, assert_plotted, make_row, run, run_script

import fused_bce
from cases.base import DTYPES, REDUCTIONS, WEIGHTS, Case
from cases.goal import Goal
from cases.goals_cuda import cases_without_goals, cuda_goals
from harness.rows import read_rows
from harness.timing import peak_bytes


def test_ladder(tmp_path, device):
    rows, _ = run(tmp_path, device, "--sizes", 3, "2^10")
    contenders = ["fused", "eager", "stream"] + ["copy"] * (device == "cuda")
    assert sorted((row.contender, row.mode, row.numel) for row in rows) == sorted(
        itertools.product(contenders, ("fwd", "fwd+bwd"), (3, 1024))
    )
    for row in rows:
        assert row.median_seconds > 0
        assert row.iqr_seconds >= 0
        if row.contender == "copy":
            # A GiB is read and written, but for the rounding to whole numbers for each element.
            assert row.bytes_per_element * row.numel == pytest.approx(2**31, rel=1e-6)
        else:
            assert row.bytes_per_element == (8 if row.mode == "fwd" else 12)
        program, option = shlex.split(row.command)[1:3]
        assert program.endswith("benchmarks/run.py")
        assert option == "--no-compile"
    assert_plotted(tmp_path, f"-{device}-fwd-bwd-float32-mean", f"-{device}-fwd-float32-mean")


def test_variants_then_goals_appended(tmp_path):
    variants = ["--mode", "fwd+bwd", "--sizes", "2^14", "--weights", "both", "--reduction", "none"]
    run(tmp_path, "cpu", *variants, "--dtype", "float32", "float16")
    steps = ["--mode", "fwd+bwd", "--sizes", 1, 640]
    rows, output = run(tmp_path, "cpu", "--preset", "goals", *steps, "--append")
    assert "of 2 met" in output
    assert "<= 0.78" in output
    fused, eager, stream = rows[:3]
    assert {row.weights for row in rows[:6]} == {"both"}
    # Two reads and a write in forward, three and one in backward; half as much in float16
    assert [row.bytes_per_element for row in rows[:6]] == [28] * 3 + [14] * 3
    # The losses and the gradient, and at most a page beside them; torch holds more.
    assert 2 * 4 * 2**14 <= fused.peak_bytes <= 2 * 4 * 2**14 + 4096
    assert eager.peak_bytes > fused.peak_bytes
    assert stream.peak_bytes is None
    assert [row.numel for row in rows[6:]] == [1] * 3 + [640] * 3


def test_non_leaf(tmp_path):
    rows, _ = run(tmp_path, "cpu", "--non-leaf", "--sizes", "2^14")
    # Without a backward pass a view of the logits would change nothing.
    assert [row.mode for row in rows] == ["fwd"] * 3 + ["fwd+bwd non-leaf"] * 3
    # The gradient passes through the view as it is: no copy for the leaf.
    assert 4 * 2**14 <= rows[3].peak_bytes <= 4 * 2**14 + 4096
    assert_plotted(tmp_path, "-cpu-fwd-bwd-non-leaf-float32-mean", "-cpu-fwd-float32-mean")

    # In a folder, device and preset name the file.
    quick = ["--no-compile", *QUICK, "--device", "cpu", "--non-leaf", "--output", tmp_path]
    run_script("run.py", *quick, "--sizes", 128)
    assert "of 2 met" in run_script("run.py", *quick, "--sizes", 128, "--preset", "goals")
    assert len(read_rows(tmp_path / "cpu-ladder.csv")) == 2 * 3
    modes = {row.mode for row in read_rows(tmp_path / "cpu-goals.csv")}
    assert modes == {"fwd", "fwd+bwd non-leaf"}


def test_instruction_set(tmp_path, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    name = fused_bce.build_info()["cpu_instruction_sets"][-1]
    before = fused_bce._C.current_instruction_set()
    try:
        rows, _ = run(tmp_path, "cpu", "--sizes", 128, "--instruction-set", name)
    finally:  # the script has run in this process
        fused_bce._C.use_instruction_set(before)
    assert {row.instruction_set for row in rows} == {name}
    # What torch has of it, in a process where it has not computed yet
    assert os.environ["ATEN_CPU_CAPABILITY"] == {"sse2": "default"}.get(name, name)


def test_alone(tmp_path):
    rows, _ = run(tmp_path, "cpu", "--alone", "--mode", "fwd+bwd", "--sizes", 640, "2^14")
    assert [row.contender for row in rows] == ["fused", "fused"]
    assert rows[-1].peak_bytes == pytest.approx(4 * 2**14, abs=4096)
    assert_plotted(tmp_path, "")


@by_reduction
@by_dtype
def test_peak_memory(dtype, reduction, device):
    """A training step holds the gradient of the logits and, where each is wanted, the losses."""
    logits, target = (torch.rand(2**16, device=device, dtype=dtype) for _ in range(2))
    logits.requires_grad_()
    grad_loss = torch.ones_like(target) if reduction == "none" else torch.ones((), device=device)

    def step():
        torch.autograd.backward(fused(logits, target, reduction=reduction), grad_loss.to(dtype))

    step()
    logits.grad = None
    size = logits.nbytes * (2 if reduction == "none" else 1)
    # Beside them the loss and partial sums, in blocks of half a kilobyte on a GPU
    assert size <= peak_bytes(step, device) <= size + 4096


def test_refusals(tmp_path):
    """The first in a process of its own, with no more to import from than a user's."""
    command = [sys.executable, "benchmarks/run.py", "--graph", "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--graph needs --device cuda" in result.stderr

    arguments = ["--preset", "workloads", "--mode", "fwd", "--output", tmp_path]
    message = run_script("run.py", *arguments, status="The preset workloads has no such case")
    assert message == ""
    run_script("run.py", "--workloads", "detection", "--output", tmp_path, status=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_goals_and_graphs_on_cuda(tmp_path):
    quick = ["--no-compile", *QUICK, "--device", "cuda", "--preset", "goals", "--graph"]
    output = run_script("run.py", *quick, "--sizes", 1, 640, "2^26", "--output", tmp_path)
    # Two for the small sizes; at 2^26 four for float32 and three for each half type, of which
    # that of torch.compile is not measured here.
    assert "of 12 met" in output
    assert output.count("not measured") == 3

    (path,) = tmp_path.glob("*-goals-20??-??-??.csv")
    contenders = {}
    for row in read_rows(path):
        contenders.setdefault((row.numel, row.dtype), set()).add(row.contender)
        if row.contender == "fused" and row.dtype == "float32" and row.weights == "none":
            passes_memory = 2 if row.reduction == "none" else 1
            assert row.peak_bytes >= 4 * row.numel * passes_memory
    plain = {"fused", "eager", "stream", "copy"}
    assert contenders[640, "float32"] == plain | {"fused graph", "eager graph"}
    assert contenders[2**26, "bfloat16"] == plain
    assert contenders.keys() >= {(2**26, "float16"), (2**26, "float64")}


def test_cuda_goals():
    cases = {goal.case for goal in cuda_goals()}
    assert not cases & set(cases_without_goals())
    for case in cases | set(cases_without_goals()):
        assert math.prod(case.shape) == case.numel
        assert case.device == "cuda"
        assert {case.dtype, case.target_dtype} <= set(DTYPES)
        assert case.reduction in REDUCTIONS
        assert case.weights in WEIGHTS

    # Bytes that one pass of forward and backward must move
    large = {(c.dtype, c.target_dtype): c.bytes_per_element for c in cases if c.numel == 2**28}
    expected = {("float32", "float32"): 12, ("bfloat16", "bfloat16"): 6, ("bfloat16", "float32"): 8}
    assert large == expected


def test_measures_of_goals():
    case = Case(2**26, "cuda")
    columns = {**dataclasses.asdict(case), "peak_bytes": 4 * 2**26 + 512}
    rows = {
        "fused": make_row(**columns, median_seconds=3e-3, wall_seconds=6e-3),
        "eager": make_row(**columns, median_seconds=18e-3, wall_seconds=18e-3),
        "copy": make_row(**columns, median_seconds=7e-3, wall_seconds=7e-3, bytes_per_element=32),
    }
    expected = {
        # fused moves 12 * 2^26 bytes in 3 ms, copy 2 * 2^30 bytes in 7 ms
        "% of copy": 100 * (12 * 2**26 / 3) / (2**31 / 7),
        "eager / fused": 6,
        # The wall clock runs twice as long for fused
        "eager / fused on the wall clock": 3,
        "compile / fused": None,
        "peak / logits": 1,
        "copy peak / logits": 1,
    }
    measured = {name: Goal(case, name, ">=", 1).measured(rows) for name in expected}
    assert measured == pytest.approx(expected)
