"""A ladder of sizes, in each kind of call that the command line asks for."""

import itertools

from cases.base import MODES, Case
from cases.preset import Preset, Selection
from contenders.steps import Contender, loss_contender

SIZES = (1, 16, 128, 640, 2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)


class Ladder(Preset):
    summary = "a ladder of sizes, with and without backward"
    by_size = True

    def cases(self, selection: Selection) -> list[Case]:
        # The sizes run fastest: cases that differ in nothing else share a table.
        combinations = itertools.product(
            selection.mode or MODES,
            selection.dtype or ["float32"],
            selection.reduction or ["mean"],
            selection.weights or ["none"],
            selection.sizes or SIZES,
        )
        return [
            Case(
                numel=numel,
                device=selection.device,
                mode=mode,
                dtype=dtype,
                target_dtype=selection.target_dtype or dtype,
                reduction=reduction,
                weights=weights,
            )
            for mode, dtype, reduction, weights, numel in combinations
        ]


class Alone(Ladder):
    """fused and none beside it, where others do not fit."""

    by_size = False

    def contenders(self, case: Case, **_) -> dict[str, Contender]:
        inputs = self.rotated_inputs(case)
        fused = self.losses(case, inputs[0], with_compile=False)["fused"]
        return {"fused": loss_contender(case, fused, inputs)}
