"""What torch's loss does not take, against what its users write by hand."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

import fused_bce
from cases.base import Case, size_text
from cases.preset import Preset, Selection
from contenders.inputs import Inputs
from contenders.limits import limit_contenders
from contenders.losses import CastsTarget, Loss, compiled, exit_unless_fused
from contenders.steps import Contender, loss_contender

SIZES = (2**20, 2**24)
IGNORED = 255
IGNORED_SHARE = 0.2
SMOOTHING = 0.1


def masked_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    kept = target != IGNORED
    # Legal where it is ignored too: 0 times a loss that is not finite would be nan.
    legal = target.where(kept, 0).to(logits.dtype)
    losses = functional.binary_cross_entropy_with_logits(logits, legal, reduction="none")
    return (losses * kept).sum() / kept.sum()


def smoothed_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    smoothed = target * (1 - SMOOTHING) + SMOOTHING / 2
    return functional.binary_cross_entropy_with_logits(logits, smoothed)


@dataclass(frozen=True)
class Spec:
    """What is particular to a workload, and what torch's users have in its place."""

    by_hand: Loss
    written: str  # what that is, in a few words
    dtype: str = "float32"
    target_dtype: str = "float32"
    options: dict[str, float] = field(default_factory=dict)  # of the fused loss


CAST = {
    "by_hand": CastsTarget(torch.nn.BCEWithLogitsLoss()),
    "written": "targets cast to the dtype of the logits",
}

WORKLOADS = {
    "bool targets": Spec(**CAST, target_dtype="bool"),
    "bool targets, bfloat16": Spec(**CAST, dtype="bfloat16", target_dtype="bool"),
    "int64 targets": Spec(**CAST, target_dtype="int64"),
    "ignore_index": Spec(
        masked_by_hand,
        "ignored targets made 0, losses multiplied by a mask, their sum divided by its count",
        target_dtype="uint8",
        options={"ignore_index": IGNORED},
    ),
    "label_smoothing": Spec(
        smoothed_by_hand,
        f"targets times {1 - SMOOTHING:g} plus {SMOOTHING / 2:g}",
        options={"label_smoothing": SMOOTHING},
    ),
}


@dataclass(frozen=True)
class ExtrasCase(Case):
    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def title(self) -> str:
        return f"extras, {self.mode}, {self.reduction}, N = {size_text(self.numel)}"

    @property
    def passes(self) -> list[tuple[int, int]]:
        # What is not ignored is counted first: a gradient is divided by the count.
        target = getattr(torch, self.target_dtype).itemsize
        return [(target, 0)] * ("ignore_index" in self.spec.options) + super().passes

    @property
    def plain(self) -> Case | None:
        """The same with targets that are in the dtype of the logits already; None if they are, or
        if that is another loss."""
        if self.spec.options:
            return None
        return dataclasses.replace(self, target_dtype=self.dtype)


class Extras(Preset):
    summary = "what torch's loss does not take, against by hand"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        # They have no shapes of their own: any size will do.
        sizes = dict.fromkeys(selection.sizes or SIZES)
        return [make_case(name, selection.device, numel) for numel in sizes for name in WORKLOADS]

    def contenders(
        self, case: ExtrasCase, with_compile: bool = True, with_graph: bool = False
    ) -> dict[str, Contender]:
        """Those of "fused plain" get targets that were cast before."""
        inputs = self.rotated_inputs(case)
        losses = self.losses(case, inputs[0], with_compile)
        contenders = {name: loss_contender(case, loss, inputs) for name, loss in losses.items()}
        if case.plain is not None:
            loss, cast = fused_bce.BCEWithLogitsLoss(), [plain_inputs(each) for each in inputs]
            contenders["fused plain"] = dataclasses.replace(
                loss_contender(case, loss, cast), bytes_per_element=case.plain.bytes_per_element
            )
        return contenders | limit_contenders(case, len(inputs))

    def inputs(self, case: ExtrasCase) -> Inputs:
        logits, target, grad_loss = super().inputs(case)
        if "ignore_index" in case.spec.options:
            ignored = torch.empty_like(target, dtype=torch.bool).bernoulli_(IGNORED_SHARE)
            target.masked_fill_(ignored, IGNORED)
        return logits, target, grad_loss

    def losses(self, case: ExtrasCase, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
        exit_unless_fused(*inputs[:2])
        losses = {
            "fused": fused_bce.BCEWithLogitsLoss(**case.spec.options),
            "eager": case.spec.by_hand,
        }
        if with_compile:
            losses["compile"] = compiled(case.spec.by_hand)
        return losses

    def notes(self, cases: Sequence[ExtrasCase]) -> list[str]:
        names = dict.fromkeys(case.workload for case in cases)
        return [f"{name}: eager and compile have {WORKLOADS[name].written}." for name in names]


def make_case(name: str, device: str, numel: int) -> ExtrasCase:
    spec = WORKLOADS[name]
    return ExtrasCase(
        numel, device, dtype=spec.dtype, target_dtype=spec.target_dtype, workload=name
    )


def plain_inputs(inputs: Inputs) -> Inputs:
    logits, target, grad_loss = inputs
    return logits, target.to(logits.dtype), grad_loss
