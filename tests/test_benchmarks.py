"""The benchmark scripts run, and write what their readers expect."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="plot.py draws with it")
pytest.importorskip("rich", reason="run.py prints its tables with it")

ROOT = Path(__file__).parent.parent
# As little as shows that it works: the numbers mean nothing.
QUICK = ["--no-compile", "--device", "cpu", "--repeats", "2", "--seconds", "0"]


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, f"benchmarks/{name}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ladder_and_plot(tmp_path):
    path = tmp_path / "results.csv"
    run_script("run.py", *QUICK, "--sizes", 3, "2^10", "--output", path)
    rows = read(path)
    cases = {(row["contender"], row["mode"], row["numel"]) for row in rows}
    assert cases == {
        (contender, mode, numel)
        for contender in ("fused", "eager", "stream")
        for mode in ("fwd", "fwd+bwd")
        for numel in ("3", "1024")
    }
    assert len(rows) == len(cases)
    for row in rows:
        assert float(row["median_seconds"]) > 0
        assert float(row["iqr_seconds"]) >= 0
        assert int(row["bytes_per_element"]) == (8 if row["mode"] == "fwd" else 12)
        assert "benchmarks/run.py --no-compile" in row["command"]

    run_script("plot.py", tmp_path)
    figures = sorted(tmp_path.glob("results-*.png"))
    assert [figure.name for figure in figures] == [
        "results-cpu-fwd-bwd-float32-mean.png",
        "results-cpu-fwd-float32-mean.png",
    ]
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_variants_then_goals_appended(tmp_path):
    path = tmp_path / "results.csv"
    variants = ["--mode", "fwd+bwd", "--sizes", "2^14", "--weights", "both", "--reduction", "none"]
    run_script("run.py", *QUICK, *variants, "--dtype", "float32", "float16", "--output", path)
    goals = ["--preset", "goals", "--sizes", 1, 640, "--append"]
    output = run_script("run.py", *QUICK, *goals, "--output", path)
    assert "of 2 met" in output
    assert "<= 0.85" in output

    rows = read(path)
    fused, eager, stream = rows[:3]
    assert {row["weights"] for row in rows[:6]} == {"both"}
    # Two reads and a write in forward, three and one in backward; half as much in float16
    assert [row["bytes_per_element"] for row in rows[:6]] == ["28"] * 3 + ["14"] * 3
    # The losses and the gradient, and at most a page beside them; torch holds more.
    assert 2 * 4 * 2**14 <= int(fused["peak_bytes"]) <= 2 * 4 * 2**14 + 4096
    assert int(eager["peak_bytes"]) > int(fused["peak_bytes"])
    assert stream["peak_bytes"] == ""
    assert [row["numel"] for row in rows[6:]] == ["1"] * 3 + ["640"] * 3
