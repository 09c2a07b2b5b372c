"""Threads of the CPU take blocks of labels of their own where there are enough of them."""

import pytest
import torch
from head_cases import (
    CHUNKS,
    as_rows,
    by_head_dtype,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    relative_error,
)

ROWS, LABELS = 32, 5003
CHUNK = 2**16  # seven threads' gradients of the features are as much

by_threads = pytest.mark.parametrize("threads", [1, 2, 3, 7])


@by_threads
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,), (0,)], ids=["all", "weight", "input"])
@by_head_dtype
def test_values(set_threads, dtype, wanted, threads):
    """Also where the sums of some gradient are not there, for it is not wanted."""
    operands = draw_operands("cpu", dtype, rows=ROWS, labels=LABELS)
    target = draw_target(ROWS, LABELS, density=0.01)
    want = exact(operands, target)
    for i, operand in enumerate(operands):
        operand.requires_grad_(i in wanted)
    set_threads(threads)
    loss = head(*operands[:2], as_rows(target), linear_bias=operands[2], chunk_bytes=CHUNK)
    # Half types round the logits, and each gradient once. Sums in float32 or float64 have up to
    # 5,003 terms, of which each rounds the last digit.
    most = (8 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
    assert relative_error(loss.detach(), want.loss) <= most
    grads = torch.autograd.grad(loss, [operands[i] for i in wanted])
    for i, grad in zip(wanted, grads, strict=True):
        assert relative_error(grad, want.grads[i]) <= most


@by_threads
@pytest.mark.parametrize("chunk_bytes", [CHUNK, *CHUNKS.values()])
def test_same_bits_from_run_to_run(set_threads, chunk_bytes, threads):
    """Whichever thread takes which labels."""
    labels, times = (1500, 5) if chunk_bytes == CHUNK else (200, 1)
    operands = draw_operands("cpu", rows=ROWS, labels=labels)
    target = as_rows(draw_target(ROWS, labels))
    set_threads(threads)
    first = evaluate(operands, target, chunk_bytes=chunk_bytes)
    for _ in range(times):
        again = evaluate(operands, target, chunk_bytes=chunk_bytes)
        assert torch.equal(first.loss, again.loss)
        assert all(torch.equal(a, b) for a, b in zip(first.grads, again.grads, strict=True))


@by_threads
def test_same_loss_without_gradients(set_threads, threads):
    operands = draw_operands("cpu", rows=ROWS, labels=LABELS)
    target = as_rows(draw_target(ROWS, LABELS))
    set_threads(threads)
    for chunk_bytes in (CHUNK, 4 * operands.input.numel()):  # no room for several sums
        want = evaluate(operands, target, chunk_bytes=chunk_bytes).loss
        for without_gradients in (torch.no_grad(), torch.inference_mode()):
            with without_gradients:
                got = head(*operands[:2], target, linear_bias=operands[2], chunk_bytes=chunk_bytes)
            assert torch.equal(got, want)


def test_profiles_show_all_blocks(set_threads):
    """Also those of the other threads."""
    operands = draw_operands("cpu", rows=ROWS, labels=LABELS)
    target = as_rows(draw_target(ROWS, LABELS))
    set_threads(3)
    with torch.profiler.profile(record_shapes=True) as profile:
        evaluate(operands, target, chunk_bytes=CHUNK)
    sizes = [e.input_shapes[:3] for e in profile.events() if e.name == "aten::addmm"]
    # The other products have no bias.
    blocks = [rows * labels for bias, (rows, _), (_, labels) in sizes if len(bias) == 1]
    assert len(blocks) > 3
    assert sum(blocks) == ROWS * LABELS
