"""The head and the loss of pairs on a GPU: nothing waits for the host, and a graph replays them."""

import math

import pytest
import torch
from common import DEVICE, capture, no_synchronisation, sync_debug_mode
from helpers import FLOATS, dtype_name

from fused_bce import SigLipLoss, SparseTarget
from fused_bce.functional import linear_binary_cross_entropy_with_logits as head
from fused_bce.functional import pairwise_sigmoid_loss

pytestmark = pytest.mark.gpu

ROWS, FEATURES, LABELS = 64, 32, 1003
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)


def operands(dtype):
    input = torch.randn(ROWS, FEATURES, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(LABELS, FEATURES, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(LABELS, device=DEVICE).to(dtype).requires_grad_()
    return input, weight, bias


def draw_labels():
    return torch.randint(-1, LABELS, (ROWS, 5), device=DEVICE)


def draw_rows_with_nan(labels):
    """Labels may occur several times in a row, those that are even with nan."""
    rows = SparseTarget.from_padded(labels, LABELS)
    return rows._replace(values=torch.where(rows.indices % 2 == 0, math.nan, 0.5))


CALLS = {
    "padded": lambda labels: {"target": SparseTarget.from_padded(labels, LABELS)},
    "smoothed": lambda labels: {
        "target": SparseTarget.from_padded(labels, LABELS),
        "label_smoothing": 0.1,
        "reduction": "batchmean",
        "pos_weight": torch.full((LABELS,), 2.0, device=DEVICE),
    },
    "dense, ignored": lambda _: {
        "target": torch.randint(3, (ROWS, LABELS), device=DEVICE),
        "ignore_index": 2,
    },
    "values, ignored": lambda labels: {
        "target": draw_rows_with_nan(labels % 8),
        "ignore_index": math.nan,
    },
    "blocks": lambda labels: {
        "target": SparseTarget.from_padded(labels, LABELS),
        "chunk_bytes": 4096,
    },
}


def step(leaves, call):
    input, weight, bias = leaves
    loss = head(input, weight, linear_bias=bias, **call)
    return loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.5))


def in_float64(leaves, call):
    call = {
        name: value.to("cpu") if isinstance(value, torch.Tensor | SparseTarget) else value
        for name, value in call.items()
    }
    return step([t.detach().cpu().double().requires_grad_() for t in leaves], call)


def assert_near(got, want, dtype):
    # Logits of some 6 units are rounded to the dtype, and their gradients with them.
    tolerance = 1e-12 if dtype is torch.float64 else 16 * torch.finfo(dtype).eps
    for ours, exact in zip(got, want, strict=True):
        assert (ours.cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()


@sync_debug_mode
@by_dtype
@pytest.mark.parametrize("name", CALLS)
def test_head_waits_for_nothing(name, dtype):
    leaves, labels = operands(dtype), draw_labels()
    with no_synchronisation():
        call = CALLS[name](labels)
        got = step(leaves, call)
    assert_near(got, in_float64(leaves, call), dtype)


def test_graph_of_a_head():
    leaves, labels = operands(torch.float32), draw_labels()
    graph, got = capture(lambda: step(leaves, CALLS["padded"](labels)))
    with torch.no_grad():
        leaves[0].normal_()
        labels.copy_(draw_labels())
    graph.replay()
    torch.cuda.synchronize()
    assert_near(got, in_float64(leaves, CALLS["padded"](labels)), torch.float32)


def pairs(dtype):
    input1, input2, _ = operands(dtype)
    numbers = [torch.tensor(n, device=DEVICE, dtype=dtype).requires_grad_() for n in (3.0, -2.0)]
    return [input1, input2, *numbers]


def step_of_pairs(leaves, loss=pairwise_sigmoid_loss):
    value = loss(*leaves)
    differentiable = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    return value, *torch.autograd.grad(value, differentiable)


def step_of_pairs_in_float64(leaves):
    wide = [
        t.detach().cpu().double().requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor)
        else t
        for t in leaves
    ]
    return step_of_pairs(wide)


@sync_debug_mode
@by_dtype
@pytest.mark.parametrize("numbers", ["on the device", "of Python", "on the CPU"])
def test_pairs_wait_for_nothing(numbers, dtype):
    leaves = pairs(dtype)
    if numbers != "on the device":
        leaves[2:] = (3.0, -2.0) if numbers == "of Python" else map(torch.tensor, (3.0, -2.0))
    with no_synchronisation():
        got = step_of_pairs(leaves)
    assert_near(got, step_of_pairs_in_float64(leaves), dtype)


LOSSES = {"function": pairwise_sigmoid_loss, "module": SigLipLoss(chunk_size=16)}


@pytest.mark.parametrize("numbers", ["on the device", "of Python"])
@pytest.mark.parametrize("name", LOSSES)
def test_graph_of_pairs(name, numbers):
    leaves = pairs(torch.float32)
    if numbers == "of Python":
        leaves[2:] = 3.0, -2.0
    graph, got = capture(lambda: step_of_pairs(leaves, LOSSES[name]))
    with torch.no_grad():
        leaves[0].normal_()
        leaves[1].normal_()
        if numbers == "on the device":
            leaves[2].fill_(2.0)
            leaves[3].fill_(-3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert_near(got, step_of_pairs_in_float64(leaves), torch.float32)
