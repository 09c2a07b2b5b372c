"""Plots a CSV file of run.py: one PNG beside it for each kind of call.

python benchmarks/plot.py benchmarks/results/cpu-ladder.csv
"""

import argparse
import re
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Row, read_rows

STYLES = {
    "eager": {"color": "tab:orange", "marker": "s"},
    "compile": {"color": "tab:green", "marker": "^"},
    "fused": {"color": "tab:blue", "marker": "o"},
    "eager graph": {"color": "tab:orange", "marker": "s", "linestyle": ":"},
    "fused graph": {"color": "tab:blue", "marker": "o", "linestyle": ":"},
    "stream": {"color": "black", "linestyle": "--", "label": "stream (the limit)"},
}

# The rows of one contender by size
Line = dict[int, Row]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a CSV file, or a folder of them")
    path = parser.parse_args().path
    for csv in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        plot_file(csv)


def plot_file(csv: Path) -> None:
    rows = read_rows(csv)
    if len({(row.device, row.device_name) for row in rows}) > len({row.device for row in rows}):
        raise SystemExit(f"{csv} mixes the results of several machines")
    for name, lines in group_lines(rows).items():
        png = csv.with_name(f"{csv.stem}-{name}.png")
        plot(lines).savefig(png, dpi=120)
        print(png)


def group_lines(rows: list[Row]) -> dict[str, dict[str, Line]]:
    """By kind of call, then by contender; of rows for the same size the last one counts.

    Without the copy, which moves other bytes than the case.
    """
    groups: dict[str, dict[str, Line]] = {}
    for row in rows:
        if row.contender not in STYLES:
            continue
        lines = groups.setdefault(group_name(row), {})
        lines.setdefault(row.contender, {})[row.numel] = row
    return groups


def group_name(row: Row) -> str:
    parts = [row.device, re.sub(r"\W", "-", row.mode), row.dtype, row.reduction]
    if row.target_dtype != row.dtype:
        parts.insert(3, f"{row.target_dtype}-targets")
    if row.weights != "none":
        parts.append(row.weights if row.weights != "both" else "both-weights")
    return "-".join(parts)


def plot(lines: dict[str, Line]) -> Figure:
    figure = Figure(figsize=(15, 5), layout="constrained")
    times, speedups, multiples = figure.subplots(1, 3)
    plot_times(times, lines)
    plot_speedups(speedups, lines)
    plot_multiples(multiples, lines)
    for axes in (times, speedups, multiples):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("N, elements")
        axes.grid(alpha=0.3)
        axes.legend()
    row = next(iter(lines["fused"].values()))
    targets = "" if row.target_dtype == row.dtype else f", {row.target_dtype} targets"
    weights = "" if row.weights == "none" else f", weights: {row.weights}"
    figure.suptitle(
        f"{row.device_name}: {row.mode}, {row.dtype}{targets}, reduction {row.reduction}{weights}"
    )
    figure.supxlabel(caption(lines), fontsize=7, color="dimgray", family="monospace")
    return figure


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
    for contender in ("eager", "compile"):
        sizes = sorted(fused.keys() & lines.get(contender, {}).keys())
        if sizes:
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
    for contender in ("eager", "compile", "fused"):
        sizes = sorted(stream.keys() & lines.get(contender, {}).keys())
        if sizes:
            ratios = [
                lines[contender][size].median_seconds / stream[size].median_seconds
                for size in sizes
            ]
            axes.plot(sizes, ratios, **{"label": contender} | STYLES[contender])
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("times the stream's time")


def caption(lines: dict[str, Line]) -> str:
    """Where the numbers come from, each fact once."""
    rows = [row for line in lines.values() for row in line.values()]
    facts = []
    for row in rows:
        cuda = f", CUDA {row.cuda}" if row.cuda else ""
        instructions = f", {row.instruction_set}" if row.device == "cpu" else ""
        facts.append(
            f"{row.device_name}{instructions}, {row.threads} threads; torch {row.torch}{cuda}; "
            f"fused_bce {row.fused_bce}; {row.date[:10]}; "
            f"{row.bytes_per_element} bytes an element"
        )
    if any(row.is_disturbed for row in rows):
        facts.append("Other work disturbed some of these times: see other_load in the CSV file.")
    unique = dict.fromkeys([*facts, *(row.command for row in rows)])
    return "\n".join(textwrap.fill(text, 150) for text in unique)


if __name__ == "__main__":
    main()
