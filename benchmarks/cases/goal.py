"""What a goal is: a case, what is measured in it, and its bound."""

from dataclasses import dataclass

from cases.base import Case
from harness.rows import Row, share_of_copy

PEAK = "peak / logits"
SHARE_OF_COPY = "% of copy"
WALL = " on the wall clock"


@dataclass(frozen=True)
class Goal:
    """A bound on a quotient of two contenders' times, or on another measure of one."""

    case: Case
    # "eager / fused" and the like, with or without WALL; PEAK, of fused or of the contender that is
    # named before it; or SHARE_OF_COPY
    measure: str
    bound: str  # ">=" or "<="
    value: float
    stretch: float | None = None

    def measured(self, rows: dict[str, Row]) -> float | None:
        """The value in these rows, one for each contender; None if they do not tell."""
        if self.measure.endswith(PEAK):
            return rows[self.measure.removesuffix(PEAK).strip() or "fused"].peak_multiple
        if self.measure == SHARE_OF_COPY:
            return share_of_copy(rows)
        above, below = self.measure.removesuffix(WALL).split(" / ")
        if above not in rows or below not in rows:
            return None
        if self.measure.endswith(WALL):
            return rows[above].wall_seconds / rows[below].wall_seconds
        return rows[above].median_seconds / rows[below].median_seconds

    def is_met(self, measured: float, stretch: bool = False) -> bool:
        """Whether the goal, or what was set beyond it, is reached."""
        value = self.stretch if stretch else self.value
        if value is None:
            return False
        return measured >= value if self.bound == ">=" else measured <= value
