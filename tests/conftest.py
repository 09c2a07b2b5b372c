"""Fixtures for every test, and the option that thins parametrised tests out."""

import gc
import itertools
import os
from collections import defaultdict

import pytest
import torch
from helpers import EMULATES_CUDA, quoted_folder_of_torch, why_no_cuda
from torch.utils import cpp_extension

from fused_bce import _C

GPUS = ["cuda"] if why_no_cuda() is None else []
DEVICES = ["cpu", *GPUS]
KERNELS = ["emulated cuda"] if EMULATES_CUDA else [*_C.instruction_sets(), *GPUS]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """The device that a test runs on; a test runs once for each that is there."""
    return request.param


@pytest.fixture(params=KERNELS)
def kernel_device(request):
    """The device to run on, with each instruction set of the CPU forced in turn."""
    if request.param not in _C.instruction_sets():
        yield "cpu" if EMULATES_CUDA else "cuda"
        return
    before = _C.current_instruction_set()
    _C.use_instruction_set(request.param)
    yield "cpu"
    _C.use_instruction_set(before)


@pytest.fixture(autouse=True, scope="session")
def _compiler_cache(tmp_path_factory):
    """What an earlier run compiled would hide that this one cannot; but the processes of one run
    share it, each of which would compile torch's headers else."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _folder_of_torch_is_quoted():
    """Its compiler fails where the path has a space, until torch 2.14 quotes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_extension, "TORCH_LIB_PATH", quoted_folder_of_torch())
        yield


@pytest.fixture
def _fresh_compiler():
    """Graphs of other tests count towards its limits."""
    # Takes a second, and few tests compile.
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, whichever tests ran before it."""
    # torch.manual_seed keeps its traceback, for each kind of device that is not there: half a
    # millisecond.
    torch.default_generator.manual_seed(0)
    if GPUS:
        torch.cuda.manual_seed_all(0)


# What torch 2.11 says once in a process: of the first torch.profiler.profile, which later releases
# say of the second, and of the first sparse tensor, also of its own conversions.
WARNINGS_OF_TORCH_2_11 = (
    "ignore:Warning. Profiler clears events at the end of each cycle:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)


def pytest_configure(config):
    if torch.__version__ < "2.12":
        for line in WARNINGS_OF_TORCH_2_11:
            config.addinivalue_line("filterwarnings", line)


def pytest_addoption(parser):
    parser.addoption(
        "--pairs",
        action="store_true",
        help="run so few cases of each parametrised test that every two values of two parameters "
        "still meet in one",
    )


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    if not GPUS:
        deselect(config, items, {item for item in items if item.get_closest_marker("gpu")})
    if config.getoption("pairs"):
        tests = defaultdict(list)
        for item in items:
            tests[item.nodeid.partition("[")[0]].append(item)
        chosen = {item for cases in tests.values() for item in choose_pairs(cases)}
        deselect(config, items, set(items) - chosen)


def pytest_collection_finish():
    """What has been imported and collected by now stays: the garbage collector passes over it."""
    gc.collect()
    gc.freeze()


def deselect(config, items, unwanted):
    config.hook.pytest_deselected(items=[item for item in items if item in unwanted])
    items[:] = [item for item in items if item not in unwanted]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    devices, kernels = ", ".join(DEVICES), ", ".join(KERNELS)
    missing = "" if GPUS else f"; {why_no_cuda()}, so tests for a GPU are not selected"
    terminalreporter.write_line(f"Devices: {devices}; kernels: {kernels}{missing}")


def choose_pairs(cases):
    """Of the cases of one test so few that every two values of two parameters meet in one.

    Each time the case that brings the most new pairs; the first of them, so that every process
    chooses the same.
    """
    pairs = {case: pairs_of(case) for case in cases}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs.pop(best)
    return chosen


def pairs_of(case):
    """Pairs of parameters, told apart by identity: tensors and functions have no other."""
    params = case.callspec.params if hasattr(case, "callspec") else {}
    values = [(name, id(value)) for name, value in params.items()]
    return set(itertools.combinations(values, 2)) or {tuple(values)}
