"""A whole training step, around torch's loss and around the fused one.

The logits come from a Linear layer: they are no leaf, and their gradient goes on into the weights.
With accumulation the batch comes in parts, and the loss of each is divided by their number, so that
the gradient that reaches the loss is not 1. Under autocast the logits are of a half type; those of
float16 with a loss scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import fused_bce
from cases.base import Case
from cases.preset import Preset, Selection
from contenders.losses import WithLoss, compiled
from contenders.steps import Contender, GraphStep, gradients_contender

# The categories of AmazonCat-13K, as in workloads.py
LABELS = 13330
# The CPU gets a sixteenth.
BATCH = {"cuda": 4096, "cpu": 256}


@dataclass(frozen=True)
class Spec:
    """A network: a hidden layer as wide as the features, then one logit for each label."""

    features: int
    parts: int = 1  # backward passes in one step of the optimizer
    dtype: str = "float32"  # of the logits


WORKLOADS = {
    "64 features": Spec(64),
    "512 features": Spec(512),
    "512 features, 4 parts": Spec(512, parts=4),
    "512 features, float16": Spec(512, dtype="float16"),
    "512 features, bfloat16": Spec(512, dtype="bfloat16"),
}

Batches = list[tuple[Tensor, Tensor]]
# Of one part of the batch
Backward = Callable[[Tensor, Tensor, GradScaler], None]


@dataclass(frozen=True)
class TrainingCase(Case):
    """A step of the optimizer."""

    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits of all parts."""
        return BATCH[self.device], LABELS

    @property
    def title(self) -> str:
        return f"training step, {self.dtype}, batch of {self.shape[0]:,}, {LABELS:,} labels"


class Training(Preset):
    summary = "whole training steps"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        device = selection.device
        # Few CPUs multiply matrices of float16: a step takes seconds.
        return [
            make_case(name, device)
            for name, spec in WORKLOADS.items()
            if device == "cuda" or spec.dtype != "float16"
        ]

    def contenders(
        self, case: TrainingCase, with_compile: bool = True, with_graph: bool = False
    ) -> dict[str, Contender]:
        """Each trains a network of its own on the same batches.

        "no loss" hands a fixed gradient to the logits: no loss can make the step shorter than that.
        """
        spec = case.spec
        features = torch.randn(case.shape[0], spec.features, device=case.device)
        target = torch.empty(case.shape, device=case.device).bernoulli_()
        batches = list(zip(features.chunk(spec.parts), target.chunk(spec.parts), strict=True))

        def make(loss: nn.Module, wrap: Callable = lambda model: model) -> Contender:
            model = WithLoss(make_network(spec), loss).to(case.device)
            return training_contender(case, model, through_loss(case, wrap(model)), batches)

        fused, eager = fused_bce.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()
        contenders = {"fused": make(fused), "eager": make(eager)}
        if with_compile:
            contenders["compile"] = make(eager, compiled)
            contenders["fused compile"] = make(fused, compiled)
        # A loss scale is read by the host, once a step.
        if with_graph and spec.dtype != "float16":
            for name, loss in (("fused", fused), ("eager", eager)):
                contenders[f"{name} graph"] = Contender(GraphStep(make(loss).step))
        network = make_network(spec).to(case.device)
        grad_logits = torch.randn_like(batches[0][1]) / case.numel
        contenders["no loss"] = training_contender(
            case, network, past_loss(case, network, grad_logits), batches
        )
        return contenders


def make_case(name: str, device: str) -> TrainingCase:
    return TrainingCase(
        BATCH[device] * LABELS,
        device,
        mode="step",
        dtype=WORKLOADS[name].dtype,
        target_dtype="float32",
        workload=name,
    )


def make_network(spec: Spec) -> nn.Module:
    features = spec.features
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, LABELS))


def autocast(case: TrainingCase) -> torch.autocast:
    half = case.dtype != "float32"
    dtype = getattr(torch, case.dtype) if half else None
    return torch.autocast(case.device, dtype=dtype, enabled=half)


def through_loss(case: TrainingCase, model: Callable[[Tensor, Tensor], Tensor]) -> Backward:
    parts = case.spec.parts

    def backward(features, target, scaler):
        with autocast(case):
            loss = model(features, target)
        scaler.scale(loss / parts if parts > 1 else loss).backward()

    return backward


def past_loss(case: TrainingCase, network: nn.Module, grad_logits: Tensor) -> Backward:
    grad_logits = grad_logits.to(getattr(torch, case.dtype))

    def backward(features, _target, _scaler):
        with autocast(case):
            logits = network(features)
        logits.backward(grad_logits)

    return backward


def training_contender(
    case: TrainingCase, model: nn.Module, backward: Backward, batches: Batches
) -> Contender:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = GradScaler(case.device, enabled=case.dtype == "float16")
    # It makes its scale when it first scales something.
    scaler.scale(torch.zeros((), device=case.device))

    def step():
        optimizer.zero_grad()
        for features, target in batches:
            backward(features, target, scaler)
        scaler.step(optimizer)
        scaler.update()

    return gradients_contender(step, optimizer.zero_grad)
