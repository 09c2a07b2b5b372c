"""What is timed against each other: each contender is a step, a function without arguments."""

import itertools
import math
import sys

import torch
from cases import NON_LEAF, Case
from limits import copy_step, stream_step
from timing import Step
from torch import Tensor

import fused_bce

Inputs = tuple[Tensor, Tensor, Tensor | None]

# More than any L2: on the GPU the inputs rotate through this much, so that each call finds them
# in memory. The limit on the copies is for small cases, which launches dominate anyhow.
ROTATED_BYTES = 100e6
MOST_COPIES = 256

# What a graph saves is launches, and a larger call is more than those.
LARGEST_GRAPHED = 2**16


def copies_of_inputs(case: Case) -> int:
    if case.device == "cpu":
        return 1
    return min(math.ceil(ROTATED_BYTES / (case.bytes_per_element * case.numel)), MOST_COPIES)


def make_losses(case: Case, inputs: Inputs, with_compile: bool) -> dict[str, torch.nn.Module]:
    """The losses by the name of their contender."""
    options = {**make_weights(case), "reduction": case.reduction}
    fused = fused_bce.BCEWithLogitsLoss(**options)
    eager = torch.nn.BCEWithLogitsLoss(**options)
    reason = fused_bce.why_not_fused(*inputs[:2], fused.weight, fused.pos_weight)
    if reason is not None:
        sys.exit(f"There is nothing to measure, fused_bce would call torch's loss: {reason}")

    losses = {"fused": fused, "eager": eager}
    if with_compile:
        # Without the reset the sizes of one run reach the limit of recompilations, after which
        # torch.compile quietly runs eager code.
        torch.compiler.reset()
        losses["compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    return losses


def make_steps(
    case: Case, losses: dict[str, torch.nn.Module], inputs: list[Inputs], with_graph: bool
) -> dict[str, Step]:
    """The contenders by name, all with these inputs."""
    steps = {name: loss_step(case, loss, inputs) for name, loss in losses.items()}
    if with_graph and case.numel <= LARGEST_GRAPHED:
        for name in ("fused", "eager"):
            steps[f"{name} graph"] = GraphStep(loss_step(case, losses[name], inputs[:1]))
    steps["stream"] = stream_step(case, len(inputs))
    if case.device == "cuda":
        steps["copy"] = copy_step(case.numel, case.device)
    return steps


def loss_step(case: Case, loss: torch.nn.Module, inputs: list[Inputs]) -> Step:
    if case.mode == "fwd":
        return forward_step(loss, inputs)
    return training_step(loss, inputs, with_leaf=case.mode != NON_LEAF)


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


def training_step(loss: torch.nn.Module, inputs: list[Inputs], with_leaf: bool) -> Step:
    # Leaves of its own: to free the gradient of another contender takes as long as its memory does.
    leaves = [(logits.detach().clone().requires_grad_(), *rest) for logits, *rest in inputs]
    rotation = itertools.cycle(leaves)

    def step():
        leaf, target, grad_loss = next(rotation)
        leaf.grad = None
        # A view adds a node to the graph and no work on memory, in forward or backward.
        logits = leaf if with_leaf else leaf.view_as(leaf)
        loss(logits, target).backward(grad_loss)

    return step


def forward_step(loss: torch.nn.Module, inputs: list[Inputs]) -> Step:
    rotation = itertools.cycle(inputs)

    def step():
        logits, target, _ = next(rotation)
        return loss(logits, target)

    return step


class GraphStep:
    """A step captured as a CUDA graph, to be replayed. Its inputs do not rotate."""

    def __init__(self, step: Step):
        # Holds the tensors that the graph reads.
        self.step = step
        # A first call initialises what must not be captured. It has a stream of its own, for a
        # capture must not depend on work of the default stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        self.graph.replay()
