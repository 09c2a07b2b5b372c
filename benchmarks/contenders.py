"""What is timed against each other: each contender is a step, a function without arguments."""

import itertools
import math
import sys
from collections.abc import Callable

import torch
from cases import Case
from torch import Tensor

import fused_bce

Step = Callable[[], object]
Inputs = tuple[Tensor, Tensor, Tensor | None]

# More than any L2: on the GPU the inputs rotate through this much, so that each call finds them
# in memory. The limit on the copies is for small cases, which launches dominate anyhow.
ROTATED_BYTES = 100e6
MOST_COPIES = 256


def copies_of_inputs(case: Case) -> int:
    if case.device == "cpu":
        return 1
    return min(math.ceil(ROTATED_BYTES / (case.bytes_per_element * case.numel)), MOST_COPIES)


def make_steps(case: Case, inputs: list[Inputs], with_compile: bool) -> dict[str, Step]:
    """The contenders by name, all with these inputs."""
    options = {**make_weights(case), "reduction": case.reduction}
    fused = fused_bce.BCEWithLogitsLoss(**options)
    eager = torch.nn.BCEWithLogitsLoss(**options)
    reason = fused_bce.why_not_fused(*inputs[0][:2], fused.weight, fused.pos_weight)
    if reason is not None:
        sys.exit(f"There is nothing to measure, fused_bce would call torch's loss: {reason}")

    make_step = forward_step if case.mode == "fwd" else training_step
    steps = {"fused": make_step(fused, inputs), "eager": make_step(eager, inputs)}
    if with_compile:
        # Without the reset the sizes of one run reach the limit of recompilations, after which
        # torch.compile quietly runs eager code.
        torch.compiler.reset()
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        steps["compile"] = make_step(compiled, inputs)
    steps["stream"] = stream_step(case, len(inputs))
    return steps


def make_inputs(case: Case) -> Inputs:
    """Logits, target, and the gradient that the backward pass of a loss for each element needs."""
    dtype, target_dtype = getattr(torch, case.dtype), getattr(torch, case.target_dtype)
    logits = torch.randn(case.shape, device=case.device, dtype=dtype) * 3
    target = torch.empty(case.shape, device=case.device, dtype=target_dtype).bernoulli_()
    if case.mode == "fwd":
        return logits, target, None
    grad_loss = torch.ones_like(target) if case.reduction == "none" else None
    return logits, target, grad_loss


def make_weights(case: Case) -> dict[str, Tensor]:
    rows, columns = case.shape
    options = {"device": case.device, "dtype": getattr(torch, case.target_dtype)}
    weights = {}
    if case.weights in ("weight", "both"):
        weights["weight"] = torch.rand(rows, 1, **options) + 0.5
    if case.weights in ("pos_weight", "both"):
        weights["pos_weight"] = torch.rand(columns, **options) * 4 + 1
    return weights


def training_step(loss: torch.nn.Module, inputs: list[Inputs]) -> Step:
    # Leaves of its own: to free the gradient of another contender takes as long as its memory does.
    leaves = [(logits.detach().clone().requires_grad_(), *rest) for logits, *rest in inputs]
    rotation = itertools.cycle(leaves)

    def step():
        logits, target, grad_loss = next(rotation)
        logits.grad = None
        loss(logits, target).backward(grad_loss)

    return step


def forward_step(loss: torch.nn.Module, inputs: list[Inputs]) -> Step:
    rotation = itertools.cycle(inputs)

    def step():
        logits, target, _ = next(rotation)
        return loss(logits, target)

    return step


def stream_step(case: Case, copies: int) -> Step:
    """The passes that the case needs, each as a memory-bound operation on as many bytes.

    For float32: torch.dot for the forward pass of mean and sum, torch.add for their single pass of
    forward and backward, torch.add and then torch.addcmul for the two passes of "none". The other
    dtypes move their bytes as float32 as well, so that no conversion is timed; float16, whose
    gradient takes a second pass, gets torch.dot and then torch.add.
    """
    rotation = itertools.cycle(
        [
            [stream_pass(r * case.numel, w * case.numel, case.device) for r, w in case.passes]
            for _ in range(copies)
        ]
    )

    def step():
        for stream in next(rotation):
            stream()

    return step


def stream_pass(read: int, written: int, device: str) -> Step:
    """Reads and writes so many bytes, with as good as no arithmetic."""

    def buffer(size: float) -> Tensor:
        return torch.rand(math.ceil(size / torch.float32.itemsize), device=device)

    operands = min(3, read // written) if written else 0
    left = read - operands * written
    calls = []
    if operands:
        operation = {1: torch.neg, 2: torch.add, 3: torch.addcmul}[operands]
        arguments, out = [buffer(written) for _ in range(operands)], buffer(written)
        calls.append(lambda: operation(*arguments, out=out))
    # What does not fit beside the written bytes is only read.
    if left:
        a, b = buffer(left / 2), buffer(left / 2)
        calls.append(lambda: torch.dot(a, b))
    if len(calls) == 1:
        return calls[0]
    return lambda: [call() for call in calls]
