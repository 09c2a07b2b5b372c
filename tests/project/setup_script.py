"""setup.py in this process, which has imported torch already: that takes a process longest."""

import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_setup(*arguments, **environment):
    """As the build backend runs it, in the source folder: its globals, or what it exits with."""
    # PATH as it is, for setup.py appends to it
    environment = {"FORCE_CUDA": "0", "PATH": os.environ["PATH"]} | environment
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setuptools'
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["setup.py", "-q", *map(str, arguments or ["--name"])])
        patch.chdir(ROOT)
        try:
            return runpy.run_path("setup.py")
        except SystemExit as stopped:
            return stopped.code
