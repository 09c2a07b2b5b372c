"""Calls of the linear head, and what torch makes of them on whole logits in float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from helpers import by_torch, dtype_name
from torch import Tensor

from fused_bce import SparseTarget
from fused_bce.functional import linear_binary_cross_entropy_with_logits

head = linear_binary_cross_entropy_with_logits

ROWS, FEATURES, LABELS = 23, 16, 101

# Of a block of float32 logits; more in float64. One logit; blocks of a few rows and labels; whole
# columns, with fewer in the last; all at once.
CHUNKS = {"tiniest": 1, "small": 300, "ragged": 4 * ROWS * 40, "whole": None}
by_chunk = pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
by_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
by_head_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=dtype_name
)


class Operands(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def detached(self, dtype=None) -> "Operands":
        """Leaves of their own."""
        return Operands(
            *(
                None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
                for t in self
            )
        )


def draw_operands(device, dtype=torch.float32, bias=True, rows=ROWS, labels=LABELS) -> Operands:
    """Logits of a few units, so that both tails occur."""
    input = torch.randn(rows, FEATURES)
    weight = torch.randn(labels, FEATURES)
    operands = Operands(input, weight, torch.randn(labels) if bias else None)
    return Operands(*(None if t is None else t.to(device) for t in operands)).detached(dtype)


def draw_target(rows=ROWS, labels=LABELS, density=0.05) -> Tensor:
    """A matrix of bool, with an empty row and a full one."""
    target = torch.rand(rows, labels) < density
    target[0], target[1] = False, True
    return target


def as_rows(dense: Tensor, values: Tensor | None = None) -> SparseTarget:
    """Unsorted rows, of which every third has a label twice."""
    rows, columns = dense.nonzero().t()
    again = rows % 3 == 1
    rows, columns = torch.cat([rows, rows[again]]), torch.cat([columns, columns[again]])
    order = torch.randperm(len(rows))
    rows, columns = rows[order], columns[order]
    values = None if values is None else values[rows, columns]
    return SparseTarget.from_coo(rows, columns, tuple(dense.shape), values)


FORMS = {
    "bool": lambda dense: dense,
    "int64": lambda dense: dense.long(),
    "float": lambda dense: dense.double(),
    "rows": as_rows,
    "int32 rows": lambda dense: as_rows(dense)._replace(indices=as_rows(dense).indices.int()),
    "values": lambda dense: as_rows(dense, dense.double() * 0.75),
    "bool values": lambda dense: as_rows(torch.ones_like(dense), dense),
    "coo": lambda dense: dense.double().to_sparse_coo(),
    "csr": lambda dense: dense.double().to_sparse_csr(),
}
# torch's own, of the layout
ignore_csr = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


def matrix_of(target) -> Tensor:
    """By torch's own means, not by the package's."""
    if isinstance(target, Tensor):
        return target.to_dense() if target.layout is not torch.strided else target
    indices, offsets, num_labels, values = (t.cpu() if isinstance(t, Tensor) else t for t in target)
    dtype = torch.bool if values is None else values.dtype
    dense = torch.zeros(len(offsets) - 1, num_labels, dtype=dtype)
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        of_row = slice(begin, end)
        dense[row, indices[of_row]] = True if values is None else values[of_row]
        if dtype.is_floating_point:  # of a label that is named again nan prevails
            dense[row, indices[of_row][values[of_row].isnan()]] = math.nan
    return dense


class Result(NamedTuple):
    loss: Tensor
    grads: tuple[Tensor, ...]


def evaluate(operands: Operands, target, *, grad_loss=1.0, function=head, **options) -> Result:
    input, weight, bias = operands
    loss = function(input, weight, target, linear_bias=bias, **options)
    grads = torch.autograd.grad(loss, operands.leaves(), torch.full_like(loss, grad_loss))
    return Result(loss.detach(), grads)


def on_whole_logits(input, linear_weight, target, *, linear_bias=None, reduction="mean", **options):
    """torch's layer and torch's loss."""
    options.pop("chunk_bytes", None)
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    batchmean = reduction == "batchmean"
    loss = by_torch(logits, target, reduction="sum" if batchmean else reduction, **options)
    return loss / input.shape[0] if batchmean else loss


def exact(operands: Operands, target, *, grad_loss=1.0, **options) -> Result:
    """In float64, on the CPU."""

    def widen(value):
        return value.detach().cpu().double() if isinstance(value, Tensor) else value

    dense = matrix_of(target).cpu()
    wide = Operands(*(None if t is None else t.detach().cpu() for t in operands))
    return evaluate(
        wide.detached(torch.float64),
        dense.double(),
        grad_loss=grad_loss,
        function=on_whole_logits,
        **{name: widen(value) for name, value in options.items()},
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error, as a part of the largest exact value."""
    if want.numel() == 0:
        return 0.0
    scale = want.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((got.cpu().double() - want).abs().max() / scale).item()


def assert_near(got: Result, want: Result, tolerance: float) -> None:
    """Every error, as a part of the largest value of its kind."""
    assert relative_error(got.loss, want.loss) <= tolerance
    for ours, theirs in zip(got.grads, want.grads, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= tolerance
