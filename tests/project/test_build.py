"""What a user reads when a build does not fit."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from setup_script import ROOT, run_setup
from torch.utils import cpp_extension

import fused_bce


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_torch_is_refused():
    """The version is compared before torch is called, so a pretended one does."""
    result = run_python("-c", "import torch; torch.__version__ = '9.9.0'; import fused_bce")
    major, minor = torch.__version__.split(".")[:2]
    assert result.returncode == 1
    assert (
        f"ImportError: fused_bce was built for torch {major}.{minor} but this is torch 9.9.0. "
        "Rebuild it in its source folder: pip install"
    ) in result.stderr


def test_a_patch_release_is_accepted():
    major, minor = torch.__version__.split(".")[:2]
    pretend = f"import torch; torch.__version__ = '{major}.{minor}.99'; import fused_bce"
    assert run_python("-c", pretend).returncode == 0


def import_from(path):
    """An editable install would find the extension in its own folder, hence none is asked."""
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r}); "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import fused_bce"
    )
    return run_python("-c", code).stderr


def test_a_folder_without_build_says_so(tmp_path):
    package = tmp_path / "fused_bce"
    package.mkdir()
    for source in Path(fused_bce.__file__).parent.glob("*.py"):
        (package / source.name).write_bytes(source.read_bytes())
    # What Python 2.7 would not load, nor another does
    (package / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    assert (
        "ImportError: fused_bce is not built here, or not for this Python. Build it in its source "
        "folder: pip install --no-build-isolation ."
    ) in import_from(tmp_path)


def test_a_zip_file_says_so(tmp_path):
    """Such as a wheel on PYTHONPATH."""
    wheel = tmp_path / "fused_bce.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in Path(fused_bce.__file__).parent.glob("*.py"):
            archive.write(path, f"fused_bce/{path.name}")
    inside = wheel / "fused_bce" / "__init__.py"
    assert (
        f"ImportError: fused_bce cannot be imported from a zip file, as {inside} is in one: Python "
        "loads no compiled module from there. Install the wheel with pip, or unpack the file."
    ) in import_from(wheel)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_forced_cuda_needs_a_cuda_torch():
    error = run_setup(FORCE_CUDA="1")
    assert "is a CPU build. Install a CUDA build of torch" in error


def test_what_cannot_build_it_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1"))
        assert "fused_bce needs torch 2.11 or newer, and this is torch 2.10.1" in run_setup()
    with monkeypatch.context() as patch:
        patch.setattr(setuptools, "__version__", "65.5.0")
        assert 'this is 65.5.0: pip install "setuptools>=77"' in run_setup()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "there is no pybind11 here" in run_setup()


def test_no_compiler_is_named(tmp_path):
    error = run_setup(CXX="absent++")
    assert "there is no absent++ here. Install GCC 11 or newer (the package g++ of Debian" in error
    # What a folder on PATH that the user may not read makes of it, for others than root
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o000)
    path = f"{secret}{os.pathsep}{os.environ['PATH']}"
    assert "there is no absent++ here. Install GCC" in run_setup(CXX="absent++", PATH=path)
    script = tmp_path / "not-executable"
    script.touch()
    assert f"there is no {script} here" in run_setup(CXX=str(script))


def make_compiler(path, *macros):
    """One that says these macros of itself."""
    path.write_text("#!/bin/sh\n" + "".join(f"echo '#define {macro}'\n" for macro in macros))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("macros", [["__cplusplus 201709L"], []], ids=["GCC 10", "a failure"])
def test_an_old_compiler_is_refused(tmp_path, macros):
    old = make_compiler(tmp_path / "g++", *macros)
    error = run_setup(CXX=old)
    assert f"fused_bce is C++20, which {old} does not compile. Install GCC 11 or newer" in error


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Clang is the compiler of torch")
def test_clang_is_refused(tmp_path):
    clang = make_compiler(tmp_path / "clang++", "__clang__ 1", "__cplusplus 202002L")
    assert f"but {clang} is Clang: set CXX=g++" in run_setup(CXX=clang)


def test_gcc_is_refused_on_macos(monkeypatch, tmp_path):
    gcc = make_compiler(tmp_path / "g++", "__GNUC__ 14", "__cplusplus 202002L")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert f"is built by Clang, as torch is: {gcc} is not" in run_setup(CXX=gcc)


def test_missing_headers_of_python_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    error = run_setup()
    assert f"there is no {tmp_path}/Python.h here. Install them (the package python3-dev" in error


def test_ninja_is_found_beside_python_or_named(monkeypatch, tmp_path):
    """pip installs it there, and in `make` nobody has activated the environment."""
    compiler = make_compiler(tmp_path / "g++", "__cplusplus 202002L", "Py_PYTHON_H")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    environment = {"CXX": compiler, "PATH": str(tmp_path / "absent")}
    error = run_setup(**environment)
    assert "there is no ninja here: pip install ninja" in error
    make_compiler(tmp_path / "ninja")
    assert run_setup(**environment)["version"]()


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert run_setup().startswith("fused_bce does not support Windows")


def test_openmp_on_macos(monkeypatch, tmp_path):
    """Without the header that torch's wheels for macOS bring there is a warning, not an error."""
    openmp_args = run_setup()["openmp_args"]
    monkeypatch.setattr(cpp_extension, "include_paths", lambda *_: [str(tmp_path)])
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(match="there is no omp.h beside this torch: fused_bce will use one thread"):
        assert openmp_args() == []
    (tmp_path / "omp.h").touch()
    assert openmp_args() == ["-Xpreprocessor", "-fopenmp"]
    monkeypatch.setenv("SANITIZE", "thread")
    assert openmp_args() == []
