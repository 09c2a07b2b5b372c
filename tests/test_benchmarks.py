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
QUICK = ["--no-compile", "--repeats", "2", "--seconds", "0"]


def run_script(name: str, *arguments: object) -> str:
    result = start_script(name, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def scripts(monkeypatch):
    """Makes the modules of the benchmark importable, as they are to its scripts."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ladder_and_plot(tmp_path, device):
    path = tmp_path / "results.csv"
    run_script("run.py", *QUICK, "--device", device, "--sizes", 3, "2^10", "--output", path)
    rows = read(path)
    contenders = ["fused", "eager", "stream"] + ["copy"] * (device == "cuda")
    cases = {(row["contender"], row["mode"], row["numel"]) for row in rows}
    assert cases == {
        (contender, mode, numel)
        for contender in contenders
        for mode in ("fwd", "fwd+bwd")
        for numel in ("3", "1024")
    }
    assert len(rows) == len(cases)
    for row in rows:
        assert float(row["median_seconds"]) > 0
        assert float(row["iqr_seconds"]) >= 0
        bytes_moved = int(row["bytes_per_element"]) * int(row["numel"])
        if row["contender"] == "copy":
            # A GiB is read and written, but for the rounding to whole numbers for each element.
            assert bytes_moved == pytest.approx(2**31, rel=1e-6)
        else:
            assert bytes_moved == (8 if row["mode"] == "fwd" else 12) * int(row["numel"])
        assert "benchmarks/run.py --no-compile" in row["command"]

    run_script("plot.py", tmp_path)
    figures = sorted(tmp_path.glob("results-*.png"))
    assert [figure.name for figure in figures] == [
        f"results-{device}-fwd-bwd-float32-mean.png",
        f"results-{device}-fwd-float32-mean.png",
    ]
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_variants_then_goals_appended(tmp_path):
    path = tmp_path / "results.csv"
    variants = ["--mode", "fwd+bwd", "--sizes", "2^14", "--weights", "both", "--reduction", "none"]
    quick = [*QUICK, "--device", "cpu"]
    run_script("run.py", *quick, *variants, "--dtype", "float32", "float16", "--output", path)
    goals = ["--preset", "goals", "--sizes", 1, 640, "--append"]
    output = run_script("run.py", *quick, *goals, "--output", path)
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


def test_non_leaf(tmp_path):
    quick = [*QUICK, "--device", "cpu", "--non-leaf"]
    run_script("run.py", *quick, "--sizes", "2^14", "--output", tmp_path)
    rows = read(tmp_path / "cpu-ladder.csv")
    # Without a backward pass a view of the logits would change nothing.
    assert [row["mode"] for row in rows] == ["fwd"] * 3 + ["fwd+bwd non-leaf"] * 3
    # The gradient passes through the view as it is: no copy for the leaf.
    fused = rows[3]
    assert 4 * 2**14 <= int(fused["peak_bytes"]) <= 4 * 2**14 + 4096

    run_script("plot.py", tmp_path)
    assert (tmp_path / "cpu-ladder-cpu-fwd-bwd-non-leaf-float32-mean.png").exists()

    goals = ["--preset", "goals", "--sizes", 128]
    assert "of 1 met" in run_script("run.py", *quick, *goals, "--output", tmp_path)
    assert {row["mode"] for row in read(tmp_path / "cpu-goals.csv")} == {"fwd+bwd non-leaf"}


def test_graph_needs_a_gpu():
    result = start_script("run.py", "--graph", "--device", "cpu")
    assert result.returncode == 2
    assert "--graph needs --device cuda" in result.stderr


def test_goals_and_graphs_on_cuda(tmp_path, device):
    if device == "cpu":
        pytest.skip("only for CUDA")
    quick = [*QUICK, "--device", "cuda", "--preset", "goals", "--graph"]
    output = run_script("run.py", *quick, "--sizes", 1, 640, "2^26", "--output", tmp_path)
    # Two for the small sizes; at 2^26 four for float32 and three for each half type, of which
    # that of torch.compile is not measured here.
    assert "of 12 met" in output
    assert output.count("not measured") == 3

    (path,) = tmp_path.glob("*-goals-20??-??-??.csv")
    contenders = {}
    for row in read(path):
        contenders.setdefault((row["numel"], row["dtype"]), set()).add(row["contender"])
        if row["contender"] == "fused" and row["dtype"] == "float32" and row["weights"] == "none":
            passes_memory = 2 if row["reduction"] == "none" else 1
            assert int(row["peak_bytes"]) >= 4 * int(row["numel"]) * passes_memory
    plain = {"fused", "eager", "stream", "copy"}
    assert contenders["640", "float32"] == plain | {"fused graph", "eager graph"}
    assert contenders[str(2**26), "bfloat16"] == plain
    assert contenders.keys() >= {(str(2**26), "float16"), (str(2**26), "float64")}


@pytest.mark.usefixtures("scripts")
def test_cuda_goals():
    from cases import DTYPES, REDUCTIONS, WEIGHTS
    from goals_cuda import cases_without_goals, cuda_goals

    goals = cuda_goals()
    cases = {goal.case for goal in goals}
    assert not cases & set(cases_without_goals())
    for case in cases | set(cases_without_goals()):
        rows, columns = case.shape
        assert rows * columns == case.numel
        assert case.device == "cuda"
        assert {case.dtype, case.target_dtype} <= set(DTYPES)
        assert case.reduction in REDUCTIONS
        assert case.weights in WEIGHTS

    # Bytes that one pass of forward and backward must move
    large = {(c.dtype, c.target_dtype): c.bytes_per_element for c in cases if c.numel == 2**28}
    assert large == {
        ("float32", "float32"): 12,
        ("bfloat16", "bfloat16"): 6,
        ("bfloat16", "float32"): 8,
    }


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        # fused moves 12 * 2^26 bytes in 3 ms, copy 2 * 2^30 bytes in 7 ms
        ("% of copy", 100 * (12 * 2**26 / 3) / (2**31 / 7)),
        ("eager / fused", 6),
        # The wall clock runs twice as long for fused
        ("eager / fused on the wall clock", 3),
        ("compile / fused", None),
        ("peak / logits", 1),
    ],
)
def test_measures_of_goals(measure, expected):
    from goals import Goal, goal_case
    from results import Row

    case = goal_case("cuda", 2**26)

    def row(contender: str, bytes_per_element: int, seconds: float, wall: float) -> Row:
        return Row(
            device="cuda",
            device_name="a GPU",
            torch="",
            cuda="",
            fused_bce="",
            instruction_set="",
            threads=1,
            date="",
            contender=contender,
            mode=case.mode,
            dtype=case.dtype,
            target_dtype=case.target_dtype,
            reduction=case.reduction,
            weights=case.weights,
            numel=case.numel,
            bytes_per_element=bytes_per_element,
            median_seconds=seconds,
            iqr_seconds=0,
            wall_seconds=wall,
            peak_bytes=4 * 2**26 + 512,
            other_load=None,
            command="",
        )

    rows = {
        "fused": row("fused", 12, 3e-3, 6e-3),
        "eager": row("eager", 12, 18e-3, 18e-3),
        "copy": row("copy", 32, 7e-3, 7e-3),
    }
    measured = Goal(case, measure, ">=", 1).measured(rows)
    assert measured == (None if expected is None else pytest.approx(expected))


@pytest.mark.usefixtures("scripts")
def test_file_names():
    from results import file_name

    date = "2030-01-02T03:04:05+00:00"
    assert file_name("cpu", "Some CPU", date, "goals") == "cpu-goals.csv"
    name = file_name("cuda", "NVIDIA H100 80GB HBM3", date, "ladder")
    assert name == "nvidia-h100-80gb-hbm3-ladder-2030-01-02.csv"
