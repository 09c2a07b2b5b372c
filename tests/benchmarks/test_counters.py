"""counters.py: what it asks of ncu and how it reads the answer."""

import functools
import shutil

import pytest
import torch
from scripts import assert_plotted, run_script

import counters
from cases.base import Case
from harness import machine
from harness.rows import CounterRow, append_rows, read_rows, start_file

CASES = [Case(2**26, "cuda"), Case(2**20, "cuda", dtype="float16", target_dtype="bfloat16")]


def ncu_log(*launches, units=None, left_out=()):
    """As ncu writes it: lines of its own around a table of which each cell is quoted."""
    metrics = {name: unit for name, unit in counters.METRICS.values() if name not in left_out}
    table = [["ID", "Kernel Name", *metrics], ["", "", *(units or metrics.values())]]
    table += [
        [str(i), "void fused_bce::loss_kernel<float, float>(...)", *map(str, launch)]
        for i, launch in enumerate(launches)
    ]
    lines = [",".join(f'"{cell}"' for cell in line) for line in table]
    prolog = "==PROF== Connected to process 1"
    return "\n".join([prolog, *lines, "==PROF== Disconnected from process 1", ""])


def test_rows(tmp_path):
    launches = [
        ("536,870,912", "268,435,456", "180000", "91.5", "60.25", 32, "73,400,320"),
        (32, 0, 2000, 0.01, 12, 16, 1000),
        (2**22, 0, 3000, 50, 40, 40, 2**20),
        (2**22, 2**21, 3000, 50, 40, 40, 2**20),
    ]
    rows = counters.make_rows(
        CASES, counters.parse_launches(ncu_log(*launches)), machine.facts("cpu")
    )
    first, again, half, half_again = rows
    assert [row.direction for row in rows] == ["forward", "backward"] * 2
    assert (first.numel, first.dtype, first.registers) == (2**26, "float32", 32)
    assert (first.read_bytes, first.written_bytes) == (2**29, 2**28)
    # Logits and targets, and the gradient
    assert first.least_bytes == 12 * 2**26
    assert again.least_bytes == 0
    # float16 waits for the loss scale.
    assert (half.least_bytes, half_again.least_bytes) == (4 * 2**20, 6 * 2**20)

    path = tmp_path / "results.csv"
    start_file(path, kind=CounterRow)
    append_rows(path, rows)
    assert read_rows(path, kinds=[CounterRow]) == rows
    assert_plotted(tmp_path)
    cells = [list(column.cells) for column in counters.counters_table(rows).columns]
    names, sizes, milliseconds, _, moved, by_the_least, instructions, *_ = cells
    assert names[2] == "forward, float16, bfloat16 targets, mean"
    assert (sizes[0], milliseconds[0], moved[0]) == ("2^26", "0.180", "0.805")
    assert by_the_least == ["1.000", "", "1.000", "1.000"]
    assert instructions[0] == "35.0"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM", "ncu counted nothing:\n==ERROR== ERR_NVGPUCTRPERM"),
        (ncu_log(), "counted nothing"),
        (ncu_log([0] * 7, units=["Kbyte"] * 7), "read.sum in Kbyte, not in byte"),
        (ncu_log([0] * 6, left_out=["gpu__time_duration.sum"]), "duration.sum in None, not in ns"),
        (ncu_log([0] * 7), "1 launches for 2 cases of two each:\nvoid fused_bce::loss_kernel"),
    ],
)
def test_what_cannot_be_read_is_said(log, message):
    with pytest.raises(SystemExit) as error:
        counters.make_rows(CASES, counters.parse_launches(log), machine.facts("cpu"))
    assert message in str(error.value)


def test_watched_steps(monkeypatch):
    """One forward and one backward pass between start and stop, of each case."""
    seen = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, functools.partial(seen.append, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    backward = torch.Tensor.backward

    def watched_backward(loss, *arguments):
        seen.append(loss.grad_fn.name())
        backward(loss, *arguments)

    monkeypatch.setattr(torch.Tensor, "backward", watched_backward)
    counters.run_watched([Case(64, "cpu"), Case(64, "cpu", reduction="none")])
    name = seen[0]
    assert "BCEWithLogitsFunction" in name
    assert seen == [name, "start", name, "stop"] * 2


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_script("counters.py", status="torch finds no CUDA device")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="There is no ncu"):
        counters.run_ncu()
