"""The benchmark scripts run, and write what their readers expect."""

import contextlib
import csv
import dataclasses
import io
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

pytest.importorskip("matplotlib", reason="plot.py draws with it")
pytest.importorskip("rich", reason="run.py prints its tables with it")

ROOT = Path(__file__).parents[2]
# As little as shows that it works: the numbers mean nothing.
QUICK = ["--no-compile", "--repeats", "2", "--seconds", "0"]
# The sizes of workloads, so much smaller that they take no time
SMALLER = {65536: 64, 13330: 30, 670091: 41, 100000: 50, 512: 8, 1024: 16, 4096: 32}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Makes the modules of the benchmark importable, as they are to its scripts."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def run_script(name: str, *arguments: object, status: int = 0) -> str:
    """In this process, which has imported torch already. Returns what it prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(out):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}", *map(str, arguments)])
        got = 0
        try:
            runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        except SystemExit as exit:
            got = exit.code
    assert got == status
    return out.getvalue()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def make_row(**columns):
    """A row of a case on the CPU, but for what is given."""
    from harness.rows import Row

    values = {
        "device": "cpu",
        "device_name": "a CPU",
        "torch": "2.13",
        "cuda": "",
        "fused_bce": "0.1",
        "instruction_set": "avx2",
        "threads": 2,
        "date": "2030-01-02T03:04:05+00:00",
        "contender": "fused",
        "mode": "fwd+bwd",
        "dtype": "float32",
        "target_dtype": "float32",
        "reduction": "mean",
        "weights": "none",
        "numel": 1024,
        "bytes_per_element": 12,
        "median_seconds": 1e-3,
        "iqr_seconds": 0.0,
        "wall_seconds": 1e-3,
        "peak_bytes": 4096,
        "other_load": None,
        "command": "python benchmarks/run.py",
    }
    return Row(**values | columns)


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


def test_alone(tmp_path):
    path = tmp_path / "cost.csv"
    arguments = ["--alone", "--device", "cpu", "--mode", "fwd+bwd", "--sizes", 640, "2^14"]
    run_script("run.py", *QUICK, *arguments, "--output", path)
    rows = read(path)
    assert [row["contender"] for row in rows] == ["fused", "fused"]
    assert int(rows[-1]["peak_bytes"]) == pytest.approx(4 * 2**14, abs=4096)
    run_script("plot.py", path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@by_reduction
@by_dtype
def test_peak_memory(dtype, reduction, device):
    """A training step holds the gradient of the logits and, where each is wanted, the losses."""
    from harness.timing import peak_bytes

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


def test_graph_needs_a_gpu():
    command = [sys.executable, "benchmarks/run.py", "--graph", "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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


def test_cuda_goals():
    from cases.base import DTYPES, REDUCTIONS, WEIGHTS
    from cases.goals_cuda import cases_without_goals, cuda_goals

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
    from cases.base import Case
    from cases.goal import Goal

    case = Case(2**26, "cuda")

    def row(contender: str, bytes_per_element: int, seconds: float, wall: float):
        return make_row(
            **dataclasses.asdict(case),
            contender=contender,
            bytes_per_element=bytes_per_element,
            median_seconds=seconds,
            wall_seconds=wall,
            peak_bytes=4 * 2**26 + 512,
        )

    rows = {
        "fused": row("fused", 12, 3e-3, 6e-3),
        "eager": row("eager", 12, 18e-3, 18e-3),
        "copy": row("copy", 32, 7e-3, 7e-3),
    }
    measured = Goal(case, measure, ">=", 1).measured(rows)
    assert measured == (None if expected is None else pytest.approx(expected))


def test_file_names():
    from harness.rows import csv_path

    facts = {"device": "cpu", "device_name": "A CPU", "date": "2030-01-02T03:04:05+00:00"}
    folder = Path("results")
    assert csv_path(folder, facts, "goals") == folder / "cpu-goals.csv"
    facts |= {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}
    path = csv_path(folder, facts, "ladder")
    assert path == folder / "nvidia-h100-80gb-hbm3-ladder-2030-01-02.csv"
    assert csv_path(folder / "a.csv", facts, "ladder") == folder / "a.csv"


@pytest.fixture
def small_workloads(monkeypatch):
    """The workloads with their dimensions made small."""
    from cases.workloads import WORKLOADS

    def shrink(shape):
        return shape and tuple(SMALLER.get(size, size) for size in shape)

    for name, spec in WORKLOADS.items():
        shapes = {
            field: shrink(getattr(spec, field)) for field in ("shape", "weight", "pos_weight")
        }
        monkeypatch.setitem(WORKLOADS, name, dataclasses.replace(spec, **shapes))
    return WORKLOADS


@pytest.mark.usefixtures("small_workloads")
def test_workloads(tmp_path, device):
    path = tmp_path / "results.csv"
    quick = [*QUICK, "--device", device, "--preset", "workloads"]
    output = run_script("run.py", *quick, "--output", path)
    rows = read(path)
    contenders = ["fused", "eager", "stream"] + ["copy"] * (device == "cuda")
    assert [row["contender"] for row in rows] == contenders * 6
    fused = {row["workload"]: row for row in rows if row["contender"] == "fused"}
    assert fused["detection"]["shape"] == ("1x50x80" if device == "cpu" else "4x50x80")
    for row in rows:
        assert int(row["numel"]) == math.prod(map(int, row["shape"].split("x")))
    weights = {name: row["weights"] for name, row in fused.items()}
    assert weights == {
        "click-through": "none",
        "text labels": "pos_weight",
        "extreme labels": "none",
        "detection": "weight",
        "segmentation": "pos_weight",
        "contrastive": "none",
    }
    # bfloat16 read, bool read, bfloat16 written
    assert fused["extreme labels"]["bytes_per_element"] == "5"
    assert ("1/8 of the batch" in output) == (device == "cpu")
    assert "fused takes them" in output

    output = run_script("run.py", *quick, "--workloads", "contrastive", "--output", path)
    assert {row["workload"] for row in read(path)} == {"contrastive"}
    assert "Bool targets" not in output
    run_script("plot.py", path)
    assert (tmp_path / "results-fwd-bwd.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_selected(tmp_path):
    arguments = ["--preset", "workloads", "--mode", "fwd", "--output", tmp_path]
    message = run_script("run.py", *arguments, status="The preset workloads has no such case")
    assert message == ""
    assert not list(tmp_path.iterdir())
    run_script("run.py", "--workloads", "detection", "--output", tmp_path, status=2)


def test_workloads_of_both_devices(small_workloads):
    from cases.workloads import make_case
    from contenders.inputs import make_inputs, make_weights
    from contenders.losses import make_losses

    for name in small_workloads:
        shape = make_case(name, "cuda").shape
        assert shape == small_workloads[name].shape
        case = make_case(name, "cpu")
        assert case.shape == (shape[0] // small_workloads[name].cpu_factor, *shape[1:])
        for weight in make_weights(case).values():
            assert torch.broadcast_shapes(weight.shape, case.shape) == case.shape
        logits, target, _ = inputs = make_inputs(case)
        assert str(logits.dtype) == f"torch.{case.dtype}"
        assert str(target.dtype) == f"torch.{case.target_dtype}"
        channels_last = logits.is_contiguous(memory_format=torch.channels_last)
        assert (logits.dim() == 4 and channels_last) == (name == "segmentation")
        assert 0 < target.float().mean() < 1
        # The contenders compute the same.
        losses = make_losses(case, inputs, with_compile=False)
        wide = torch_bce(logits.double(), target.double(), **make_weights_again(losses["fused"]))
        for loss in losses.values():
            rounding = 4 * torch.finfo(logits.dtype).eps
            assert loss(logits, target).item() == pytest.approx(wide.item(), rel=rounding)


def make_weights_again(loss):
    """The weights that a loss has, whether or not it is wrapped."""
    loss = getattr(loss, "loss", loss)
    return {"weight": loss.weight, "pos_weight": loss.pos_weight}


@pytest.mark.parametrize("accepted", [True, False])
def test_bool_targets(monkeypatch, accepted):
    """Taken as they are if the kernels can, else cast, as they are for torch."""
    from cases.base import Case
    from contenders import losses
    from contenders.inputs import make_inputs

    case = Case(64, "cpu", dtype="bfloat16", target_dtype="bool")
    monkeypatch.setattr(losses, "takes_bool_targets", lambda device: accepted)
    monkeypatch.setattr(losses.fused_bce, "why_not_fused", lambda *_, **__: None)
    made = losses.make_losses(case, make_inputs(case), with_compile=False)
    assert isinstance(made["eager"], losses.CastsTarget)
    assert isinstance(made["fused"], losses.CastsTarget) == (not accepted)


def test_bool_targets_are_taken(device):
    from contenders.losses import takes_bool_targets

    assert takes_bool_targets(device)


def test_readme_names_every_workload():
    from cases.registry import PRESETS

    text = (ROOT / "benchmarks" / "README.md").read_text()
    for preset in PRESETS.values():
        for name in preset.workloads:
            assert f"| {name} |" in text


@pytest.fixture
def small_networks(monkeypatch):
    from cases import training

    monkeypatch.setattr(training, "LABELS", 40)
    monkeypatch.setattr(training, "BATCH", {"cpu": 16, "cuda": 16})
    return training


@pytest.mark.usefixtures("small_networks")
def test_training(tmp_path, device):
    quick = [
        *QUICK,
        "--device",
        device,
        "--preset",
        "training",
        "--output",
        tmp_path / "results.csv",
    ]
    run_script("run.py", *quick)
    rows = read(tmp_path / "results.csv")
    assert [row["contender"] for row in rows] == ["fused", "eager", "no loss"] * 3
    assert {row["mode"] for row in rows} == {"step"}
    assert {row["shape"] for row in rows} == {"16x40"}
    for row in rows:
        # At least the gradients of the two layers
        features = int(row["workload"].split()[0])
        assert int(row["peak_bytes"]) >= 4 * features * (features + 40)
    run_script("plot.py", tmp_path)
    assert (tmp_path / "results-step.png").exists()


def test_training_steps_agree(small_networks, device):
    """torch's loss and ours, in one batch and in four parts: the same step of the optimizer."""
    from contenders.losses import WithLoss

    import fused_bce

    spec = small_networks.WORKLOADS["64 features"]
    start = small_networks.make_network(spec).to(device).state_dict()
    inputs = torch.randn(16, spec.features, device=device)
    target = torch.rand(16, 40, device=device).round()

    def trained(loss, parts):
        model = WithLoss(small_networks.make_network(spec), loss).to(device)
        model.network.load_state_dict(start)
        batches = list(zip(inputs.chunk(parts), target.chunk(parts), strict=True))
        small_networks.training_contender(model, small_networks.through_loss(model), batches).step()
        return torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])

    expected = trained(torch.nn.BCEWithLogitsLoss(), 1)
    assert not torch.equal(expected, torch.cat([value.view(-1) for value in start.values()]))
    for loss in (torch.nn.BCEWithLogitsLoss(), fused_bce.BCEWithLogitsLoss()):
        for parts in (1, 4):
            torch.testing.assert_close(trained(loss, parts), expected)


@pytest.fixture
def small_extras(monkeypatch):
    from cases import extras

    monkeypatch.setattr(extras, "SIZES", (2**10, 2**12))
    return extras


@pytest.mark.usefixtures("small_extras")
def test_extras(tmp_path, device):
    quick = [*QUICK, "--device", device, "--preset", "extras"]
    path = tmp_path / "results.csv"
    output = run_script("run.py", *quick, "--output", path)
    contenders: dict[tuple[str, int], dict[str, dict[str, str]]] = {}
    for row in read(path):
        case = contenders.setdefault((row["workload"], int(row["numel"])), {})
        case[row["contender"]] = row
    # bytes an element of fused and of fused plain: logits, targets, gradient; ignore_index reads
    # the targets twice
    expected = {
        "bool targets": (9, 12),
        "bool targets, bfloat16": (5, 6),
        "int64 targets": (16, 12),
        "ignore_index": (10, None),
        "label_smoothing": (12, None),
    }
    assert list(contenders) == [(name, numel) for numel in (2**10, 2**12) for name in expected]
    for (name, numel), rows in contenders.items():
        fused_bytes, plain_bytes = expected[name]
        plain = ["fused plain"] * (plain_bytes is not None)
        assert list(rows) == ["fused", "eager", *plain, "stream"] + ["copy"] * (device == "cuda")
        assert int(rows["fused"]["bytes_per_element"]) == fused_bytes
        if plain_bytes is not None:
            assert int(rows["fused plain"]["bytes_per_element"]) == plain_bytes
        # The gradient, where eager holds a cast or a smoothed target too
        gradient = numel * getattr(torch, rows["fused"]["dtype"]).itemsize
        assert gradient <= int(rows["fused"]["peak_bytes"]) <= gradient + 4096
        assert int(rows["eager"]["peak_bytes"]) >= 2 * gradient
        assert f"{name}: eager and compile have" in output

    run_script("plot.py", path)
    assert (tmp_path / "results-fwd-bwd.png").read_bytes().startswith(b"\x89PNG")
    arguments = ["--sizes", 640, "--workloads", "ignore_index", "--output", path]
    run_script("run.py", *quick, *arguments)
    assert {(row["workload"], row["numel"]) for row in read(path)} == {("ignore_index", "640")}


@pytest.mark.parametrize(
    "with_compile",
    [
        False,
        # The compiler's own warning, on its way through torch
        pytest.param(
            True,
            marks=[pytest.mark.large, pytest.mark.filterwarnings("default::DeprecationWarning")],
        ),
    ],
)
def test_extras_compute_the_same(device, with_compile):
    from cases import extras

    import fused_bce

    preset = extras.Extras()
    for name in extras.WORKLOADS:
        case = extras.make_case(name, device, 2**12)
        inputs = preset.inputs(case)
        logits, target, _ = inputs
        assert str(target.dtype) == f"torch.{case.target_dtype}"
        assert (case.plain is not None) == ("targets" in name)
        share = (target == extras.IGNORED).float().mean().item()
        assert share == pytest.approx(0.2 if name == "ignore_index" else 0, abs=0.05)
        calls = {
            contender: (loss, target)
            for contender, loss in preset.losses(case, inputs, with_compile).items()
        }
        assert len(calls) == 2 + with_compile
        if case.plain is not None:
            plain = extras.plain_inputs(inputs)[1]
            assert plain.dtype is logits.dtype
            calls["fused plain"] = fused_bce.BCEWithLogitsLoss(), plain
        # From the definition
        wide = logits.double().requires_grad_()
        kept = target != extras.IGNORED
        t = target.double() * 0.9 + 0.05 if name == "label_smoothing" else target.double()
        expected = torch_bce(wide[kept], t[kept])
        (expected_grad,) = torch.autograd.grad(expected, wide)
        rounding = 4 * torch.finfo(logits.dtype).eps
        for loss, given in calls.values():
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, given)
            value.backward()
            assert value.dtype is logits.dtype
            assert value.item() == pytest.approx(expected.item(), rel=rounding)
            torch.testing.assert_close(
                leaf.grad.double(), expected_grad, rtol=rounding, atol=rounding / case.numel
            )


@pytest.fixture
def small_heads(monkeypatch):
    from cases import heads

    monkeypatch.setattr(heads, "SIZES", {"cpu": (2**16,), "cuda": (2**16,)})
    return heads


@pytest.mark.usefixtures("small_heads")
def test_heads(tmp_path, device):
    quick = [*QUICK, "--device", device, "--preset", "heads"]
    path = tmp_path / "results.csv"
    output = run_script("run.py", *quick, "--output", path)
    rows = read(path)
    assert [row["contender"] for row in rows] == ["fused", "fused recompute", "eager"] * 2
    assert {(row["bytes_per_element"], row["shape"]) for row in rows} == {("72", "1024x64")}
    # In multiples of the logits of one head
    peaks = {}
    for row in rows:
        size = int(row["peak_bytes"]) / (4 * int(row["numel"]))
        peaks.setdefault(row["workload"], {})[row["contender"]] = size
    leaves, linear = peaks["six losses, leaf logits"], peaks["six heads"]
    # The gradients, and beside them losses and partial sums
    assert all(6 <= leaves[name] <= 6.1 for name in ("fused", "fused recompute"))
    # Hidden layer, logits and gradients; without those, what backward needs for one head
    assert linear["fused"] == pytest.approx(13, abs=0.1)
    assert linear["fused recompute"] <= min(linear["eager"], 10)
    assert "peak count the logits of one head" in output

    run_script("plot.py", path)
    assert (tmp_path / "results-summed-fwd-bwd.png").read_bytes().startswith(b"\x89PNG")
    arguments = ["--sizes", 640, "--workloads", "six heads", "--output", path]
    run_script("run.py", *quick, *arguments)
    assert {(row["workload"], row["numel"]) for row in read(path)} == {("six heads", "640")}


@pytest.mark.parametrize(
    "with_compile",
    [
        False,
        # The compiler's own warning, on its way through torch
        pytest.param(
            True,
            marks=[pytest.mark.large, pytest.mark.filterwarnings("default::DeprecationWarning")],
        ),
    ],
)
def test_heads_compute_the_same(device, with_compile):
    import copy

    from cases import heads

    torch.manual_seed(0)
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


@pytest.mark.large
# The compiler's own, on its way through torch
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.usefixtures("small_networks", "small_workloads", "small_extras", "small_heads")
@pytest.mark.parametrize("preset", ["workloads", "training", "extras", "heads"])
def test_compiled(tmp_path, device, preset):
    quick = [option for option in QUICK if option != "--no-compile"]
    path = tmp_path / "results.csv"
    run_script("run.py", *quick, "--device", device, "--preset", preset, "--output", path)
    contenders = [row["contender"] for row in read(path)]
    assert contenders.count("compile") == contenders.count("eager") >= 2
    assert contenders.count("fused compile") == (3 if preset == "training" else 0)


def test_peers(tmp_path, device):
    quick = [*QUICK, "--device", device, "--preset", "peers", "--sizes", "2^16"]
    output = run_script("run.py", *quick, "--output", tmp_path / "results.csv")
    rows = read(tmp_path / "results.csv")
    assert {row["mode"] for row in rows} == {"fwd", "fwd+bwd"}
    contenders = {row["contender"] for row in rows}
    assert contenders >= {"fused", "eager", "sigmoid + BCELoss", "softplus - x*t", "stream"}
    assert "Not measured: flag_gems: " in output


def test_peers_compute_the_same(device):
    from cases.base import Case
    from contenders.peers import make_peers

    logits, target = torch.randn(1000, device=device), torch.rand(1000, device=device).round()
    expected = torch_bce(logits, target)
    peers = make_peers(Case(1000, device))
    assert len(peers) >= 2
    for loss in peers.values():
        torch.testing.assert_close(loss(logits, target), expected)


def test_flag_gems(monkeypatch, device):
    """Whatever it does, the run goes on, and says why it is left out."""
    from cases.base import Case
    from contenders.peers import make_peers, missing_peers, why_not_flag_gems

    forward, training = Case(64, "cuda", mode="fwd"), Case(64, "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_peers(forward) == {"flag_gems": "not installed"}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there it is")
    package = types.ModuleType("flag_gems")
    monkeypatch.setitem(sys.modules, "flag_gems", package)
    assert why_not_flag_gems(Case(64, "cpu")) == "its kernels need a GPU"
    assert why_not_flag_gems(training) == "it has no backward pass of its own"
    # Releases up to 5.0 do not have the function; a machine without a GPU has no device.
    assert why_not_flag_gems(forward).startswith("it does not run here: ")
    if device == "cuda":
        package.binary_cross_entropy_with_logits = torch.binary_cross_entropy_with_logits
        assert "flag_gems" in make_peers(forward)
        package.binary_cross_entropy_with_logits = lambda logits, *_: logits.mean()
        assert "not close" in why_not_flag_gems(forward)


def test_accuracy(monkeypatch, tmp_path, device):
    import accuracy

    monkeypatch.setattr(accuracy, "POINTS", 20)
    path = tmp_path / "accuracy.csv"
    arguments = ["benchmarks/accuracy.py", "--device", device, "--output", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    accuracy.main()
    rows = read(path)
    ranges = 2 * accuracy.LIMIT / accuracy.WIDTH
    assert len(rows) == ranges * 2 * 2 * 2  # contenders, targets, loss and gradient
    errors = {}
    for row in rows:
        # Where exp(-|x|) is normal
        if abs(float(row["logits_from"])) <= 86:
            key = row["contender"], row["quantity"], float(row["target"])
            errors[key] = max(errors.get(key, 0), float(row["max_ulp"]))
    assert max(error for key, error in errors.items() if key[0] == "fused") <= 4
    # torch loses every digit of a small loss of a negative, and of a small gradient of a positive.
    lost = {key for key, error in errors.items() if error > 2**23}
    assert lost == {("eager", "loss", 0.0), ("eager", "gradient", 1.0)}

    run_script("plot.py", path)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values_of_accuracy(target):
    """Against 50 digits, of which 1 - sigmoid(90) loses 39."""
    from accuracy import true_values

    logits = np.array([-100.0, -17.25, -0.5, 0.0, 1.5, 90.0], dtype=np.float32)
    got = true_values(logits, target)
    for i, logit in enumerate(logits.tolist()):
        with mpmath.workdps(50 + 39):
            sigmoid = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
            loss = -mpmath.log(sigmoid if target else 1 - sigmoid)
            grad = sigmoid - target
        assert got["loss"][i] == pytest.approx(float(loss), rel=1e-14)
        assert got["gradient"][i] == pytest.approx(float(grad), rel=1e-14)


def test_ulp_errors():
    from accuracy import ulp_errors

    eps = float(np.finfo(np.float32).eps)
    results = np.array([1 + eps, 1.0, 2.0, 0.0], dtype=np.float32)
    true = np.array([1.0, 1.0 + eps / 2, 2 + 4 * eps, 2.0**-149])
    assert ulp_errors(results, true).tolist() == [1.0, 0.5, 2.0, 1.0]


def test_bars():
    """Their lengths are the ratios, whatever the order of the rows."""
    from plots.bars import plot_bars

    seconds = {"stream": 1e-3, "fused": 2e-3, "compile": 4e-3, "eager": 10e-3}
    rows = [
        make_row(
            contender=name,
            workload=workload,
            shape="32x32",
            median_seconds=value * factor[name == "eager"],
            peak_bytes=None if name == "stream" else 4096 * (1 + (name == "eager")),
        )
        for workload, factor in (("a", (1, 1)), ("b", (1, 2)))
        for name, value in seconds.items()
    ]
    speedups, peaks = plot_bars(rows).axes
    lengths = [
        {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
        for axes in (speedups, peaks)
    ]
    assert lengths[0] == {"compile": [2.5, 5.0], "fused": [5.0, 10.0]}
    assert lengths[1] == {"eager": [2, 2], "compile": [1, 1], "fused": [1, 1]}


# Seconds of an older and of a newer file: fused took 1.3 times as long, eager and the whole machine
# half as long.
OLDER = {"fused": 1.0e-3, "eager": 8e-3, "stream": 0.8e-3}
NEWER = {"fused": 1.3e-3, "eager": 4e-3, "stream": 0.4e-3}


def write_file(path: Path, seconds: dict[str, float], left_out: tuple[str, ...] = (), **columns):
    from harness.rows import Row, header

    names = [name for name in header(Row) if name not in left_out]
    rows = [
        make_row(contender=name, median_seconds=value, **columns) for name, value in seconds.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
    return path


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (
            [],
            1,
            {
                "fused": ("1.30", "slower"),
                "eager": ("0.50", "faster"),
                "stream": ("0.50", "faster"),
            },
        ),
        (
            ["--factor", "1.4"],
            0,
            {"fused": ("1.30", ""), "eager": ("0.50", "faster"), "stream": ("0.50", "faster")},
        ),
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
    message = "The two files have no case in common"
    run_script("compare.py", old, new, status=message)
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
    from harness.rows import append_rows, read_rows, start_file

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
