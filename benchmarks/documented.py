"""Compares the tables of README.md and docs/ with the results that they are made of.

    python benchmarks/documented.py            lists those that differ, and results of older kernels
    python benchmarks/documented.py --write    writes the tables anew

The exit status is 1 if anything is listed.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.machine import hash_kernels
from harness.rows import RESULTS, AccuracyRow, CounterRow, Row, read_rows

ROOT = Path(__file__).parents[1]


class Results:
    """The rows of a file."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def case(self, **columns: object) -> dict[str, Row]:
        """By contender, the rows that have these values in these columns."""
        found = {
            row.contender: row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in columns.items())
        }
        if not found:
            raise LookupError(f"no row has {columns}")
        return found


@dataclass(frozen=True)
class DocTable:
    page: str
    heading: str  # the first line of the table begins with it
    results: str  # the name of a file
    lines: Callable[[Results], Iterable[tuple[str, ...]]]  # the cells of each line

    def make_lines(self) -> list[str]:
        results = Results(read_rows(RESULTS / self.results))
        return [f"| {' | '.join(cells)} |" for cells in self.lines(results)]

    def replace_in(self, text: str) -> str:
        """The page with the lines of this table."""
        pattern = rf"(^{re.escape(self.heading)}.*\n\|[-|]+\|\n)(?:\|.*\n)+"
        lines = "".join(line + "\n" for line in self.make_lines())
        text, count = re.subn(pattern, lambda match: match[1] + lines, text, flags=re.MULTILINE)
        if count != 1:
            raise LookupError(f"{self.page} has {count} tables with the heading {self.heading!r}")
        return text


def time(row: Row) -> str:
    seconds = row.median_seconds
    value, unit = (seconds * 1e6, "us") if seconds < 5e-5 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def ratio(of: Row, to: Row) -> str:
    """Of their times."""
    value = of.median_seconds / to.median_seconds
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def share(of: Row, to: Row) -> str:
    """The same where it is about 1."""
    return f"{of.median_seconds / to.median_seconds:.2f}"


def peaks(rows: dict[str, Row], *contenders: str) -> str:
    """In multiples of the logits."""
    return ", ".join(f"{round(rows[name].peak_multiple, 1):g}" for name in contenders)


def speed(rows: dict[str, Row]) -> tuple[str, ...]:
    fused = rows["fused"]
    return time(fused), ratio(rows["eager"], fused), ratio(rows["compile"], fused)


BOTH = {"mode": "fwd+bwd", "reduction": "mean", "weights": "none"}
GOALS = [
    ("float32", {"numel": 128}),
    ("float32", {"numel": 2**20}),
    ("float32", {"numel": 2**24}),
    ("float32, `pos_weight` (C,)", {"numel": 2**24, "weights": "pos_weight"}),
    ("bfloat16", {"numel": 2**24, "dtype": "bfloat16"}),
    ("float16", {"numel": 2**24, "dtype": "float16"}),
    ("float64", {"numel": 2**24, "dtype": "float64"}),
]
MORE_GOALS = [
    *GOALS[:3],
    ("float32", {"numel": 2**26}),
    GOALS[3],
    ("float32, `weight` (N, 1)", {"numel": 2**24, "weights": "weight"}),
    ("float32, reduction none", {"numel": 2**24, "reduction": "none"}),
    *GOALS[4:],
    ("float32, forward only", {"numel": 128, "mode": "fwd"}),
    ("float32, forward only", {"numel": 2**24, "mode": "fwd"}),
]


def goals(cases: list) -> Callable[[Results], Iterable[tuple[str, ...]]]:
    def lines(results: Results) -> Iterable[tuple[str, ...]]:
        for label, columns in cases:
            rows = results.case(**{"dtype": "float32", **BOTH, **columns})
            exponent = columns["numel"].bit_length() - 1
            size = str(columns["numel"]) if exponent < 10 else f"2^{exponent}"
            yield label, size, *speed(rows)

    return lines


WORKLOADS = {
    "click-through": ("", "65,536 x 1"),
    "text labels": (", `pos_weight`", "256 x 13,330"),
    "extreme labels": (", bfloat16, bool targets", "*16 x 670,091"),
    "detection": (", `weight`", "*1 x 100,000 x 80"),
    "segmentation": (", channels_last, `pos_weight`", "*1 x 19 x 512 x 1,024"),
    "contrastive": ("", "4,096 x 4,096"),
}


def workloads(results: Results) -> Iterable[tuple[str, ...]]:
    for name, (more, shape) in WORKLOADS.items():
        rows = results.case(workload=name)
        yield name + more, shape, *speed(rows), peaks(rows, "fused", "compile", "eager")


TRAINING = {
    "64 features": "64 features",
    "512 features": "512 features",
    "512 features, 4 parts": "512 features, 4 accumulated parts (loss / 4)",
    "512 features, bfloat16": "512 features under autocast, bfloat16",
}


def training(results: Results) -> Iterable[tuple[str, ...]]:
    for name, label in TRAINING.items():
        rows = results.case(workload=name)
        contenders = ("eager", "compile", "fused", "fused compile", "no loss")
        yield label, *(time(rows[contender]) for contender in contenders)


EXTRAS = {
    "bool targets": "bool targets",
    "bool targets, bfloat16": "bool targets, bfloat16 logits",
    "int64 targets": "int64 targets",
    "ignore_index": "`ignore_index`, uint8 targets, 20 % ignored",
    "label_smoothing": "`label_smoothing`",
}


def extras(results: Results) -> Iterable[tuple[str, ...]]:
    for name, label in EXTRAS.items():
        rows = results.case(workload=name, numel=2**24)
        yield label, *speed(rows), peaks(rows, "fused", "compile", "eager")


HEADS = {
    "fused": "`recompute=False`",
    "fused recompute": "`recompute=True`",
    "eager": "torch.nn",
    "compile": "`torch.compile`",
}


def heads(results: Results) -> Iterable[tuple[str, ...]]:
    layers = results.case(workload="six heads")
    alone = results.case(workload="six losses, leaf logits")
    for name, label in HEADS.items():
        times = share(layers[name], layers["fused"]), share(alone[name], alone["fused"])
        yield label, f"{layers[name].peak_multiple:.0f} N", *times


FOCAL = {
    "focal": ("focal, float32", "2^22"),
    "focal, gamma 1.5": ("focal, float32, gamma 1.5", "2^22"),
    "focal, bfloat16": ("focal, bfloat16", "2^22"),
    "RetinaNet": ("focal, RetinaNet, one image, float32", "160,956 x 91"),
    "FCOS": ("focal, FCOS, two images, float32", "2 x 17,884 x 91"),
    "quality focal": ("quality focal, float32", "2^22"),
    "varifocal": ("varifocal, float32", "2^22"),
    "varifocal, detached": ("varifocal, float32, `detach_weight`", "2^22"),
    "asymmetric": ("asymmetric, float32", "2^22"),
    "asymmetric, detached": ("asymmetric, float32, `detach_weight`", "2^22"),
}


def focal(results: Results) -> Iterable[tuple[str, ...]]:
    for name, (label, size) in FOCAL.items():
        rows = results.case(workload=name)
        yield label, size, *speed(rows)[1:], peaks(rows, "fused", "compile", "eager")


HEAD = {
    "AmazonCat-13K": "256 x 768 x 13,330",
    "AmazonCat-13K, bfloat16": "256 x 768 x 13,330",
    "wide layer": "256 x 768 x 32,768",
    "narrow layer": "256 x 128 x 131,072",
    "Wiki-500K": "128 x 64 x 501,070",
    "few rows": "64 x 64 x 131,072",
    "many rows": "4,096 x 128 x 16,384",
}


def head(results: Results) -> Iterable[tuple[str, ...]]:
    for name, shape in HEAD.items():
        rows = results.case(workload=name)
        times = (share(rows["head"], rows[n]) for n in ("gemms", "fused", "compile", "eager"))
        names = ("head", "fused", "compile", "eager")
        peak = ", ".join(f"{rows[n].peak_multiple:.2f}" for n in names)
        yield name, shape, *times, peak


PARTS = {"parts": "`parts=16`", "whole": "whole", "eager": "torch.nn"}


def parts(results: Results) -> Iterable[tuple[str, ...]]:
    for shape in ("64x256x100000", "128x64x501070"):
        by_sgd, by_adam = (
            results.case(shape=shape, workload=optimizer) for optimizer in ("SGD", "AdamW")
        )
        sizes = [int(size) for size in shape.split("x")]
        for name, label in PARTS.items():
            of_weight = by_sgd[name].peak_bytes / (4 * sizes[1] * sizes[2])
            times = time(by_sgd[name]), time(by_adam[name])
            yield " x ".join(f"{size:,}" for size in sizes), label, f"{of_weight:.2f}", *times


def pairwise(results: Results) -> Iterable[tuple[str, ...]]:
    contenders = ("eager", "chunked", "compile", "fused")
    for size in (2**10, 2**11, 2**12, 2**13, 2**14):
        rows = results.case(workload="batch", numel=size**2)
        times = (share(rows[name], rows["gemms"]) for name in contenders)
        peak = (f"{rows[name].peak_bytes / 2**20:,.0f}" for name in contenders)
        yield f"{size:,}", f"{4 * size**2 // 2**20:,}", *times, *peak


def processes(results: Results) -> Iterable[tuple[str, ...]]:
    for number in (1, 2, 4):
        rows = results.case(workload=f"{number} process{'es' if number > 1 else ''}")
        logits = 4 * rows["fused"].numel // 2**20
        peak = (f"{rows[n].peak_bytes / 2**20:,.0f}" for n in ("eager", "chunked", "fused"))
        yield str(number), str(logits), *peak


TABLES = [
    DocTable("README.md", "| forward and backward | N |", "cpu-goals.csv", goals(GOALS)),
    DocTable("docs/speed.md", "| reduction mean | N |", "cpu-goals.csv", goals(MORE_GOALS)),
    DocTable("docs/speed.md", "| | logits | time of fused |", "cpu-workloads.csv", workloads),
    DocTable("docs/speed.md", "| time of a step |", "cpu-training.csv", training),
    DocTable("docs/speed.md", "| | time of fused |", "cpu-extras.csv", extras),
    DocTable("docs/extras.md", "| | peak memory |", "cpu-heads.csv", heads),
    DocTable("docs/focal.md", "| reduction sum", "cpu-focal.csv", focal),
    DocTable("docs/head.md", "| | rows x features x labels |", "cpu-head.csv", head),
    DocTable("docs/head.md", "| rows x features x labels | | peak", "cpu-parts.csv", parts),
    DocTable("docs/pairwise.md", "| N | logits, MiB |", "cpu-pairwise.csv", pairwise),
    DocTable("docs/pairwise.md", "| processes |", "cpu-pairwise-processes.csv", processes),
]


def list_differences(write: bool = False) -> list[str]:
    """The tables that are not made of their results; writes them if that is asked for."""
    differences = []
    for table in TABLES:
        path = ROOT / table.page
        text = path.read_text(encoding="utf-8")
        new = table.replace_in(text)
        if new != text:
            differences.append(f"{table.page}: {table.heading!r} differs from {table.results}")
            if write:
                path.write_text(new, encoding="utf-8")
    return differences


def list_older_results() -> list[str]:
    """The results of other kernels than those of today's sources."""
    older = []
    for path in sorted(RESULTS.glob("*.csv")):
        rows = read_rows(path, (Row, AccuracyRow, CounterRow))
        measured = {row.kernels or "unknown" for row in rows}
        if measured != {hash_kernels(rows[0].device)}:
            older.append(f"{path.name} of {rows[0].date[:10]} is of kernels {', '.join(measured)}")
    return older


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    arguments = parser.parse_args()
    lines = [*list_differences(arguments.write), *list_older_results()]
    print(*lines, sep="\n")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
