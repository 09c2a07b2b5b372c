"""What is measured: one case, its shape, and the bytes that it must move."""

import math
from dataclasses import dataclass

import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
REDUCTIONS = ("mean", "sum", "none")
WEIGHTS = ("none", "pos_weight", "weight", "both")
MODES = ("fwd", "fwd+bwd")
NON_LEAF = "fwd+bwd non-leaf"


@dataclass(frozen=True)
class Case:
    """One way to call the loss. The fields are columns of the CSV too."""

    numel: int
    device: str
    mode: str = "fwd+bwd"
    dtype: str = "float32"
    target_dtype: str = ""  # becomes that of the logits
    reduction: str = "mean"
    weights: str = "none"
    workload: str = ""  # its name, for cases that are more than a size

    def __post_init__(self):
        if not self.target_dtype:
            object.__setattr__(self, "target_dtype", self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and up to 64 columns, so that weights per row and per column have a meaning."""
        columns = math.gcd(self.numel, 64)
        return self.numel // columns, columns

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that the loss has, by the name of the argument."""
        rows, columns = self.shape
        shapes = {"weight": (rows, 1), "pos_weight": (columns,)}
        return {name: shapes[name] for name in shapes if self.weights in (name, "both")}

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.contiguous_format

    @property
    def label(self) -> str:
        """What tells it from the other cases of its title."""
        return self.workload or size_text(self.numel)

    @property
    def title(self) -> str:
        targets = "" if self.target_dtype == self.dtype else f", {self.target_dtype} targets"
        weights = "" if self.weights == "none" else f", weights: {self.weights}"
        return f"{self.mode}, {self.dtype}{targets}, {self.reduction}{weights}"

    @property
    def passes(self) -> list[tuple[int, int]]:
        """Bytes an element, (read, written), in each pass over memory that cannot be left out.

        Weights per row and per column stay in the cache and do not count.
        """
        logits = getattr(torch, self.dtype).itemsize
        target = getattr(torch, self.target_dtype).itemsize
        loss = target if self.reduction == "none" else 0
        forward = (logits + target, loss)
        if self.mode == "fwd":
            return [forward]
        # These gradients wait for grad_loss: it differs from element to element for "none", and
        # carries the loss scale without which a float16 gradient underflows.
        if self.reduction == "none" or self.dtype == "float16":
            return [forward, (logits + target + loss, logits)]
        return [(logits + target, logits)]

    @property
    def bytes_per_element(self) -> int:
        return sum(read + written for read, written in self.passes)

    @property
    def uncounted_bytes(self) -> int:
        """What every contender leaves behind; its peak of memory is counted without."""
        return 0


def size_text(numel: int) -> str:
    power = numel.bit_length() - 1
    return f"2^{power}" if power >= 10 and numel == 2**power else str(numel)
