"""Compares two CSV files of run.py, an older and a newer one, and flags what got slower.

    python benchmarks/compare.py OLD.csv NEW.csv
    python benchmarks/compare.py OLD.csv NEW.csv --relative-to stream --factor 1.1

The exit status is 1 if a fused contender got slower than the factor allows.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from rich.table import Table

from cases.base import Case, size_text
from harness.rows import Row, read_rows
from harness.tables import make_console, time_text

# What makes two rows the same measurement, but for the contender
CASE = [field.name for field in fields(Case)]
# Where these differ, so may every time.
CIRCUMSTANCES = ("device_name", "torch", "cuda", "instruction_set", "threads", "kernels")
# How many times as long the stream may take, which has no part in what is compared
STEADY = 1.2

Rows = dict[tuple, dict[str, Row]]  # by case, then by contender


@dataclass(frozen=True)
class Change:
    old: Row
    new: Row
    ratio: float  # of the new time to the old

    @property
    def is_ours(self) -> bool:
        return self.new.contender.startswith(("fused", "head"))


def main() -> None:
    arguments = parse_arguments()
    old, new = (by_case(read_rows(path)) for path in (arguments.old, arguments.new))
    changes = list_changes(old, new, arguments.relative_to)
    if not changes:
        sys.exit("The two files have no case in common")
    console = make_console()
    console.print(changes_table(changes, arguments.factor, arguments.relative_to))
    console.print(*remarks(old, new, changes), sep="\n", soft_wrap=True)
    slower = any(change.is_ours and change.ratio > arguments.factor for change in changes)
    sys.exit(1 if slower else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("old", type=Path, metavar="OLD.csv")
    add("new", type=Path, metavar="NEW.csv")
    add("--factor", type=float, default=1.2, help="flag what takes this many times as long (1.2)")
    add(
        "--relative-to",
        metavar="CONTENDER",
        help="divide each time by that of this contender in the same case and file, such as eager "
        "or stream: what the whole machine gained or lost then cancels out",
    )
    return parser.parse_args()


def by_case(rows: list[Row]) -> Rows:
    """Of rows for the same contender in the same case the last one counts."""
    cases: Rows = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in CASE)
        cases.setdefault(key, {})[row.contender] = row
    return cases


def list_changes(old: Rows, new: Rows, relative_to: str | None) -> list[Change]:
    """What both files have, in the order of the newer one."""
    changes = []
    for case in new:
        before, after = old.get(case, {}), new[case]
        machine = 1.0
        if relative_to is not None:
            if relative_to not in before or relative_to not in after:
                continue
            machine = after[relative_to].median_seconds / before[relative_to].median_seconds
        for name in after:
            if name in before and name != relative_to:
                times = after[name].median_seconds / before[name].median_seconds
                changes.append(Change(before[name], after[name], times / machine))
    return changes


def changes_table(changes: list[Change], factor: float, relative_to: str | None) -> Table:
    ratio = "new / old" + (f",\nper {relative_to}" if relative_to else "")
    table = Table()
    for heading in ("case", "contender", "old", "new", ratio, ""):
        table.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for change in changes:
        row = change.new
        table.add_row(
            case_text(row),
            row.contender,
            time_text(change.old.median_seconds),
            time_text(row.median_seconds),
            f"{change.ratio:.2f}",
            verdict(change, factor),
        )
    return table


def case_text(row: Row) -> str:
    targets = "" if row.target_dtype == row.dtype else f"{row.target_dtype} targets"
    weights = "" if row.weights == "none" else row.weights
    parts = [row.workload, size_text(row.numel), row.mode, row.dtype, targets, row.reduction]
    return ", ".join(part for part in (*parts, weights) if part)


def verdict(change: Change, factor: float) -> str:
    if factor >= change.ratio >= 1 / factor:
        return ""
    word = "[bold red]slower" if change.ratio > factor else "[green]faster"
    disturbed = change.old.is_disturbed or change.new.is_disturbed
    return word + (", but disturbed" if disturbed else "")


def remarks(old: Rows, new: Rows, changes: list[Change]) -> list[str]:
    lines = [
        f"{name} was {before}, is {after}: the times may differ for that alone."
        for name in CIRCUMSTANCES
        for before, after in sorted(
            {(str(getattr(c.old, name)), str(getattr(c.new, name))) for c in changes}
        )
        if before != after
    ]
    streams = [c.ratio for c in changes if c.new.contender == "stream"]
    if streams and not 1 / STEADY < statistics.median(streams) < STEADY:
        lines.append(
            f"The stream took {statistics.median(streams):.2f} times as long as before: it is the "
            "machine that changed. Measure again, or use --relative-to stream."
        )
    for rows, others, where in ((old, new, "older"), (new, old, "newer")):
        alone = len(rows.keys() - others.keys())
        if alone:
            lines.append(f"Cases in the {where} file alone: {alone}.")
    return lines


if __name__ == "__main__":
    main()
