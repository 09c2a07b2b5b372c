"""The errors over the logits."""

import itertools

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.rows import AccuracyRow
from plots.style import CAPTION_STYLE, STYLES, WIDTH, caption

# A float32 of which no digit is right
ALL_DIGITS = 2**23
# Beyond it exp(-|x|) is below the smallest normal number.
LAST_NORMAL = 87.34


def plot_accuracy(rows: list[AccuracyRow]) -> Figure:
    figure = Figure(figsize=(WIDTH, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    combinations = itertools.product((0.0, 1.0), ("loss", "gradient"))
    for axes, (target, quantity) in zip(panels.flat, combinations, strict=True):
        selected = [row for row in rows if (row.target, row.quantity) == (target, quantity)]
        plot_errors(axes, selected)
        axes.set_title(f"{quantity}, target {target:g}")
    for axes in panels[1]:
        axes.set_xlabel("logit")
    for axes in panels[:, 0]:
        axes.set_ylabel("largest error, ULP")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel(caption(rows), **CAPTION_STYLE)
    return figure


def plot_errors(axes: Axes, rows: list[AccuracyRow]) -> None:
    for contender in ("eager", "fused"):
        of_contender = [row for row in rows if row.contender == contender]
        middles = [(row.logits_from + row.logits_to) / 2 for row in of_contender]
        label = {"eager": "torch"}.get(contender, contender)
        color = STYLES[contender]["color"]
        axes.plot(middles, [row.max_ulp for row in of_contender], color=color, label=label)
    # Linear below one ULP: some errors are 0.
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.axhline(ALL_DIGITS, color="gray", linewidth=1, linestyle=":", label="no digit is right")
    axes.axvspan(-LAST_NORMAL, LAST_NORMAL, color="gray", alpha=0.08, label="exp(-|x|) is normal")
    axes.grid(alpha=0.3)
