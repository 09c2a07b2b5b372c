"""Other ways to compute the same."""

from collections.abc import Sequence

from cases.base import MODES, Case
from cases.preset import Preset, Selection
from contenders.inputs import Inputs
from contenders.losses import Loss
from contenders.peers import make_peers, missing_peers

SIZES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**16, 2**24, 2**26)}


class Peers(Preset):
    summary = "other ways to compute the same"

    def cases(self, selection: Selection) -> list[Case]:
        device = selection.device
        return [Case(numel, device, mode) for mode in MODES for numel in SIZES[device]]

    def losses(self, case: Case, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
        return super().losses(case, inputs, with_compile) | make_peers(case)

    def notes(self, cases: Sequence[Case]) -> list[str]:
        missing = {
            f"{name}: {reason}" for case in cases for name, reason in missing_peers(case).items()
        }
        return [f"Not measured: {line}." for line in sorted(missing)]
