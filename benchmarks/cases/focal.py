"""The focal loss of dense detection, against torchvision's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import fused_bce
from cases.base import Case
from cases.goal import Goal
from cases.preset import Preset, Selection
from contenders.focal import eager_focal_loss, has_torchvision
from contenders.inputs import Inputs
from contenders.losses import Loss, compiled, exit_unless_fused

# One logit in a thousand is of an object; a model starts with a probability of 0.01 for each.
POSITIVES = 1e-3
FIRST_LOGIT = -4.6


@dataclass(frozen=True)
class Spec:
    origin: str  # a sentence: where the shape comes from
    shape: tuple[int, ...]
    dtype: str = "float32"
    gamma: float = 2
    reduction: str = "sum"


# Rows of an image of 800 x 1,067 pixels: the cells of the strides 8 to 128, nine anchors on each.
ANCHORS = 9 * sum(math.ceil(800 / s) * math.ceil(1067 / s) for s in (8, 16, 32, 64, 128))

WORKLOADS = {
    "2^22": Spec("No model's.", (65536, 64)),
    "2^22, mean": Spec("No model's.", (65536, 64), reduction="mean"),
    "2^22, gamma 1.5": Spec("No model's.", (65536, 64), gamma=1.5),
    "2^22, bfloat16": Spec("No model's.", (65536, 64), dtype="bfloat16"),
    "RetinaNet": Spec(
        "The anchors of one image of COCO, 800 x 1,067 pixels, and 91 classes.", (ANCHORS, 91)
    ),
    "FCOS": Spec("The places of two such images.", (2, ANCHORS // 9, 91)),
}


@dataclass(frozen=True)
class FocalCase(Case):
    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def title(self) -> str:
        return f"focal, {self.mode}"


class Focal(Preset):
    summary = "the focal loss of dense detection"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        return [make_case(name, selection.device) for name in WORKLOADS]

    def goals(self, device: str) -> list[Goal]:
        if device != "cpu":
            return []
        case = make_case("2^22", device)
        return [Goal(case, "eager / fused", ">=", 10), Goal(case, "compile / fused", ">=", 3)]

    def inputs(self, case: FocalCase) -> Inputs:
        logits, target, grad_loss = super().inputs(case)
        return logits.add_(FIRST_LOGIT), target.bernoulli_(POSITIVES), grad_loss

    def losses(self, case: FocalCase, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
        exit_unless_fused(*inputs[:2])
        arguments = {"gamma": case.spec.gamma, "reduction": case.reduction}

        def bound(loss: Loss) -> Loss:
            return lambda logits, target: loss(logits, target, **arguments)

        losses = {
            "fused": bound(fused_bce.functional.sigmoid_focal_loss),
            "eager": bound(eager_focal_loss()),
        }
        if with_compile:
            losses["compile"] = compiled(losses["eager"])
        return losses

    def notes(self, cases: Sequence[FocalCase]) -> list[str]:
        theirs = "torchvision's" if has_torchvision() else "torchvision's, written again"
        origins = [f"{case.workload}: {case.spec.origin}" for case in cases]
        return [f"eager and compile have the operations of {theirs}.", *origins]


def make_case(name: str, device: str) -> FocalCase:
    spec = WORKLOADS[name]
    return FocalCase(
        math.prod(spec.shape), device, dtype=spec.dtype, reduction=spec.reduction, workload=name
    )
