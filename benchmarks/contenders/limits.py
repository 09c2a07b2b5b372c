"""What the memory allows: the same bytes with no arithmetic, and a plain copy."""

import itertools
import math

import torch
from torch import Tensor

from cases.base import Case
from contenders.steps import Contender
from harness.timing import Step

# Large enough that a GPU copies at its full bandwidth.
COPIED_BYTES = 2**30


def limit_contenders(case: Case, rotated: int) -> dict[str, Contender]:
    """The stream rotates through as many buffers as the losses have inputs."""
    limits = {"stream": Contender(stream_step(case, rotated))}
    if case.device == "cuda":
        # What is copied is read and written.
        moved = 2 * copied_per_element(case.numel)
        limits["copy"] = Contender(copy_step(case.numel, case.device), bytes_per_element=moved)
    return limits


def copied_per_element(numel: int) -> int:
    """Bytes of the copied buffer for each element of the case, as the CSV file counts all bytes."""
    number = torch.float32.itemsize
    return math.ceil(COPIED_BYTES / (number * numel)) * number


def copy_step(numel: int, device: str) -> Step:
    """Copies a buffer of about COPIED_BYTES, whatever the size of the case."""
    size = copied_per_element(numel) * numel
    source = torch.rand(size // torch.float32.itemsize, device=device)
    out = torch.empty_like(source)
    return lambda: out.copy_(source)


def stream_step(case: Case, rotated: int) -> Step:
    """The passes that the case needs, each as a memory-bound operation on as many bytes.

    For float32: torch.dot for the forward pass of mean and sum, torch.add for their single pass of
    forward and backward, torch.add and then torch.addcmul for the two passes of "none". The other
    dtypes move their bytes as float32 as well, so that no conversion is timed; float16, whose
    gradient takes a second pass, gets torch.dot and then torch.add.
    """
    rotation = itertools.cycle(
        [
            [stream_pass(r * case.numel, w * case.numel, case.device) for r, w in case.passes]
            for _ in range(rotated)
        ]
    )

    def step():
        for stream in next(rotation):
            stream()

    return step


def stream_pass(read: int, written: int, device: str) -> Step:
    """Reads and writes so many bytes, with as good as no arithmetic."""

    def buffer(size: float) -> Tensor:
        return torch.rand(math.ceil(size / torch.float32.itemsize), device=device)

    operands = min(3, read // written) if written else 0
    left = read - operands * written
    calls = []
    if operands:
        operation = {1: torch.neg, 2: torch.add, 3: torch.addcmul}[operands]
        arguments, out = [buffer(written) for _ in range(operands)], buffer(written)
        calls.append(lambda: operation(*arguments, out=out))
    # What does not fit beside the written bytes is only read.
    if left:
        a, b = buffer(left / 2), buffer(left / 2)
        calls.append(lambda: torch.dot(a, b))
    if len(calls) == 1:
        return calls[0]
    return lambda: [call() for call in calls]
