"""The sigmoid loss of all pairs of a batch, as of SigLIP, with and without their logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from cases.base import Case
from cases.goal import PEAK, Goal
from cases.preset import Preset, Selection
from contenders.head import gemms_contender
from contenders.pairwise import (
    CHUNK_ROWS,
    PairwiseInputs,
    make_pairwise_losses,
    why_not_siglip_kernel,
)
from contenders.steps import Contender, leaves_contender


@dataclass(frozen=True)
class Spec:
    features: int
    batches: tuple[int, ...]  # a ladder of them


BATCH = "batch"
WORKLOADS = {BATCH: Spec(512, tuple(2**power for power in range(10, 15)))}
# Batches from which the products are long, and the logits large, beside all that is N x F
LONG_PRODUCTS, LARGE_LOGITS = 4096, 16384
# Of the features, as they are trained
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
# As SigLIP's training starts
SCALE, BIAS = 10.0, -10.0


@dataclass(frozen=True)
class PairwiseCase(Case):
    @property
    def spec(self) -> Spec:
        return WORKLOADS[self.workload]

    @property
    def batch(self) -> int:
        return round(self.numel**0.5)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.batch

    @property
    def label(self) -> str:
        return f"batch {self.batch:,}, {self.spec.features} features"

    @property
    def uncounted_bytes(self) -> int:
        """The gradients of both inputs."""
        return 2 * self.batch * self.spec.features * getattr(torch, self.dtype).itemsize


class Pairwise(Preset):
    summary = "the sigmoid loss of all pairs of a batch, with and without their logits"
    workloads = WORKLOADS

    def cases(self, selection: Selection) -> list[Case]:
        return [case for name in WORKLOADS for case in make_cases(name, selection.device)]

    def goals(self, device: str) -> list[Goal]:
        if device != "cpu":
            return []
        goals = []
        for case in make_cases(BATCH, device):
            if case.batch >= LONG_PRODUCTS:
                goals += [Goal(case, "fused / gemms", "<=", 1.15)]
            if case.batch >= LARGE_LOGITS:
                goals += [Goal(case, PEAK, "<=", 0.1)]
        return goals

    def contenders(
        self, case: PairwiseCase, with_compile: bool = True, with_graph: bool = False
    ) -> dict[str, Contender]:
        inputs = image, text, *_ = make_inputs(case)
        losses = make_pairwise_losses(inputs, with_compile)
        contenders = {name: leaves_contender(loss, inputs) for name, loss in losses.items()}
        return {"gemms": gemms_contender(image, text)} | contenders

    def notes(self, cases: Sequence[Case]) -> list[str]:
        reason = why_not_siglip_kernel(cases[0].device)
        return [
            "N counts the logits, all pairs. The limit is not the stream but gemms, the three "
            "products of the two inputs and of the gradient of the logits.",
            f"chunked: {CHUNK_ROWS:,} rows of logits at a time, as open_clip with chunk_size.",
            "peak: without the gradients of the inputs, which all contenders leave behind.",
            *([f"Not measured: siglip_kernel: {reason}."] if reason else []),
        ]


def make_cases(name: str, device: str) -> list[PairwiseCase]:
    of_all = {"mode": "pairwise fwd+bwd", "dtype": DTYPE[device], "reduction": "batchmean"}
    return [
        PairwiseCase(batch**2, device, **of_all, workload=name) for batch in WORKLOADS[name].batches
    ]


def make_inputs(case: PairwiseCase) -> PairwiseInputs:
    return draw_inputs(case.batch, case.spec.features, case.device, getattr(torch, case.dtype))


def draw_inputs(
    batch: int, features: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PairwiseInputs:
    options = {"dtype": dtype, "device": device}
    image, text = (normalize(torch.randn(batch, features, **options)) for _ in range(2))
    return image, text, torch.tensor(SCALE, **options), torch.tensor(BIAS, **options)
