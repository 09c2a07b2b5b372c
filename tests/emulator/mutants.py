"""The CUDA kernels under the thread sanitizer, on small grids; and faults planted in them, one at a
time, each of which must be found: a tool that never reported an error cannot be told from one that
does not run.

    python -m pytest tests/emulator/mutants.py

Needs GCC with its sanitizers and the headers of the extra `emulator`. Each build, of float32 only,
is loaded by a process of its own, which runs probing.py.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from planting import plant
from probing import WRONG

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CUDA_HEADERS = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/include"))
RACE = 66  # exit status of a process; that of probing.py is WRONG
TSAN_OPTIONS = f"exitcode={RACE} halt_on_error=1"

RESET = "C10_CUDA_CHECK(cudaMemsetAsync(workspace.ticket, 0, sizeof(unsigned), stream))"
SECOND_KERNEL = "if (workspace.sums && !workspace.ticket)"
COVERS = "if (error != cudaErrorNoKernelImageForDevice &&"

# The file, what stands there, and what in the mutant
FAULTS = {
    "lanes left out": ("kernels.cuh", "distance = kWarp / 2;", "distance = kWarp / 4;"),
    "a chunk whole too early": (
        "launch.cu",
        "(problem.numel / kChunk)",
        "((problem.numel + 1) / kChunk)",
    ),
    "a chunk left out": (
        "kernels.cuh",
        "chunk < a.chunks; chunk +=",
        "chunk < gridDim.x; chunk +=",
    ),
    "a store beyond the end": ("kernels.cuh", "if (i + k < numel) p[k] =", "p[k] ="),
    "no last block": ("kernels.cuh", "== gridDim.x - 1", "== gridDim.x"),
    "two last blocks": ("kernels.cuh", "== gridDim.x - 1", ">= gridDim.x - 2"),
    "division by no element": ("kernels.cuh", "divisor == 0 ? 1 : divisor", "divisor"),
    "a ticket reset to 1": ("launch.cu", RESET, RESET.replace(", 0,", ", 1,")),
    "no reset": ("launch.cu", RESET, ""),
    "a reset by the host": ("launch.cu", RESET, "*workspace.ticket = 0"),
    "a reset in no stream": ("launch.cu", RESET, RESET.replace("stream", "nullptr")),
    "a ticket for all": (
        "launch.cu",
        "= static_cast<unsigned*>(workspace_bytes)",
        "= &ticket_for_all",
    ),
    "a kernel in no stream": ("launch.cuh", "kThreads, stream, [=]", "kThreads, nullptr, [=]"),
    "a second kernel in no stream": (
        "launch.cu",
        "add_up_kernel, 1, stream",
        "add_up_kernel, 1, nullptr",
    ),
    "no second kernel": ("launch.cu", SECOND_KERNEL, "if (false)"),
    "a sum left out": (
        "launch.cu",
        "sums, chunks_of(problem.numel)",
        "sums, chunks_of(problem.numel) - 1",
    ),
    "an error as an answer": ("launch.cu", COVERS, "if (error == cudaSuccess &&"),
    "an answer as an error": ("launch.cu", COVERS, "if ("),
    "a failed launch": ("launch.cuh", "  C10_CUDA_KERNEL_LAUNCH_CHECK();", ""),
}


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
def emulator(tmp_path_factory) -> list[Path]:
    """Compiled: it has no fault."""
    folder = tmp_path_factory.mktemp("emulator")
    compiled = [folder / f"{name}.o" for name in ("emulator", "streams")]
    for path in compiled:
        compile_and_link("-c", HERE / f"{path.stem}.cpp", "-o", path)
    return compiled


def compile_kernels(csrc: Path, folder: Path, emulator: list[Path]) -> Path:
    """A library that the thread sanitizer watches, of the kernels that the probe calls."""
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    probe = (HERE / "probe.cpp").read_text().replace("../../csrc", str(csrc))
    shared = "unsigned ticket_for_all;  // what a mutant takes\n"
    launch = f'#include "{csrc / "cuda" / "launch.cu"}"\n'
    source.write_text(f'#include "cuda.h"\n{shared}{launch}{probe}')
    compile_and_link("-shared", source, *emulator, "-o", library)
    return library


def run(library: Path) -> subprocess.CompletedProcess:
    """Of a process that loads it. No randomised addresses, for the thread sanitizer."""
    runtime = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "TSAN_OPTIONS": TSAN_OPTIONS}
    environment |= {"PYTHONPATH": str(HERE.parent)}
    command = ["setarch", "-R", sys.executable, str(HERE / "probing.py"), str(library)]
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
