"""A contender is a step, a function without arguments, that is timed against others."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cases.base import NON_LEAF, Case
from contenders.inputs import Inputs
from contenders.losses import Loss
from harness.timing import Step

# What a graph saves is launches, and a larger call is more than those.
LARGEST_GRAPHED = 2**16


@dataclass(frozen=True)
class Contender:
    step: Step
    # Makes the step anew, with nothing to free before its peak of memory; None: it has no peak.
    renew: Callable[[], Step] | None = None
    bytes_per_element: int | None = None  # None: those of the case


def loss_contender(case: Case, loss: Loss, inputs: list[Inputs]) -> Contender:
    return Contender(
        step=loss_step(case, loss, inputs), renew=lambda: loss_step(case, loss, inputs[:1])
    )


def loss_step(case: Case, loss: Loss, inputs: list[Inputs]) -> Step:
    if case.mode == "fwd":
        return forward_step(loss, inputs)
    return backward_step(loss, inputs, with_leaf=case.mode != NON_LEAF)


def gradients_contender(step: Step, zero_grad: Callable[[], None]) -> Contender:
    """Of a step that leaves gradients behind, which are freed before its peak."""

    def renew():
        zero_grad()
        return step

    return Contender(step, renew)


def leaves_contender(loss: Callable[..., Tensor], operands: Sequence[Tensor]) -> Contender:
    """Of a loss whose operands all get a gradient."""
    # Each contender has gradients of its own, of the same numbers.
    leaves = [t.detach().requires_grad_() for t in operands]

    def zero_grad():
        for leaf in leaves:
            leaf.grad = None

    def step():
        zero_grad()
        loss(*leaves).backward()

    return gradients_contender(step, zero_grad)


def graph_contenders(
    case: Case, losses: dict[str, Loss], inputs: list[Inputs]
) -> dict[str, Contender]:
    if case.numel > LARGEST_GRAPHED:
        return {}
    return {
        f"{name} graph": Contender(GraphStep(loss_step(case, losses[name], inputs[:1])))
        for name in ("fused", "eager")
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
