"""The sigmoid loss of pairs: memory and time over the batch."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cases.pairwise import BATCH, WORKLOADS
from harness.rows import Row
from plots.style import CAPTION_STYLE, STYLES, WIDTH, caption

MIB = 2**20


def plot_batch(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(WIDTH, 9), layout="constrained")
    peaks, times = figure.subplots(2, 1, sharex=True)
    draw(peaks, rows, lambda row: row.peak_bytes and row.peak_bytes / MIB)
    logits = {batch_of(row): row.logits_bytes / MIB for row in rows}
    # On top of a contender that holds as much
    peaks.plot(list(logits), list(logits.values()), "k:", zorder=3, label="the logits")
    peaks.set_ylabel("MiB beyond operands and gradients, at the peak")
    draw(times, rows, lambda row: row.median_seconds)
    times.set_ylabel("seconds, median")
    for axes in (peaks, times):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    times.set_xlabel("N, images and texts of a batch")
    features = WORKLOADS[rows[0].workload].features
    figure.suptitle(f"N x N pairs, {features} features, {rows[0].dtype}")
    figure.supxlabel(caption(rows), **CAPTION_STYLE)
    return figure


# By the workload whose rows they are of
FIGURES = {BATCH: plot_batch}


def draw(axes: Axes, rows: list[Row], measure: Callable[[Row], float | None]) -> None:
    """A line for each contender of which there is a measure."""
    for contender, style in STYLES.items():
        line = {batch_of(row): measure(row) for row in rows if row.contender == contender}
        if line and None not in line.values():
            axes.plot(list(line), list(line.values()), **{"label": contender} | style)


def batch_of(row: Row) -> int:
    return int(row.shape.split("x")[0])
