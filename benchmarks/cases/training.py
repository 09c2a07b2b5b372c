"""A whole training step, around torch's loss and around the fused one.

The logits come from a Linear layer: they are no leaf, and their gradient goes on into the weights.
With accumulation the batch comes in parts, and the loss of each is divided by their number, so that
the gradient that reaches the loss is not 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from contenders.base import Contender, compiled
from torch import Tensor, nn

import fused_bce
from cases.base import Case

# The categories of AmazonCat-13K, as in workloads.py
LABELS = 13330
# The CPU gets a sixteenth.
BATCH = {"cuda": 4096, "cpu": 256}


@dataclass(frozen=True)
class Network:
    """A hidden layer as wide as the features, then one logit for each label."""

    features: int
    parts: int = 1  # backward passes in one step of the optimizer


NETWORKS = {
    "64 features": Network(64),
    "512 features": Network(512),
    "512 features, 4 parts": Network(512, parts=4),
}

Backward = Callable[[Tensor, Tensor, int], None]


@dataclass(frozen=True)
class TrainingCase(Case):
    """A step of the optimizer; the workload is a key of NETWORKS."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits of all parts."""
        return BATCH[self.device], LABELS

    @property
    def title(self) -> str:
        return f"training step, {self.dtype}, batch of {self.shape[0]:,}, {LABELS:,} labels"


def training_case(workload: str, device: str) -> TrainingCase:
    return TrainingCase(
        numel=BATCH[device] * LABELS,
        device=device,
        mode="step",
        dtype="float32",
        target_dtype="float32",
        reduction="mean",
        weights="none",
        workload=workload,
    )


def make_contenders(case: TrainingCase, with_compile: bool = True) -> dict[str, Contender]:
    """Each trains a network of its own on the same batches.

    "no loss" hands a fixed gradient to the logits: no loss can make the step shorter than that.
    """
    spec = NETWORKS[case.workload]
    inputs = torch.randn(case.shape[0], spec.features, device=case.device)
    target = torch.empty(case.shape, device=case.device).bernoulli_()
    batches = list(zip(inputs.chunk(spec.parts), target.chunk(spec.parts), strict=True))

    def make(loss: nn.Module, wrap: Callable = lambda model: model) -> Contender:
        model = WithLoss(make_network(spec), loss).to(case.device)
        return make_contender(model, through_loss(wrap(model)), batches)

    fused, eager = fused_bce.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()
    contenders = {"fused": make(fused), "eager": make(eager)}
    if with_compile:
        contenders["compile"] = make(eager, compiled)
        contenders["fused compile"] = make(fused, compiled)
    network = make_network(spec).to(case.device)
    grad_logits = torch.randn_like(batches[0][1]) / case.numel
    contenders["no loss"] = make_contender(network, past_loss(network, grad_logits), batches)
    return contenders


def make_network(spec: Network) -> nn.Module:
    features = spec.features
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, LABELS))


class WithLoss(nn.Module):
    """A network and its loss, so that both can be compiled together."""

    def __init__(self, network: nn.Module, loss: nn.Module):
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.network(inputs), target)


def through_loss(model: Callable[[Tensor, Tensor], Tensor]) -> Backward:
    def backward(inputs, target, parts):
        loss = model(inputs, target)
        (loss / parts if parts > 1 else loss).backward()

    return backward


def past_loss(network: nn.Module, grad_logits: Tensor) -> Backward:
    return lambda inputs, target, parts: network(inputs).backward(grad_logits)


def make_contender(
    model: nn.Module, backward: Backward, batches: list[tuple[Tensor, Tensor]]
) -> Contender:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        for inputs, target in batches:
            backward(inputs, target, len(batches))
        optimizer.step()

    def renew():
        optimizer.zero_grad()
        return step

    return Contender(step, renew)
