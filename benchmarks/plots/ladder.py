"""Time, speed-up and distance from the limit over the number of elements."""

import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.rows import Row
from plots.style import CAPTION_STYLE, STYLES, WIDTH, caption

# The rows of one contender by size
Line = dict[int, Row]


def group_name(row: Row) -> str:
    """Rows of one name share a figure."""
    parts = [row.device, re.sub(r"\W", "-", row.mode), row.dtype, row.reduction]
    if row.target_dtype != row.dtype:
        parts.insert(3, f"{row.target_dtype}-targets")
    if row.weights != "none":
        parts.append(row.weights if row.weights != "both" else "both-weights")
    return "-".join(parts)


def plot_ladder(rows: list[Row]) -> Figure:
    lines = make_lines(rows)
    figure = Figure(figsize=(WIDTH, 11), layout="constrained")
    times, speedups, multiples = figure.subplots(3, 1, sharex=True)
    plot_times(times, lines)
    plot_speedups(speedups, lines)
    plot_multiples(multiples, lines)
    for axes in (times, speedups, multiples):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    multiples.set_xlabel("N, elements")
    row = rows[0]
    targets = "" if row.target_dtype == row.dtype else f", {row.target_dtype} targets"
    weights = "" if row.weights == "none" else f", weights: {row.weights}"
    figure.suptitle(
        f"{row.mode}, {row.dtype}{targets}, reduction {row.reduction}{weights}, "
        f"{row.bytes_per_element} bytes an element"
    )
    figure.supxlabel(caption(rows), **CAPTION_STYLE)
    return figure


def make_lines(rows: list[Row]) -> dict[str, Line]:
    """By contender; of rows for the same size the last one counts.

    Without the copy, which moves other bytes than the case.
    """
    lines: dict[str, Line] = {}
    for row in rows:
        if row.contender in STYLES:
            lines.setdefault(row.contender, {})[row.numel] = row
    return lines


def plot_times(axes: Axes, lines: dict[str, Line]) -> None:
    axes.set_title("time of one call")
    for contender, style in STYLES.items():
        line = sorted(lines.get(contender, {}).items())
        if line:
            sizes, rows = zip(*line, strict=True)
            axes.plot(sizes, [row.median_seconds for row in rows], **{"label": contender} | style)
    axes.set_yscale("log")
    axes.set_ylabel("seconds, median")


def plot_speedups(axes: Axes, lines: dict[str, Line]) -> None:
    axes.set_title("speed-up of fused")
    fused = lines["fused"]
    for contender in others(lines, "fused"):
        sizes = sorted(fused.keys() & lines[contender].keys())
        ratios = [
            lines[contender][size].median_seconds / fused[size].median_seconds for size in sizes
        ]
        axes.plot(sizes, ratios, **STYLES[contender], label=f"over {contender}")
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times faster")


def plot_multiples(axes: Axes, lines: dict[str, Line]) -> None:
    axes.set_title("multiple of the stream limit")
    stream = lines["stream"]
    for contender in others(lines):
        sizes = sorted(stream.keys() & lines[contender].keys())
        ratios = [
            lines[contender][size].median_seconds / stream[size].median_seconds for size in sizes
        ]
        axes.plot(sizes, ratios, **{"label": contender} | STYLES[contender])
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("times the stream's time")


def others(lines: dict[str, Line], *left_out: str) -> list[str]:
    """Those to compare with, in the order of STYLES, which is that of the legend."""
    graphs = ("eager graph", "fused graph")
    return [name for name in STYLES if name in lines and name not in ("stream", *graphs, *left_out)]
