"""accuracy.py: its errors, and the true values that it holds them against."""

import sys

import mpmath
import numpy as np
import pytest
from scripts import assert_plotted, run_script

import accuracy
from cases import trained_pairs
from harness.rows import read_rows


def test_accuracy_of_pairs(monkeypatch, device):
    monkeypatch.setattr(trained_pairs, "BATCH", 64)
    errors = trained_pairs.measure(device)
    # Logits are sums of up to 27 and -15: in float32 they are off by some 1e-6, their exp as well.
    assert max(errors["fused"]) <= 5e-6
    # What is left of 1 + exp(-12) - 1, and of softplus(12) - 12
    assert min(max(errors[name]) for name in ("chunked", "log(1 + exp)")) >= 1e-4
    output = run_script("accuracy.py", "--loss", "pairwise", "--device", device)
    assert all(name in output for name in (*trained_pairs.LOSSES, *trained_pairs.QUANTITIES[:2]))


def test_accuracy(monkeypatch, tmp_path, device):
    monkeypatch.setattr(accuracy, "POINTS", 20)
    path = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--device", device, "--output", str(path)])
    accuracy.main()
    rows = read_rows(path, kinds=[accuracy.AccuracyRow])
    ranges = 2 * accuracy.LIMIT / accuracy.WIDTH
    assert len(rows) == ranges * 2 * 2 * 2  # contenders, targets, loss and gradient
    errors = {}
    for row in rows:
        # Where exp(-|x|) is normal
        if abs(row.logits_from) <= 86:
            key = row.contender, row.quantity, row.target
            errors[key] = max(errors.get(key, 0), row.max_ulp)
    assert max(error for key, error in errors.items() if key[0] == "fused") <= 4
    # torch loses every digit of a small loss of a negative, and of a small gradient of a positive.
    lost = {key for key, error in errors.items() if error > 2**23}
    assert lost == {("eager", "loss", 0.0), ("eager", "gradient", 1.0)}
    assert_plotted(tmp_path, "")


def test_accuracy_of_focal(monkeypatch, tmp_path, device):
    monkeypatch.setattr(accuracy, "POINTS", 20)
    path = tmp_path / "results.csv"
    arguments = ["--loss", "focal", "--device", device, "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    accuracy.main()
    errors = {"fused": 0.0, "eager": 0.0}
    for row in read_rows(path, kinds=[accuracy.AccuracyRow]):
        # Where a third power of exp(-|x|) is normal
        if abs(row.logits_from) <= 28:
            errors[row.contender] = max(errors[row.contender], row.max_ulp)
    assert errors["fused"] <= 8
    assert errors["eager"] > 2**23
    assert_plotted(tmp_path, "")


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values_of_accuracy(target):
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


def test_ulp_errors():
    eps = float(np.finfo(np.float32).eps)
    got = np.array([1 + eps, 1.0, 2.0, 0.0], dtype=np.float32)
    true = np.array([1.0, 1.0 + eps / 2, 2 + 4 * eps, 2.0**-149])
    assert accuracy.ulp_errors(got, true).tolist() == [1.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_true_values_of_focal_accuracy(target):
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
