"""Threads with as little stack as a system allows."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from helpers import EMULATES_CUDA, FLOATS, REDUCTIONS, torch_bce

from fused_bce import _C, functional

# The least that POSIX threads of Linux have; what is smaller is ignored. Threads of the head call
# torch's products of matrices, each with the dispatcher's frames.
SMALLEST_STACK, SMALLEST_OF_HEAD = "16k", "64k"


def losses(dtype, reduction):
    """Every loss of single elements, with all operands, of three chunks: name, loss and leaf."""
    logits, target = torch.randn(12, 3001), torch.rand(12, 3001)
    logits, target = logits.to(dtype).requires_grad_(), target.to(dtype)
    by_class = torch.rand(3001).to(dtype)
    by_row = torch.rand(12, 1).to(dtype)
    both = {"weight": by_row, "pos_weight": by_class, "reduction": reduction}
    labels = target.round().long()
    bce, focal = functional.binary_cross_entropy_with_logits, functional.sigmoid_focal_loss
    yield "torch", torch_bce(logits, target, **both), logits
    yield "plain", bce(logits, target, reduction=reduction), logits
    yield "weights", bce(logits, target, **both), logits
    yield "bool", bce(logits, target.bool(), **both), logits
    yield "integers", bce(logits, labels, **both, label_smoothing=0.1, ignore_index=1), logits
    yield "other dtype", bce(logits, target.double(), reduction=reduction), logits
    yield "focal", focal(logits, target, gamma=1.5, weight=by_row, reduction=reduction), logits


def head_losses(dtype, reduction):
    """Of labels enough for each thread to take blocks of its own."""
    if reduction == "none":
        return
    features, rows = torch.randn(12, 16).to(dtype).requires_grad_(), torch.randn(3001, 16).to(dtype)
    target, by_class = torch.rand(12, 3001).to(dtype), torch.rand(3001).to(dtype)
    head = functional.linear_binary_cross_entropy_with_logits
    pairwise = functional.pairwise_sigmoid_loss
    yield "head", head(features, rows, target, pos_weight=by_class, reduction=reduction), features
    yield "pairs", pairwise(features, rows, positives=None, reduction=reduction), features


def compute(losses, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for dtype, reduction in itertools.product(FLOATS, REDUCTIONS):
        for name, loss, leaf in losses(dtype, reduction):
            # A gradient for each element has a vector of them read.
            (grad,) = torch.autograd.grad(loss, leaf, torch.rand(loss.shape).to(loss.dtype) + 0.5)
            yield (name, dtype, reduction), loss.detach(), grad


def main(losses):
    for instruction_set in _C.instruction_sets():
        print(instruction_set, flush=True)  # a stack that is too small ends the process
        _C.use_instruction_set(instruction_set)
        alone = list(compute(losses, threads=1))  # the main thread, whose stack is large
        for (case, *one), (_, *two) in zip(alone, compute(losses, threads=2), strict=True):
            if case[0] in ("torch", "head", "pairs"):
                continue  # torch's sums and products of matrices depend on the number of threads
            assert all(map(torch.equal, one, two)), case


@pytest.mark.skipif(EMULATES_CUDA, reason="the emulator's threads have stacks of their own")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems ignore OMP_STACKSIZE")
@pytest.mark.parametrize(
    ("losses", "stack"), [("losses", SMALLEST_STACK), ("head_losses", SMALLEST_OF_HEAD)]
)
def test_smallest_stacks_of_openmp(losses, stack):
    environment = os.environ | {
        "OMP_STACKSIZE": stack,
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, __file__, losses], env=environment, check=True, timeout=300)


if __name__ == "__main__":
    main(globals()[sys.argv[1]])
