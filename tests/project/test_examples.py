"""The examples run, print the numbers that they promise, and fail when the loss is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS

EXAMPLES = Path(__file__).parents[2] / "examples"

# Its value and gradient are off by a hundredth: less than a look at the curves would show.
WRONG_LOSS = """
import runpy, sys
import fused_bce

class Wrong(fused_bce.BCEWithLogitsLoss):
    def forward(self, input, target):
        return 1.01 * super().forward(input, target)

fused_bce.BCEWithLogitsLoss = Wrong
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments, python=sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=HANGS,
        # One thread: on a busy machine the threads of so small a network wait for each other.
        # Encoding and width: the tables must not depend on the terminal of whoever runs the tests.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"},
        check=False,
    )


def table_rows(output: str, first_cell: str) -> list[list[str]]:
    """Cells of the rows of rich's tables whose first cell matches."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines()]
    return [row for row in rows if len(row) > 1 and re.fullmatch(first_cell, row[0])]


@pytest.fixture
def _needs_extras():
    """Skips where the packages of the extra ``examples`` are missing."""
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)


@pytest.mark.usefixtures("_needs_extras")
@pytest.mark.large
def test_train_digits_agrees_with_torch(tmp_path):
    output = tmp_path / "new folder"
    done = run(EXAMPLES / "train_digits.py", "--output", output, "--epochs", 6)
    assert done.returncode == 0, done.stderr
    assert "Both losses agree" in done.stdout

    losses = [[float(cell) for cell in row[1:]] for row in table_rows(done.stdout, r"\d+")]
    assert len(losses) == 6
    for digits_torch, digits_fused, cancer_torch, cancer_fused in losses:
        assert digits_fused == pytest.approx(digits_torch, rel=1e-4)
        assert cancer_fused == pytest.approx(cancer_torch, rel=1e-4)
    assert all(last < first / 4 for first, last in zip(losses[0], losses[-1], strict=True))

    scores = table_rows(done.stdout, r"digits \(multi-label\)|breast cancer")
    assert [row[1] for row in scores] == ["torch.nn", "fused_bce"] * 2
    # Better than answering no to all digits (0.90) and yes to all of breast cancer (0.63).
    assert all(float(row[2]) > 0.93 for row in scores)
    assert all(float(row[3]) > 0.95 for row in scores)
    assert all(float(row[4]) > 0 for row in scores)
    assert_is_drawing(output / "loss_curves.png")


def assert_is_drawing(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)  # [height, width, RGBA], 0 to 1
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    # Both halves, for there are two tasks, have the broad curve and the thin one: blue and orange.
    for half in (pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]):
        red, blue = half[..., 0], half[..., 2]
        assert (blue - red > 0.1).sum() > 500
        assert (red - blue > 0.5).sum() > 500


@pytest.mark.usefixtures("_needs_extras")
@pytest.mark.large
def test_train_digits_notices_a_wrong_loss(tmp_path):
    program = EXAMPLES / "train_digits.py"
    done = run("-c", WRONG_LOSS, program, "--output", tmp_path, "--epochs", 1)
    assert done.returncode == 1
    for task in ("digits (multi-label)", "breast cancer"):
        assert f"On {task} the loss curves of torch.nn and fused_bce differ by" in done.stderr


WRONG_HEAD = WRONG_LOSS.replace("BCEWithLogitsLoss", "LinearBCEWithLogitsLoss")


@pytest.mark.usefixtures("_needs_extras")
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory in /proc")
@pytest.mark.large
def test_train_extreme_labels_agrees_with_torch(tmp_path):
    done = run(EXAMPLES / "train_extreme_labels.py", "--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Both agree" in done.stdout
    rows = table_rows(done.stdout, "torch.nn|fused_bce")
    theirs, ours = ([float(cell) for cell in row[1:]] for row in rows)
    first, last, *precisions, memory, _ = ours
    assert theirs[:2] == pytest.approx([first, last], rel=1e-4)
    assert theirs[2:5] == pytest.approx(precisions, abs=0.01)
    assert last < 0.9 * first
    # The most frequent label alone has 0.03, and five labels by chance 0.0003.
    assert min(precisions) > 0.1
    # 10 MiB of logits, as much of targets, of the gradient and more, against a block of 4 MiB
    assert memory < theirs[-2] / 2
    assert_is_drawing(tmp_path / "extreme_labels.png")


@pytest.mark.usefixtures("_needs_extras")
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory in /proc")
@pytest.mark.large
def test_train_extreme_labels_notices_a_wrong_loss(tmp_path):
    program = EXAMPLES / "train_extreme_labels.py"
    small = ("--quick", "--labels", 500, "--steps", 2)
    done = run("-c", WRONG_HEAD, program, "--output", tmp_path, *small)
    assert done.returncode == 1
    assert "The loss curves of torch.nn and fused_bce differ by" in done.stderr


@pytest.mark.large
def test_train_million_labels(tmp_path):
    """Of fewer. torchao compiles its optimizer: a minute."""
    for package in ("tqdm", "torchao"):
        pytest.importorskip(package)
    # torch's compiler fails where its folder has a space in its name, until torch 2.14.
    environment = tmp_path / "environment"
    environment.symlink_to(sys.prefix)
    python = environment / "bin" / Path(sys.executable).name
    ways = ["float32", "bfloat16", "torch.nn"]
    options = ["--labels", 20_000, "--steps", 30, "--ways", *ways]
    done = run(EXAMPLES / "train_million_labels.py", *options, python=python)
    assert done.returncode == 0, done.stderr
    form = r"precision at 5: (\S+) .* ([\d,]+) MiB of .* and ([\d,]+) MiB beyond"
    *ours, theirs = re.findall(form, done.stdout.replace(",", ""))
    assert len(ours) == 2
    for precision, model, beyond in ours:
        # By chance 0.0003
        assert float(precision) > 0.1
        # Of the weight and two states: 1/8 of the weight, and a block
        assert int(beyond) <= int(model) / 24 + 6
        assert int(theirs[-1]) > 3 * int(beyond)


def test_tutorial_gives_the_expected_numbers():
    done = run(EXAMPLES / "tutorial.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "  64 classes, 10 rows: 0.2014   torch 0.2014   expected 0.2014",
        "  logit -2.34: 8.79 %   torch 8.79 %   expected 8.79 %",
        "  logit 3.45: 96.9 %   torch 96.9 %   expected 96.9 %",
        "  reduction=sum: 0.8024   torch 0.8024   expected 0.8024",
        "    warns: size_average and reduce args will be deprecated, "
        "please use reduction='sum' instead.",
    ):
        assert line in lines
    assert re.fullmatch(r"All \d+ listings give the expected numbers\.", lines[-1])


@pytest.mark.large
def test_tutorial_notices_a_wrong_loss():
    done = run("-c", WRONG_LOSS, EXAMPLES / "tutorial.py")
    assert done.returncode == 1
    assert "fused_bce gives 0.3078, torch 0.3048." in done.stderr


@pytest.mark.large
def test_train_distributed_agrees_with_one_process():
    pytest.importorskip("sklearn")
    parallel, processes = ["batch", "labels", "head"], 3  # of ten labels 4, 4 and 2
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    program = EXAMPLES / "train_distributed.py"
    done = run(*launcher, program, "--epochs", 3, "--parallel", *parallel)
    assert done.returncode == 0, done.stderr
    curve = re.findall(r"^ +\d +(\d\.\d+) +(\d\.\d+)$", done.stdout, re.MULTILINE)
    assert len(curve) == 3 * len(parallel)
    for distributed, alone in curve:
        assert float(distributed) == pytest.approx(float(alone), rel=1e-4)
    # Better than answering no to all (0.33).
    assert all(float(distributed) < 0.31 for distributed, _ in curve[2::3])


@pytest.mark.usefixtures("_needs_extras")
@pytest.mark.large
def test_train_siglip_agrees_with_the_plain_formula(tmp_path):
    options = ["--output", tmp_path, "--epochs", 20, "--peak-batch-size", 2048]
    done = run(EXAMPLES / "train_siglip.py", *options)
    assert done.returncode == 0, done.stderr
    assert "Both losses agree" in done.stdout
    plain, ours = table_rows(done.stdout, "plain formula|fused_bce")
    assert float(ours[1]) == pytest.approx(float(plain[1]), rel=1e-4)
    # One caption of 450 by chance
    assert float(ours[2].rstrip("%")) > 10
    assert float(ours[4]) < float(plain[4]) / 4
    assert (tmp_path / "siglip_curves.png").stat().st_size > 10_000


@pytest.mark.usefixtures("_needs_extras")
@pytest.mark.large
def test_train_siglip_notices_a_wrong_loss(tmp_path):
    wrong = """
import runpy, sys
import fused_bce

class Wrong(fused_bce.SigLipLoss):
    def forward(self, *features):
        return 1.01 * super().forward(*features)

fused_bce.SigLipLoss = Wrong
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    options = ["--output", tmp_path, "--epochs", 1, "--peak-batch-size", 64]
    done = run("-c", wrong, EXAMPLES / "train_siglip.py", *options)
    assert done.returncode == 1
    assert "The loss curves differ by 0.01" in done.stderr
