"""Speed-up over eager torch (longer is better) and memory (shorter is better) of named cases."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.rows import Row
from plots.style import CAPTION_STYLE, STYLES, WIDTH, caption

# The rows of one case by contender
Bars = dict[str, Row]


def plot_bars(rows: list[Row]) -> Figure:
    cases = make_cases(rows)
    figure = Figure(figsize=(WIDTH, 1.7 + 0.75 * len(cases)), layout="constrained")
    speedups, peaks = figure.subplots(1, 2, sharey=True)
    draw(speedups, cases, speedup)
    speedups.set_title("time of eager torch / time")
    speedups.axvline(1, color=STYLES["eager"]["color"])
    draw(peaks, cases, peak)
    peaks.set_title("peak memory / logits")
    speedups.set_yticks(range(len(cases)), [case_text(bars) for bars in cases.values()])
    speedups.invert_yaxis()
    for axes in (speedups, peaks):
        axes.grid(alpha=0.3, axis="x")
        axes.margins(x=0.2)
    handles, names = legend(speedups, peaks)
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.supxlabel(caption(rows), **CAPTION_STYLE)
    return figure


def legend(*panels: Axes) -> tuple[list, list]:
    """One for both panels, neither of which shows every contender."""
    both = [axes.get_legend_handles_labels() for axes in panels]
    handles = {label: handle for pair in both for handle, label in zip(*pair, strict=True)}
    names = [name for name in STYLES if name in handles]
    return [handles[name] for name in names], names


def make_cases(rows: list[Row]) -> dict[tuple[str, int], Bars]:
    """By workload and size; of rows for the same contender the last one counts."""
    cases: dict[tuple[str, int], Bars] = {}
    for row in rows:
        cases.setdefault((row.workload, row.numel), {})[row.contender] = row
    return cases


def case_text(bars: Bars) -> str:
    row = bars["fused"]
    shape = " x ".join(f"{int(size):,}" for size in row.shape.split("x"))
    targets = "" if row.target_dtype == row.dtype else f", {row.target_dtype} targets"
    weights = "" if row.weights == "none" else f"\n{row.weights}"
    return f"{row.workload}\n{shape}\n{row.dtype}{targets}{weights}"


def speedup(name: str, bars: Bars) -> float | None:
    if name in ("eager", "stream", "copy"):
        return None
    return bars["eager"].median_seconds / bars[name].median_seconds


def peak(name: str, bars: Bars) -> float | None:
    return bars[name].peak_multiple


def draw(axes: Axes, cases: dict[tuple[str, int], Bars], measure: Callable) -> None:
    """Bars for each case, side by side, one for each contender of which there is a measure."""
    values = {
        name: [measure(name, bars) if name in bars else None for bars in cases.values()]
        for name in STYLES
    }
    shown = [name for name in values if any(value is not None for value in values[name])]
    height = 0.8 / len(shown)
    for place, name in enumerate(shown):
        bars = [(case, value) for case, value in enumerate(values[name]) if value is not None]
        positions = [case + (place - (len(shown) - 1) / 2) * height for case, _ in bars]
        lengths = [length for _, length in bars]
        color = STYLES[name]["color"]
        drawn = axes.barh(positions, lengths, height, color=color, label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=9)
