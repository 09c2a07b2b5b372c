"""The CUDA kernels under the thread sanitizer, on small grids; and faults planted in them, one at a
time, each of which must be found: a tool that never reported an error cannot be told from one that
does not run.

    python -m pytest tests/emulator/mutants.py

Needs GCC with its sanitizers and the headers of the extra `emulator`. Each build, of float32 only,
is loaded by a process of its own, which runs this file.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from planting import plant

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CUDA_HEADERS = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/include"))
CHUNK = 8192
WRONG, RACE = 1, 66  # exit statuses of a process
TSAN_OPTIONS = f"exitcode={RACE} halt_on_error=1"

# What stands in a file, and what stands there in the mutant
FAULTS = {
    "lanes left out": ("kernels.cuh", "distance = kWarp / 2;", "distance = kWarp / 4;"),
    "a chunk whole too early": ("kernels.cuh", "kChunk <= p.numel;", "kChunk <= p.numel + 1;"),
    "a chunk left out": ("kernels.cuh", "chunk < chunks; chunk +=", "chunk < gridDim.x; chunk +="),
    "a store beyond the end": ("kernels.cuh", "if (i + k < numel) p[k] =", "p[k] ="),
    "no last block": ("kernels.cuh", "== gridDim.x - 1", "== gridDim.x"),
    "two last blocks": ("kernels.cuh", "== gridDim.x - 1", ">= gridDim.x - 2"),
    "a ticket not reset": ("launch.cu", "ticket, 0, sizeof", "ticket, 1, sizeof"),
    "division by no element": ("kernels.cuh", "divisor == 0 ? 1 : divisor", "divisor"),
}  # fmt: skip


def places(word: str) -> list[tuple[str, int]]:
    """Where it stands: files, and how many stand before it in the file."""
    texts = {path.name: path.read_text() for path in sorted(CSRC.glob("cuda/*.cu*"))}
    return [(name, i) for name, text in texts.items() for i in range(text.count(word))]


BARRIERS = places("__syncthreads();")
FENCES = places("__threadfence();")


def without(word: str, name: str, which: int, csrc: Path) -> None:
    path = csrc / "cuda" / name
    parts = path.read_text().split(word)
    path.write_text(word.join(parts[: which + 1]) + ";" + word.join(parts[which + 1 :]))


# initial-exec: shared memory is there when its block begins, as on a GPU.
FLAGS = ["-std=c++20", "-O1", "-g1", "-Dalways_inline=unused", "-fPIC", "-fsanitize=thread", "-w"]
FLAGS += ["-ftls-model=initial-exec", f"-I{HERE}", f"-I{HERE / 'include'}"]
FLAGS += [f"-isystem{headers}" for headers in CUDA_HEADERS]


def compile_and_link(*arguments: object) -> None:
    subprocess.run(["g++", *FLAGS, *map(str, arguments)], check=True)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Path:
    """Compiled: it has no fault."""
    compiled = tmp_path_factory.mktemp("emulator") / "emulator.o"
    compile_and_link("-c", HERE / "emulator.cpp", "-o", compiled)
    return compiled


def compile_kernels(csrc: Path, folder: Path, emulator: Path) -> Path:
    """A library that the thread sanitizer watches, of the kernels that the probe calls."""
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    probe = (HERE / "probe.cpp").read_text().replace("../../csrc", str(csrc))
    source.write_text(f'#include "cuda.h"\n#include "{csrc / "cuda" / "launch.cu"}"\n{probe}')
    compile_and_link("-shared", source, emulator, "-o", library)
    return library


def run(library: Path) -> subprocess.CompletedProcess:
    """Of a process that loads it. No randomised addresses, for the thread sanitizer."""
    runtime = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "TSAN_OPTIONS": TSAN_OPTIONS}
    environment |= {"PYTHONPATH": str(HERE.parent)}
    command = ["setarch", "-R", sys.executable, __file__, str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture
def csrc(tmp_path) -> Path:
    return Path(shutil.copytree(CSRC, tmp_path / "csrc"))


@pytest.fixture
def check_found(csrc, emulator):
    def check(statuses: set[int], reports: str) -> None:
        done = run(compile_kernels(csrc, csrc.parent, emulator))
        output = done.stdout + done.stderr
        print(done.returncode, output[:2000])
        assert done.returncode in statuses, output
        assert re.search(reports, output), output

    return check


def test_kernels(tmp_path, emulator):
    done = run(compile_kernels(CSRC, tmp_path, emulator))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, csrc, check_found):
    name, there, instead = FAULTS[fault]
    plant(csrc / "cuda" / name, there, instead)
    check_found({WRONG, RACE}, "WRONG|data race")


@pytest.mark.parametrize(("name", "which"), BARRIERS)
def test_missing_barrier(name, which, csrc, check_found):
    without("__syncthreads();", name, which, csrc)
    check_found({WRONG, RACE}, "WRONG|data race")


@pytest.mark.parametrize(("name", "which"), FENCES)
def test_missing_fence(name, which, csrc, check_found):
    without("__threadfence();", name, which, csrc)
    check_found({RACE}, "data race")


def test_a_barrier_for_some(csrc, check_found):
    path = csrc / "cuda" / "kernels.cuh"
    text = path.read_text()
    assert BARRIERS
    path.write_text(text.replace("__syncthreads();", "if (threadIdx.x < 100) __syncthreads();"))
    check_found({-6}, "not all threads reach a barrier")


# In the process that has loaded a library


def guarded(numel: int, value=np.nan) -> np.ndarray:
    """Room for so many numbers, and behind them what must neither be read nor written."""
    whole = np.frombuffer(bytearray(4 * (numel + 68)), np.float32)
    start = -whole.ctypes.data % 64 // 4
    whole[:] = value
    return whole[start : start + numel + 16]


def wrong_mean(library, numel, blocks, weighted, ignored) -> str | None:
    random = np.random.default_rng(numel)
    logits, target, grad = guarded(numel), guarded(numel), guarded(numel)
    logits[:numel] = random.normal(size=numel) * 4
    target[:numel] = random.integers(0, 2, numel) if ignored != "all" else 2
    if ignored == "some":
        target[: numel // 2] = 2
    kept = target[:numel] != 2
    pos_weight = random.uniform(0.5, 2, 8).astype(np.float32)
    weights = np.resize(pos_weight, numel) if weighted else 1.0
    loss, divisor = np.full(1, np.nan, np.float32), np.array([float(kept.sum())])
    workspace = np.full(1024, 0x55, np.uint8)  # what an earlier launch may have left there
    library.probe_mean(
        ctypes.c_int64(numel),
        *(p.ctypes.data_as(ctypes.c_void_p) for p in (logits, target)),
        pos_weight.ctypes.data_as(ctypes.c_void_p) if weighted else None,
        ctypes.c_int64(8),
        ctypes.c_double(2.0 if ignored else np.nan),
        *(p.ctypes.data_as(ctypes.c_void_p) for p in (divisor, loss, grad, workspace)),
        ctypes.c_int64(blocks),
    )
    x = logits[:numel].astype(np.float64)
    positive = target[:numel] == 1
    losses = np.where(positive, weights * np.logaddexp(0, -x), np.logaddexp(0, x))
    sigmoid = 1 / (1 + np.exp(-x))
    grads = np.where(positive, weights * (sigmoid - 1), sigmoid)
    n = max(kept.sum(), 1)
    # float32, of which the approximations cost a few units
    if not abs(loss[0] - losses[kept].sum() / n) <= 2e-6 * np.abs(losses).max():
        return f"loss {loss[0]}, not {losses[kept].sum() / n}"
    if not (np.abs(grad[:numel] - np.where(kept, grads, 0) / n) <= 2e-6 / n).all():
        return "gradient"
    return None if np.isnan(grad[numel:]).all() else "written beyond the end"


def wrong_scale(library, numel, channels) -> str | None:
    grad = guarded(numel)
    grad[:numel] = before = np.random.default_rng(numel).normal(size=numel).astype(np.float32)
    grad_loss = np.arange(3, 3 + channels, dtype=np.float32)
    library.probe_scale(
        grad.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(numel),
        grad_loss.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(channels),
    )
    same = np.array_equal(grad[:numel], before * np.resize(grad_loss, numel))
    return None if same and np.isnan(grad[numel:]).all() else "scaled gradient"


def wrong_count(library, numel) -> str | None:
    target = guarded(numel, 2.0)
    target[:numel] = np.random.default_rng(numel).integers(0, 3, numel)
    count = np.zeros(1)
    library.probe_count_kept(
        target.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(numel),
        ctypes.c_double(2.0),
        count.ctypes.data_as(ctypes.c_void_p),
    )
    kept = (target[:numel] != 2).sum()
    return None if count[0] == kept else f"count {count[0]}, not {kept}"


# Blocks, whether there is a pos_weight, which targets are ignored
MEANS = [(2, False, None), (100, True, "some"), (100, False, "all")]


def main(path: str) -> int:
    library = ctypes.CDLL(path)
    for numel in (3 * CHUNK + 5, CHUNK - 1, 257):
        found = [wrong_mean(library, numel, *options) for options in MEANS]
        found += [wrong_scale(library, numel, channels) for channels in (1, numel)]
        found += [wrong_count(library, numel)]
        if any(found):
            print("WRONG", numel, [what for what in found if what])
            return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
