"""What the benchmarks compute of their measurements: units in the last place, ratios, columns."""

import dataclasses

import mpmath
import numpy as np
import pytest

pytest.importorskip("rich", reason="counters.py and compare.py print tables with it")

import accuracy
import compare
import counters
from cases.base import Case
from cases.goal import Goal
from harness import machine
from harness.rows import Row, append_rows, csv_path, read_rows, start_file


def make_row(**columns) -> Row:
    """A row of a case on the CPU, but for what is given."""
    facts = {**machine.facts("cpu"), "torch": "2.13", "other_load": None}
    times = {"median_seconds": 1e-3, "iqr_seconds": 0.0, "wall_seconds": 1e-3}
    fused = {"contender": "fused", "bytes_per_element": 12, "peak_bytes": 4096}
    return Row(**facts | dataclasses.asdict(Case(1024, "cpu")) | times | fused | columns)


def test_ulp_errors():
    eps = float(np.finfo(np.float32).eps)
    got = np.array([1 + eps, 1.0, 2.0, 0.0], dtype=np.float32)
    true = np.array([1.0, 1.0 + eps / 2, 2 + 4 * eps, 2.0**-149])
    assert accuracy.ulp_errors(got, true).tolist() == [1.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values(target):
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


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values_of_the_focal_loss(target):
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


def test_rows_come_back_as_they_were(tmp_path):
    """None, numbers and text; a file that lacks a column is refused."""
    rows = [make_row(peak_bytes=None, other_load=0.5), make_row(workload="a", shape="2x3")]
    path = tmp_path / "a.csv"
    start_file(path)
    append_rows(path, rows)
    start_file(path, append=True)
    assert read_rows(path) == rows
    path.write_text(path.read_text().replace("numel", "another", 1))
    with pytest.raises(SystemExit, match="does not have the columns"):
        read_rows(path)
    with pytest.raises(SystemExit, match="other columns"):
        start_file(path, append=True)


def test_paths_of_files(tmp_path):
    facts = {"device": "cpu", "device_name": "A CPU", "date": "2030-01-02T03:04:05+00:00"}
    assert csv_path(tmp_path, facts, "goals").name == "cpu-goals.csv"
    facts |= {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}
    path = csv_path(tmp_path, facts, "ladder")
    assert path.name == "nvidia-h100-80gb-hbm3-ladder-2030-01-02.csv"


@pytest.mark.parametrize(("relative_to", "ratio"), [(None, 1.3), ("stream", 2.6)])
def test_ratios_of_two_runs(relative_to, ratio):
    """fused took 1.3 times as long, the whole machine half as long."""
    seconds = {"fused": (1.0e-3, 1.3e-3), "stream": (0.8e-3, 0.4e-3)}
    old, new = (
        compare.by_case([make_row(contender=n, median_seconds=s[i]) for n, s in seconds.items()])
        for i in range(2)
    )
    changes = {c.new.contender: c for c in compare.list_changes(old, new, relative_to)}
    assert changes["fused"].ratio == pytest.approx(ratio)
    assert "slower" in compare.verdict(changes["fused"], 1.1)
    remarks = compare.remarks(old, new, [*changes.values()])
    assert [r for r in remarks if "stream" in r] == ([] if relative_to else [remarks[0]]), (
        "a machine that is twice as fast is no news where it cancels out"
    )


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


def ncu_log(unit: str) -> str:
    """As ncu writes it: lines of its own around a table of which each cell is quoted. Two launches,
    of forward and backward."""
    metrics = dict(counters.METRICS.values())
    first, *others = metrics.values()
    assert first == "byte"
    cells = [
        ["ID", "Kernel Name", *metrics],
        ["", "", unit, *others],
        ["0", "k", "536,870,912", "268,435,456", "180000", "91.5", "60.25", "32", "73,400,320"],
        ["1", "k", "32", "0", "2000", "0.01", "12", "16", "1000"],
    ]
    lines = [",".join(f'"{cell}"' for cell in line) for line in cells]
    return "\n".join(["==PROF== Connected to process 1", *lines, "==PROF== Disconnected", ""])


def test_counters():
    case, facts = Case(2**26, "cuda"), machine.facts("cpu")
    rows = counters.make_rows([case], counters.parse_launches(ncu_log("byte")), facts)
    assert [row.direction for row in rows] == ["forward", "backward"]
    assert (rows[0].read_bytes, rows[0].written_bytes) == (2**29, 2**28)
    # Logits and targets, and the gradient
    assert [row.least_bytes for row in rows] == [12 * 2**26, 0]
    with pytest.raises(SystemExit, match="in Kbyte, not in byte"):
        counters.make_rows([case], counters.parse_launches(ncu_log("Kbyte")), facts)
