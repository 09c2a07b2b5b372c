"""Losses of the literature, made of targets and weights as docs/head.md and docs/focal.md say.

Each is compared with its own formula, in torch's operations in float64.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_bce import LinearBCEWithLogitsLoss, SparseTarget
from fused_bce.functional import (
    binary_cross_entropy_with_logits,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)

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


def with_gradient(loss, logits):
    leaf = logits.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf)


def test_quality_focal_loss_of_classes(device):
    """mmdetection's targets: of each row a class, or the background, and a score. Every cell is a
    negative, but that of the class."""
    logits = torch.randn(ROWS, LABELS, dtype=DOUBLE, device=device)
    classes = torch.tensor([3, 49, LABELS, 0, LABELS, 25], device=device)
    scores = torch.rand(ROWS, dtype=DOUBLE, device=device)

    def theirs(x):
        p = x.sigmoid()
        cells = p**2 * F.softplus(x)
        row = (classes < LABELS).nonzero()[:, 0]
        place = row, classes[row]
        positives = (scores[row] - p[place]) ** 2 * losses(x[place], scores[row])
        return cells.index_put(place, positives).sum() / ROWS

    dense = torch.zeros(ROWS, LABELS + 1, dtype=DOUBLE, device=device)
    dense = dense.scatter(1, classes[:, None], scores[:, None])[:, :-1]
    got = with_gradient(lambda x: quality_focal_loss(x, dense, 2, "batchmean"), logits)
    torch.testing.assert_close(got, with_gradient(theirs, logits), **CLOSE)


def test_varifocal_loss_of_matched_boxes(device):
    """RT-DETR's: the weight is the IoU of a matched box, or a power of p, without a gradient; the
    loss is the sum over the number of boxes."""
    logits = torch.randn(2, 30, 5, dtype=DOUBLE, device=device)
    one_hot = (torch.rand(2, 30, 5, device=device) < 0.1).to(DOUBLE)
    iou = one_hot * torch.rand(2, 30, 1, dtype=DOUBLE, device=device)
    num_boxes = 12

    def theirs(x):
        weight = 0.75 * x.detach().sigmoid() ** 2 * (1 - one_hot) + iou
        return (weight * losses(x, iou)).sum() / num_boxes

    def ours(x):
        return varifocal_loss(x, iou, 0.75, 2, "sum", detach_weight=True) / num_boxes

    torch.testing.assert_close(with_gradient(ours, logits), with_gradient(theirs, logits), **CLOSE)
