"""The presets of run.py: their cases, contenders, bytes and peaks."""

import argparse
import math

import pytest
import torch
from scripts import BENCHMARKS, assert_plotted, by_compile, run, run_script, shrink_presets

import pairwise_processes
from cases import workloads
from cases.registry import PRESETS
from harness.rows import read_rows, start_file
from plots.bars import make_cases


@pytest.fixture
def small(monkeypatch):
    shrink_presets(monkeypatch)


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
    assert ("of 12 met" in output) == (device == "cpu")


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
        logits = getattr(torch, rows["fused"].dtype).itemsize * numel
        # Logits, labels, their product and what logsigmoid has
        assert rows["eager"].peak_bytes >= 4 * logits
        # The logits of all chunks
        assert logits <= rows["chunked"].peak_bytes <= 3 * logits
        # One block, here all logits, and the scaled input
        assert rows["fused"].peak_bytes <= 1.5 * logits + 4096
    assert "peak: without the gradients of the inputs" in output
    assert "Not measured: siglip_kernel: " in output


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
    missing = {"512 features, float16"} if device == "cpu" else set()
    assert {name for name, _ in cases} == set(PRESETS[preset].workloads) - missing
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


def test_every_preset_is_tested_and_documented():
    assert {name for name, preset in PRESETS.items() if preset.workloads} == NAMED.keys()
    text = (BENCHMARKS / "README.md").read_text()
    for name, preset in PRESETS.items():
        assert name == "ladder" or f"--preset {name}" in text
        assert all(f"| {workload} |" in text for workload in preset.workloads)


@pytest.mark.usefixtures("small")
def test_peers(tmp_path, device):
    rows, output = run(tmp_path, device, "--preset", "peers", "--sizes", "2^16")
    assert {row.mode for row in rows} == {"fwd", "fwd+bwd"}
    contenders = {row.contender for row in rows}
    assert contenders >= {"fused", "eager", "sigmoid + BCELoss", "softplus - x*t", "stream"}
    assert "Not measured: flag_gems: " in output


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
