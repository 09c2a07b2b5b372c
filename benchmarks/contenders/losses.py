"""The fused loss and torch's, eager and compiled."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_bce
from cases.base import Case
from contenders.inputs import Inputs, make_weights

Loss = Callable[[Tensor, Tensor], Tensor]


def make_losses(case: Case, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
    """The losses by the name of their contender."""
    weights = make_weights(case)
    fused = fused_bce.BCEWithLogitsLoss(**weights, reduction=case.reduction)
    eager = nn.BCEWithLogitsLoss(**weights, reduction=case.reduction)
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


class CastsTarget(nn.Module):
    """What a user of torch's loss writes if the targets are bool or integers."""

    def __init__(self, loss: nn.Module):
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


class WithLoss(nn.Module):
    """A network and its loss, so that both can be compiled together."""

    def __init__(self, network: nn.Module, loss: nn.Module):
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.network(features), target)
