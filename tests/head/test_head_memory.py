"""The logits, their gradient and a matrix of targets are never there."""

import math

import pytest
import torch
from head_cases import by_head_dtype
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


@by_head_dtype
@pytest.mark.parametrize("shape", [(256, 256, 16384), (16, 128, 32768), (8192, 16, 512)], ids=str)
def test_what_is_held(shape, dtype, device):
    """Beyond the gradients: a block of logits and one of bool, whatever the sizes; on the CPU also
    the threads' sums of the features' gradient, where they are no more than that block."""
    chunk_bytes = 2**19
    input, weight, target = operands(shape, device, dtype)

    def step():
        head(input, weight, target, chunk_bytes=chunk_bytes).backward()

    bits = torch.finfo(dtype).bits
    blocks = 1 + 8 / bits + (device == "cpu")
    beside = 28 * target.indices.numel() + 8 * shape[2]  # and some numbers for each label
    if bits == 16:
        # Widened on the CPU: of both factors of three products, and the sum of one of them
        blocks = 6
        beside += 2 * 4 * input.numel()
    gradients = bits // 8 * (input.numel() + weight.numel())
    if device == "cuda":
        beside *= 4  # nothing is sorted there
    assert bytes_of(step, device).peak - gradients <= blocks * chunk_bytes + beside


@pytest.mark.parametrize("values", [False, True], ids=["ones", "values"])
@pytest.mark.parametrize("size", [(256, 16384), (16384, 256), (2048, 2049)], ids=str)
def test_bytes_of_a_positive(size, values, device):
    """On the CPU they are sorted by label, where that is of use: 4 bytes for labels in int32 and
    for rows each, and 20 that torch's sort takes."""
    rows, labels = size
    input = torch.randn(rows, 2, device=device)
    weight = torch.randn(labels, 2, device=device)

    def peak(number):
        padded = torch.randint(labels, (rows, number // rows), device=device)
        target = SparseTarget.from_padded(padded, labels)
        if values:
            target = target._replace(values=torch.rand(target.indices.shape, device=device))
        return bytes_of(lambda: head(input, weight, target, chunk_bytes=2**18), device).peak

    # The blocks hold as much of both.
    assert peak(2**19) - peak(2**18) <= (28 if device == "cpu" else 80) * 2**18


@pytest.mark.parametrize("size", [(8, 2000), (2000, 8), (256, 256)], ids=str)
def test_a_block_looks_at_its_own_positives(size):
    """Else many blocks would take the square of the time. Where rows and labels are split, each
    part of the labels looks at all positives of a part of the rows, or the other way round."""
    rows, labels = size
    input, weight = torch.randn(rows, 2), torch.randn(labels, 2)
    target = SparseTarget.from_padded(torch.randint(labels, (rows, 5)), labels)
    with torch.profiler.profile(record_shapes=True) as profile:
        head(input, weight, target, chunk_bytes=4096)
    # Written to the block, and taken out again
    numbers = [
        shape[0]
        for event in profile.events()
        if event.name == "aten::index_fill_"
        for shape in [event.input_shapes[2]]
    ]
    # A block of each thread has its share of the bytes.
    parts = 8 * torch.get_num_threads() if rows == labels else 1
    assert len(numbers) > parts
    assert 5 * rows <= sum(numbers) <= 2 * parts * 5 * rows


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
