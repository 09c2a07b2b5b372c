"""What an element costs, over the number of elements."""

from matplotlib.figure import Figure

from harness.rows import Row
from plots.ladder import group_name
from plots.style import CAPTION_STYLE, WIDTH, caption

FLAT = 1.25  # times the cheapest


def plot_cost(rows: list[Row]) -> Figure:
    """A line for each kind of call, and how far it may rise and still be flat.

    Of runs appended to each other the best counts: what disturbs one for a minute is not in all.
    """
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        costs = groups.setdefault(group_name(row), {})
        cost = 1e9 * row.median_seconds / row.numel
        costs[row.numel] = min(cost, costs.get(row.numel, cost))
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    axes = figure.subplots()
    for name, costs in groups.items():
        (line,) = axes.plot(list(costs), list(costs.values()), marker="o", label=name)
        least = min(costs.values())
        axes.axhspan(least, FLAT * least, color=line.get_color(), alpha=0.1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("N, elements")
    axes.set_ylabel("nanoseconds an element")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("fused, and 25 % above the cheapest size")
    figure.supxlabel(caption(rows), **CAPTION_STYLE)
    return figure
