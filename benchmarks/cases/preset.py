"""What a preset is: cases, the contenders in each, and what a reader of the numbers must know."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cases.base import DTYPES, NON_LEAF, WEIGHTS, Case
from cases.goal import Goal
from contenders.inputs import Inputs, count_rotated, make_inputs
from contenders.limits import limit_contenders
from contenders.losses import Loss, make_losses
from contenders.steps import Contender, graph_contenders, loss_contender


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; None where it leaves the choice to the preset."""

    device: str
    sizes: Sequence[int] | None = None
    mode: Sequence[str] | None = None
    dtype: Sequence[str] | None = None
    target_dtype: str | None = None
    reduction: Sequence[str] | None = None
    weights: Sequence[str] | None = None
    workloads: Sequence[str] | None = None
    non_leaf: bool = False

    def takes(self, case: Case) -> bool:
        return (
            case.numel in (self.sizes or [case.numel])
            and case.mode in (self.mode or [case.mode])
            and case.dtype in (self.dtype or DTYPES)
            and case.target_dtype == (self.target_dtype or case.target_dtype)
            and case.reduction in (self.reduction or [case.reduction])
            and case.weights in (self.weights or WEIGHTS)
            and case.workload in (self.workloads or [case.workload])
        )

    def with_logits(self, case: Case) -> Case:
        """The case with the kind of logits asked for; without backward there is only one."""
        if self.non_leaf and case.mode == "fwd+bwd":
            return dataclasses.replace(case, mode=NON_LEAF)
        return case


class Preset:
    """A subclass overrides what is particular to it; cases.registry lists an instance."""

    summary: str  # a line for --help
    workloads: Mapping[str, object] = {}  # by name, for --workloads
    by_size = False  # whether its cases differ in their size alone, and one is a line of a table

    def cases(self, selection: Selection) -> list[Case]:
        """At least those that are selected, in the order in which they are measured."""
        raise NotImplementedError

    def goals(self, _device: str) -> list[Goal]:
        """Bounds on what is measured in these cases."""
        return []

    def contenders(
        self, case: Case, with_compile: bool = True, with_graph: bool = False
    ) -> dict[str, Contender]:
        """By name; all get the same inputs."""
        inputs = self.rotated_inputs(case)
        losses = self.losses(case, inputs[0], with_compile)
        contenders = {name: loss_contender(case, loss, inputs) for name, loss in losses.items()}
        if with_graph:
            contenders |= graph_contenders(case, losses, inputs)
        return contenders | limit_contenders(case, len(inputs))

    def rotated_inputs(self, case: Case) -> list[Inputs]:
        return [self.inputs(case) for _ in range(count_rotated(case))]

    def inputs(self, case: Case) -> Inputs:
        return make_inputs(case)

    def losses(self, case: Case, inputs: Inputs, with_compile: bool) -> dict[str, Loss]:
        """By the name of their contender."""
        return make_losses(case, inputs, with_compile)

    def notes(self, _cases: Sequence[Case]) -> list[str]:
        """What a reader of the table must know beside the numbers."""
        return []
