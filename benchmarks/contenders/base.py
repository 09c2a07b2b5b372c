"""What is timed against each other: each contender is a step, a function without arguments."""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases.base import NON_LEAF, Case
from harness.timing import Step
from torch import Tensor

import fused_bce
from contenders.limits import copy_step, stream_step
from contenders.peers import make_peers

Loss = Callable[[Tensor, Tensor], Tensor]
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


@dataclass(frozen=True)
class Contender:
    step: Step
    # Makes the step anew, with nothing to free before its peak of memory; None: it has no peak.
    renew: Callable[[], Step] | None = None


def make_contenders(
    case: Case,
    with_compile: bool = True,
    with_graph: bool = False,
    with_peers: bool = False,
    alone: bool = False,
) -> dict[str, Contender]:
    """The contenders by name, all with the same inputs; alone: fused and none beside it."""
    inputs = [make_inputs(case) for _ in range(copies_of_inputs(case))]
    if alone:
        return {"fused": loss_contender(case, make_losses(case, inputs[0], False)["fused"], inputs)}
    losses = make_losses(case, inputs[0], with_compile)
    if with_peers:
        losses |= make_peers(case)
    contenders = {name: loss_contender(case, loss, inputs) for name, loss in losses.items()}
    if with_graph and case.numel <= LARGEST_GRAPHED:
        for name in ("fused", "eager"):
            step = loss_step(case, losses[name], inputs[:1])
            contenders[f"{name} graph"] = Contender(GraphStep(step))
    contenders["stream"] = Contender(stream_step(case, len(inputs)))
    if case.device == "cuda":
        contenders["copy"] = Contender(copy_step(case.numel, case.device))
    return contenders


def make_losses(case: Case, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
    """The losses by the name of their contender."""
    weights = make_weights(case)
    fused = fused_bce.BCEWithLogitsLoss(**weights, reduction=case.reduction)
    eager = torch.nn.BCEWithLogitsLoss(**weights, reduction=case.reduction)
    logits, target, _ = inputs
    if target.dtype is torch.bool:
        eager = CastsTarget(eager)
        if not takes_bool_targets(case.device):
            fused, target = CastsTarget(fused), target.to(logits.dtype)
    exit_unless_fused(logits, target, **weights)

    losses = {"fused": fused, "eager": eager}
    if with_compile:
        losses["compile"] = compiled(eager)
    return losses


def exit_unless_fused(logits: Tensor, target: Tensor, **weights: Tensor) -> None:
    reason = fused_bce.why_not_fused(logits, target, **weights)
    if reason is not None:
        sys.exit(f"There is nothing to measure, fused_bce would call torch's loss: {reason}")


class CastsTarget(torch.nn.Module):
    """What a user of torch's loss writes if the targets are bool or integers."""

    def __init__(self, loss: torch.nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, target.to(logits.dtype))


def takes_bool_targets(device: str) -> bool:
    """Whether the kernels do; torch's do not."""
    logits = torch.zeros(1, device=device)
    return fused_bce.why_not_fused(logits, logits.bool()) is None


def compiled(loss: Loss) -> Loss:
    # Without the reset the sizes of one run reach the limit of recompilations, after which
    # torch.compile quietly runs eager code.
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False, fullgraph=True)


def loss_contender(case: Case, loss: Loss, inputs: list[Inputs]) -> Contender:
    return Contender(
        step=loss_step(case, loss, inputs), renew=lambda: loss_step(case, loss, inputs[:1])
    )


def loss_step(case: Case, loss: Loss, inputs: list[Inputs]) -> Step:
    if case.mode == "fwd":
        return forward_step(loss, inputs)
    return backward_step(loss, inputs, with_leaf=case.mode != NON_LEAF)


def make_inputs(case: Case) -> Inputs:
    """Logits, target, and the gradient that the backward pass of a loss for each element needs."""
    dtype, target_dtype = getattr(torch, case.dtype), getattr(torch, case.target_dtype)
    layout = {"device": case.device, "memory_format": case.memory_format}
    logits = torch.empty(case.shape, dtype=dtype, **layout).normal_(std=3)
    target = torch.empty(case.shape, dtype=target_dtype, **layout).bernoulli_()
    if case.mode == "fwd":
        return logits, target, None
    grad_loss = torch.ones_like(target) if case.reduction == "none" else None
    return logits, target, grad_loss


def make_weights(case: Case) -> dict[str, Tensor]:
    """Between 1 and 5 for positive targets, 0.5 and 1.5 for all."""
    ranges = {"weight": (0.5, 1.5), "pos_weight": (1, 5)}
    options = {"device": case.device, "dtype": getattr(torch, case.target_dtype)}
    return {
        name: torch.empty(shape, **options).uniform_(*ranges[name])
        for name, shape in case.weight_shapes.items()
    }


def backward_step(loss: Loss, inputs: list[Inputs], with_leaf: bool) -> Step:
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


def forward_step(loss: Loss, inputs: list[Inputs]) -> Step:
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
