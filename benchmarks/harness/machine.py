"""What the numbers were measured on."""

import hashlib
import math
import os
import platform
import re
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import fused_bce


def facts(device: str) -> dict[str, str | int]:
    """The columns that are the same in the whole run, by name."""
    build = fused_bce.build_info()
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "fused_bce": build["version"],
        "instruction_set": build["cpu_instruction_set"],
        "threads": torch.get_num_threads(),
        "kernels": hash_kernels(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


def hash_kernels(device: str) -> str:
    """A name for the code that the kernels of a device are compiled from, whatever its comments."""
    sources = Path(__file__).parents[2] / "csrc"
    folder = "cuda" if device == "cuda" else "cpu"
    files = [sources / "problem.h", *sources.glob("formulas/*"), *sources.glob(f"{folder}/*")]
    digest = hashlib.sha256()
    for file in sorted(files):
        code = re.sub(r"//.*", "", file.read_text(encoding="utf-8"))
        digest.update(" ".join(code.split()).encode())
    return digest.hexdigest()[:12]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def touch_constants() -> None:
    """Lets torch's log1p for AVX-512 read what it has for special values.

    It loads these constants under a mask, empty for ordinary values. While nothing has ever read
    their page of memory each such load goes the processor's slow way, and log1p takes seven times
    as long: until a call of another function that has its constants there, which is chance.
    """
    torch.log1p(torch.tensor([-0.0, -1.0, -2.0, math.inf] * 16))


class OtherLoad:
    """How many processors everything but this process kept busy inside a with block.

    Where threads wait for each other, as in every parallel loop, one that lost its processor costs
    all of them a time slice: times taken beside other work are multiples of that slice.
    """

    processors: float | None = None

    def __enter__(self) -> "OtherLoad":
        self.start, self.others = time.perf_counter(), other_seconds()
        return self

    def __exit__(self, *_) -> None:
        if self.others is not None:
            seconds = time.perf_counter() - self.start
            self.processors = round(max(0, (other_seconds() - self.others) / seconds), 2)


def other_seconds() -> float | None:
    """Processor time since the start of the machine, without this process; None if unknown."""
    try:
        counts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
