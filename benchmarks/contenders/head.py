"""A linear layer and the loss of its logits: their three products alone, the loss of whole logits,
and the head, which has them block by block."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import fused_bce
from contenders.losses import Loss, compiled, exit_unless_fused
from contenders.steps import Contender
from fused_bce.functional import linear_binary_cross_entropy_with_logits

# Of the input and the weight of the layer
LayerLoss = Callable[[Tensor, Tensor], Tensor]
HeadInputs = tuple[Tensor, Tensor, fused_bce.SparseTarget]  # input, weight, target

HEAD = "head"


def name_of_chunk(chunk_bytes: int) -> str:
    """Of the contender that has this chunk_bytes, a power of two."""
    return f"{HEAD} 2^{chunk_bytes.bit_length() - 1}"


def chunk_of_name(contender: str) -> int | None:
    """None for any other contender."""
    power = contender.removeprefix(f"{HEAD} 2^")
    return 2 ** int(power) if power != contender else None


def whole_logits_losses(inputs: HeadInputs, with_compile: bool) -> dict[str, LayerLoss]:
    """torch's with a dense target in the dtype of the logits, as it must be, and fused of bool."""
    _, weight, target = inputs
    eager = after_layer(functional.binary_cross_entropy_with_logits)
    numbers = target.to_dense(weight.dtype)
    losses = {"eager": partial(eager, target=numbers)}
    if with_compile:
        losses["compile"] = partial(compiled(eager), target=numbers)
    return losses | {"fused": fused_loss(inputs)}


def fused_loss(inputs: HeadInputs) -> LayerLoss:
    _, weight, target = inputs
    bits = target.to_dense()
    exit_unless_fused(torch.empty_like(bits, dtype=weight.dtype), bits)
    loss = after_layer(fused_bce.functional.binary_cross_entropy_with_logits)
    return partial(loss, target=bits)


def after_layer(loss: Loss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda input, weight, target: loss(functional.linear(input, weight), target)


def head_loss(inputs: HeadInputs, chunk_bytes: int | None = None) -> LayerLoss:
    input, weight, target = inputs
    exit_unless_fused(input, target, linear_weight=weight)
    return partial(linear_binary_cross_entropy_with_logits, target=target, chunk_bytes=chunk_bytes)


def gemms_contender(input: Tensor, weight: Tensor) -> Contender:
    """The products that no loss can do without: what comes out of the first stands for the gradient
    of the logits in the others."""
    logits = input.new_empty(len(input), len(weight))
    grad_input, grad_weight = torch.empty_like(input), torch.empty_like(weight)

    def step():
        torch.mm(input, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_input)
        torch.mm(logits.t(), input, out=grad_weight)

    return Contender(step)
