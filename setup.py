"""Builds fused_bce._C. What is not metadata (pyproject.toml) is decided here, and two pieces of
metadata that depend on the torch at hand: the version and what the package requires.

Environment variables:
  FORCE_CUDA            1: build the CUDA kernels although no GPU is visible; 0: leave them out
  TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0;9.0+PTX" (default: see default_cuda_archs)
  EMULATE_CUDA          1: compile the CUDA kernels for the host, for tests: see tests/emulator
  TAG_VERSION           1: name what it is built for in the version: see .ci/build-wheel
  DEBUG                 1: no optimisation, debug symbols
  SANITIZE              sanitizers of the compiler, such as "address,undefined": see .ci/sanitize
  ONE_FILE              1: compile the C++ as one file, but for the instruction sets: half the time
                        of a whole build, most of which goes into torch's headers
  MAX_JOBS              compilers that run at the same time
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import setuptools
from setuptools import setup

if sys.platform == "win32":
    sys.exit("fused_bce does not support Windows: its kernels are written for GCC and Clang")

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"fused_bce is compiled against the torch that it will run with, and there is no "
        f"{error.name} here (pip builds in an environment of its own unless told not to). Install "
        'torch, "setuptools>=77", ninja and pybind11, then: pip install --no-build-isolation .'
    )

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"fused_bce is built by setuptools 77 or newer, and this is {setuptools.__version__}: "
        'pip install "setuptools>=77"'
    )

OLDEST_TORCH = "2.11"
if torch.__version__ < OLDEST_TORCH:
    sys.exit(
        f"fused_bce needs torch {OLDEST_TORCH} or newer, and this is torch {torch.__version__}"
    )

# Ampere and Hopper as machine code, PTX for what comes after; and machine code for Blackwell, which
# would compile that PTX for a minute at first use, where this nvcc knows it.
CUDA_ARCHS = "8.0;9.0+PTX"
CUDA_ARCHS_OF_SOME_NVCC = {"sm_100": "10.0", "sm_120": "12.0"}

# torch 2.11 would have C++17.
CXX_STANDARD = "-std=c++20"

COMPILER_TO_INSTALL = (
    "Install GCC 11 or newer (the package g++ of Debian, gcc-c++ of Fedora), on macOS Apple's "
    "command line tools: xcode-select --install"
)
HEADERS_TO_INSTALL = "Install them (the package python3-dev of Debian, python3-devel of Fedora)"

ROOT = Path(__file__).parent

# An sdist is for any torch; all else that is made here has been compiled for this one.
IS_SDIST = "sdist" in sys.argv


def requirements() -> list[str]:
    """The extension loads under one minor release of torch: see check_torch_version in csrc."""
    major, minor = torch.__version__.split(".")[:2]
    return [f"torch>={OLDEST_TORCH}" if IS_SDIST else f"torch=={major}.{minor}.*"]


def version() -> str:
    """0.1.0, or 0.1.0+pt213cpu: the local version of PyTorch Geometric's wheels, which has torch's
    minor release and CUDA's in letters and digits, so that PEP 440 and indexes leave it as it is.

    Not unless asked for: pip refuses an sdist whose metadata have another version than its name.
    """
    text = (ROOT / "fused_bce/__init__.py").read_text()
    public = re.search('^__version__ = "(.+)"$', text, re.MULTILINE)[1]
    if IS_SDIST or os.environ.get("TAG_VERSION") != "1":
        return public
    major, minor = torch.__version__.split(".")[:2]
    kernels = f"cu{torch.version.cuda.replace('.', '')}" if use_cuda() else "cpu"
    return f"{public}+pt{major}{minor}{kernels}"


def sources(folder: str, suffix: str) -> list[str]:
    paths = sorted((ROOT / "csrc" / folder).glob(f"*{suffix}"))
    return [str(path.relative_to(ROOT)) for path in paths]


def cpu_sources() -> list[str]:
    # What composite/ specialises comes before what calls it: see ONE_FILE.
    folders = ("composite", "", "head", "cpu")
    paths = [path for folder in folders for path in sources(folder, ".cpp")]
    if sanitizes_threads():
        # Threads meet in the same places, whatever the width of a vector.
        paths = [path for path in paths if "/isa_avx" not in path]
    if os.environ.get("ONE_FILE") != "1":
        return paths
    apart = [path for path in paths if "/isa_" in path]
    # What a file of this name includes is code to Clang's analyzer, which does not follow headers.
    return [write_source("UnifiedSource", [p for p in paths if p not in apart]), *apart]


def write_source(name: str, included: list[str]) -> str:
    """A file below build/ that includes these. It stays as it is where another build reads it."""
    source = ROOT / "build" / "sources" / f"{name}.cpp"
    text = "".join(f'#include "{ROOT / path}"\n' for path in included)
    if not source.exists() or source.read_text() != text:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
    return str(source.relative_to(ROOT))


def use_cuda() -> bool:
    forced = os.environ.get("FORCE_CUDA")
    if forced is None:
        return torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    if forced == "1":
        check_cuda_toolchain()
    return forced == "1"


def check_cuda_toolchain() -> None:
    if torch.version.cuda is None:
        sys.exit(
            f"FORCE_CUDA=1, but torch {torch.__version__} is a CPU build. "
            "Install a CUDA build of torch, or leave FORCE_CUDA out."
        )
    if cpp_extension.CUDA_HOME is None:
        sys.exit(
            f"FORCE_CUDA=1, but there is no CUDA toolkit: set CUDA_HOME to the folder of "
            f"CUDA {torch.version.cuda}, or leave FORCE_CUDA out."
        )


def default_cuda_archs() -> str:
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    if not nvcc.exists():
        sys.exit(f"There is no CUDA toolkit in {cpp_extension.CUDA_HOME}, CUDA_HOME: no bin/nvcc.")
    done = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, text=True, check=True)
    known = done.stdout.split()
    others = [arch for code, arch in CUDA_ARCHS_OF_SOME_NVCC.items() if code in known]
    return ";".join([CUDA_ARCHS, *others])


def preprocess(text: str, *options: str) -> str:
    """The macros that are defined after this text; none if the compiler fails."""
    compiler = cpp_extension.get_cxx_compiler()
    command = [*shlex.split(compiler), CXX_STANDARD, "-dM", "-E", "-x", "c++", *options, "-"]
    try:
        done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=False)
    except OSError:  # PermissionError where PATH has a folder that the user may not read
        sys.exit(
            f"fused_bce is compiled by GCC, and there is no {compiler} here. {COMPILER_TO_INSTALL}"
        )
    return done.stdout


def check_compiler() -> None:
    """On Linux torch brings GCC's OpenMP runtime, on macOS LLVM's, which is what Clang calls."""
    compiler = cpp_extension.get_cxx_compiler()
    macros = preprocess("")
    if "__cplusplus 202002L" not in macros:
        sys.exit(f"fused_bce is C++20, which {compiler} does not compile. {COMPILER_TO_INSTALL}")
    if sys.platform == "linux" and "__clang__" in macros:
        sys.exit(
            f"On Linux fused_bce is built by GCC, as torch is, but {compiler} is Clang: set CXX=g++"
        )
    if sys.platform == "darwin" and "__clang__" not in macros:
        sys.exit(f"On macOS fused_bce is built by Clang, as torch is: {compiler} is not")


def check_python_headers() -> None:
    folder = sysconfig.get_path("include")
    if "Py_PYTHON_H" not in preprocess("#include <Python.h>", f"-I{folder}"):
        sys.exit(
            f"fused_bce is compiled against the headers of Python, and there is no "
            f"{folder}/Python.h here. {HEADERS_TO_INSTALL}"
        )


def check_ninja() -> None:
    """pip puts it beside this Python, a folder that is on PATH in an activated environment only."""
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    if not cpp_extension.is_ninja_available():
        sys.exit("fused_bce is built with ninja, and there is no ninja here: pip install ninja")


def compile_args() -> list[str]:
    args = [CXX_STANDARD, "-fvisibility=hidden", "-Wall", *sanitizer_args()]
    if sanitizer_args():
        # Lines, for a report; variables double the time of the build, what is inlined everywhere
        # makes it ten times as long.
        args += ["-O1", "-g1", "-Dalways_inline=unused"]
    elif os.environ.get("DEBUG") == "1":
        args += ["-O0", "-g"]
    else:
        args += ["-O3", "-g0"]
    if sanitizes_threads():
        args += ["-DFUSED_BCE_BASELINE_ONLY"]
    return [*args, *openmp_args()]


def openmp_args() -> list[str]:
    """For the compiler only, without which at::parallel_for is serial. The linker gets none: the
    symbols come from the OpenMP runtime that torch brings, so that there is one pool of threads."""
    if sanitizes_threads():
        # Takes the barriers of that runtime, which it cannot see into, for races.
        return []
    if sys.platform != "darwin":
        return ["-fopenmp"]
    # Apple's compiler has OpenMP, and its driver hides it; the header comes with torch's wheels.
    if any(Path(folder, "omp.h").exists() for folder in cpp_extension.include_paths()):
        return ["-Xpreprocessor", "-fopenmp"]
    warnings.warn(
        "there is no omp.h beside this torch: fused_bce will use one thread", stacklevel=2
    )
    return []


def sanitizes_threads() -> bool:
    return "thread" in os.environ.get("SANITIZE", "")


def sanitizer_args() -> list[str]:
    sanitizers = os.environ.get("SANITIZE")
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"] if sanitizers else []


def cuda_headers() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        for header in sorted(Path(folder).glob("cu*/include/cuda_runtime.h")):
            return header.parent
    sys.exit("EMULATE_CUDA=1 needs CUDA's headers: those of the extra `emulator` in pyproject.toml")


def emulate_cuda(options: dict) -> None:
    """On tensors of the CPU, the CUDA kernels run in the place of the CPU's."""
    folder = ROOT / "tests" / "emulator"
    for name in ("emulator.cpp", "streams.cpp"):
        options["sources"].append(str((folder / name).relative_to(ROOT)))
    for kernel in sources("cuda", ".cu"):
        # torch would have nvcc compile a file of that name.
        options["sources"].append(write_source(Path(kernel).stem, [str(folder / "cuda.h"), kernel]))
    options["include_dirs"] += [str(folder), str(folder / "include")]
    options["extra_compile_args"]["cxx"] += [
        '-DFUSED_BCE_CUDA="emulated"',
        "-DFUSED_BCE_EMULATES_CUDA",
        f"-isystem{cuda_headers()}",
        # Of loops that nvcc unrolls, and of branches for no dtype at all
        "-Wno-unknown-pragmas",
        "-Wno-maybe-uninitialized",
    ]


def extension():
    check_compiler()
    check_python_headers()
    check_ninja()
    options = {
        "name": "fused_bce._C",
        "sources": cpu_sources(),
        "include_dirs": [pybind11.get_include()],
        "depends": [str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h")],
        "extra_compile_args": {"cxx": compile_args()},
        "extra_link_args": sanitizer_args(),
    }
    if os.environ.get("EMULATE_CUDA") == "1":
        emulate_cuda(options)
        return cpp_extension.CppExtension(**options)
    if not use_cuda():
        return cpp_extension.CppExtension(**options)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_cuda_archs()
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs = archs.replace(" ", ";")
    options["sources"] += sources("cuda", ".cu")
    options["extra_compile_args"]["cxx"].append(f'-DFUSED_BCE_CUDA="{archs}"')
    options["extra_compile_args"]["nvcc"] = [CXX_STANDARD, "-O3", "--expt-relaxed-constexpr"]
    return cpp_extension.CUDAExtension(**options)


setup(
    version=version(),
    install_requires=requirements(),
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
