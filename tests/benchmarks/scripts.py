"""The benchmark scripts, run in this process, and rows as they write them."""

import contextlib
import dataclasses
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="plot.py draws with it")
pytest.importorskip("rich", reason="run.py prints its tables with it")

from cases import extras, focal, head, heads, pairwise, peers, training, workloads
from cases.base import Case
from contenders import pairwise as pairwise_contenders
from harness import machine
from harness.rows import Row, read_rows

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
BENCHMARKS = ROOT / "benchmarks"

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


def shrink_presets(monkeypatch) -> None:
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
