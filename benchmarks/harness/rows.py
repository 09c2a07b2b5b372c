"""The CSV files: their rows, a reader and a writer."""

import csv
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import get_args

import torch

RESULTS = Path(__file__).parent.parent / "results"

# In processors; below it is what an idle system does by itself.
TOLERABLE_LOAD = 0.1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The columns that are the same in the whole run: see machine.py."""

    device: str
    device_name: str
    torch: str
    cuda: str
    fused_bce: str
    instruction_set: str
    threads: int
    date: str
    kernels: str = ""  # see hash_kernels; files from before have none


@dataclass(frozen=True, kw_only=True)
class Row(Facts):
    """One contender in one case. The fields are the header of the CSV."""

    contender: str
    mode: str
    dtype: str
    target_dtype: str
    reduction: str
    weights: str
    numel: int
    bytes_per_element: int
    median_seconds: float
    iqr_seconds: float
    wall_seconds: float
    peak_bytes: int | None
    other_load: float | None
    command: str
    workload: str = ""  # as in kernels, so in these two
    shape: str = ""

    @property
    def is_disturbed(self) -> bool:
        return self.other_load is not None and self.other_load > TOLERABLE_LOAD

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes_per_element * self.numel / self.median_seconds

    @property
    def logits_bytes(self) -> int:
        return self.numel * getattr(torch, self.dtype).itemsize

    @property
    def peak_multiple(self) -> float | None:
        """Peak memory in multiples of the logits, without the few bytes of the loss and sums."""
        if self.peak_bytes is None:
            return None
        return round(self.peak_bytes / self.logits_bytes, 2)


@dataclass(frozen=True, kw_only=True)
class AccuracyRow(Facts):
    """The largest error of one contender over a short range of logits."""

    contender: str
    quantity: str  # loss or gradient
    target: float
    logits_from: float
    logits_to: float
    points: int
    max_ulp: float
    command: str


@dataclass(frozen=True, kw_only=True)
class CounterRow(Facts):
    """What a GPU counted during one launch of a kernel: see counters.py."""

    direction: str  # forward or backward
    dtype: str
    target_dtype: str
    reduction: str
    weights: str
    numel: int
    least_bytes: int  # that must be read and written
    read_bytes: float
    written_bytes: float
    nanoseconds: float
    percent_of_peak: float
    percent_occupied: float
    registers: float
    warp_instructions: float
    command: str


def header(kind: type[Facts]) -> list[str]:
    return [field.name for field in fields(kind)]


def share_of_copy(rows: dict[str, Row]) -> float | None:
    """The bandwidth of the fused loss in percent of the copy's."""
    if "copy" not in rows:
        return None
    return 100 * rows["fused"].bandwidth / rows["copy"].bandwidth


def csv_path(output: Path, facts: dict[str, str | int], content: str) -> Path:
    """Where the rows go: the output if it is a file, else one in that folder.

    There is one file for the CPU, renewed by each run; for GPUs, one for each model and day.
    """
    if output.suffix == ".csv":
        return output
    if facts["device"] == "cpu":
        return output / f"cpu-{content}.csv"
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device_name"].lower()).strip("-")
    return output / f"{slug}-{content}-{facts['date'][:10]}.csv"


def read_rows(path: Path, kinds: Sequence[type[Facts]] = (Row,)) -> list:
    """The rows of a file, of that one of the kinds which has its columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        for kind in kinds:
            if is_header(reader.fieldnames or [], kind):
                return [parse_row(record, kind) for record in reader]
    raise SystemExit(f"{path} does not have the columns of this benchmark")


def is_header(names: Sequence[str], kind: type[Facts]) -> bool:
    required = {field.name for field in fields(kind) if field.default is MISSING}
    return set(header(kind)) >= set(names) >= required


def parse_row(record: dict[str, str], kind: type[Facts]) -> Facts:
    columns = [field for field in fields(kind) if field.name in record]
    return kind(**{field.name: parse_cell(record[field.name], field.type) for field in columns})


def parse_cell(text: str, kind: type) -> str | int | float | None:
    """In the type of a field; a type with "| None" may be empty."""
    first, *others = get_args(kind) or [kind]
    return None if others and not text else first(text)


def start_file(path: Path, append: bool = False, kind: type[Facts] = Row) -> None:
    """Writes the header, or checks the one that is there."""
    if append and path.exists():
        with path.open(newline="") as file:
            if next(csv.reader(file), None) != header(kind):
                raise SystemExit(f"{path} has other columns: nothing can be appended")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(header(kind))


def append_rows(path: Path, rows: Sequence[Facts]) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, header(type(rows[0]))).writerows(asdict(row) for row in rows)
