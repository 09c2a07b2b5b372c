"""The benchmark scripts run, and write what their readers expect."""

import argparse
import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import math
import runpy
import subprocess
import sys
import types
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from helpers import by_dtype, by_reduction, fused, torch_bce

import fused_bce

pytest.importorskip("matplotlib", reason="plot.py draws with it")
pytest.importorskip("rich", reason="run.py prints its tables with it")

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
BENCHMARKS = ROOT / "benchmarks"
with pytest.MonkeyPatch.context() as monkeypatch:
    # Where the scripts find their modules
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accuracy
    import pairwise_processes
    from cases import (
        extras,
        focal,
        head,
        heads,
        pairwise,
        peers,
        trained_pairs,
        training,
        workloads,
    )
    from cases.base import DTYPES, REDUCTIONS, WEIGHTS, Case
    from cases.goal import Goal
    from cases.goals_cuda import cases_without_goals, cuda_goals
    from cases.preset import Selection
    from cases.registry import PRESETS
    from contenders import losses
    from contenders import pairwise as pairwise_contenders
    from contenders.inputs import make_inputs
    from contenders.peers import make_peers, missing_peers, why_not_flag_gems
    from harness import machine
    from harness.rows import Row, append_rows, csv_path, header, read_rows, start_file
    from harness.timing import peak_bytes
    from plots.bars import make_cases, plot_bars
    from plots.head import plot_chunk_bytes, plot_labels
    from plots.pairwise import plot_batch

# As little as shows that it works: the numbers mean nothing.
QUICK = ["--repeats", "2", "--seconds", "0"]
# The sizes of workloads, so much smaller that they take no time
SMALLER = {65536: 64, 13330: 30, 670091: 41, 100000: 50, 512: 8, 1024: 16, 4096: 32}

# The warning is the compiler's own, on its way through torch.
compiles = [pytest.mark.large, pytest.mark.filterwarnings("default::DeprecationWarning")]
by_compile = pytest.mark.parametrize("with_compile", [False, pytest.param(True, marks=compiles)])


def run_script(name: str, *arguments: object, status: int | str = 0) -> str:
    """In this process, which has imported torch already. Returns what it prints."""
    out, threads, got = io.StringIO(), torch.get_num_threads(), 0
    # A loop whose threads share a processor with other work waits for whole slices of time.
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(out):
            monkeypatch.syspath_prepend(BENCHMARKS)
            monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}", *map(str, arguments)])
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    except SystemExit as exit:
        got = exit.code
    finally:
        torch.set_num_threads(threads)
    assert got == status
    return out.getvalue()


def run(folder: Path, *arguments: object, with_compile: bool = False) -> tuple[list[Row], str]:
    """The rows of results.csv, where run.py writes them, and what it prints."""
    quick = QUICK if with_compile else ["--no-compile", *QUICK]
    path = folder / "results.csv"
    output = run_script("run.py", *quick, "--output", path, "--device", *arguments)
    return read_rows(path), output


def assert_plotted(folder: Path, *endings: str) -> None:
    """Of results.csv: a figure for each ending of its name, and no other."""
    run_script("plot.py", folder)
    figures = sorted(folder.glob("*.png"))
    assert [figure.stem for figure in figures] == ["results" + ending for ending in endings]
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def make_row(**columns) -> Row:
    """A row of a case on the CPU, but for what is given."""
    facts = {**machine.facts("cpu"), "torch": "2.13", "other_load": None}
    times = {"median_seconds": 1e-3, "iqr_seconds": 0.0, "wall_seconds": 1e-3}
    fused = {"contender": "fused", "bytes_per_element": 12, "peak_bytes": 4096}
    return Row(**facts | dataclasses.asdict(Case(1024, "cpu")) | times | fused | columns)


@pytest.fixture
def small(monkeypatch):
    """Every preset with its dimensions made small."""

    def shrink(shape):
        return shape and tuple(SMALLER.get(size, size) for size in shape)

    for name, spec in workloads.WORKLOADS.items():
        fields = ("shape", "weight", "pos_weight")
        shapes = {field: shrink(getattr(spec, field)) for field in fields}
        monkeypatch.setitem(workloads.WORKLOADS, name, dataclasses.replace(spec, **shapes))
    monkeypatch.setattr(training, "LABELS", 40)
    monkeypatch.setattr(training, "BATCH", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(extras, "SIZES", (2**10, 2**12))
    monkeypatch.setattr(heads, "SIZES", {"cpu": (2**16,), "cuda": (2**16,)})
    for name, spec in focal.WORKLOADS.items():
        monkeypatch.setitem(focal.WORKLOADS, name, dataclasses.replace(spec, shape=(16, 64)))
    for name, spec in head.WORKLOADS.items():
        shape = {"rows": 16, "features": 8, "labels": (2**9, 2**10)[-len(spec.labels) :]}
        chunks = spec.chunk_bytes and (2**10, 2**12)
        small = dataclasses.replace(spec, **shape, chunk_bytes=chunks)
        monkeypatch.setitem(head.WORKLOADS, name, small)
    monkeypatch.setitem(pairwise.WORKLOADS, "batch", pairwise.Spec(8, (64, 128)))
    monkeypatch.setattr(pairwise_contenders, "CHUNK_ROWS", 48)
    monkeypatch.setattr(peers, "SIZES", {"cpu": (2**16,), "cuda": (2**16,)})


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
        assert "benchmarks/run.py --no-compile" in row.command
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


def test_instruction_set(tmp_path):
    name = fused_bce.build_info()["cpu_instruction_sets"][-1]
    before = fused_bce._C.current_instruction_set()
    try:
        rows, _ = run(tmp_path, "cpu", "--sizes", 128, "--instruction-set", name)
    finally:  # the script has run in this process
        fused_bce._C.use_instruction_set(before)
    assert {row.instruction_set for row in rows} == {name}


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


def test_goals_and_graphs_on_cuda(tmp_path, device):
    if device == "cpu":
        pytest.skip("only for CUDA")
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


def check_workloads(cases, output, device):
    fused = {name: rows["fused"] for (name, _), rows in cases.items()}
    assert fused["detection"].shape == ("1x50x80" if device == "cpu" else "4x50x80")
    for (_, numel), rows in cases.items():
        assert {math.prod(map(int, row.shape.split("x"))) for row in rows.values()} == {numel}
    weighted = {"text labels": "pos_weight", "detection": "weight", "segmentation": "pos_weight"}
    assert {name: row.weights for name, row in fused.items()} == {
        name: weighted.get(name, "none") for name in workloads.WORKLOADS
    }
    # bfloat16 read, bool read, bfloat16 written
    assert fused["extreme labels"].bytes_per_element == 5
    assert ("1/8 of the batch" in output) == (device == "cpu")
    assert "Bool targets: cast to the dtype of the logits for torch, fused takes them" in output


def check_training(cases, _output, _device):
    for (name, _), rows in cases.items():
        # At least the gradients of the two layers
        features = int(name.split()[0])
        for row in rows.values():
            assert (row.mode, row.shape) == ("step", "16x40")
            assert row.peak_bytes >= 4 * features * (features + 40)


def check_extras(cases, output, _device):
    # Logits, targets, gradient; ignore_index reads the targets twice.
    bytes_per_element = {
        "bool targets": 9,
        "bool targets, bfloat16": 5,
        "int64 targets": 16,
        "ignore_index": 10,
        "label_smoothing": 12,
    }
    assert list(cases) == [(name, size) for size in (2**10, 2**12) for name in bytes_per_element]
    for (name, numel), rows in cases.items():
        fused = rows["fused"]
        assert fused.bytes_per_element == bytes_per_element[name]
        size = getattr(torch, fused.dtype).itemsize
        if "fused plain" in rows:
            assert rows["fused plain"].bytes_per_element == 3 * size
        # The gradient, where eager holds a cast or a smoothed target too
        assert numel * size <= fused.peak_bytes <= numel * size + 4096
        assert rows["eager"].peak_bytes >= 2 * numel * size
        assert f"{name}: eager and compile have" in output


def check_heads(cases, output, _device):
    rows = [row for rows in cases.values() for row in rows.values()]
    assert {(row.bytes_per_element, row.shape) for row in rows} == {(72, "1024x64")}
    # In multiples of the logits of one head
    leaves, linear = (
        {name: row.peak_bytes / (4 * row.numel) for name, row in rows.items()}
        for rows in cases.values()
    )
    # The gradients, and beside them losses and partial sums
    assert all(6 <= leaves[name] <= 6.1 for name in ("fused", "fused recompute"))
    # Hidden layer, logits and gradients; without those, what backward needs for one head
    assert linear["fused"] == pytest.approx(13, abs=0.1)
    assert linear["fused recompute"] <= min(linear["eager"], 10)
    assert "peak count the logits of one head" in output


def check_focal(cases, output, device):
    for rows in cases.values():
        size = getattr(torch, rows["fused"].dtype).itemsize
        assert rows["fused"].bytes_per_element == 3 * size
        # The gradient; the operations one by one keep several more.
        assert 1024 * size <= rows["fused"].peak_bytes <= 1024 * size + 4096
        assert rows["eager"].peak_bytes >= 5 * 1024 * size
    assert "eager and compile have the operations of torchvision's" in output
    assert ("of 2 met" in output) == (device == "cpu")


def check_head(cases, output, device):
    assert [numel for name, numel in cases if name == "labels"] == [2**13, 2**14]
    for rows in cases.values():
        assert rows["gemms"].peak_bytes is None
        assert {row.mode for row in rows.values()} == {"linear fwd+bwd"}
    # Without the gradients of input and weight, half as large as the logits
    narrow = {name: row.peak_bytes for name, row in cases["narrow layer", 2**14].items()}
    logits = 4 * 2**14
    assert narrow["eager"] >= 2 * logits
    assert 1.4 * logits <= narrow["fused"] <= 1.5 * logits + 4096
    # One block of logits and one of bool targets
    assert 1.25 * logits <= narrow["head"] <= 1.25 * logits + 4096
    chunks = cases["chunk_bytes", 2**14]
    for chunk_bytes in (2**10, 2**12):
        peak = chunks[f"head 2^{chunk_bytes.bit_length() - 1}"].peak_bytes
        assert 1.25 * chunk_bytes <= peak <= 1.25 * chunk_bytes + 4096
    assert "peak: without the gradients of input and weight" in output
    assert ("of 6 met" in output) == (device == "cpu")


def check_pairwise(cases, output, _device):
    assert [numel for _, numel in cases] == [2**12, 2**14]
    for (_, numel), rows in cases.items():
        assert rows["gemms"].peak_bytes is None
        assert {row.mode for row in rows.values()} == {"pairwise fwd+bwd"}
        logits = 4 * numel
        # Logits, labels, their product and what logsigmoid has
        assert rows["eager"].peak_bytes >= 4 * logits
        # The logits of all chunks
        assert logits <= rows["chunked"].peak_bytes <= 3 * logits
        # One block, here all logits, and the scaled input
        assert rows["fused"].peak_bytes <= 1.5 * logits + 4096
    assert "peak: without the gradients of the inputs" in output


# The contenders, and what is particular to the preset
NAMED = {
    "workloads": (["fused", "eager", "compile", "stream", "copy"], check_workloads),
    "training": (["fused", "eager", "compile", "fused compile", "no loss"], check_training),
    "extras": (["fused", "eager", "compile", "fused plain", "stream", "copy"], check_extras),
    "heads": (["fused", "fused recompute", "eager", "compile"], check_heads),
    "focal": (["fused", "eager", "compile", "stream", "copy"], check_focal),
    "head": (["gemms", "eager", "compile", "fused", "head", "head 2^10", "head 2^12"], check_head),
    "pairwise": (["gemms", "eager", "chunked", "compile", "fused"], check_pairwise),
}
# Of the others: one for the mode
FIGURES = {
    "training": ["-step"],
    "heads": ["-summed-fwd-bwd"],
    "head": ["-chunk_bytes", "-labels", "-linear-fwd-bwd"],
    "pairwise": ["-batch"],
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("preset", NAMED)
@by_compile
def test_preset(tmp_path, device, preset, with_compile):
    contenders, check = NAMED[preset]
    rows, output = run(tmp_path, device, "--preset", preset, with_compile=with_compile)
    cases = make_cases(rows)
    assert sum(map(len, cases.values())) == len(rows)
    assert {name for name, _ in cases} == set(PRESETS[preset].workloads)
    for (name, _), of_case in cases.items():
        left_out = {"copy"} if device == "cpu" else set()
        left_out |= set() if with_compile else {"compile", "fused compile"}
        # Targets that could be cast to what torch takes
        left_out |= set() if "targets" in name else {"fused plain"}
        # A ladder of blocks, where only what bounds them is beside it
        in_ladder = name == "chunk_bytes"
        left_out |= {"eager", "compile"} if in_ladder else {"head 2^10", "head 2^12"}
        assert list(of_case) == [name for name in contenders if name not in left_out]
    check(cases, output, device)
    assert_plotted(tmp_path, *FIGURES.get(preset, ["-fwd-bwd"]))

    # One alone, of any size where it has no shape of its own
    *_, last = PRESETS[preset].workloads
    sizes = ["--sizes", 640] if preset in ("extras", "heads") else []
    rows, output = run(tmp_path, device, "--preset", preset, "--workloads", last, *sizes)
    assert {row.workload for row in rows} == {last}
    assert {row.numel for row in rows} == {640} or not sizes
    # Which workload has them is not selected.
    assert "Bool targets" not in output


def test_workloads_of_both_devices():
    for name, spec in workloads.WORKLOADS.items():
        assert workloads.make_case(name, "cuda").shape == spec.shape
        batch, *rest = spec.shape
        assert workloads.make_case(name, "cpu").shape == (batch // spec.cpu_factor, *rest)


@pytest.mark.parametrize("accepted", [True, False])
def test_bool_targets(monkeypatch, accepted):
    """Taken as they are if the kernels can, else cast, as they are for torch."""
    case = Case(64, "cpu", dtype="bfloat16", target_dtype="bool")
    monkeypatch.setattr(losses, "takes_bool_targets", lambda device: accepted)
    monkeypatch.setattr(losses.fused_bce, "why_not_fused", lambda *_, **__: None)
    made = losses.make_losses(case, make_inputs(case), with_compile=False)
    assert isinstance(made["eager"], losses.CastsTarget)
    assert isinstance(made["fused"], losses.CastsTarget) == (not accepted)


def test_every_preset_is_tested_and_documented():
    assert {name for name, preset in PRESETS.items() if preset.workloads} == NAMED.keys()
    text = (BENCHMARKS / "README.md").read_text()
    for name, preset in PRESETS.items():
        assert name == "ladder" or f"--preset {name}" in text
        assert all(f"| {workload} |" in text for workload in preset.workloads)


@pytest.mark.usefixtures("small")
def test_training_steps_agree(device):
    """torch's loss and ours, in one batch and in four parts: the same step of the optimizer."""
    spec = training.WORKLOADS["64 features"]
    start = training.make_network(spec).to(device).state_dict()
    inputs = torch.randn(16, spec.features, device=device)
    target = torch.rand(16, 40, device=device).round()

    def trained(loss, parts):
        model = losses.WithLoss(training.make_network(spec), loss).to(device)
        model.network.load_state_dict(start)
        batches = list(zip(inputs.chunk(parts), target.chunk(parts), strict=True))
        training.training_contender(model, training.through_loss(model), batches).step()
        return torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])

    expected = trained(torch.nn.BCEWithLogitsLoss(), 1)
    assert not torch.equal(expected, torch.cat([value.view(-1) for value in start.values()]))
    for loss in (torch.nn.BCEWithLogitsLoss(), fused_bce.BCEWithLogitsLoss()):
        for parts in (1, 4):
            torch.testing.assert_close(trained(loss, parts), expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("preset", ["workloads", "extras"])
@by_compile
def test_losses_compute_the_same(device, preset, with_compile):
    """The contenders of a case, and what the definition says of it."""
    preset = PRESETS[preset]
    for case in preset.cases(Selection(device, sizes=[2**12])):
        inputs = logits, target, _ = preset.inputs(case)
        assert str(logits.dtype) == f"torch.{case.dtype}"
        assert str(target.dtype) == f"torch.{case.target_dtype}"
        channels_last = logits.is_contiguous(memory_format=torch.channels_last)
        assert (logits.dim() == 4 and channels_last) == (case.workload == "segmentation")
        assert 0 < (target == 1).float().mean() < 1
        share = (target == extras.IGNORED).float().mean().item()
        assert share == pytest.approx(0.2 if case.workload == "ignore_index" else 0, abs=0.05)
        made = preset.losses(case, inputs, with_compile)
        assert len(made) == 2 + with_compile
        calls = {name: (loss, target) for name, loss in made.items()}
        if preset is PRESETS["extras"]:
            assert (case.plain is not None) == ("targets" in case.workload)
            if case.plain is not None:
                plain = extras.plain_inputs(inputs)[1]
                assert plain.dtype is logits.dtype
                calls["fused plain"] = fused_bce.BCEWithLogitsLoss(), plain
        wide, t = logits.double().requires_grad_(), target.double()
        if case.workload == "label_smoothing":
            t = t * 0.9 + 0.05
        weights = {name: getattr(made["fused"], name) for name in case.weight_shapes}
        each = torch_bce(wide, t, **weights, reduction="none")
        assert each.shape == case.shape
        expected = each[target != extras.IGNORED].mean()
        (expected_grad,) = torch.autograd.grad(expected, wide)
        rounding = 4 * torch.finfo(logits.dtype).eps
        for loss, given in calls.values():
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, given)
            value.backward()
            assert value.dtype is logits.dtype
            assert value.item() == pytest.approx(expected.item(), rel=rounding)
            largest = expected_grad.abs().max().item()
            torch.testing.assert_close(
                leaf.grad.double(), expected_grad, rtol=rounding, atol=rounding * largest
            )


@by_compile
def test_heads_compute_the_same(device, with_compile):
    for name in heads.WORKLOADS:
        case = heads.make_case(name, device, 2**12)
        features, targets = heads.make_batch(case)
        models = heads.make_models(case, with_compile)
        assert len(models) == 3 + with_compile
        # From the definition
        wide = copy.deepcopy(models["eager"].network).double()
        logits = wide(features.double())
        expected = sum(torch_bce(logits[i], targets[i].double()) for i in range(6))
        expected.backward()
        for model in models.values():
            heads.heads_contender(model, features, targets).step()
            assert model(features, targets).item() == pytest.approx(expected.item(), rel=1e-6)
            for got, true in zip(model.parameters(), wide.parameters(), strict=True):
                # The Linear layers add up some 100 terms in float32.
                largest = true.grad.abs().max().item()
                torch.testing.assert_close(
                    got.grad.double(), true.grad, rtol=0, atol=1e-5 * largest
                )


@pytest.mark.usefixtures("small")
@by_compile
def test_head_computes_the_same(device, with_compile):
    for case in PRESETS["head"].cases(Selection(device)):
        inputs = input, weight, target = head.make_inputs(case)
        rounding = 4 * torch.finfo(input.dtype).eps
        wide = [t.double().requires_grad_() for t in (input, weight)]
        logits = wide[0] @ wide[1].T
        assert logits.shape == case.shape
        assert logits.std().item() == pytest.approx(3, rel=0.5)
        dense = target.to_dense(torch.float64)
        assert ((dense.sum(1) >= 1) & (dense.sum(1) <= head.POSITIVES)).all()
        expected = torch_bce(logits, dense)
        expected.backward()
        made = head.make_losses(case, inputs, with_compile)
        assert len(made) == (4 if case.spec.chunk_bytes else 3 + with_compile)
        for loss in made.values():
            leaves = [t.clone().requires_grad_() for t in (input, weight)]
            value = loss(*leaves)
            value.backward()
            assert value.item() == pytest.approx(expected.item(), rel=rounding)
            for got, true in zip(leaves, wide, strict=True):
                # Logits of up to 12 are rounded in the dtype of the layer, then added up.
                largest = true.grad.abs().max().item()
                torch.testing.assert_close(
                    got.grad.double(), true.grad, rtol=0, atol=4 * rounding * largest
                )


@pytest.mark.usefixtures("small")
@by_compile
def test_pairwise_computes_the_same(device, with_compile):
    for case in PRESETS["pairwise"].cases(Selection(device)):
        inputs = pairwise.make_inputs(case)
        wide = [t.double().requires_grad_() for t in inputs]
        logits = wide[2] * wide[0] @ wide[1].T + wide[3]
        assert logits.shape == case.shape
        pairs = torch.eye(case.batch, dtype=torch.float64, device=device)
        expected = torch_bce(logits, pairs, reduction="sum") / case.batch
        true = [expected, *torch.autograd.grad(expected, wide)]
        made = pairwise_contenders.make_pairwise_losses(inputs, with_compile)
        assert len(made) == 3 + with_compile
        for loss in (*made.values(), pairwise_contenders.exp_loss):
            for got, of_wide in zip(trained_pairs.evaluate(loss, inputs), true, strict=True):
                # Logits of -10 and their sigmoids lose three digits in 1 + exp(-10) and the like.
                largest = of_wide.abs().max().item()
                torch.testing.assert_close(got.double(), of_wide, rtol=0, atol=1e-3 * largest)


def test_accuracy_of_pairs(monkeypatch, device):
    monkeypatch.setattr(trained_pairs, "BATCH", 64)
    errors = trained_pairs.measure(device)
    # Logits are sums of up to 27 and -15: in float32 they are off by some 1e-6, their exp as well.
    assert max(errors["fused"]) <= 5e-6
    # What is left of 1 + exp(-12) - 1, and of softplus(12) - 12
    assert min(max(errors[name]) for name in ("chunked", "log(1 + exp)")) >= 1e-4
    output = run_script("accuracy.py", "--loss", "pairwise", "--device", device)
    assert all(name in output for name in (*trained_pairs.LOSSES, *trained_pairs.QUANTITIES[:2]))


def test_one_process_of_pairs(tmp_path):
    """In this one: those of a group take seconds to start."""
    path, threads = tmp_path / "results.csv", torch.get_num_threads()
    start_file(path)
    job = argparse.Namespace(processes=[1], batch=64, repeats=1)
    try:
        pairwise_processes.run_process(0, str(tmp_path), path, job)
    finally:
        torch.set_num_threads(threads)
    rows = read_rows(path)
    assert [row.contender for row in rows] == ["eager", "chunked", "fused"]
    assert {(row.workload, row.shape, row.threads) for row in rows} == {("1 process", "64x64", 1)}


@pytest.mark.large
def test_processes_of_pairs(tmp_path):
    """The script itself compares the losses and the gradients of the contenders."""
    path, batch = tmp_path / "results.csv", 512
    options = ["--processes", 1, 2, 4, "--batch", batch, "--repeats", 1]
    output = run_script("pairwise_processes.py", *options, "--output", path)
    assert "4 processes, 512 x 2048" in output
    peaks = {(row.contender, row.workload): row.peak_bytes for row in read_rows(path)}
    logits, features = 4 * batch**2, 4 * batch * pairwise_processes.FEATURES
    # Autograd keeps the labels, their product with the logits and more of two neighbours' pairs;
    # of the chunks, the logits.
    kept = {"eager": 2, "chunked": 1}
    for name, blocks in kept.items():
        growth = peaks[name, "4 processes"] - peaks[name, "2 processes"]
        assert growth >= 2 * blocks * logits
    # The texts that are passed on, while the next ones come in
    assert peaks["fused", "4 processes"] - peaks["fused", "2 processes"] <= features + 4096
    assert_plotted(tmp_path, "-pairwise-fwd-bwd")


@pytest.mark.usefixtures("small")
def test_peers(tmp_path, device):
    rows, output = run(tmp_path, device, "--preset", "peers", "--sizes", "2^16")
    assert {row.mode for row in rows} == {"fwd", "fwd+bwd"}
    contenders = {row.contender for row in rows}
    assert contenders >= {"fused", "eager", "sigmoid + BCELoss", "softplus - x*t", "stream"}
    assert "Not measured: flag_gems: " in output


def test_peers_compute_the_same(device):
    logits, target = torch.randn(1000, device=device), torch.rand(1000, device=device).round()
    made = make_peers(Case(1000, device))
    assert len(made) >= 2
    for loss in made.values():
        torch.testing.assert_close(loss(logits, target), torch_bce(logits, target))


def test_flag_gems(monkeypatch, device):
    """Whatever it does, the run goes on, and says why it is left out."""
    forward, backward = Case(64, "cuda", mode="fwd"), Case(64, "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_peers(forward) == {"flag_gems": "not installed"}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there it is")
    package = types.ModuleType("flag_gems")
    monkeypatch.setitem(sys.modules, "flag_gems", package)
    assert why_not_flag_gems(Case(64, "cpu")) == "its kernels need a GPU"
    assert why_not_flag_gems(backward) == "it has no backward pass of its own"
    # Releases up to 5.0 do not have the function; a machine without a GPU has no device.
    assert why_not_flag_gems(forward).startswith("it does not run here: ")
    if device == "cuda":
        package.binary_cross_entropy_with_logits = torch.binary_cross_entropy_with_logits
        assert "flag_gems" in make_peers(forward)
        package.binary_cross_entropy_with_logits = lambda logits, *_: logits.mean()
        assert "not close" in why_not_flag_gems(forward)


def test_accuracy(monkeypatch, tmp_path, device):
    monkeypatch.setattr(accuracy, "POINTS", 20)
    path = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--device", device, "--output", str(path)])
    accuracy.main()
    rows = read_rows(path, kinds=[accuracy.AccuracyRow])
    ranges = 2 * accuracy.LIMIT / accuracy.WIDTH
    assert len(rows) == ranges * 2 * 2 * 2  # contenders, targets, loss and gradient
    errors = {}
    for row in rows:
        # Where exp(-|x|) is normal
        if abs(row.logits_from) <= 86:
            key = row.contender, row.quantity, row.target
            errors[key] = max(errors.get(key, 0), row.max_ulp)
    assert max(error for key, error in errors.items() if key[0] == "fused") <= 4
    # torch loses every digit of a small loss of a negative, and of a small gradient of a positive.
    lost = {key for key, error in errors.items() if error > 2**23}
    assert lost == {("eager", "loss", 0.0), ("eager", "gradient", 1.0)}
    assert_plotted(tmp_path, "")


def test_accuracy_of_focal(monkeypatch, tmp_path, device):
    monkeypatch.setattr(accuracy, "POINTS", 20)
    path = tmp_path / "results.csv"
    arguments = ["--loss", "focal", "--device", device, "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    accuracy.main()
    errors = {"fused": 0.0, "eager": 0.0}
    for row in read_rows(path, kinds=[accuracy.AccuracyRow]):
        # Where a third power of exp(-|x|) is normal
        if abs(row.logits_from) <= 28:
            errors[row.contender] = max(errors[row.contender], row.max_ulp)
    assert errors["fused"] <= 8
    assert errors["eager"] > 2**23
    assert_plotted(tmp_path, "")


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values_of_accuracy(target):
    logits = np.array([-100.0, -17.25, -0.5, 0.0, 1.5, 90.0], dtype=np.float32)
    got = accuracy.true_values(logits, target)
    # Against 50 digits, of which 1 - sigmoid(90) loses 39
    with mpmath.workdps(50 + 39):
        sigmoids = [1 / (1 + mpmath.exp(-mpmath.mpf(logit))) for logit in logits.tolist()]
        true = {
            "loss": [-mpmath.log(s if target else 1 - s) for s in sigmoids],
            "gradient": [s - target for s in sigmoids],
        }
    for quantity, values in true.items():
        assert got[quantity].tolist() == pytest.approx(list(map(float, values)), rel=1e-14, abs=0)


def test_ulp_errors():
    eps = float(np.finfo(np.float32).eps)
    got = np.array([1 + eps, 1.0, 2.0, 0.0], dtype=np.float32)
    true = np.array([1.0, 1.0 + eps / 2, 2 + 4 * eps, 2.0**-149])
    assert accuracy.ulp_errors(got, true).tolist() == [1.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values_of_focal_accuracy(target):
    logits = np.array([-100.0, -17, -1, 0, 1, 17, 100], dtype=np.float32)
    got = accuracy.true_focal_values(logits, target)
    with mpmath.workdps(120):  # of which 1 - p loses 44
        for i, x in enumerate(map(mpmath.mpf, logits.tolist())):

            def loss(y):
                p = 1 / (1 + mpmath.exp(-y))
                alpha, p_t = (mpmath.mpf(0.25), p) if target else (mpmath.mpf(0.75), 1 - p)
                return -alpha * (1 - p_t) ** 2 * mpmath.log(p_t)

            # float64's own rounding, times 200 in an exponent
            assert got["loss"][i] == pytest.approx(float(loss(x)), rel=1e-12)
            assert got["gradient"][i] == pytest.approx(float(mpmath.diff(loss, x)), rel=1e-12)


def test_bars():
    """Their lengths are the ratios, whatever the order of the rows."""
    rows = [
        make_row(contender=name, workload=workload, shape="32x32", median_seconds=s, peak_bytes=p)
        for workload, eager in (("a", 10e-3), ("b", 20e-3))
        for name, s, p in (
            ("stream", 1e-3, None),
            ("fused", 2e-3, 4096),
            ("compile", 4e-3, 4096),
            ("eager", eager, 2 * 4096),
        )
    ]
    speedups, peaks = (
        {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
        for axes in plot_bars(rows).axes
    )
    assert speedups == {"compile": [2.5, 5.0], "fused": [5.0, 10.0]}
    assert peaks == {"eager": [2, 2], "compile": [1, 1], "fused": [1, 1]}


def test_ladders_of_head():
    """Memory over labels; time over the bytes of a block, between lines for the others."""
    shapes = {2**20: "256x4096", 2**21: "256x8192"}
    rows = [
        make_row(contender=name, workload="labels", numel=numel, shape=shape, peak_bytes=peak)
        for numel, shape in shapes.items()
        for name, peak in (("gemms", None), ("eager", 8 * numel), ("head", 2**20))
    ]
    (axes,) = plot_labels(rows).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "linear layer, eager": [[4096, 8], [8192, 16]],
        "head": [[4096, 1], [8192, 1]],
        "the logits": [[4096, 4], [8192, 8]],
    }

    seconds = {"gemms": 1e-3, "fused": 3e-3, "head": 2e-3, "head 2^16": 5e-3, "head 2^17": 4e-3}
    rows = [
        make_row(contender=name, workload="chunk_bytes", shape="16x64", median_seconds=each)
        for name, each in seconds.items()
    ]
    (axes,) = plot_chunk_bytes(rows).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines.pop("head")) == [5, 4]
    assert list(axes.lines[0].get_xdata()) == [2**16, 2**17]
    heights = {label: set(heights) for label, heights in lines.items()}
    assert heights == {
        "gemms (the limit)": {1},
        "linear layer, fused": {3},
        "head by default": {2},
    }


def test_ladder_of_pairwise():
    """Memory and time over the batch; the limit has no peak."""
    rows = [
        make_row(
            contender=name,
            workload="batch",
            numel=batch**2,
            shape=f"{batch}x{batch}",
            median_seconds=seconds * batch,
            peak_bytes=peak and peak * batch**2,
        )
        for batch in (1024, 2048)
        for name, seconds, peak in (("gemms", 1, None), ("eager", 3, 16), ("fused", 2, 1))
    ]
    peaks, times = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in plot_batch(rows).axes
    )
    assert peaks == {
        "eager": [[1024, 16], [2048, 64]],
        "fused": [[1024, 1], [2048, 4]],
        "the logits": [[1024, 4], [2048, 16]],
    }
    assert times == {
        "eager": [[1024, 3072], [2048, 6144]],
        "fused": [[1024, 2048], [2048, 4096]],
        "gemms (the limit)": [[1024, 1024], [2048, 2048]],
    }


# Seconds of an older and of a newer file: fused took 1.3 times as long, eager and the whole machine
# half as long.
OLDER = {"fused": 1.0e-3, "eager": 8e-3, "stream": 0.8e-3}
NEWER = {"fused": 1.3e-3, "eager": 4e-3, "stream": 0.4e-3}


def write_file(path: Path, seconds: dict[str, float], left_out: tuple[str, ...] = (), **columns):
    names = [name for name in header(Row) if name not in left_out]
    rows = [
        make_row(contender=name, median_seconds=value, **columns) for name, value in seconds.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
    return path


HALF = ("0.50", "faster")


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ([], 1, {"fused": ("1.30", "slower"), "eager": HALF, "stream": HALF}),
        (["--factor", "1.4"], 0, {"fused": ("1.30", ""), "eager": HALF, "stream": HALF}),
        (["--relative-to", "stream"], 1, {"fused": ("2.60", "slower"), "eager": ("1.00", "")}),
    ],
)
def test_compare(tmp_path, arguments, status, expected):
    # Files from before the workloads lack their columns.
    old = write_file(tmp_path / "old.csv", OLDER, left_out=("workload", "shape"))
    new = write_file(tmp_path / "new.csv", NEWER, shape="16x64", torch="2.14")
    output = run_script("compare.py", old, new, *arguments, status=status)
    cells = [line.split("│")[1:-1] for line in output.splitlines() if "│" in line]
    found = {c[1].strip(): (c[4].strip(), c[5].strip()) for c in cells}
    assert found == expected
    assert "torch was 2.13, is 2.14" in output
    # The other way round ours got faster; what others lost is shown, and no failure.
    assert "slower" in run_script("compare.py", new, old, status=0)


def test_compare_case_by_case(tmp_path):
    """Rows of other cases are not held against each other."""
    old = write_file(tmp_path / "old.csv", OLDER, workload="a")
    new = write_file(tmp_path / "new.csv", NEWER, workload="b")
    run_script("compare.py", old, new, status="The two files have no case in common")
    with old.open("a", newline="") as file:
        file.writelines(new.read_text().splitlines(keepends=True)[1:])
    output = run_script("compare.py", old, new)
    assert "Cases in the older file alone: 1." in output
    assert "1.30" not in output


def test_disturbed_times_are_marked(tmp_path):
    old = write_file(tmp_path / "old.csv", OLDER, other_load=1.0)
    new = write_file(tmp_path / "new.csv", NEWER, other_load=0.0)
    assert "slower, but disturbed" in run_script("compare.py", old, new, status=1)


def test_columns_of_files(tmp_path):
    """None, numbers and text come back as they were; other columns are refused."""
    rows = [make_row(peak_bytes=None, other_load=0.5), make_row(workload="a", shape="2x3")]
    path = tmp_path / "a.csv"
    start_file(path)
    append_rows(path, rows)
    assert read_rows(path) == rows
    start_file(path, append=True)
    assert read_rows(path) == rows

    old = write_file(tmp_path / "old.csv", OLDER, left_out=("workload", "shape"))
    assert [row.workload for row in read_rows(old)] == [""] * 3
    with pytest.raises(SystemExit, match="other columns"):
        start_file(old, append=True)
    short = write_file(tmp_path / "short.csv", OLDER, left_out=("numel",))
    with pytest.raises(SystemExit, match="does not have the columns"):
        read_rows(short)


def test_paths_of_files():
    facts = {"device": "cpu", "device_name": "A CPU", "date": "2030-01-02T03:04:05+00:00"}
    folder = Path("results")
    assert csv_path(folder, facts, "goals") == folder / "cpu-goals.csv"
    facts |= {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}
    path = csv_path(folder, facts, "ladder")
    assert path == folder / "nvidia-h100-80gb-hbm3-ladder-2030-01-02.csv"
    assert csv_path(folder / "a.csv", facts, "ladder") == folder / "a.csv"
