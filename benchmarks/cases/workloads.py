"""Losses as people train with them: shapes, dtypes and weights of known models and data sets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cases.base import Case
from cases.preset import Preset, Selection
from contenders.losses import takes_bool_targets

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """What is particular to a workload; its logits are float32 where nothing else is said."""

    origin: str  # a sentence: where the shape comes from
    shape: Shape
    # For memory and time the CPU gets the batch, the first dimension, divided by this.
    cpu_factor: int = 1
    dtype: str = "float32"
    target_dtype: str = "float32"
    weight: Shape | None = None
    pos_weight: Shape | None = None
    channels_last: bool = False


WORKLOADS = {
    "click-through": Spec(
        "One logit for each of 65,536 impressions, the batch of MLPerf's recommendation benchmark.",
        shape=(65536, 1),
    ),
    "text labels": Spec(
        "256 texts and the 13,330 categories of AmazonCat-13K, rare ones weighted by pos_weight.",
        shape=(256, 13330),
        pos_weight=(13330,),
    ),
    "extreme labels": Spec(
        "128 products and the 670,091 labels of Amazon-670K, in bfloat16, targets bool.",
        shape=(128, 670091),
        cpu_factor=8,
        dtype="bfloat16",
        target_dtype="bool",
    ),
    "detection": Spec(
        "4 images, some 100,000 anchors as in RetinaNet, the 80 classes of COCO, a weight for each "
        "anchor.",
        shape=(4, 100000, 80),
        cpu_factor=4,
        weight=(4, 100000, 1),
    ),
    "segmentation": Spec(
        "8 crops of 512 x 1024 pixels, one map for each of the 19 classes of Cityscapes, "
        "channels_last, pos_weight for each class.",
        shape=(8, 19, 512, 1024),
        cpu_factor=8,
        pos_weight=(19, 1, 1),
        channels_last=True,
    ),
    "contrastive": Spec(
        "Each of 4,096 images against each of 4,096 texts, the pairwise sigmoid loss of SigLIP.",
        shape=(4096, 4096),
    ),
}


@dataclass(frozen=True)
class WorkloadCase(Case):
    """A workload on a device."""

    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def shape(self) -> Shape:
        return on_device(self.spec.shape, self.spec, self.device)

    @property
    def weight_shapes(self) -> dict[str, Shape]:
        shapes = {"weight": self.spec.weight, "pos_weight": self.spec.pos_weight}
        return {
            name: on_device(shape, self.spec, self.device)
            for name, shape in shapes.items()
            if shape
        }

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.spec.channels_last else torch.contiguous_format

    @property
    def title(self) -> str:
        return f"workloads, {self.mode}, {self.reduction}"


def on_device(shape: Shape, spec: Spec, device: str) -> Shape:
    """The shape of the logits or of a weight, with the part of the batch that the device gets."""
    if device != "cpu" or len(shape) < len(spec.shape):
        return shape
    return shape[0] // spec.cpu_factor, *shape[1:]


class Workloads(Preset):
    summary = "losses as people train with them"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        return [make_case(name, selection.device) for name in WORKLOADS]

    def notes(self, cases: Sequence[WorkloadCase]) -> list[str]:
        lines = [describe(case) for case in cases]
        if any(case.target_dtype == "bool" for case in cases):
            fused = "takes them" if takes_bool_targets(cases[0].device) else "gets the same"
            lines.append(f"Bool targets: cast to the dtype of the logits for torch, fused {fused}.")
        return lines


def make_case(name: str, device: str) -> WorkloadCase:
    spec = WORKLOADS[name]
    return WorkloadCase(
        numel=math.prod(on_device(spec.shape, spec, device)),
        device=device,
        dtype=spec.dtype,
        target_dtype=spec.target_dtype,
        weights="weight" if spec.weight else "pos_weight" if spec.pos_weight else "none",
        workload=name,
    )


def describe(case: WorkloadCase) -> str:
    """A line for the reader of a table."""
    shape = " x ".join(f"{size:,}" for size in case.shape)
    factor = case.spec.cpu_factor if case.device == "cpu" else 1
    scaled = f"1/{factor} of the batch, {shape}" if factor > 1 else shape
    return f"{case.workload}: {case.spec.origin} Here {scaled}."
