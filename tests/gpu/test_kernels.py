"""What can go wrong in the CUDA kernels, on a GPU or emulated: blocks, vectors, alignment."""

import itertools

import pytest
import torch
from common import (
    CHUNK,
    DEVICE,
    assert_close_to_torch,
    assert_same_bits,
    by_extras,
    check_result,
    expected_results,
    make_grad_loss,
)
from helpers import (
    EMULATES_CUDA,
    REDUCTIONS,
    assert_no_worse,
    assert_results_no_worse,
    by_dtype,
    by_reduction,
    check,
    draw,
    draw_weights,
    dtype_name,
    evaluate,
    fused,
)

from fused_bce import _C

pytestmark = [] if EMULATES_CUDA else pytest.mark.gpu

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
by_target_dtype = pytest.mark.parametrize("target_dtype", [*INTEGERS, None], ids=str)


@pytest.fixture
def limit_blocks():
    yield _C.limit_cuda_blocks
    _C.limit_cuda_blocks(2**31 - 1)


@pytest.fixture
def choose_last_block():
    """Whether the last block adds up the sums of chunks, as it does unless told otherwise."""
    yield _C.add_up_in_last_block
    _C.add_up_in_last_block(True)


@by_reduction
@by_dtype
@pytest.mark.parametrize("numel", [1000, CHUNK, 100_003, 2**20 + 5])
def test_any_number_of_blocks(limit_blocks, choose_last_block, numel, dtype, reduction):
    logits, target = draw((numel,), DEVICE, dtype, dtype)
    options = {"grad_loss": make_grad_loss(logits, reduction), "reduction": reduction}
    first = evaluate(fused, logits, target, **options)
    for blocks, in_last_block in itertools.product((1, 2, 7, 100, 2**31 - 1), (True, False)):
        limit_blocks(blocks)
        choose_last_block(in_last_block)
        for _ in range(3):
            assert_same_bits(evaluate(fused, logits, target, **options), first)
    check_result(first, logits, target, **options)


def at_offset(t, offset):
    """A contiguous copy that begins ``offset`` elements after an aligned address."""
    return t.new_empty(offset + t.numel())[offset:].copy_(t)


@by_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("numel", [1, 100, CHUNK, 20_001])
def test_misaligned(numel, reduction, dtype):
    """The kernel that reads element by element adds up in the order of the one for vectors."""
    logits, target = draw((numel,), DEVICE, dtype, dtype)
    aligned = evaluate(fused, logits, target, reduction=reduction)
    theirs, exact = expected_results(logits, target, reduction=reduction)
    assert_results_no_worse(aligned, theirs, exact)
    for a, b in itertools.product(range(16), range(16)):
        operands = at_offset(logits, a), at_offset(target, b)
        assert operands[0].data_ptr() % 16 == a * dtype.itemsize % 16
        got = evaluate(fused, *operands, reduction=reduction)
        assert torch.equal(got.loss, aligned.loss)
        assert_no_worse(got.grad_logits, theirs.grad_logits, exact.grad_logits)


# shapes of logits and of their weights, for a length n
SHAPES = {
    "full": lambda n: ((n,), (n,)),
    "columns": lambda n: ((2, n), (n,)),
    "rows": lambda n: ((2, n), (2, 1)),
}


# 2, 4 and 8 elements to a vector
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n", [*range(1, 71), CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 100_003])
def test_sizes_with_weights(n, shapes, dtype):
    """Around the widths of vectors and chunks: where the weights start again, and the padding."""
    shape, weight_shape = shapes(n)
    logits, target = draw(shape, DEVICE, dtype, dtype)
    weights = draw_weights(["weight", "pos_weight"], weight_shape, DEVICE)
    for reduction in REDUCTIONS:
        check(logits, target, reduction=reduction, **weights)


# The same where a weight is read for one element, for a row of n, for a plane of n
LAYOUTS = {
    "columns": lambda n: ((6, n), (n,)),
    "rows": lambda n: ((6, n), (6, 1)),
    "planes": lambda n: ((2, 3, n, 1), (3, 1, 1)),
}


@by_dtype
@pytest.mark.parametrize("target_dtype", [None, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(
    "names", [("weight",), ("pos_weight",), ("weight", "pos_weight")], ids="+".join
)
@pytest.mark.parametrize("shapes", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("n", [4, 8, 16, 24, 48, 1000, CHUNK - 16, CHUNK, CHUNK + 16])
def test_weights_in_vectors(n, shapes, names, target_dtype, dtype):
    """Their kernels give the bits of the general one, which takes weights with gaps."""
    shape, weight_shape = shapes(n)
    logits = torch.randn(shape, device=DEVICE).to(dtype)
    target = torch.randint(2, shape, device=DEVICE).to(target_dtype or dtype)
    dense = draw_weights(names, weight_shape, DEVICE)
    gaps = {name: weight.repeat_interleave(2, 0)[::2] for name, weight in dense.items()}
    misaligned = at_offset(logits.flatten(), 1).view(shape)
    for recompute, smoothing in itertools.product((False, True), (0.0, 0.1)):
        options = {"recompute": recompute, "label_smoothing": smoothing}
        expected = evaluate(fused, logits, target, **options, **gaps)
        assert_same_bits(evaluate(fused, logits, target, **options, **dense), expected)
        assert_same_bits(evaluate(fused, misaligned, target, **options, **dense), expected)
        assert_close_to_torch(expected, logits, target, label_smoothing=smoothing, **dense)


@by_dtype
@by_reduction
@by_extras
@by_target_dtype
def test_hard_targets_of_any_size_and_alignment(target_dtype, extras, reduction, dtype):
    # Around a vector, a chunk, several chunks; and from an address that no vector may have.
    for numel in (1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3):
        logits = torch.randn(numel + 1, device=DEVICE).to(dtype)
        target = torch.randint(2, (numel + 1,), device=DEVICE).to(target_dtype or dtype)
        options = {"reduction": reduction, **extras}
        for x, t in (
            (logits[:-1], target[:-1]),
            (logits[1:], target[1:]),
            (logits[:-1], target[1:]),
        ):
            assert_close_to_torch(evaluate(fused, x, t, **options), x, t, **options)


@by_extras
@by_reduction
def test_extras_with_any_number_of_blocks(limit_blocks, reduction, extras):
    logits = torch.randn(20 * CHUNK + 5, device=DEVICE)
    target = torch.randint(2, logits.shape, device=DEVICE, dtype=torch.uint8)
    expected = evaluate(fused, logits, target, reduction=reduction, **extras)
    for most in (1, 3, 7):
        limit_blocks(most)
        got = evaluate(fused, logits, target, reduction=reduction, **extras)
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad_logits, expected.grad_logits)
