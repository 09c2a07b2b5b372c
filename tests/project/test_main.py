"""``python -m fused_bce``: its checks, its verdict and its exit status."""

import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import by_dtype, fused, torch_bce

import fused_bce
import fused_bce.__main__ as main_module
from fused_bce.__main__ import Times, check, main, verdict

# Some ten units in the last place of a float32
TOO_MUCH = 1e-6


@pytest.fixture
def quick(monkeypatch):
    """As little timing as there can be: the times mean nothing."""
    monkeypatch.setattr(main_module, "SIZES", {"cpu": (1, 128), "cuda": (1, 128)})
    monkeypatch.setattr(main_module, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(main_module, "ROUNDS", 1)


def replace_loss(monkeypatch, function):
    monkeypatch.setattr(main_module, "binary_cross_entropy_with_logits", function)


@by_dtype
def test_kernels_pass_and_torch_does_not(monkeypatch, device, dtype):
    """The limits are narrow enough to see the digits that torch loses in the tails."""
    ours = check(device, dtype)
    assert ours.passed
    # Rounding alone is half a unit.
    assert 0.4 < ours.loss <= ours.limit <= 8
    assert 0.4 < ours.gradient <= ours.limit
    assert ours.mean <= ours.limit

    replace_loss(monkeypatch, torch_bce)
    theirs = check(device, dtype)
    assert not theirs.passed
    assert theirs.loss > 100 * ours.loss
    # None: torch scales by grad_loss before it divides, which overflows in float16.
    assert theirs.gradient is None or theirs.gradient > 100 * ours.gradient


def loss_off(*arguments, **options):
    loss = fused(*arguments, **options)
    return loss + TOO_MUCH * loss.detach()


def gradient_off(*arguments, **options):
    loss = fused(*arguments, **options)
    return loss.detach() + (1 + TOO_MUCH) * (loss - loss.detach())


def mean_off(*arguments, reduction, **options):
    change = loss_off if reduction == "mean" else fused
    return change(*arguments, reduction=reduction, **options)


def one_loss_nan(*arguments, **options):
    loss = fused(*arguments, **options)
    spoilt = loss.detach().clone()
    spoilt.view(-1)[-1] = math.nan
    return loss - loss.detach() + spoilt


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (loss_off, {"loss", "mean"}),
        (gradient_off, {"gradient"}),
        (mean_off, {"mean"}),
        (one_loss_nan, {"loss", "mean"}),
    ],
)
def test_each_error_is_seen(monkeypatch, device, wrong, seen):
    replace_loss(monkeypatch, wrong)
    result = check(device, torch.float32)
    errors = {name: getattr(result, name) for name in ("loss", "gradient", "mean")}
    bad = {name for name, error in errors.items() if error is None or error > result.limit}
    assert bad == seen
    assert not result.passed
    assert (errors["loss"] is None) == (wrong is one_loss_nan)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("wrong", [gradient_off, one_loss_nan])
def test_failed_check(monkeypatch, capsys, wrong):
    replace_loss(monkeypatch, wrong)
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("A CHECK FAILED")
    assert any(line.split()[1:2] == ["float32"] and line.endswith("FAILED") for line in lines)

    assert main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    passed = {row["dtype"]: row["passed"] for row in report["checks"]}
    assert passed["float32"] is False
    # The error of one loss is nan in every dtype; JSON has no nan.
    losses = [row["loss"] for row in report["checks"]]
    assert all((loss is None) == (wrong is one_loss_nan) for loss in losses)


@pytest.mark.usefixtures("quick")
def test_exit_status_of_a_failure(monkeypatch, capsys):
    """As python -m runs it, around a function that is wrong."""
    monkeypatch.setattr(fused_bce.functional, "binary_cross_entropy_with_logits", torch_bce)
    # The module runs anew, so only what it imports can be made quick.
    monkeypatch.setattr(torch.utils.benchmark, "Timer", OneSecond)
    monkeypatch.setattr(sys, "argv", ["fused_bce"])
    monkeypatch.delitem(sys.modules, "fused_bce.__main__")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("fused_bce", run_name="__main__")
    assert exit.value.code == 1
    assert "A CHECK FAILED" in capsys.readouterr().out


class OneSecond:
    """In the place of torch's timer: every step takes a second, and none is run."""

    median = 1.0

    def __init__(self, *_, **__):
        pass

    def blocked_autorange(self, **_):
        return self

    def timeit(self, _):
        return self


@pytest.mark.large
def test_in_another_folder(tmp_path):
    """The whole, as a user runs it, with the exit status of success and nothing but JSON."""
    command = [sys.executable, "-W", "error", "-m", "fused_bce", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # torch's timer says so where there is a CUDA toolkit and no GPU.
    said = [line for line in result.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert said == []
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["build"]["running_torch"] == torch.__version__
    assert report["build"]["threads"] >= 1
    assert report["build"]["cpu_instruction_set"] in report["build"]["cpu_instruction_sets"]
    assert report["devices"][0]["device"] == "cpu"
    dtypes = {row["dtype"] for row in report["checks"] if row["device"] == "cpu"}
    assert dtypes == {"float16", "bfloat16", "float32", "float64"}
    times = [row for row in report["times"] if row["device"] == "cpu"]
    assert [row["numel"] for row in times] == list(main_module.SIZES["cpu"])
    for row in times:
        assert row["speedup"] == pytest.approx(row["torch"] / row["fused"])
    assert report["verdict"].startswith("The fused loss")


@pytest.mark.usefixtures("quick")
def test_text(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for fact in (
        fused_bce.__version__,
        torch.__version__,
        fused_bce.build_info()["cpu_instruction_set"],
        f"{torch.get_num_threads()} threads",
    ):
        assert fact in out
    assert "none in this build" in out or fused_bce.build_info()["cuda_archs"] is not None
    assert out.splitlines()[-1] == "All checks passed."


@pytest.mark.usefixtures("quick")
def test_nothing_fused_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(main_module, "why_not_fused", lambda *_: "the moon is full")
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {device["why_not_fused"] for device in report["devices"]} == {"the moon is full"}
    assert report["checks"] == report["times"] == []
    assert "no device" in report["verdict"]


@pytest.mark.parametrize(
    ("speedups", "answer", "numbers"),
    [
        ({"cpu": [1.3, 8]}, "is faster than", "1.3 to 8.0 times as fast on cpu."),
        (
            {"cpu": [1.3, 8], "cuda:0": [2, 6]},
            "is faster than",
            "1.3 to 8.0 times as fast on cpu, 2.0 to 6.0 times as fast on cuda:0.",
        ),
        (
            {"cpu": [0.8, 8]},
            "is faster than",
            "0.8 to 8.0 times as fast on cpu, slower for N = 1,000 on cpu.",
        ),
        # Within the noise of a measurement
        ({"cpu": [0.96, 1.04]}, "is not faster than", "1.0 to 1.0 times as fast on cpu."),
    ],
)
def test_verdict(speedups, answer, numbers):
    times = [
        Times(device, numel=1000 * (i + 1), torch=speedup * 1e-3, fused=1e-3)
        for device, of_device in speedups.items()
        for i, speedup in enumerate(of_device)
    ]
    assert verdict(times) == f"The fused loss {answer} torch's on this machine: {numbers}"
