"""Targets of which nearly all are 0, as rows of label numbers."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_LABELS = (torch.int32, torch.int64)


class SparseTarget(NamedTuple):
    """Targets of N rows and C labels of which nearly all are 0, as rows of label numbers (CSR).

    A row has its labels in any order; one that occurs twice counts once (with ``values``: the
    largest). A named tuple of tensors, so that what moves or pins a batch moves and pins it.

    Attributes:
        indices: (P,) label numbers from 0 to C - 1, int32 or int64.
        offsets: (N + 1,) int64; row i has the labels ``indices[offsets[i] : offsets[i + 1]]``. What
            lies behind the last offset is not read.
        num_labels: C.
        values: (P,) targets other than 1, of any dtype that a loss takes; None: all are 1.

    The constructors check dtypes and shapes, a loss also the numbers: IndexError for a label or a
    row out of range, ValueError for offsets that do not ascend. On a GPU, where the host would have
    to wait, they are device-side assertions.

    Example:
        >>> import torch
        >>> from fused_bce import SparseTarget
        >>> target = SparseTarget.from_lists([[0, 3], [], [1]], num_labels=4)
        >>> target.to_dense(torch.int64)
        tensor([[1, 0, 0, 1],
                [0, 0, 0, 0],
                [0, 1, 0, 0]])
    """

    indices: Tensor
    offsets: Tensor
    num_labels: int
    values: Tensor | None = None

    @classmethod
    def from_padded(
        cls, indices: Tensor, num_labels: int, padding_value: int = -1
    ) -> "SparseTarget":
        """From label numbers (N, K), of which those equal to ``padding_value`` are none, wherever
        in a row they are. Waits for no GPU.

        Raises:
            TypeError: for indices that are not of integers.
            ValueError: for indices that are no matrix.
        """
        _check_integers("indices", indices)
        if indices.dim() != 2:
            raise ValueError(f"indices must be of shape (N, K), not {tuple(indices.shape)}")
        kept = indices != padding_value
        flat = kept.flatten()
        # All padding to one place at the end, which is left out: a mask would have a length to wait
        # for.
        places = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
        labels = indices.new_zeros(flat.numel() + 1, dtype=_labels_dtype(indices))
        labels = labels.scatter(0, places, indices.flatten().to(labels.dtype))
        return cls(labels[:-1], _offsets(kept.sum(1)), num_labels)

    @classmethod
    def from_lists(
        cls,
        rows: Iterable[Sequence[int]],
        num_labels: int,
        *,
        device: torch.device | str | None = None,
    ) -> "SparseTarget":
        """From the label numbers of each row."""
        rows = list(rows)
        labels = torch.tensor([label for row in rows for label in row], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return cls(labels.to(device), _offsets(lengths).to(device), num_labels)

    @classmethod
    def from_csr(cls, matrix: Any) -> "SparseTarget":
        """From a matrix (N, C) of scipy.sparse, or a tensor of layout torch.sparse_csr. What it
        stores are the targets.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(matrix, Tensor) and matrix.layout is torch.sparse_csr:
            labels, offsets, values = matrix.col_indices(), matrix.crow_indices(), matrix.values()
        elif not isinstance(matrix, Tensor) and hasattr(matrix, "tocsr"):
            csr = matrix.tocsr()
            labels, offsets, values = map(torch.as_tensor, (csr.indices, csr.indptr, csr.data))
        else:
            raise TypeError(f"expected a CSR matrix of scipy or torch, not {type(matrix).__name__}")
        return cls(labels, offsets.to(torch.int64), matrix.shape[1], _other_than_ones(values))

    @classmethod
    def from_coo(
        cls,
        rows: Tensor,
        columns: Tensor,
        shape: tuple[int, int],
        values: Tensor | None = None,
    ) -> "SparseTarget":
        """From the row and the label number of each target, (P,) each, in any order.

        Raises:
            TypeError: for rows or columns that are not of integers.
            ValueError: if they are no vectors of the same length.
            IndexError: on the CPU, for a row out of range.
        """
        num_rows, num_labels = shape
        _check_integers("rows", rows)
        _check_integers("columns", columns)
        if rows.dim() != 1 or rows.shape != columns.shape:
            raise ValueError(
                f"rows and columns must be vectors of the same length, not of shapes "
                f"{tuple(rows.shape)} and {tuple(columns.shape)}"
            )
        if _readable(rows) and rows.numel():
            _check_range("row", int(rows.min()), int(rows.max()), num_rows)
        rows, order = rows.to(torch.int64).sort(stable=True)
        starts = torch.arange(num_rows + 1, device=rows.device)
        offsets = torch.searchsorted(rows, starts)
        columns = columns[order].to(_labels_dtype(columns))
        values = None if values is None else values[order]
        return cls(columns, offsets, num_labels, values)

    @classmethod
    def identity(cls, n: int, *, device: torch.device | str | None = None) -> "SparseTarget":
        """Row i has label i alone: the target of a batch of pairs."""
        labels = torch.arange(n + 1, device=device)
        return cls(labels[:-1], labels, n)

    @property
    def shape(self) -> torch.Size:
        """(N, C)"""
        return torch.Size((self.offsets.shape[0] - 1, self.num_labels))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SparseTarget":
        """The same on another device."""
        return SparseTarget(
            self.indices.to(device, non_blocking=non_blocking),
            self.offsets.to(device, non_blocking=non_blocking),
            self.num_labels,
            None if self.values is None else self.values.to(device, non_blocking=non_blocking),
        )

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The targets as a matrix (N, C); of bool, or the dtype of ``values``, by default. Checks
        the numbers as the losses do.
        """
        self.check()
        dense = self.to_dense_unchecked()
        return dense if dtype is None else dense.to(dtype)

    def to_dense_unchecked(self) -> Tensor:
        """The same without a look at the numbers; what is out of range is left out."""
        num_rows, num_labels = self.shape
        places = torch.arange(self.indices.shape[0], device=self.offsets.device)
        rows = torch.searchsorted(self.offsets, places, right=True) - 1
        inside = (rows >= 0) & (rows < num_rows)
        inside = inside & (self.indices >= 0) & (self.indices < num_labels)
        # To one element more: a mask would have a length that the host waits for.
        size = num_rows * num_labels + 1
        places = torch.where(inside, rows * num_labels + self.indices, size - 1)
        if self.values is None:
            dense = torch.zeros(size, dtype=torch.bool, device=self.indices.device)
            dense = dense.index_fill(0, places, 1)
            return dense[:-1].view(num_rows, num_labels)
        # Of bool there is no maximum.
        values = self.values.to(torch.promote_types(self.values.dtype, torch.uint8))
        dense = values.new_zeros(size).scatter_reduce(0, places, values, "amax", include_self=False)
        return dense[:-1].view(num_rows, num_labels).to(self.values.dtype)

    def like_dense(self) -> Tensor:
        """A tensor of the shape, dtype and device of :meth:`to_dense`, without its memory."""
        one = self.indices if self.values is None else self.values
        dtype = torch.bool if self.values is None else one.dtype
        return one.new_zeros((), dtype=dtype).expand(self.shape)

    def check(self) -> None:
        """Raises what the losses raise for it: see the class."""
        indices, offsets, _, values = self
        if not isinstance(indices, Tensor) or indices.dtype not in _LABELS or indices.dim() != 1:
            raise TypeError(f"indices must be a vector of int32 or int64, not {_what(indices)}")
        if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.dim() != 1:
            raise TypeError(f"offsets must be a vector of int64, not {_what(offsets)}")
        if offsets.shape[0] == 0:
            raise ValueError("offsets must have one number more than there are rows, hence one")
        if values is not None and (not isinstance(values, Tensor) or values.shape != indices.shape):
            raise TypeError(f"values must be as many as indices, not {_what(values)}")
        if isinstance(indices, FakeTensor) or indices.is_meta:
            return
        if _readable(indices):
            self._check_numbers()
        else:
            self._assert_numbers()

    def _check_numbers(self) -> None:
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0:
            raise ValueError(f"offsets must begin with 0, not {first}")
        if not 0 <= last <= self.indices.shape[0]:
            raise ValueError(
                f"offsets must end with at most the number of indices, {self.indices.shape[0]}, "
                f"not {last}"
            )
        falls = self.offsets.diff() < 0
        if falls.any():
            raise ValueError(
                f"offsets must ascend, but fall behind row {int(falls.int().argmax())}"
            )
        if last:
            lowest, highest = self.indices[:last].aminmax()
            _check_range("label", int(lowest), int(highest), self.num_labels)

    def _assert_numbers(self) -> None:
        offsets, indices = self.offsets, self.indices
        ascend = (offsets.diff() >= 0).all() & (offsets[0] == 0)
        torch._assert_async(ascend & (offsets[-1] <= indices.shape[0]), "bad offsets")
        inside = (indices >= 0) & (indices < self.num_labels)
        unread = torch.arange(indices.shape[0], device=indices.device) >= offsets[-1]
        torch._assert_async((inside | unread).all(), "a label is out of range")


def as_sparse(target: Tensor | SparseTarget) -> Tensor | SparseTarget:
    """The same, but that a sparse tensor becomes a SparseTarget."""
    if not isinstance(target, Tensor):
        return target
    layout = _layout(target)
    if layout is torch.sparse_csr:
        return SparseTarget.from_csr(target)
    if layout is torch.sparse_coo and target.dim() == 2:
        target = target.coalesce()
        rows, columns = target.indices()
        num_rows, num_labels = target.shape
        return SparseTarget.from_coo(rows, columns, (num_rows, num_labels), target.values())
    return target


def _layout(target: Tensor) -> torch.layout:
    if torch.compiler.is_compiling():
        return target.layout
    with torch._C.DisableTorchFunction():  # a subclass would see it being asked for
        return target.layout


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _labels_dtype(labels: Tensor) -> torch.dtype:
    return labels.dtype if labels.dtype in _LABELS else torch.int64


def _other_than_ones(values: Tensor) -> Tensor | None:
    return None if _readable(values) and bool((values == 1).all()) else values


def _readable(t: Tensor) -> bool:
    """Whether the host has its numbers at hand, and no graph is made."""
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return False
    return t.is_cpu and not isinstance(t, FakeTensor)


def _check_integers(name: str, t: Tensor) -> None:
    if t.is_floating_point() or t.is_complex() or t.dtype is torch.bool:
        raise TypeError(f"{name} must be of integers, not {t.dtype}")


def _check_range(name: str, lowest: int, highest: int, size: int) -> None:
    for number in (lowest, highest):
        if not 0 <= number < size:
            raise IndexError(f"{name} {number} is out of range for {size} {name}s")


def _what(t: object) -> str:
    return f"of {t.dtype} and shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(type(t))
