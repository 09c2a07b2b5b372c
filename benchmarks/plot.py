"""Plots CSV files of run.py and accuracy.py: PNGs beside them.

python benchmarks/plot.py benchmarks/results/cpu-ladder.csv

A ladder of sizes becomes one figure for each kind of call, workloads, training steps, extras, heads
and focal losses become bars, a file of accuracy.py the errors over the logits, one of --alone the
cost of an element over the sizes. Of the preset head the memory is drawn over the labels and the
time over the size of a block as well, of the preset pairwise both over the batch.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from harness.rows import AccuracyRow, CounterRow, Facts, Row, read_rows
from plots.accuracy import plot_accuracy
from plots.bars import plot_bars
from plots.cost import plot_cost
from plots.head import FIGURES as OF_HEAD
from plots.ladder import group_name, plot_ladder
from plots.pairwise import FIGURES as OF_PAIRWISE
from plots.style import DPI, SIZES

# By workload: ladders of what is not the number of elements
LADDERS = OF_HEAD | OF_PAIRWISE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a CSV, or a folder")
    for path in parser.parse_args().paths:
        for csv in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
            plot_file(csv)


def plot_file(csv: Path) -> None:
    rows = read_rows(csv, kinds=(Row, AccuracyRow, CounterRow))
    if len({(row.device, row.device_name) for row in rows}) > len({row.device for row in rows}):
        raise SystemExit(f"{csv} mixes the results of several machines")
    with matplotlib.rc_context(SIZES):
        for name, figure in figures(rows):
            png = csv.with_name(f"{csv.stem}-{name}.png" if name else f"{csv.stem}.png")
            figure.savefig(png, dpi=DPI)
            print(png)


def figures(rows: list[Facts]) -> Iterator[tuple[str, Figure]]:
    """With the end of their names; "" where the file has one figure."""
    if isinstance(rows[0], CounterRow):
        return  # the table that counters.py prints is all there is to see
    if isinstance(rows[0], AccuracyRow):
        yield "", plot_accuracy(rows)
        return
    if all(row.contender == "fused" for row in rows):
        yield "", plot_cost(rows)
        return
    for workload, plot in LADDERS.items():
        ladder = [row for row in rows if row.workload == workload]
        if ladder:
            yield workload, plot(ladder)
    named = [row for row in rows if row.workload and row.workload not in LADDERS]
    for mode in dict.fromkeys(row.mode for row in named):
        name = re.sub(r"\W", "-", mode)
        yield name, plot_bars([row for row in named if row.mode == mode])
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.workload:
            groups.setdefault(group_name(row), []).append(row)
    for name, group in groups.items():
        yield name, plot_ladder(group)


if __name__ == "__main__":
    main()
