"""Every command of benchmarks/ runs once, on small inputs: the times mean nothing."""

import argparse
import contextlib
import csv
import dataclasses
import io
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="plot.py draws with it")
pytest.importorskip("rich", reason="run.py prints its tables with it")

import accuracy
import counters
import fused_bce
import pairwise_processes
from cases import extras, focal, head, heads, pairwise, peers, trained_pairs, training, workloads
from cases.preset import Selection
from cases.registry import PRESETS
from contenders import pairwise as pairwise_contenders
from fused_bce import _C
from harness.rows import AccuracyRow, read_rows, start_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The dimensions of workloads, and those that take no time
SMALLER = {65536: 64, 13330: 30, 670091: 41, 100000: 50, 512: 8, 1024: 16, 4096: 32}
SIZES = {"ladder": ["640"], "goals": ["1", "640"], "peers": ["2^16"]}

# The warning is the compiler's own, on its way through torch.
compiles = [pytest.mark.large, pytest.mark.filterwarnings("default::DeprecationWarning")]


def by_preset(names: list[str], compiled: list[str]):
    """Each without torch.compile, which takes seconds, and those with it that differ in what is
    compiled."""
    cases = [(name, False) for name in names]
    cases += [pytest.param(name, True, marks=compiles) for name in compiled]
    return pytest.mark.parametrize(("preset", "with_compile"), cases)


def run_script(name: str, *arguments: object, status: int | str = 0) -> str:
    """In this process, which has imported torch already. Returns what it prints."""
    out, threads, got = io.StringIO(), torch.get_num_threads(), 0
    # A loop whose threads share a processor with other work waits for whole slices of time.
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(out):
            monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}", *map(str, arguments)])
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    except SystemExit as exit:
        got = exit.code
    finally:
        torch.set_num_threads(threads)
    assert got == status
    return out.getvalue()


def assert_plotted(folder: Path) -> None:
    run_script("plot.py", folder)
    figures = [*folder.glob("*.png")]
    assert figures
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


@pytest.fixture
def small(monkeypatch):
    """Every preset with its dimensions made small."""

    def shrink(shape):
        return shape and tuple(SMALLER.get(size, size) for size in shape)

    def replace(module, name, **fields):
        spec = dataclasses.replace(module.WORKLOADS[name], **fields)
        monkeypatch.setitem(module.WORKLOADS, name, spec)

    for name, spec in workloads.WORKLOADS.items():
        fields = ("shape", "weight", "pos_weight")
        replace(workloads, name, **{field: shrink(getattr(spec, field)) for field in fields})
    for name in focal.WORKLOADS:
        replace(focal, name, shape=(16, 64))
    for name, spec in head.WORKLOADS.items():
        shape = {"rows": 16, "features": 8, "labels": (2**9, 2**10)[-len(spec.labels) :]}
        replace(head, name, **shape, chunk_bytes=spec.chunk_bytes and (2**10, 2**12))
    monkeypatch.setattr(training, "LABELS", 40)
    monkeypatch.setattr(training, "BATCH", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(extras, "SIZES", (2**10, 2**12))
    for module in (heads, peers):
        monkeypatch.setattr(module, "SIZES", {"cpu": (2**16,), "cuda": (2**16,)})
    monkeypatch.setitem(pairwise.WORKLOADS, "batch", pairwise.Spec(8, (64, 128)))
    monkeypatch.setattr(pairwise_contenders, "CHUNK_ROWS", 48)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[] if p == "goals" else pytest.mark.large) for p in PRESETS]
)
def test_preset(monkeypatch, tmp_path, device, preset):
    # What is compiled is called below.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    path = tmp_path / "results.csv"
    options = ["--graph"] if device == "cuda" else []
    options += ["--sizes", *SIZES[preset]] if preset in SIZES else []
    quick = ["--repeats", 2, "--seconds", 0, "--output", path, "--device", device]
    run_script("run.py", "--preset", preset, *quick, *options)
    rows = read_rows(path)
    assert all(0 < row.median_seconds < math.inf and row.bytes_per_element > 0 for row in rows)
    contenders = {}
    for row in rows:
        contenders.setdefault((row.workload, row.mode, row.dtype, row.numel), set()).add(
            row.contender
        )
    assert all("fused" in names and len(names) > 1 for names in contenders.values())
    # The gradient alone is as large as the logits, which a network and a head do not keep.
    whole = [row for row in rows if row.contender == "fused" and row.mode.startswith("fwd+bwd")]
    assert all(row.peak_bytes >= row.logits_bytes for row in whole)
    assert_plotted(tmp_path)


@pytest.mark.usefixtures("small")
@by_preset(["ladder", "workloads", "extras", "focal", "peers"], compiled=["workloads", "focal"])
def test_contenders_compute_the_same(device, preset, with_compile):
    """Else one of them would be fast for nothing."""
    preset = PRESETS[preset]
    for case in preset.cases(Selection(device, sizes=[2**12])):
        logits, target, grad_loss = preset.inputs(case)
        leaf, results = logits.clone().requires_grad_(), {}
        for name, loss in preset.losses(case, (logits, target, grad_loss), with_compile).items():
            value = loss(leaf, target).sum()
            results[name] = value, *torch.autograd.grad(value, leaf)
        fused = results.pop("fused")
        assert results
        # The others round each operation in the dtype of the logits.
        rounding = 16 * torch.finfo(logits.dtype).eps
        for result in results.values():
            for got, expected in zip(result, fused, strict=True):
                atol = rounding * expected.abs().max().item()
                torch.testing.assert_close(got, expected, rtol=rounding, atol=atol)


@pytest.mark.usefixtures("small")
@by_preset(["training", "heads", "head", "pairwise"], compiled=["training", "head", "pairwise"])
def test_steps_compute_the_same(monkeypatch, device, preset, with_compile):
    """The losses of each step, as it hands them to backward."""
    losses, backward, make_network = [], torch.Tensor.backward, training.make_network

    def keep_loss(loss, *gradient):
        if not gradient:  # with one these are logits, which have no loss
            losses.append(loss.item())
        backward(loss, *gradient)

    def make_same_network(spec):
        torch.manual_seed(0)
        return make_network(spec)

    monkeypatch.setattr(torch.Tensor, "backward", keep_loss)
    monkeypatch.setattr(training, "make_network", make_same_network)
    for case in PRESETS[preset].cases(Selection(device)):
        results = {}
        for name, contender in PRESETS[preset].contenders(case, with_compile).items():
            losses.clear()
            contender.step()
            results[name] = [*losses]
        computed = {name: result for name, result in results.items() if result}
        assert results.keys() - computed.keys() <= {"gemms", "no loss"}
        fused = computed.pop("fused")
        assert computed
        # Logits, of which a compiled layer may round none in the dtype, and their sum
        rounding = 16 * torch.finfo(getattr(torch, case.dtype)).eps
        for result in computed.values():
            assert result == pytest.approx(fused, rel=rounding)


def test_one_process_of_pairs(tmp_path):
    """In this one: those of a group take seconds to start."""
    path, threads = tmp_path / "results.csv", torch.get_num_threads()
    start_file(path)
    job = argparse.Namespace(processes=[1], batch=64, repeats=1)
    try:
        pairwise_processes.run_process(0, str(tmp_path), path, job)
    finally:
        torch.set_num_threads(threads)
    assert [row.contender for row in read_rows(path)] == ["eager", "chunked", "fused"]


@pytest.mark.large
def test_parts(tmp_path):
    path = tmp_path / "parts.csv"
    run_script("parts.py", "--sizes", "4x8x500000", "--repeats", 1, "--output", path)
    rows = read_rows(path)
    assert [row.contender for row in rows] == ["parts", "whole", "eager"] * 2
    weight = 4 * 8 * 500_000
    # A block of logits beside the gradient of the whole, or of a part
    assert all(row.peak_bytes >= weight for row in rows if row.contender != "parts")
    assert all(row.peak_bytes < weight / 2 for row in rows if row.contender == "parts")


@pytest.mark.large
def test_processes_of_pairs(tmp_path):
    """The script itself compares the losses and the gradients of the contenders."""
    path = tmp_path / "results.csv"
    options = ["--processes", 1, 2, "--batch", 512, "--repeats", 1, "--output", path]
    run_script("pairwise_processes.py", *options)
    assert_plotted(tmp_path)


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_accuracy(monkeypatch, tmp_path, device, loss):
    monkeypatch.setattr(accuracy, "POINTS", 20)
    path = tmp_path / "results.csv"
    arguments = ["--loss", loss, "--device", device, "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    accuracy.main()
    errors = {"fused": 0.0, "eager": 0.0}
    for row in read_rows(path, kinds=[AccuracyRow]):
        # Where a third power of exp(-|x|) is normal
        if abs(row.logits_from) <= 28:
            errors[row.contender] = max(errors[row.contender], row.max_ulp)
    assert errors["fused"] <= 8
    assert errors["eager"] > 2**23  # torch loses every digit of a small loss of a negative.
    assert_plotted(tmp_path)


def test_accuracy_of_pairs(monkeypatch, device):
    monkeypatch.setattr(trained_pairs, "BATCH", 64)
    errors = trained_pairs.measure(device)
    # Logits are sums of up to 27 and -15: in float32 they are off by some 1e-6, their exp as well.
    assert max(errors["fused"]) <= 5e-6
    # What is left of 1 + exp(-12) - 1, and of softplus(12) - 12
    assert min(max(errors[name]) for name in ("chunked", "log(1 + exp)")) >= 1e-4
    run_script("accuracy.py", "--loss", "pairwise", "--device", device)


@pytest.mark.large
def test_a_folder_of_results(tmp_path):
    """run.py as a user runs it, with no more to import from."""
    command = [sys.executable, "benchmarks/run.py", "--device", "cpu", "--sizes", "128"]
    quick = ["--no-compile", "--repeats", "2", "--seconds", "0", "--output", str(tmp_path)]
    subprocess.run([*command, *quick], cwd=BENCHMARKS.parent, check=True)
    (path,) = tmp_path.iterdir()
    assert path.name == "cpu-ladder.csv"
    run_script("compare.py", path, path)


@pytest.mark.large
def test_choices(monkeypatch, tmp_path):
    """Rehearsed: on the CPU the choices do nothing."""
    for choice in ("limit_cuda_blocks", "add_up_in_last_block"):
        monkeypatch.setattr(_C, choice, lambda _: None, raising=False)
    monkeypatch.setattr(fused_bce, "build_info", lambda: {"cuda_archs": ["9.0"]})
    path = tmp_path / "choices.csv"
    run_script("choices.py", "--device", "cpu", "--sizes", 64, "--seconds", 0, "--output", path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len({tuple(row[name] for name in ("dtype", "target_dtype")) for row in rows}) == 5
    assert len({(row["finish"], row["blocks"]) for row in rows}) == 10
    assert len(rows) == 50
    assert all(float(row["seconds"]) > 0 and float(row["copy_share"]) > 0 for row in rows)


def test_counters_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_script("counters.py", status="torch finds no CUDA device")
    assert counters.all_cases()
