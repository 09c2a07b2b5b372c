"""Nothing of the gradient's size is held between forward and backward where its owner does not want
it: under saved-tensor hooks, and with recompute=True."""

import pytest
import torch
from helpers import by_dtype, by_reduction, fused, torch_bce
from memory import Memory, bytes_of
from torch.utils.checkpoint import checkpoint

# Large enough for torch's allocators to give nothing else of this size.
ROWS = 1024
BYTES = ROWS * ROWS * 4
# What is not of the logits' size: numbers, and a pool's rounding.
LITTLE = BYTES // 8


def memory_of(step, device) -> Memory:
    """In tensors of the size of the logits."""
    held, peak = bytes_of(step, device)
    return Memory(held / BYTES, peak / BYTES)


def held_after(step, device) -> float:
    return memory_of(step, device).held


def operands(device, dtype=torch.float32):
    logits = torch.randn(ROWS, ROWS, device=device).to(dtype).requires_grad_()
    return logits, torch.rand(ROWS, ROWS, device=device)


OPTIONS = {
    "plain": {},
    "pos_weight": {"pos_weight": torch.full((ROWS,), 2.0)},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": -1},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@by_reduction
@by_dtype
def test_peak_memory(dtype, reduction, device):
    """A training step holds the gradient of the logits and, where each is wanted, the losses."""
    logits, target = (torch.rand(2**16, device=device, dtype=dtype) for _ in range(2))
    logits.requires_grad_()
    grad_loss = torch.ones_like(target) if reduction == "none" else torch.ones((), device=device)

    def step():
        torch.autograd.backward(fused(logits, target, reduction=reduction), grad_loss.to(dtype))

    step()
    logits.grad = None
    size = logits.nbytes * (2 if reduction == "none" else 1)
    # Beside them the loss and partial sums, in blocks of half a kilobyte on a GPU
    assert size <= bytes_of(step, device).peak <= size + 4096


@by_options
@by_reduction
def test_recompute_holds_the_operands_only(reduction, options, device):
    logits, target = operands(device)
    options = on(device, options)
    losses = 1 if reduction == "none" else 0

    def forward(**more):
        return fused(logits, target, reduction=reduction, **options, **more)

    held = held_after(lambda: forward(recompute=True), device)
    assert held == pytest.approx(losses, abs=LITTLE / BYTES)
    # The other way holds the gradient: so this would see one.
    assert held_after(forward, device) == pytest.approx(losses + 1, abs=LITTLE / BYTES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_checkpoints_hold_the_operands_only(dtype, device):
    # Twelve losses, each in a checkpoint of its own, hold their losses, and in backward one
    # gradient at a time is computed.
    logits, target = operands(device, dtype)

    def forward(function):
        def block(x):
            return function(x * 2, target)

        return sum(checkpoint(block, logits, use_reentrant=False) for _ in range(12))

    assert held_after(lambda: forward(fused), device) < LITTLE / BYTES
    (ours,) = torch.autograd.grad(forward(fused), logits)
    (theirs,) = torch.autograd.grad(forward(torch_bce), logits)
    # Twelve terms, each of them rounded to the dtype.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=12 * eps, atol=12 * eps * theirs.abs().max())


def test_save_on_cpu_leaves_nothing_behind(device):
    # What is packed lies elsewhere; the gradient, which no hook sees, is not there yet.
    logits, target = operands(device)
    packed = []

    def forward():
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):
            return fused(logits, target, ignore_index=-1)

    assert held_after(forward, device) < LITTLE / BYTES
    assert {t.data_ptr() for t in packed} >= {logits.data_ptr(), target.data_ptr()}


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recompute"])
def test_six_losses_and_one_backward(recompute, device):
    heads = [operands(device) for _ in range(6)]

    def forward():
        # No leaves: their gradients are gone as soon as they have been passed on.
        return sum(fused(logits * 2, target, recompute=recompute) for logits, target in heads)

    # The logits themselves, and with each its gradient.
    several = 6 * LITTLE / BYTES
    assert held_after(forward, device) == pytest.approx(6 if recompute else 12, abs=several)
    peak = memory_of(lambda: torch.autograd.grad(forward(), heads[0][0]), device).peak
    assert peak <= (8 if recompute else 14) + several
