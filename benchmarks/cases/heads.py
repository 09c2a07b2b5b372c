"""Several heads with a loss each, summed, and one backward pass at the end.

Auxiliary and multi-task heads and deep supervision train so. What a loss keeps for its backward
pass is then held once for each head.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_bce
from cases.base import Case, size_text
from cases.preset import Preset, Selection
from contenders.inputs import make_inputs
from contenders.losses import WithLoss, compiled, exit_unless_fused
from contenders.steps import Contender, gradients_contender

COUNT = 6
# Logits of one head
SIZES = {"cpu": (2**22,), "cuda": (2**26,)}
FEATURES = 64


@dataclass(frozen=True)
class HeadsCase(Case):
    """Size and shape are those of one head."""

    @property
    def title(self) -> str:
        size = size_text(self.numel)
        return f"{COUNT} heads, {self.mode}, {self.dtype}, {self.reduction}, N = {size} for each"

    @property
    def passes(self) -> list[tuple[int, int]]:
        return super().passes * COUNT


class LeafLogits(nn.Module):
    """No network: logits that are leaves, so that little but the losses is timed."""

    def __init__(self, case: HeadsCase):
        super().__init__()
        self.logits = nn.ParameterList(make_inputs(case)[0] for _ in range(COUNT))

    def forward(self, _features: Tensor) -> list[Tensor]:
        return list(self.logits)


class LinearHeads(nn.Module):
    """A hidden layer that the heads share, then a Linear layer for each."""

    def __init__(self, case: HeadsCase):
        super().__init__()
        labels = case.shape[1]
        self.trunk = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(FEATURES, labels) for _ in range(COUNT))

    def forward(self, features: Tensor) -> list[Tensor]:
        hidden = self.trunk(features)
        return [head(hidden) for head in self.heads]


WORKLOADS = {"six losses, leaf logits": LeafLogits, "six heads": LinearHeads}


class SummedLosses(nn.Module):
    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: list[Tensor], targets: Tensor) -> Tensor:
        return sum(map(self.loss, logits, targets))


class Heads(Preset):
    summary = "several losses, summed, and one backward pass"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        sizes = dict.fromkeys(selection.sizes or SIZES[selection.device])
        return [make_case(name, selection.device, numel) for numel in sizes for name in WORKLOADS]

    def contenders(
        self, case: HeadsCase, with_compile: bool = True, with_graph: bool = False
    ) -> dict[str, Contender]:
        features, targets = make_batch(case)
        models = make_models(case, with_compile)
        return {name: heads_contender(model, features, targets) for name, model in models.items()}

    def notes(self, _cases: Sequence[Case]) -> list[str]:
        return [
            "N and peak count the logits of one head: those of all six together are 6.",
            "six losses, leaf logits: the logits are inputs; their six gradients are the peak.",
            f"six heads: {FEATURES} hidden features and six Linear layers that share them. In the "
            "peak is what forward keeps for backward, the logits included.",
        ]


def make_case(name: str, device: str, numel: int) -> HeadsCase:
    return HeadsCase(numel, device, mode="summed fwd+bwd", workload=name)


def make_batch(case: HeadsCase) -> tuple[Tensor, Tensor]:
    """What the network gets, and the targets of all heads."""
    features = torch.randn(case.shape[0], FEATURES, device=case.device)
    return features, torch.empty(COUNT, *case.shape, device=case.device).bernoulli_()


def make_models(case: HeadsCase, with_compile: bool) -> dict[str, nn.Module]:
    """From features and targets to the sum of the losses; copies of one network, so that none
    frees the gradients of another."""
    network = WORKLOADS[case.workload](case).to(case.device)
    logits = torch.empty(case.shape, device=case.device)
    exit_unless_fused(logits, logits)

    def around(loss: nn.Module) -> nn.Module:
        return WithLoss(copy.deepcopy(network), SummedLosses(loss))

    models = {
        "fused": around(fused_bce.BCEWithLogitsLoss()),
        "fused recompute": around(fused_bce.BCEWithLogitsLoss(recompute=True)),
        "eager": around(nn.BCEWithLogitsLoss()),
    }
    if with_compile:
        models["compile"] = compiled(around(nn.BCEWithLogitsLoss()))
    return models


def heads_contender(model: nn.Module, features: Tensor, targets: Tensor) -> Contender:
    def step():
        model.zero_grad()
        model(features, targets).backward()

    return gradients_contender(step, model.zero_grad)
