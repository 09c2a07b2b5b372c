"""The focal losses of detection and of many labels, against those of libraries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import fused_bce
from cases.base import Case, size_text
from cases.goal import PEAK, Goal
from cases.preset import Preset, Selection
from contenders.focal import eager_loss, has_torchvision
from contenders.inputs import Inputs
from contenders.losses import Loss, compiled, exit_unless_fused

# One logit in a thousand is of an object; a model starts with a probability of 0.01 for each.
POSITIVES = 1e-3
FIRST_LOGIT = -4.6
SIZE = 2**22


@dataclass(frozen=True)
class Spec:
    origin: str = ""  # a sentence: where operations or the shape come from
    shape: tuple[int, ...] = ()  # (), if any size will do
    dtype: str = "float32"
    reduction: str = "sum"
    loss: str = "sigmoid_focal_loss"  # in fused_bce.functional and contenders.focal
    arguments: dict = field(default_factory=dict)  # of both
    has_scores: bool = False  # whether the targets of objects lie between 0 and 1


# Rows of an image of 800 x 1,067 pixels: the cells of the strides 8 to 128, nine anchors on each.
ANCHORS = 9 * sum(math.ceil(800 / s) * math.ceil(1067 / s) for s in (8, 16, 32, 64, 128))

QUALITY = {"loss": "quality_focal_loss", "has_scores": True}
VARIFOCAL = {"loss": "varifocal_loss", "has_scores": True}
DETACHED = {"detach_weight": True}

# The goals are for the first of each loss.
WORKLOADS = {
    "focal": Spec(),
    "focal, mean": Spec(reduction="mean"),
    "focal, gamma 1.5": Spec(arguments={"gamma": 1.5}),
    "focal, bfloat16": Spec(dtype="bfloat16"),
    "RetinaNet": Spec(
        "The anchors of one image of COCO, 800 x 1,067 pixels, and 91 classes.", (ANCHORS, 91)
    ),
    "FCOS": Spec("The places of two such images.", (2, ANCHORS // 9, 91)),
    "quality focal": Spec("The operations of mmdetection.", **QUALITY),
    "varifocal": Spec("The operations of mmdetection.", **VARIFOCAL),
    "varifocal, detached": Spec("The operations of RT-DETR.", **VARIFOCAL, arguments=DETACHED),
    "asymmetric": Spec("The operations of its authors.", loss="asymmetric_loss"),
    "asymmetric, detached": Spec("The same.", loss="asymmetric_loss", arguments=DETACHED),
}


@dataclass(frozen=True)
class FocalCase(Case):
    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape or super().shape

    @property
    def title(self) -> str:
        return f"focal, {self.mode}"

    @property
    def label(self) -> str:
        return self.workload if self.spec.shape else f"{self.workload}, {size_text(self.numel)}"


class Focal(Preset):
    summary = "the focal losses of detection and of many labels"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        sizes = dict.fromkeys(selection.sizes or [SIZE])
        cases = [make_case(name, selection.device, size) for name in WORKLOADS for size in sizes]
        return list(dict.fromkeys(cases))

    def goals(self, device: str) -> list[Goal]:
        if device != "cpu":
            return []
        first = {spec.loss: name for name, spec in reversed(WORKLOADS.items())}
        goals = []
        for case in [make_case(name, device) for name in WORKLOADS if name in first.values()]:
            goals += [Goal(case, "eager / fused", ">=", 15), Goal(case, "compile / fused", ">=", 3)]
            # The gradient, and what the allocator rounds
            goals += [Goal(case, PEAK, "<=", 1.01)]
        return goals

    def inputs(self, case: FocalCase) -> Inputs:
        logits, target, grad_loss = super().inputs(case)
        target.bernoulli_(POSITIVES)
        if case.spec.has_scores:
            target.mul_(torch.rand_like(target))
        return logits.add_(FIRST_LOGIT), target, grad_loss

    def losses(self, case: FocalCase, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
        exit_unless_fused(*inputs[:2])
        arguments = {**case.spec.arguments, "reduction": case.reduction}

        def bound(loss: Loss) -> Loss:
            return lambda logits, target: loss(logits, target, **arguments)

        losses = {
            "fused": bound(getattr(fused_bce.functional, case.spec.loss)),
            "eager": bound(eager_loss(case.spec.loss)),
        }
        if with_compile:
            losses["compile"] = compiled(losses["eager"])
        return losses

    def notes(self, cases: Sequence[FocalCase]) -> list[str]:
        theirs = "torchvision's" if has_torchvision() else "torchvision's, written again"
        named = {case.workload: case.spec.origin for case in cases if case.spec.origin}
        origins = [f"{name}: {origin}" for name, origin in named.items()]
        return [f"eager and compile have the operations of {theirs}, if no others.", *origins]


def make_case(name: str, device: str, numel: int = SIZE) -> FocalCase:
    """Of a shape of its own, or of this size."""
    spec = WORKLOADS[name]
    return FocalCase(
        math.prod(spec.shape) if spec.shape else numel,
        device,
        dtype=spec.dtype,
        reduction=spec.reduction,
        workload=name,
    )
