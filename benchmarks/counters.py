"""Counts what the CUDA kernels read and write in the memory of a GPU, with its own counters.

    python benchmarks/counters.py

Runs itself under Nsight Compute (ncu), once forward and backward for each large case of the preset
goals, and writes a CSV file. Each kernel starts with an empty L2.
"""

import csv
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from cases.base import Case, size_text
from cases.goals_cuda import cases_without_goals, large_goals
from contenders.inputs import make_inputs
from contenders.losses import make_losses
from contenders.steps import loss_step
from harness import machine
from harness.rows import RESULTS, CounterRow, append_rows, csv_path, start_file
from harness.tables import make_console

WATCHED = "--watched"
# By the column: what ncu calls it, and the unit in which it prints it
METRICS = {
    "read_bytes": ("dram__bytes_read.sum", "byte"),
    "written_bytes": ("dram__bytes_write.sum", "byte"),
    "nanoseconds": ("gpu__time_duration.sum", "ns"),
    "percent_of_peak": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    "percent_occupied": ("sm__warps_active.avg.pct_of_peak_sustained_active", "%"),
    "registers": ("launch__registers_per_thread", "register/thread"),
    "warp_instructions": ("smsp__inst_executed.sum", "inst"),
}
# As older releases write them
LONG_UNITS = {"nsecond": "ns"}
OF_CASE = ("dtype", "target_dtype", "reduction", "weights", "numel")
DIRECTIONS = ("forward", "backward")


def main() -> None:
    if sys.argv[1:] == [WATCHED]:
        return run_watched(all_cases())
    if sys.argv[1:]:
        sys.exit(__doc__)
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device")
    rows = make_rows(all_cases(), parse_launches(run_ncu()), machine.facts("cuda"))
    path = csv_path(RESULTS, asdict(rows[0]), "counters")
    start_file(path, kind=CounterRow)
    append_rows(path, rows)
    console = make_console()
    console.print(counters_table(rows))
    console.print(f"Written to {path}", soft_wrap=True)


def all_cases() -> list[Case]:
    return [*dict.fromkeys(goal.case for goal in large_goals()), *cases_without_goals()]


def run_watched(cases: Iterable[Case]) -> None:
    """Under ncu, which looks at what runs between start and stop."""
    for case in cases:
        inputs = make_inputs(case)
        step = loss_step(case, make_losses(case, inputs, with_compile=False)["fused"], [inputs])
        step()  # loads the kernels
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def run_ncu() -> str:
    """What it writes about the launches of run_watched."""
    if shutil.which("ncu") is None:
        sys.exit("There is no ncu: it comes with CUDA, as Nsight Compute")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", log]
        command += ["--profile-from-start", "off", "--clock-control", "none"]
        command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:fused_bce"]
        command += ["--metrics", ",".join(name for name, _ in METRICS.values())]
        result = subprocess.run(
            [*command, sys.executable, __file__, WATCHED], capture_output=True, text=True
        )
        text = log.read_text() if log.exists() else ""
    if result.returncode != 0:
        sys.exit("\n".join(("ncu failed:", text[-2000:], result.stdout[-2000:], result.stderr)))
    return text


def parse_launches(text: str) -> list[dict[str, str]]:
    """By the names of their columns; the line after these is of units."""
    table = [line for line in text.splitlines() if line.startswith('"')]
    if len(table) < 3:
        sys.exit(f"ncu counted nothing:\n{text[-2000:]}")
    units, *launches = csv.DictReader(table)
    for name, unit in METRICS.values():
        got = units.get(name)
        if LONG_UNITS.get(got, got) != unit:
            sys.exit(f"ncu counts {name} in {got}, not in {unit}")
    return launches


def make_rows(
    cases: list[Case], launches: list[dict[str, str]], facts: dict[str, str | int]
) -> list[CounterRow]:
    if len(launches) != len(DIRECTIONS) * len(cases):
        names = "\n".join(launch["Kernel Name"] for launch in launches)
        sys.exit(f"{len(launches)} launches for {len(cases)} cases of two each:\n{names}")
    rows = []
    for (case, direction), launch in zip(
        itertools.product(cases, DIRECTIONS), launches, strict=True
    ):
        # A gradient that was stored is not touched again while grad_loss is 1.
        read, written = (*case.passes, (0, 0))[DIRECTIONS.index(direction)]
        columns = {name: getattr(case, name) for name in OF_CASE}
        columns |= {"least_bytes": (read + written) * case.numel, "direction": direction}
        for column, (name, _) in METRICS.items():
            columns[column] = float(launch[name].replace(",", ""))
        rows.append(CounterRow(**facts, **columns))
    return rows


def counters_table(rows: list[CounterRow]) -> Table:
    table = Table(title="Counted by the GPU", title_justify="left")
    table.add_column("case")
    for heading in ("N", "ms", "% of peak", "GB", "by the least", "instructions", "registers"):
        table.add_column(heading, justify="right")
    table.add_column("occupied", justify="right")
    for row in rows:
        moved = row.read_bytes + row.written_bytes
        targets = "" if row.target_dtype == row.dtype else f", {row.target_dtype} targets"
        weights = "" if row.weights == "none" else f", {row.weights}"
        table.add_row(
            f"{row.direction}, {row.dtype}{targets}, {row.reduction}{weights}",
            size_text(row.numel),
            f"{row.nanoseconds / 1e6:.3f}",
            f"{row.percent_of_peak:.1f}",
            f"{moved / 1e9:.3f}",
            f"{moved / row.least_bytes:.3f}" if row.least_bytes else "",
            f"{32 * row.warp_instructions / row.numel:.1f}",
            f"{row.registers:.0f}",
            f"{row.percent_occupied:.0f} %",
        )
    table.caption = (
        "by the least: bytes read and written, by those that must move. instructions: an element. "
        "occupied: warps, of those that fit."
    )
    return table


if __name__ == "__main__":
    main()
