"""A step of training a head, with its weight whole and in 16 parts, and of torch.nn, on the CPU.

    python benchmarks/parts.py       SGD and Adam's W, at two sizes

Each contender computes the gradients and makes the step of a fused optimizer of torch, in parts one
for each part in backward. Time and peak memory beyond the weight and the optimizer's states; a CSV
file and a table.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from cases.base import Case
from fused_bce import LinearBCEWithLogitsLoss, SparseTarget
from harness import machine
from harness.rows import RESULTS, Row, append_rows, csv_path, start_file
from harness.tables import make_console, time_text
from harness.timing import peak_bytes, time_alternating

PARTS = 16
SIZES = ["64x256x100000", "128x64x501070"]  # rows, features, labels; the second of Wiki-500K
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}
Step = Callable[[], None]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    path = csv_path(arguments.output, machine.facts("cpu"), "parts")
    start_file(path)
    rows = []
    for size in arguments.sizes:
        for optimizer in OPTIMIZERS:
            rows += measure(size, optimizer, arguments.repeats)
    append_rows(path, rows)
    make_console().print(table(rows), f"Written to {path}", sep="\n", soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", default=SIZES, metavar="NxFxC", help=f"default: {' '.join(SIZES)}")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: as torch")
    add("--repeats", type=int, default=9, help="rounds (9)")
    add("--output", type=Path, default=RESULTS, help="a CSV file, or a folder (benchmarks/results)")
    return parser.parse_args()


def measure(size: str, optimizer: str, repeats: int) -> list[Row]:
    rows, features, labels = map(int, size.split("x"))
    torch.manual_seed(0)
    input = torch.randn(rows, features).requires_grad_()
    target = SparseTarget.from_padded(torch.randint(labels, (rows, 5)), labels)
    steps = {
        "parts": step_of_head(input, target, OPTIMIZERS[optimizer], PARTS),
        "whole": step_of_head(input, target, OPTIMIZERS[optimizer], 1),
        "eager": step_of_torch(input, target, OPTIMIZERS[optimizer]),
    }
    for step in steps.values():
        step()  # makes the states
    timings = time_alternating(steps, dict.fromkeys(steps, 1), "cpu", repeats, seconds=0)
    case = Case(rows * labels, "cpu", "training step", reduction="batchmean", workload=optimizer)
    return [
        Row(
            **machine.facts("cpu") | dataclasses.asdict(case),
            shape=size,
            contender=name,
            bytes_per_element=case.bytes_per_element,
            median_seconds=timings[name].median,
            iqr_seconds=timings[name].iqr,
            wall_seconds=timings[name].wall_median,
            peak_bytes=peak_bytes(step, "cpu"),
            other_load=None,
        )
        for name, step in steps.items()
    ]


def step_of_head(input: Tensor, target: SparseTarget, make_optimizer, parts: int) -> Step:
    torch.manual_seed(1)
    labels = target.num_labels
    head = LinearBCEWithLogitsLoss(input.shape[1], labels, parts=parts, reduction="batchmean")
    for parameter in head.parameters():
        optimizer = make_optimizer([parameter])

        def update(parameter: Tensor, optimizer=optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)

    def step() -> None:
        input.grad = None
        head(input, target).backward()

    return step


def step_of_torch(input: Tensor, target: SparseTarget, make_optimizer) -> Step:
    layer = nn.Linear(input.shape[1], target.num_labels, bias=False)
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    optimizer = make_optimizer(layer.parameters())
    dense = target.to_dense(torch.float32)

    def step() -> None:
        input.grad = None
        (criterion(layer(input), dense) / len(input)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(rows: list[Row]) -> Table:
    made = Table(title=f"training steps, {rows[0].threads} threads", title_justify="left")
    for heading in ("", "", "contender", "time", "by that of whole", "peak, of the weight"):
        made.add_column(heading, justify="right" if "a" in heading else "left")
    whole = {(r.shape, r.workload): r.median_seconds for r in rows if r.contender == "whole"}
    for row in rows:
        _, features, labels = map(int, row.shape.split("x"))
        made.add_row(
            row.shape.replace("x", " x "),
            row.workload,
            row.contender,
            time_text(row.median_seconds),
            f"{row.median_seconds / whole[row.shape, row.workload]:.2f}",
            f"{row.peak_bytes / (4 * features * labels):.2f}",
        )
    return made


if __name__ == "__main__":
    main()
