"""The goals for the device, and the cases that are measured beside them."""

from cases.base import Case
from cases.goal import Goal
from cases.goals_cpu import cpu_goals
from cases.goals_cuda import cases_without_goals, cuda_goals
from cases.preset import Preset, Selection


class Goals(Preset):
    summary = "the goals for the device: met or missed"
    by_size = True

    def goals(self, device: str) -> list[Goal]:
        return cuda_goals() if device == "cuda" else cpu_goals()

    def cases(self, selection: Selection) -> list[Case]:
        others = cases_without_goals() if selection.device == "cuda" else []
        # Several goals share a case.
        with_goals = dict.fromkeys(goal.case for goal in self.goals(selection.device))
        return [*with_goals, *others]
