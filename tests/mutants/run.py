"""Plants faults in a clone of this repository, one at a time, and says which test finds each.

    python tests/mutants/run.py                # those that need no compiler
    python tests/mutants/run.py all            # with those in C++: minutes of compiling each
    python tests/mutants/run.py NAME...        # the faults of these names, see faults.py
    python tests/mutants/run.py --suite NAME   # not found by the tests named for it: all of them

It takes what is committed. Exits with 1 if a fault is found by no test, with 2 if a fault's text is
no longer where it was: then it says nothing about the tests, and has to be planted elsewhere.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import FAULTS, IN_PYTHON, Fault
from planting import plant, stands_once

import fused_bce

ROOT = Path(__file__).resolve().parents[2]
# Seconds after which tests hang, which is found, too.
HANGS = 1800


class Clone:
    """A checkout that is built, and as it was before each fault."""

    def __init__(self, folder: Path):
        self.root = folder / "fused_bce"
        self.built = folder / "built"
        self.environment = os.environ | {"PYTHONPATH": str(self.root), "FORCE_CUDA": "0"}
        self.command("git", "clone", "--quiet", str(ROOT), str(self.root), cwd=folder)

    def command(self, *arguments: str, **options) -> None:
        subprocess.run(
            arguments, check=True, **{"cwd": self.root, "env": self.environment} | options
        )

    def take_compiled_module(self) -> None:
        module = Path(fused_bce._C.__file__)
        shutil.copy2(module, self.root / "fused_bce" / module.name)

    def build(self) -> None:
        build = sys.executable, "setup.py", "-q", "build_ext", "--inplace"
        self.command(*build, stdout=subprocess.DEVNULL)

    def keep_build(self) -> None:
        shutil.copytree(self.root / "build", self.built / "build")
        (module,) = self.root.glob("fused_bce/_C*.so")
        shutil.copy2(module, self.built)

    def restore(self, path: Path, source: Path, needs_build: bool) -> None:
        """With the times of files, by which ninja tells what is to be compiled."""
        shutil.copy2(source, path)
        if needs_build:
            shutil.rmtree(self.root / "build")
            shutil.copytree(self.built / "build", self.root / "build")
            (module,) = self.built.glob("_C*.so")
            shutil.copy2(module, self.root / "fused_bce")

    def first_failure(self, tests: list[str]) -> str | None:
        """What fails first; None if nothing does."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(HANGS)
            except subprocess.TimeoutExpired:
                return "a test that hangs"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(0)
            output = log.read()
        if status == 0:
            return None
        if status < 0:
            return f"the end of the process by signal {-status}"
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        if not failed:
            raise RuntimeError(f"pytest exited with {status}:\n{output[-4000:]}")
        return failed[1]


def find(clone: Clone, fault: Fault, with_suite: bool) -> str | None:
    path, before = clone.root / fault.file, clone.root.parent / "before"
    shutil.copy2(path, before)
    plant(path, fault.text, fault.replacement)
    try:
        if fault.needs_build:
            clone.build()
        first, *rest = fault.tests.split(" -k ")
        tests = [f"tests/{name}" for name in first.split()]
        found = clone.first_failure([*tests, *(["-k", *rest] if rest else [])])
        return clone.first_failure([]) if found is None and with_suite else found
    finally:
        clone.restore(path, before, fault.needs_build)


def gone(names: list[str]) -> list[str]:
    """Faults whose text is not in its file, or not once."""
    return [
        f"{name}: {FAULTS[name].file}: {FAULTS[name].text}"
        for name in names
        if not stands_once(ROOT / FAULTS[name].file, FAULTS[name].text)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, or names of faults")
    parser.add_argument("--suite", action="store_true", help="all tests, where those named fail")
    parser.add_argument("--check", action="store_true", help="only whether the texts are there")
    given = parser.parse_args()
    names = given.names or [*IN_PYTHON]
    names = [*FAULTS] if names == ["all"] else names
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]!r}")
    if missing := gone([*FAULTS] if given.check else names):
        print("These texts are not there any more, or not once:", *missing, sep="\n  ")
        return 2
    return 0 if given.check else run(names, given.suite)


def run(names: list[str], with_suite: bool) -> int:
    missed, finders = [], []
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone(Path(folder))
        if any(FAULTS[name].needs_build for name in names):
            clone.build()
            clone.keep_build()
        else:
            clone.take_compiled_module()
        print("| fault | file | found by | s |\n|---|---|---|---|", flush=True)
        for name in names:
            start = time.monotonic()
            try:
                found = find(clone, FAULTS[name], with_suite)
            except subprocess.CalledProcessError:
                sys.exit(f"{name} does not compile: it would be found by no test")
            if found is None:
                missed.append(name)
            elif "::" in found:
                finders.append(found)
            seconds = time.monotonic() - start
            print(
                f"| {name} | {FAULTS[name].file} | {found or 'NOT FOUND'} | {seconds:.0f} |",
                flush=True,
            )
        if finders and (failure := clone.first_failure(finders)):
            sys.exit(f"This fails without a fault, too: {failure}")
    print(f"{len(names) - len(missed)} of {len(names)} found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
