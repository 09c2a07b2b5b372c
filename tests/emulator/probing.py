"""Calls the emulated kernels of a library that mutants.py compiled, and compares with numpy.

    python tests/emulator/probing.py LIBRARY

Exits with WRONG if something is wrong. Streams and graphs are those of streams.cpp.
"""

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

CHUNK = 8192
WRONG = 1
STREAMS = (0x100, 0x200)  # names, none of which is the default stream
SEEDS = range(6)  # of the order in which streams go on
# cudaErrorMemoryAllocation, cudaErrorNoKernelImageForDevice, cudaErrorLaunchOutOfResources
OUT_OF_MEMORY, NO_KERNELS, OUT_OF_RESOURCES = 2, 209, 701


def guarded(numel: int, value=np.nan) -> np.ndarray:
    """Room for so many numbers, and behind them what must neither be read nor written."""
    whole = np.frombuffer(bytearray(4 * (numel + 68)), np.float32)
    start = -whole.ctypes.data % 64 // 4
    whole[:] = value
    return whole[start : start + numel + 16]


def address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


@dataclass
class Mean:
    """A mean and its gradient: where the operands are, and what the results must be."""

    numel: int
    blocks: int = 100
    weighted: bool = False
    ignored: str = ""  # some, all
    in_last_block: bool = True
    stream: int = 0
    pos_weight: np.ndarray = field(default_factory=lambda: np.linspace(0.5, 2, 8, dtype=np.float32))

    def __post_init__(self):
        self.logits, self.target, self.grad = (guarded(self.numel) for _ in range(3))
        self.loss, self.divisor = np.full(1, np.nan, np.float32), np.zeros(1)
        # What an earlier launch may have left there
        self.workspace = np.full(1024, 0x55, np.uint8)
        self.draw(self.numel)

    def draw(self, seed: int) -> None:
        """Other numbers in the same memory, and no results."""
        random, n = np.random.default_rng(seed), self.numel
        self.logits[:n] = random.normal(size=n) * 4
        self.target[:n] = random.integers(0, 2, n) if self.ignored != "all" else 2
        if self.ignored == "some":
            self.target[: n // 2] = 2
        self.divisor[0] = (self.target[:n] != 2).sum()
        self.loss[:] = self.grad[:] = np.nan

    def launch(self, library: ctypes.CDLL) -> str | None:
        """An error, if there was one."""
        error = library.probe_mean(
            ctypes.c_int64(self.numel),
            *map(address, (self.logits, self.target)),
            address(self.pos_weight) if self.weighted else None,
            ctypes.c_int64(8),
            ctypes.c_double(2.0 if self.ignored else np.nan),
            *map(address, (self.divisor, self.loss, self.grad, self.workspace)),
            ctypes.c_int64(self.blocks),
            ctypes.c_bool(self.in_last_block),
            ctypes.c_void_p(self.stream),
        )
        return error.decode() if error else None

    def wrong(self) -> str | None:
        """What is wrong with the results of a launch that has run."""
        kept = self.target[: self.numel] != 2
        weights = np.resize(self.pos_weight, self.numel) if self.weighted else 1.0
        x = self.logits[: self.numel].astype(np.float64)
        positive = self.target[: self.numel] == 1
        losses = np.where(positive, weights * np.logaddexp(0, -x), np.logaddexp(0, x))
        sigmoid = 1 / (1 + np.exp(-x))
        grads = np.where(positive, weights * (sigmoid - 1), sigmoid)
        n = max(kept.sum(), 1)
        loss = losses[kept].sum() / n
        # float32, of which the approximations cost a few units
        if not abs(self.loss[0] - loss) <= 2e-6 * np.abs(losses).max():
            return f"loss {self.loss[0]}, not {loss}"
        near = np.abs(self.grad[: self.numel] - np.where(kept, grads, 0) / n) <= 2e-6 / n
        if not near.all():
            return "gradient"
        return None if np.isnan(self.grad[self.numel :]).all() else "written beyond the end"


def wrong_mean(library, numel, **options) -> str | None:
    mean = Mean(numel, **options)
    return mean.launch(library) or mean.wrong()


def wrong_scale(library, numel, channels) -> str | None:
    grad = guarded(numel)
    grad[:numel] = before = np.random.default_rng(numel).normal(size=numel).astype(np.float32)
    grad_loss = np.arange(3, 3 + channels, dtype=np.float32)
    library.probe_scale(
        address(grad), ctypes.c_int64(numel), address(grad_loss), ctypes.c_int64(channels), None
    )
    same = np.array_equal(grad[:numel], before * np.resize(grad_loss, numel))
    return None if same and np.isnan(grad[numel:]).all() else "scaled gradient"


def wrong_count(library, numel) -> str | None:
    target = guarded(numel, 2.0)
    target[:numel] = np.random.default_rng(numel).integers(0, 3, numel)
    count = np.zeros(1)
    library.probe_count_kept(
        address(target), ctypes.c_int64(numel), ctypes.c_double(2.0), address(count), None
    )
    kept = (target[:numel] != 2).sum()
    return None if count[0] == kept else f"count {count[0]}, not {kept}"


def wrong_on_streams(library, in_last_block) -> str | None:
    """Two launches in each of two streams, which share the memory of their stream and are under way
    together."""
    for seed in SEEDS:
        means = [Mean(CHUNK + 5, in_last_block=in_last_block, stream=s) for s in STREAMS]
        library.emulator_hold_back()
        errors = [mean.launch(library) for mean in means * 2]
        if any(mean.loss[0] == mean.loss[0] for mean in means):
            return "a launch did not wait for its stream"
        library.emulator_let_go(ctypes.c_uint(seed))
        found = [*errors, *(mean.wrong() for mean in means)]
        if any(found):
            return f"streams, seed {seed}: {found}"
    return None


def wrong_replay(library, in_last_block) -> str | None:
    """What was captured once is replayed with other numbers, also beside a launch elsewhere."""
    mean, other = (Mean(CHUNK + 5, in_last_block=in_last_block, stream=s) for s in STREAMS)
    library.emulator_begin_capture(ctypes.c_void_p(mean.stream))
    error = mean.launch(library)
    graph = library.emulator_end_capture()
    if error or mean.loss[0] == mean.loss[0]:
        return f"captured: {error}, loss {mean.loss[0]}"
    for seed in SEEDS:
        mean.draw(seed)
        mean.workspace[:] = 0x55 + seed
        other.draw(seed + 100)
        library.emulator_hold_back()
        library.emulator_replay(ctypes.c_size_t(graph), ctypes.c_void_p(mean.stream))
        error = other.launch(library)
        library.emulator_let_go(ctypes.c_uint(seed))
        found = [error, mean.wrong(), other.wrong()]
        if any(found):
            return f"replay {seed}: {found}"
    return None


def wrong_after_failure(library, function, error, in_last_block) -> str | None:
    """An error of the driver is an error of the call, and nothing is left of it for the next."""
    mean = Mean(CHUNK + 5, in_last_block=in_last_block)
    library.emulator_fail_next(function.encode(), ctypes.c_int(error))
    if str(error) not in (mean.launch(library) or ""):
        return f"{function} failed, and the call did not"
    return mean.launch(library) or mean.wrong()


def wrong_coverage(library) -> str | None:
    """Only one error says that there are no kernels for a device."""
    covers = ctypes.c_bool()

    def answer(error=0):
        if error:
            library.emulator_fail_next(b"cudaFuncGetAttributes", ctypes.c_int(error))
        return library.probe_covers(ctypes.byref(covers)) or covers.value

    answers = [answer(OUT_OF_MEMORY), answer(), answer(NO_KERNELS), answer()]
    return None if answers == [b"CUDA error 2", True, False, True] else f"covers: {answers}"


MEANS = [
    {"blocks": 2},
    {"weighted": True, "ignored": "some"},
    {"ignored": "all"},
    {"in_last_block": False, "blocks": 2},
]


def checks(library) -> Iterator[str | None]:
    """What each of them finds wrong, the quick ones first."""
    for numel in (CHUNK - 1, 257, 3 * CHUNK + 5):
        yield from (wrong_mean(library, numel, **options) for options in MEANS)
        yield from (wrong_scale(library, numel, channels) for channels in (1, numel))
        yield wrong_count(library, numel)
    yield wrong_coverage(library)
    yield wrong_after_failure(library, "cudaMemsetAsync", OUT_OF_MEMORY, True)
    for in_last_block in (True, False):
        yield wrong_after_failure(library, "cudaLaunchKernel", OUT_OF_RESOURCES, in_last_block)
        yield wrong_on_streams(library, in_last_block)
        yield wrong_replay(library, in_last_block)


def main(path: str) -> int:
    library = ctypes.CDLL(path)
    for name in ("probe_mean", "probe_scale", "probe_count_kept", "probe_covers"):
        getattr(library, name).restype = ctypes.c_char_p
    library.emulator_end_capture.restype = ctypes.c_size_t
    for wrong in checks(library):
        if wrong:
            print("WRONG", wrong)
            return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
