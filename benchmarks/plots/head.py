"""A linear layer and its loss: memory over the number of labels, time over the size of a block."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cases.head import CHUNK_BYTES, LABELS, WORKLOADS
from contenders.head import chunk_of_name
from harness.rows import Row
from plots.style import CAPTION_STYLE, STYLES, WIDTH, caption

MIB = 2**20
# What is drawn beside the ladders; the table calls it by the loss alone.
NAMES = {
    "eager": "linear layer, eager",
    "compile": "linear layer, compile",
    "fused": "linear layer, fused",
    "head": "head",
}


def plot_labels(rows: list[Row]) -> Figure:
    figure, axes = make_figure(rows, rows[0].dtype)
    for contender, name in NAMES.items():
        peaks = {labels_of(row): row.peak_bytes / MIB for row in rows if row.contender == contender}
        if peaks:
            axes.plot(list(peaks), list(peaks.values()), **STYLES[contender], label=name)
    logits = {labels_of(row): row.logits_bytes / MIB for row in rows}
    # On top of a contender that holds as much
    axes.plot(list(logits), list(logits.values()), "k:", zorder=3, label="the logits")
    axes.set_yscale("log")
    axes.set_xlabel("C, labels")
    axes.set_ylabel("MiB beyond operands and gradients, at the peak")
    axes.legend()
    return figure


def plot_chunk_bytes(rows: list[Row]) -> Figure:
    figure, axes = make_figure(rows, f"{labels_of(rows[0]):,} labels, {rows[0].dtype}")
    times = {row.contender: 1e3 * row.median_seconds for row in rows}
    chunks = {chunk_of_name(name): time for name, time in times.items() if chunk_of_name(name)}
    axes.plot(list(chunks), list(chunks.values()), **STYLES["head"], label="head")
    lines = {"gemms": "gemms (the limit)", "fused": NAMES["fused"], "head": "head by default"}
    for contender, label in lines.items():
        color = STYLES[contender]["color"]
        axes.axhline(times[contender], color=color, linestyle="--", label=label)
    axes.set_xlabel("chunk_bytes, of all blocks of logits")
    axes.set_ylabel("milliseconds, median")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


# By the workload whose rows they are of
FIGURES = {LABELS: plot_labels, CHUNK_BYTES: plot_chunk_bytes}


def make_figure(rows: list[Row], case: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    spec = WORKLOADS[rows[0].workload]
    axes.set_title(f"{spec.rows:,} rows, {spec.features} features, {case}")
    figure.supxlabel(caption(rows), **CAPTION_STYLE)
    return figure, axes


def labels_of(row: Row) -> int:
    return int(row.shape.split("x")[-1])
