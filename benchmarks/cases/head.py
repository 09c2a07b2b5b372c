"""A linear layer with many labels and its loss, without the logits between them.

The logits and a dense target are most of the memory of such a step, the three products of the layer
most of its time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cases.base import Case
from cases.goal import PEAK, Goal
from cases.preset import Preset, Selection
from contenders.head import (
    HEAD,
    HeadInputs,
    LayerLoss,
    fused_loss,
    gemms_contender,
    head_loss,
    name_of_chunk,
    whole_logits_losses,
)
from contenders.steps import Contender, leaves_contender
from fused_bce import SparseTarget

POSITIVES = 5  # in a row, as in AmazonCat-13K and Wiki-500K


@dataclass(frozen=True)
class Spec:
    rows: int
    features: int
    labels: tuple[int, ...]  # more than one: a ladder of them
    dtype: str = "float32"
    chunk_bytes: tuple[int, ...] = ()  # a ladder of these, powers of two


LABELS, CHUNK_BYTES = "labels", "chunk_bytes"
WORKLOADS = {
    "AmazonCat-13K": Spec(256, 768, (13330,)),
    "AmazonCat-13K, bfloat16": Spec(256, 768, (13330,), dtype="bfloat16"),
    "wide layer": Spec(256, 768, (2**15,)),
    "narrow layer": Spec(256, 128, (2**17,)),
    "Wiki-500K": Spec(128, 64, (501070,)),
    "few rows": Spec(64, 64, (2**17,)),
    "many rows": Spec(4096, 128, (2**14,)),
    LABELS: Spec(256, 128, tuple(2**power for power in range(12, 19))),
    CHUNK_BYTES: Spec(256, 128, (2**17,), chunk_bytes=tuple(2**p for p in range(16, 28))),
}
# The layers whose products are long beside the loss, and those whose logits are large
LONG_PRODUCTS = ("AmazonCat-13K", "wide layer")
LARGE_LOGITS = ("narrow layer", "Wiki-500K")


@dataclass(frozen=True)
class HeadCase(Case):
    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.rows, self.numel // self.spec.rows

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.shape[1], self.spec.features

    @property
    def label(self) -> str:
        rows, labels = self.shape
        return f"{self.workload}: {rows:,} x {self.spec.features} x {labels:,}"

    @property
    def title(self) -> str:
        return f"head, {self.mode}, {self.reduction}"

    @property
    def uncounted_bytes(self) -> int:
        """The gradients of input and weight."""
        numbers = (self.shape[0] + self.shape[1]) * self.spec.features
        return numbers * getattr(torch, self.dtype).itemsize


class Head(Preset):
    summary = "a linear layer and its loss, with and without the logits"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        return [case for name in WORKLOADS for case in make_cases(name, selection.device)]

    def goals(self, device: str) -> list[Goal]:
        if device != "cpu":
            return []
        goals = []
        for case in [case for name in LONG_PRODUCTS for case in make_cases(name, device)]:
            goals += [Goal(case, f"{HEAD} / gemms", "<=", 1.15)]
            goals += [Goal(case, f"{HEAD} / fused", "<=", 1.1)]
        for case in [case for name in LARGE_LOGITS for case in make_cases(name, device)]:
            goals += [Goal(case, f"{HEAD} {PEAK}", "<=", 0.25, stretch=0.1)]
        return goals

    def contenders(
        self, case: HeadCase, with_compile: bool = True, with_graph: bool = False
    ) -> dict[str, Contender]:
        inputs = input, weight, _ = make_inputs(case)
        losses = make_losses(case, inputs, with_compile)
        contenders = {
            name: leaves_contender(loss, (input, weight)) for name, loss in losses.items()
        }
        return {"gemms": gemms_contender(input, weight)} | contenders

    def notes(self, _cases: Sequence[Case]) -> list[str]:
        return [
            "Behind the names: rows x features x labels. N counts the logits, rows x labels.",
            "fused: the layer, then the fused loss of its logits. The limit is not the stream but "
            "gemms, the three products of the layer.",
            "peak: without the gradients of input and weight, which all contenders leave behind. "
            "The target is an input: dense for eager and compile, in the dtype of the logits, "
            f"dense of bool for fused, {POSITIVES} label numbers a row for {HEAD}.",
        ]


def make_cases(name: str, device: str) -> list[HeadCase]:
    """One, or those of a ladder."""
    spec = WORKLOADS[name]
    return [
        HeadCase(spec.rows * labels, device, "linear fwd+bwd", spec.dtype, workload=name)
        for labels in spec.labels
    ]


def make_inputs(case: HeadCase) -> HeadInputs:
    """For logits with a standard deviation of 3, as in the other presets."""
    options = {"dtype": getattr(torch, case.dtype), "device": case.device}
    rows, labels = case.shape
    features = case.spec.features
    input = torch.randn(rows, features, **options)
    weight = torch.empty(case.weight_shape, **options).normal_(std=3 / math.sqrt(features))
    positives = torch.randint(labels, (rows, POSITIVES), device=case.device)
    return input, weight, SparseTarget.from_padded(positives, labels)


def make_losses(case: HeadCase, inputs: HeadInputs, with_compile: bool) -> dict[str, LayerLoss]:
    """By the name of their contender."""
    if not case.spec.chunk_bytes:
        return whole_logits_losses(inputs, with_compile) | {HEAD: head_loss(inputs)}
    chunks = {name_of_chunk(size): head_loss(inputs, size) for size in case.spec.chunk_bytes}
    return {"fused": fused_loss(inputs), HEAD: head_loss(inputs)} | chunks
