"""Fixtures for every test."""

import pytest
import torch
from helpers import EMULATES_CUDA, quoted_folder_of_torch, why_no_cuda
from torch.utils import cpp_extension

from fused_bce import _C

KERNELS = ["emulated cuda"] if EMULATES_CUDA else [*_C.instruction_sets(), "cuda"]


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """The device that a test runs on; a test runs once for each."""
    if request.param == "cuda" and (reason := why_no_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=KERNELS)
def kernel_device(request):
    """The device to run on, with each instruction set of the CPU forced in turn."""
    if request.param == "cuda" and (reason := why_no_cuda()):
        pytest.skip(reason)
    if request.param not in _C.instruction_sets():
        yield "cpu" if EMULATES_CUDA else "cuda"
        return
    before = _C.current_instruction_set()
    _C.use_instruction_set(request.param)
    yield "cpu"
    _C.use_instruction_set(before)


@pytest.fixture(autouse=True, scope="session")
def _compiler_cache(tmp_path_factory):
    """What an earlier run compiled would hide that this one cannot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _folder_of_torch_is_quoted():
    """Its compiler fails where the path has a space, until torch 2.14 quotes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_extension, "TORCH_LIB_PATH", quoted_folder_of_torch())
        yield


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
