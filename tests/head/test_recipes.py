"""Losses of the literature, made of targets and weights as docs/head.md and docs/focal.md say.

Each is compared with its own formula, in torch's operations in float64.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_bce import LinearBCEWithLogitsLoss, SparseTarget
from fused_bce.functional import binary_cross_entropy_with_logits, sigmoid_focal_loss

ROWS, LABELS, FEATURES = 6, 50, 8
DOUBLE = torch.float64
# Sums of 300 elements, each with a rounding or two of float64.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


@pytest.fixture
def head(device):
    return LinearBCEWithLogitsLoss(FEATURES, LABELS, reduction="sum", device=device, dtype=DOUBLE)


@pytest.fixture
def features(device):
    return torch.randn(ROWS, FEATURES, dtype=DOUBLE, device=device)


@pytest.fixture
def rows(device):
    lists = [[3, 49], [], [0], [7, 8, 9, 10], [25], [1, 2]]
    return SparseTarget.from_lists(lists, LABELS, device=device)


def losses(logits, target):
    """Binary cross entropy, whatever the target."""
    return target * F.softplus(-logits) + (1 - target) * F.softplus(logits)


def with_values(rows, values):
    return rows._replace(values=values.to(DOUBLE))


@pytest.mark.parametrize("floor", [0.1 / LABELS, 1 / LABELS])
def test_smoothing_with_another_floor(floor, head, features, rows):
    """t (1 - s) + s / C, or with ConvE's code + 1 / C"""
    s = 0.1
    values = torch.full_like(rows.indices, (1 - s) / (1 - 2 * floor), dtype=DOUBLE)
    target = with_values(rows, values)
    head.label_smoothing = 2 * floor
    logits = head.linear(features)
    want = losses(logits, rows.to_dense(DOUBLE) * (1 - s) + floor).sum()
    torch.testing.assert_close(head(features, target), want, **CLOSE)
    plain = binary_cross_entropy_with_logits(
        logits, target, reduction="sum", label_smoothing=2 * floor
    )
    torch.testing.assert_close(plain, want, **CLOSE)


def test_unbiased_by_propensities(head, features, rows):
    p = torch.rand(LABELS, dtype=DOUBLE, device=features.device) * 0.9 + 0.1
    got = head(features, with_values(rows, 1 / p[rows.indices]))
    want = losses(head.linear(features), rows.to_dense(DOUBLE) / p).sum()
    torch.testing.assert_close(got, want, **CLOSE)


def test_gbce(head, features, rows):
    """The probability of a positive to the power of beta"""
    beta = 0.7
    head.pos_weight = torch.tensor(beta, dtype=DOUBLE, device=features.device)
    p = head.linear(features).sigmoid()
    want = -torch.where(rows.to_dense(), (p**beta).log(), (1 - p).log()).sum()
    torch.testing.assert_close(head(features, rows), want, **CLOSE)


def test_classes_with_a_background(device):
    logits = torch.randn(40, LABELS, dtype=DOUBLE, device=device)
    classes = torch.arange(40, device=device) + LABELS - 20
    classes = classes.clamp(max=LABELS)
    target = SparseTarget.from_padded(classes[:, None], LABELS, padding_value=LABELS)
    dense = F.one_hot(classes, LABELS + 1)[:, :-1].to(DOUBLE)
    assert torch.equal(target.to_dense(DOUBLE), dense)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, target), sigmoid_focal_loss(logits, dense), **CLOSE
    )


def test_transformers_focal_loss(device):
    """Theirs is the mean over the second dimension, summed, over the number of boxes."""
    logits = torch.randn(2, 30, 5, dtype=DOUBLE, device=device)
    target = (torch.rand(2, 30, 5, device=device) < 0.1).to(DOUBLE)
    num_boxes = 12
    p = logits.sigmoid()
    p_t = torch.where(target == 1, p, 1 - p)
    alpha_t = torch.where(target == 1, 0.25, 0.75)
    want = (alpha_t * (1 - p_t) ** 2 * -p_t.log()).mean(1).sum() / num_boxes
    got = sigmoid_focal_loss(logits, target, reduction="sum") / (logits.shape[1] * num_boxes)
    torch.testing.assert_close(got, want, **CLOSE)
