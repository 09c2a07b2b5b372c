"""Files of results: their columns and names; compare.py."""

import csv
import dataclasses
from pathlib import Path

import pytest
from scripts import make_row, run_script

from harness.rows import Row, append_rows, csv_path, header, read_rows, start_file

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
