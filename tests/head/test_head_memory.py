"""The logits, their gradient and a matrix of targets are never there."""

import math

import pytest
import torch
from memory import bytes_of

from fused_bce import SparseTarget
from fused_bce.functional import linear_binary_cross_entropy_with_logits as head

# Rows, features, labels; the second has the labels of Wiki-500K.
SHAPES = [(256, 128, 131072), (128, 64, 501070)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Of the default on a GPU
CHUNK = {"cpu": None, "cuda": 2**23}


def operands(shape, device, dtype=torch.float32):
    rows, features, labels = shape
    input = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
    weight = torch.randn(labels, features, device=device).to(dtype).requires_grad_()
    target = SparseTarget.from_padded(torch.randint(labels, (rows, 5), device=device), labels)
    return input, weight, target


@by_shape
def test_a_tenth_of_the_logits(shape, device):
    """Beyond the gradients. torch holds the logits, their gradient, the target and more."""
    input, weight, target = operands(shape, device)

    def step():
        head(input, weight, target, chunk_bytes=CHUNK[device]).backward()

    gradients = 4 * (input.numel() + weight.numel())
    logits = 4 * shape[0] * shape[2]
    assert bytes_of(step, device).peak - gradients <= logits / 10


def test_autocast_casts_blocks_of_the_weight(device):
    """A cast weight as a whole would be half of the weight."""
    shape = (16, 128, 131072)
    input, weight, target = operands(shape, device)

    def step():
        with torch.autocast(device, torch.bfloat16):
            head(input, weight, target, chunk_bytes=2**18).backward()

    gradients = 4 * (input.numel() + weight.numel())
    assert bytes_of(step, device).peak - gradients <= 4 * weight.numel() / 10


def test_hooks_hold_no_gradient(device):
    """Whoever drops or moves what is saved wants nothing of its size between."""
    shape = (64, 64, 20000)
    input, weight, target = operands(shape, device)

    def forward():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return head(input, weight, target)

    gradients = 4 * (input.numel() + weight.numel())
    assert bytes_of(forward, device).held <= gradients / 10
    # The other way holds them: so this would see them.
    assert bytes_of(lambda: head(input, weight, target), device).held >= gradients


@pytest.mark.large
def test_more_than_two_to_the_31_logits(device):
    """In blocks that start beyond it; of logits of 0 all is known."""
    rows, labels = 4100, 2**19 + 3
    input = torch.ones(rows, 2, device=device).requires_grad_()
    weight = torch.zeros(labels, 2, device=device).requires_grad_()
    target = SparseTarget.from_padded(torch.full((rows, 1), labels - 1, device=device), labels)
    loss = head(input, weight, target, reduction="mean")
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    want = torch.full_like(weight, 0.5 / labels)
    want[-1] = -0.5 / labels
    torch.testing.assert_close(weight.grad, want)
