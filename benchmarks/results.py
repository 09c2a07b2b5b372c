"""The CSV: one Row, its reader and its writer."""

import csv
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# In processors; below it is what an idle system does by itself.
TOLERABLE_LOAD = 0.1


@dataclass(frozen=True)
class Row:
    """One contender in one case. The fields are the header of the CSV."""

    device: str
    device_name: str
    torch: str
    cuda: str
    fused_bce: str
    instruction_set: str
    threads: int
    date: str
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

    @property
    def is_disturbed(self) -> bool:
        return self.other_load is not None and self.other_load > TOLERABLE_LOAD

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes_per_element * self.numel / self.median_seconds


HEADER = [field.name for field in fields(Row)]


def file_name(device: str, device_name: str, date: str, content: str) -> str:
    """One file for the CPU, renewed by each run; for GPUs, one for each model and day."""
    if device == "cpu":
        return f"cpu-{content}.csv"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return f"{slug}-{content}-{date[:10]}.csv"


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != HEADER:
            raise SystemExit(f"{path} does not have the columns of this benchmark")
        return [parse_row(record) for record in reader]


def parse_row(record: dict[str, str]) -> Row:
    values: dict = dict(record)
    for name in ("threads", "numel", "bytes_per_element", "peak_bytes"):
        values[name] = int(record[name]) if record[name] else None
    for name in ("median_seconds", "iqr_seconds", "wall_seconds", "other_load"):
        values[name] = float(record[name]) if record[name] else None
    return Row(**values)


def start_file(path: Path, append: bool) -> None:
    """Writes the header, or checks the one that is there."""
    if append and path.exists():
        read_rows(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(HEADER)


def append_rows(path: Path, rows: list[Row]) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, HEADER).writerows(asdict(row) for row in rows)
