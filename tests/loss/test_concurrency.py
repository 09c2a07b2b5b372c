"""Many threads, other processes, errors halfway; and no memory lost on the way."""

import ctypes
import gc
import itertools
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import sys
import sysconfig
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import (
    HANGS,
    REDUCTIONS,
    assert_double_close,
    by_reduction,
    draw,
    dtype_name,
    evaluate,
    fused,
    outcome,
    reference,
    torch_bce,
)
from torch.utils.cpp_extension import get_cxx_compiler, include_paths
from torch.utils.data import DataLoader, Dataset

from fused_bce import BCEWithLogitsLoss, SparseTarget, functional

THREADS = 8
# Overhead only; several chunks; results from the allocator for large blocks (4 MiB on).
SIZES = (5, 40_003, 2**20 + 3)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
# Python 3.12 warns of what the tests below do on purpose.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def in_threads(function, *arguments):
    """The results of function(*a) for each a of the arguments, all started at the same moment."""
    together = threading.Barrier(len(arguments), timeout=HANGS)

    def run(*arguments):
        together.wait()
        return function(*arguments)

    with ThreadPoolExecutor(len(arguments)) as pool:
        futures = [pool.submit(run, *a) for a in arguments]
        return [future.result(HANGS) for future in futures]


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared_tensors", "own_tensors"])
def test_forward_and_backward(shared, numel, dtype, reduction, device):
    rounds = 10 if numel > 10**6 else 30
    pairs = [draw((numel,), device, dtype) for _ in range(1 if shared else THREADS)]
    expected = [evaluate(fused, *pair, reduction=reduction) for pair in pairs]

    def work(thread):
        index = thread % len(pairs)
        for _ in range(rounds):
            got = evaluate(fused, *pairs[index], reduction=reduction)
            assert torch.equal(got.loss, expected[index].loss)
            assert torch.equal(got.grad_logits, expected[index].grad_logits)

    in_threads(work, *((thread,) for thread in range(THREADS)))


LEAVE_THE_LOCK_OFF = """
import sys, torch
assert not sys._is_gil_enabled(), "torch turns it on"
import fused_bce
assert not sys._is_gil_enabled()
"""


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not free-threaded"
)
def test_import_leaves_the_interpreters_lock_off():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAVE_THE_LOCK_OFF], env=environment, check=True
    )


def losses_of_all_kinds(logits, target):
    """In Python each goes another way; the last one ends at torch's function."""
    pos_weight = torch.linspace(0.5, 2, 9)
    linear_weight = torch.linspace(-1, 1, 81).view(9, 9)
    labels = SparseTarget.from_lists([[row] for row in range(7)], num_labels=9)
    module = BCEWithLogitsLoss(pos_weight=pos_weight, label_smoothing=0.1)
    yield fused(logits, target, reduction="none").sum()
    yield fused(logits, target > 0.5, ignore_index=1)
    yield fused(logits, target, label_smoothing=0.1, reduction="batchmean", validate_targets=True)
    yield fused(logits, labels)
    yield module(logits, target)
    yield functional.sigmoid_focal_loss(logits, target, reduction="mean")
    yield functional.linear_binary_cross_entropy_with_logits(logits, linear_weight, labels)
    yield functional.pairwise_sigmoid_loss(logits, target)
    yield fused(torch._neg_view(logits), target)


def test_losses_of_all_kinds():
    """Small ones: what they do in Python is most of their time, and without the interpreter's lock
    it runs side by side."""
    pairs = [draw((7, 9), "cpu") for _ in range(THREADS)]

    def grads(pair):
        logits, target = pair[0].clone().requires_grad_(), pair[1]
        return [
            torch.autograd.grad(loss, logits)[0] for loss in losses_of_all_kinds(logits, target)
        ]

    expected = [grads(pair) for pair in pairs]

    def work(thread):
        for _ in range(100):
            got = grads(pairs[thread])
            assert all(torch.equal(*both) for both in zip(got, expected[thread], strict=True))

    in_threads(work, *((thread,) for thread in range(THREADS)))


@by_reduction
@pytest.mark.parametrize("numel", SIZES)
def test_backward_in_another_thread(numel, reduction, device):
    logits, target = draw((numel,), device)
    expected = evaluate(fused, logits, target, reduction=reduction)
    logits.requires_grad_()

    def backward(loss):
        return torch.autograd.grad(loss.sum(), logits)[0]

    for _ in range(3):
        losses = in_threads(lambda: fused(logits, target, reduction=reduction), *[()] * THREADS)
        grads = in_threads(backward, *((loss,) for loss in losses))
        assert all(torch.equal(grad, expected.grad_logits) for grad in grads)
        del losses, grads  # in the thread that did not allocate them


@by_reduction
def test_losses_of_one_graph(reduction, device):
    # Each thread goes backward through its own loss and a part that all share, into one gradient.
    logits, _ = draw((40, 25), device, torch.float64)
    targets = [draw((40, 25), device, target_dtype=torch.float64)[1] for _ in range(THREADS)]
    logits.requires_grad_()

    def total(function):
        hidden = logits * 2

        def backward(target):
            function(hidden, target, reduction=reduction).sum().backward(retain_graph=True)

        logits.grad = None
        in_threads(backward, *((target,) for target in targets))
        return logits.grad

    assert_double_close(total(fused), total(torch_bce))


class Nested(torch.autograd.Function):
    """Passes its gradient through the backward of a loss inside its own backward."""

    @staticmethod
    def forward(ctx, x, target, function, depth):
        ctx.target, ctx.function, ctx.depth = target, function, depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inner = grad.detach().requires_grad_()
            value = inner
            if ctx.depth:
                value = Nested.apply(inner, ctx.target, ctx.function, ctx.depth - 1)
            loss = ctx.function(value * 10, ctx.target)
        return torch.autograd.grad(loss, inner)[0], None, None, None


def test_backward_on_threads_of_autograd(device):
    # Deeper than 60 nested backwards, the engine goes on in threads of its own.
    logits, target = (t.double() for t in draw((6,), device))
    grads = []
    for function in (fused, torch_bce):
        leaf = logits.clone().requires_grad_()
        loss = function(Nested.apply(leaf, target, function, 130), target)
        grads += torch.autograd.grad(loss, leaf)
    assert_double_close(*grads)


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
def test_threads_change_between_forward_and_backward(set_threads, dtype, reduction):
    logits, target = draw((40_003,), "cpu", dtype)
    expected = evaluate(fused, logits, target, reduction=reduction)
    logits.requires_grad_()
    for forward, first, second in ((1, 2, 3), (2, 1, 2), (3, 2, 1)):
        set_threads(forward)
        loss = fused(logits, target, reduction=reduction)
        for threads in (first, second):
            set_threads(threads)
            (grad,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
            assert torch.equal(grad, expected.grad_logits)


# Processes. A forked child of a process that has run parallel loops can run none itself: GNU OpenMP
# waits in it for threads that fork does not copy, in torch's own loss as well. Hence DataLoader
# calls torch.set_num_threads(1) in its workers, and so do these tests. CUDA knows no fork at all.


class Losses(Dataset):
    """What a miner of hard examples does in a worker."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return fused(*self.pairs[index], reduction="none")


def check_shared_memory() -> None:
    """Skips where processes cannot share a lock or a tensor, as without a /dev/shm to write to."""
    try:
        multiprocessing.get_context("spawn").Lock()
        torch.zeros(1).share_memory_()
    except (OSError, RuntimeError) as error:
        pytest.skip(f"processes share no memory here: {error}")


@forks
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    check_shared_memory()
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    dataset = Losses([draw((numel,), "cpu") for numel in SIZES])
    # The parent has threads, and keeps freed blocks, when it forks.
    expected = [dataset[index] for index in range(len(SIZES))]
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=HANGS
    )
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got, want)


def run_in_fork(function) -> int:
    """The exit status of a child that calls it: 0 if it returns, -SIGALRM if it hangs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(HANGS)
            torch.set_num_threads(1)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@forks
@can_fork
def test_backward_in_a_fork():
    # torch refuses it if the autograd engine has started threads, as it has with CUDA, and then
    # we do; else the answer is right.
    logits, target = draw((40_003,), "cpu")
    expected = evaluate(fused, logits, target)

    def compute():
        got = outcome(evaluate, fused, logits, target)
        assert got.error == outcome(evaluate, torch_bce, logits, target).error
        if got.error is None:
            assert torch.equal(got.value.grad_logits, expected.grad_logits)

    assert run_in_fork(compute) == 0


@forks
@can_fork
def test_losses_of_all_kinds_in_a_fork():
    logits, target = (t.view(-1, 9) for t in draw((7 * 9,), "cpu"))
    expected = [loss.detach() for loss in losses_of_all_kinds(logits, target)]

    def compute():
        got = losses_of_all_kinds(logits, target)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))

    assert run_in_fork(compute) == 0


@forks
@can_fork
def test_fork_while_threads_compute():
    logits, target = draw((2**20 + 3,), "cpu")
    expected = fused(logits, target, reduction="none")
    stop = threading.Event()

    def compute():
        while not stop.is_set():
            fused(logits, target, reduction="none")

    def compute_once():
        assert torch.equal(fused(logits, target, reduction="none"), expected)

    with ThreadPoolExecutor(2) as pool:
        computing = [pool.submit(compute) for _ in range(2)]
        try:
            for _ in range(10):
                assert run_in_fork(compute_once) == 0
        finally:
            stop.set()
    assert all(future.result() is None for future in computing)


CHURN = """
#include <c10/core/StorageImpl.h>

#include <atomic>
#include <thread>

std::atomic<bool> going;
std::thread thread;

extern "C" void start(c10::StorageImpl* of_allocator) {
  going = true;
  thread = std::thread([allocator = of_allocator->allocator()] {
    while (going) allocator->allocate(4 << 20);
  });
}

extern "C" void stop() {
  going = false;
  thread.join();
}
"""


def compile_library(source: str, folder: Path) -> ctypes.CDLL:
    """With the headers of c10 alone, which take a second where torch/extension.h takes a minute."""
    path, library = folder / "source.cpp", folder / "library.so"
    path.write_text(source)
    command = [get_cxx_compiler(), "-std=c++20", "-shared", "-fPIC", path, "-o", library]
    command += [f"-I{folder}" for folder in include_paths()]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.large
@forks
@can_fork
def test_fork_while_a_thread_allocates(tmp_path):
    """The lock of the allocator for large blocks must not be held in the child for ever.

    A thread without the interpreter's lock does nothing but allocate: of the forks of threads that
    compute, one in ten thousand would hit the moment.
    """
    large = fused(*draw((2**20,), "cpu"), reduction="none")
    library = compile_library(CHURN, tmp_path)
    library.start(ctypes.c_void_p(large.untyped_storage()._cdata))
    try:
        for _ in range(200):
            assert run_in_fork(lambda: fused(large, large, reduction="none")) == 0
    finally:
        library.stop()


# Errors halfway


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


def keep(value):
    return value


def error_in_forward(logits, target):
    with pytest.raises(ValueError, match="must be the same as input size"):
        fused(logits, target[1:])
    with pytest.raises(RuntimeError, match="must match the size"):
        fused(logits, target, pos_weight=torch.ones(5))


def error_while_saving(logits, target):
    with torch.autograd.graph.saved_tensors_hooks(stop, keep), pytest.raises(Stop):
        fused(logits, target)


def error_while_unpacking(logits, target):
    with torch.autograd.graph.saved_tensors_hooks(keep, stop):
        loss = fused(logits, target)
    with pytest.raises(Stop):
        loss.backward()


def error_in_a_hook_before_the_loss(logits, target):
    loss = fused(logits, target)
    loss.grad_fn.register_prehook(stop)
    with pytest.raises(Stop):
        loss.backward()


def error_in_a_hook_after_the_loss(logits, target):
    loss = fused(logits, target)
    logits.register_hook(stop)
    with pytest.raises(Stop):
        loss.backward()


def error_of_an_edit(logits, target):
    loss = fused(logits, target)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def error_of_grad_loss(logits, target):
    loss = fused(logits, target, reduction="none")
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        loss.backward(torch.ones(3, device=loss.device))


ERRORS = (
    error_in_forward,
    error_while_saving,
    error_while_unpacking,
    error_in_a_hook_before_the_loss,
    error_in_a_hook_after_the_loss,
    error_of_an_edit,
    error_of_grad_loss,
)


@pytest.mark.parametrize("fail", ERRORS, ids=lambda f: f.__name__)
def test_error_leaves_nothing_behind(fail, device):
    leaf, target = draw((40, 25), device)
    expected = evaluate(fused, leaf, target)
    leaf.requires_grad_()
    logits = leaf * 1
    released = weakref.ref(logits)
    fail(logits, target)
    del logits
    gc.collect()  # the exception and its traceback refer to each other
    assert released() is None
    assert leaf.grad is None
    again = evaluate(fused, leaf, target)
    assert all(torch.equal(a, b) for a, b in zip(again[:2], expected[:2], strict=True))


def test_backward_again_after_an_error(device):
    # What an interrupted backward has taken out of the graph is computed anew.
    logits, target = draw((40, 25), device)
    expected = evaluate(fused, logits, target).grad_logits
    logits.requires_grad_()
    hidden = logits * 1
    loss = fused(hidden, target)
    handle = hidden.register_hook(stop)
    with pytest.raises(Stop):
        loss.backward(retain_graph=True)
    handle.remove()
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, expected)


@forks
@can_fork
@on_linux
def test_out_of_memory():
    small, large = draw((1000,), "cpu"), draw((2**24,), "cpu")
    expected = fused(*small)
    for logits in (small[0], large[0]):
        logits.requires_grad_()  # its gradient is computed, and needs memory, in the forward pass

    def compute():
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (proc_statm(0) + 2**20, before[1]))
        for reduction in REDUCTIONS:
            with pytest.raises(RuntimeError, match=r"allocate|memory"):
                fused(*large, reduction=reduction)
        assert torch.equal(fused(*small), expected)
        resource.setrlimit(resource.RLIMIT_AS, before)
        assert fused(*large).isfinite()

    assert run_in_fork(compute) == 0


# Memory


def proc_statm(field: int) -> int:
    """Bytes: field 0 the address space of this process, 1 what is resident of it."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def small_steps(count):
    """One after another of the ways through the loss, those that fail included."""
    leaf, target = draw((7, 9), "cpu")
    weight = torch.ones(7, 1, dtype=torch.float64)
    module = BCEWithLogitsLoss(pos_weight=torch.ones(9))

    def penalty(logits):
        (grad,) = torch.autograd.grad(fused(logits, target), logits, create_graph=True)
        grad.square().sum().backward()

    steps = (
        lambda logits: module(logits, target).backward(),
        lambda logits: fused(logits.half(), target, weight, reduction="none").sum().backward(),
        lambda logits: fused(target, logits.t().bfloat16().t(), reduction="sum").backward(),
        lambda logits: fused(logits.detach(), target),
        lambda logits: fused(logits, target > 0.5, ignore_index=1, label_smoothing=0.1).backward(),
        penalty,
        *(lambda logits, fail=fail: fail(logits * 1, target) for fail in ERRORS),
    )
    for step in itertools.islice(itertools.cycle(steps), count):
        step(leaf.detach().requires_grad_())


@on_linux
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.large)])
def test_memory_of_small_steps(count):
    small_steps(2000)
    gc.collect()
    before = proc_statm(1)
    small_steps(count)
    gc.collect()
    # The smallest piece of malloc, lost in each step of one kind, would be twice as much in the
    # large run; without any, nothing grows.
    assert proc_statm(1) - before < 128 * 2**10


def bytes_in_huge_pages() -> int:
    """Of the mappings that ask for huge pages: those of the allocator for large blocks."""
    found = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Size":
            size = int(rest.split()[0]) * 1024
        elif name == "VmFlags" and "hg" in rest.split():
            found += size
    return found


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
def test_large_blocks_freed_by_other_threads():
    """No block is in two hands, and but two are kept."""
    # Equal blocks, similar ones that may take each other's place, and one that is only marked free
    numels = (2**20, 2**20 + 1, 2**20 + 2**18, 2**20, 2**21, 9 * 2**20)
    producers = 4
    # The thread sanitizer finds what could meet, without waiting until it does.
    rounds = 12 if "TSAN_OPTIONS" in os.environ else 30
    results = queue.Queue(maxsize=3)

    def produce(thread):
        for i in range(rounds):
            value = thread + i / rounds
            target = torch.zeros(numels[(thread + i) % len(numels)])
            result = evaluate(fused, target + value, target, reduction="none")
            results.put((value, result), timeout=HANGS)

    def consume():
        held = []
        for _ in range(rounds):
            held.append(results.get(timeout=HANGS))
            for value, result in held:
                exact = reference(torch.tensor(value), torch.tensor(0.0), reduction="none")
                for got, true in zip(result[:2], exact[:2], strict=True):
                    assert got.min() == got.max() == pytest.approx(true.item())
            del held[:-2]

    before = bytes_in_huge_pages()
    with ThreadPoolExecutor(2 * producers) as pool:
        futures = [pool.submit(produce, thread) for thread in range(producers)]
        futures += [pool.submit(consume) for _ in range(producers)]
        for future in futures:
            future.result(HANGS)
    del futures, future
    gc.collect()
    block = 4 * max(numels)
    assert bytes_in_huge_pages() <= before + 2 * block
    result = fused(torch.zeros(2**25), torch.zeros(2**25), reduction="none")
    assert bytes_in_huge_pages() >= 2**27
    del result
