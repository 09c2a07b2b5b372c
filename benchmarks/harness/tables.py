"""The tables on the screen."""

from rich.console import Console
from rich.table import Table

from cases.base import Case, size_text
from cases.goal import Goal, share_of_copy
from harness.rows import Row

CONTENDERS = ("fused", "eager", "compile", "fused graph", "eager graph", "stream")
RATIOS = (("eager", "fused"), ("compile", "fused"), ("fused", "stream"))
TIMES_LEGEND = (
    "Medians of one call. GB/s: the bytes that must move, by the time of fused. "
    "peak: memory beyond the inputs, in multiples of the logits."
)

CONTENDERS_LEGEND = (
    "time: median of one call. against fused: time divided by that of fused, so above 1 fused is "
    "faster. peak: memory beyond the inputs, in multiples of the logits. % of the limit: how near "
    "it comes to the stream, which moves the same bytes with no arithmetic."
)

Measured = dict[Case, dict[str, Row]]


def make_console() -> Console:
    """Wide enough for the tables, where what is printed goes into a file."""
    console = Console()
    if not console.is_terminal:
        console.width = 150
    return console


def time_text(seconds: float) -> str:
    unit, size = ("us", 1e-6) if seconds < 1e-3 else ("ms", 1e-3) if seconds < 1 else ("s", 1)
    # Three digits, never 1e+02.
    return f"{float(f'{seconds / size:.3g}'):g} {unit}"


def times_table(measured: Measured) -> Table:
    """Cases that differ in their size alone."""
    case = next(iter(measured))
    table = Table(
        title=f"{case.device}: {case.title} ({case.bytes_per_element} bytes an element)",
        title_justify="left",
    )
    contenders = [name for name in CONTENDERS if any(name in rows for rows in measured.values())]
    ratios = [f"{above}/\n{below}" for above, below in RATIOS]
    headings = ["N", *(name.replace(" ", "\n") for name in contenders), *ratios]
    headings += ["fused\nGB/s", "fused\npeak", "eager\npeak"]
    if case.device == "cuda":
        headings += ["copy\nGB/s", "fused,\n% of copy"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for case, rows in measured.items():
        table.add_row(size_text(case.numel), *times_cells(rows, contenders))
    return table


def times_cells(rows: dict[str, Row], contenders: list[str]) -> list[str]:
    times = {name: row.median_seconds for name, row in rows.items()}
    cells = [time_text(times[name]) if name in times else "" for name in contenders]
    for above, below in RATIOS:
        known = above in times and below in times
        cells.append(f"{times[above] / times[below]:.2f}" if known else "")
    cells.append(f"{rows['fused'].bandwidth / 1e9:.3g}")
    cells += [f"{rows[name].peak_multiple:.2f}" for name in ("fused", "eager")]
    if "copy" in rows:
        cells += [f"{rows['copy'].bandwidth / 1e9:.0f}", f"{share_of_copy(rows):.1f}"]
    return cells


def contenders_table(measured: Measured) -> Table:
    """A line for each contender in each case: for cases that differ in more than their size."""
    case = next(iter(measured))
    table = Table(title=f"{case.device}: {case.title}", title_justify="left")
    for heading in ("", "N", "contender", "time", "against\nfused", "peak", "% of\nthe limit"):
        table.add_column(heading, justify="left" if heading in ("", "contender") else "right")
    for case, rows in measured.items():
        first = [case.label, f"{case.numel:,}"]
        for name, row in rows.items():
            if name not in ("stream", "copy"):
                table.add_row(*first, name, *contender_cells(row, rows))
                first = ["", ""]
        table.add_section()
    return table


def contender_cells(row: Row, rows: dict[str, Row]) -> list[str]:
    """Empty where there is no such number: a whole training step has no limit to come near to."""
    peak, limit = row.peak_multiple, rows.get("stream", rows.get("gemms"))
    return [
        time_text(row.median_seconds),
        f"{row.median_seconds / rows['fused'].median_seconds:.2f}",
        "" if peak is None else f"{peak:.2f}",
        "" if limit is None else f"{100 * limit.median_seconds / row.median_seconds:.0f}",
    ]


# Each with what it must say of its columns
BY_SIZE = (times_table, TIMES_LEGEND)
BY_CONTENDER = (contenders_table, CONTENDERS_LEGEND)


def goals_table(goals: list[Goal], measured: Measured) -> Table:
    values = [goal.measured(measured[goal.case]) for goal in goals]
    met = sum(
        value is not None and goal.is_met(value) for goal, value in zip(goals, values, strict=True)
    )
    device = goals[0].case.device
    table = Table(title=f"Goals, {device}: {met} of {len(goals)} met", title_justify="left")
    for heading in ("case", "N", "measure", "goal", "measured", "verdict"):
        table.add_column(heading, justify="left" if heading in ("case", "verdict") else "right")
    for goal, value in zip(goals, values, strict=True):
        table.add_row(
            goal.case.title,
            size_text(goal.case.numel),
            goal.measure,
            f"{goal.bound} {goal.value:g}",
            "" if value is None else f"{value:.2f}",
            verdict(goal, value, measured[goal.case]),
        )
    return table


def verdict(goal: Goal, value: float | None, rows: dict[str, Row]) -> str:
    if value is None:
        return "not measured"
    doubt = ", but disturbed" if rows["fused"].is_disturbed else ""
    if goal.is_met(value, stretch=True):
        return f"[green]met, and {goal.stretch:g}{doubt}"
    return ("[green]met" if goal.is_met(value) else "[bold red]missed") + doubt
