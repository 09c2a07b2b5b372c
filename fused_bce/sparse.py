"""Targets of which nearly all are 0, as rows of label numbers."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_bce.arguments import (
    as_count,
    as_integer,
    check_integers,
    check_range,
    check_tensor,
    describe,
    in_graph,
    is_assertable,
    is_readable,
)
from fused_bce.sparse_checks import (
    LABELS,
    assert_numbers,
    check_numbers,
    check_structure,
    is_read,
)
from fused_bce.sparse_layouts import SPARSE, entries_of_coo, fields_of_csr, layout_of
from fused_bce.sparse_selection import (
    check_bounds,
    compute_offsets,
    concatenate,
    select,
    slice_labels,
    slice_rows,
    take_rows,
)

_transform = torch._C._functorch.peek_interpreter_stack


class SparseTarget(NamedTuple):
    """Targets of N rows and C labels of which nearly all are 0, as rows of label numbers (CSR).

    A row has its labels in any order; one that occurs twice counts once (with ``values``: the
    largest, or nan if one of them is). A named tuple of tensors, so that what moves or pins a batch
    moves and pins it.

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
            TypeError: for indices that are no tensor of integers.
            ValueError: for indices that are no matrix.
        """
        num_labels = as_count("num_labels", num_labels)
        check_integers("indices", indices)
        if indices.dim() != 2:
            raise ValueError(f"indices must be of shape (N, K), not {tuple(indices.shape)}")
        # In uint8, -1 would be 255.
        kept = indices.to(torch.int64) != as_integer("padding_value", padding_value)
        (labels,) = select(kept.flatten(), indices.flatten().to(_labels_dtype(indices)))
        return cls(labels, compute_offsets(kept.sum(1)), num_labels)

    @classmethod
    def from_lists(
        cls,
        rows: Iterable[Sequence[int]],
        num_labels: int,
        *,
        device: torch.device | str | None = None,
    ) -> "SparseTarget":
        """From the label numbers of each row.

        Raises:
            TypeError: for labels that are not integers, as in a row of 0 and 1 for all labels.
        """
        num_labels = as_count("num_labels", num_labels)
        rows = list(rows)
        flat = [label for row in rows for label in row]
        for kind in set(map(type, flat)):
            if issubclass(kind, bool) or not hasattr(kind, "__index__"):
                raise TypeError(f"labels must be integers, not of {kind.__name__}")
        # Tensors of one number are of any dtype.
        labels = torch.tensor(flat, device="cpu") if flat else torch.empty(0, device="cpu").long()
        check_integers("labels", labels)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
        device = torch.empty(0, device=device).device
        return cls(labels.long().to(device), compute_offsets(lengths).to(device), num_labels)

    @classmethod
    def from_csr(cls, matrix: Any) -> "SparseTarget":
        """From a matrix (N, C) of scipy.sparse, or a tensor of layout torch.sparse_csr. What it
        stores are the targets; values that are all 1 are left out, where the host can read them.

        Entries of SciPy that occur twice are added up, as by ``toarray``. In a tensor torch forbids
        them (``check_invariants``); here they would count once, as the largest.

        Raises:
            TypeError: for anything else, and for values of a dtype that no loss takes.
            ValueError: for batches of matrices, and for matrices of vectors.
        """
        if isinstance(matrix, Tensor) and matrix.layout is torch.sparse_csr:
            target = cls(*fields_of_csr(matrix))
        elif not isinstance(matrix, Tensor) and hasattr(matrix, "tocsr"):
            if len(matrix.shape) != 2:
                raise ValueError(f"expected a matrix (N, C), not of shape {matrix.shape}")
            csr = matrix.tocsr()
            if not csr.has_canonical_format:
                csr = csr.copy()
                csr.sum_duplicates()
            # Copies: it may be written to, or be read-only, which torch warns of.
            labels, offsets, values = map(torch.tensor, (csr.indices, csr.indptr, csr.data))
            target = cls(labels, offsets.to(torch.int64), int(matrix.shape[1]), values)
        else:
            raise TypeError(f"expected a CSR matrix of scipy or torch, not {type(matrix).__name__}")
        target.check_structure()
        return _without_ones(target)

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
            TypeError: for rows or columns that are no tensors of integers, and values that are no
                tensor of a dtype that a loss takes.
            ValueError: if they are no vectors of the same length.
            IndexError: for a row out of range; on a GPU it is a device-side assertion.
        """
        num_rows, num_labels = (as_count("sizes in shape", size) for size in shape)
        check_integers("rows", rows)
        check_integers("columns", columns)
        if rows.dim() != 1 or rows.shape != columns.shape:
            raise ValueError(
                f"rows and columns must be vectors of the same length, not of shapes "
                f"{tuple(rows.shape)} and {tuple(columns.shape)}"
            )
        if values is not None:
            check_tensor("values", values)
            if values.shape != rows.shape:
                raise ValueError(
                    f"values must be as many as rows, {len(rows)}, not {describe(values)}"
                )
        if is_readable(rows):
            if rows.numel():
                check_range("row", int(rows.min()), int(rows.max()), num_rows)
        elif is_assertable(rows):
            torch._assert_async(((rows >= 0) & (rows < num_rows)).all(), "a row is out of range")
        rows, order = rows.to(torch.int64).sort(stable=True)
        starts = torch.arange(num_rows + 1, device=rows.device)
        offsets = torch.searchsorted(rows, starts)
        columns = columns[order].to(_labels_dtype(columns))
        values = None if values is None else values[order]
        target = cls(columns, offsets, num_labels, values)
        target.check_structure()
        return target

    @classmethod
    def identity(cls, n: int, *, device: torch.device | str | None = None) -> "SparseTarget":
        """Row i has label i alone: the target of a batch of pairs."""
        n = as_count("n", n)
        return cls(torch.arange(n, device=device), torch.arange(n + 1, device=device), n)

    @property
    def shape(self) -> torch.Size:
        """(N, C)"""
        return torch.Size((self.offsets.shape[0] - 1, self.num_labels))

    @property
    def num_rows(self) -> int:
        """N. ``len`` of a named tuple is the number of its fields."""
        return self.offsets.shape[0] - 1

    def rows(self, begin: int | Tensor, end: int | None = None) -> "SparseTarget":
        """The targets of some rows: from ``begin`` up to ``end``, or of the rows in a vector of
        integers, in its order, each as often as it is there.

        The vector waits for a GPU; ``begin`` and ``end`` do not.

        Raises:
            IndexError: for rows out of range; on a GPU a vector of them is a device-side assertion.
            TypeError: for anything but integers.
            ValueError: for a tensor that is no vector.

        Example:
            >>> import torch
            >>> from fused_bce import SparseTarget
            >>> target = SparseTarget.from_lists([[0, 3], [], [1]], num_labels=4)
            >>> target.rows(1, 3).to_dense(torch.int64)
            tensor([[0, 0, 0, 0],
                    [0, 1, 0, 0]])
            >>> target.rows(torch.tensor([2, 0])).indices
            tensor([1, 0, 3])
        """
        self.check()
        if isinstance(begin, Tensor):
            if end is not None:
                raise TypeError("rows takes begin and end, or one vector of row numbers")
            return SparseTarget(*take_rows(self, begin))
        end = self.num_rows if end is None else end
        begin, end = check_bounds("row", begin, end, self.num_rows)
        return SparseTarget(*slice_rows(self, begin, end))

    def labels(self, begin: int, end: int) -> "SparseTarget":
        """The targets of the labels from ``begin`` up to ``end``, columns of the matrix; the first
        of them becomes label 0. Waits for no GPU.

        Raises:
            IndexError: for labels out of range.
            TypeError: for anything but integers.

        Example:
            >>> from fused_bce import SparseTarget
            >>> target = SparseTarget.from_lists([[0, 3], [], [2]], num_labels=4)
            >>> target.labels(2, 4).indices
            tensor([1, 0])
        """
        self.check()
        begin, end = check_bounds("label", begin, end, self.num_labels)
        return SparseTarget(*slice_labels(self, begin, end))

    @classmethod
    def cat(cls, targets: Sequence["SparseTarget"]) -> "SparseTarget":
        """The rows of several targets, one after the other. If only some have values, those of the
        others are 1. Waits for no GPU.

        Raises:
            TypeError: for anything but targets.
            ValueError: for no target, and for different numbers of labels.

        Example:
            >>> from fused_bce import SparseTarget
            >>> one = SparseTarget.from_lists([[0, 3], []], num_labels=4)
            >>> SparseTarget.cat([one, one.rows(0, 1)]).offsets
            tensor([0, 2, 2, 4])
        """
        targets = list(targets)
        if not targets:
            raise ValueError("expected at least one SparseTarget")
        for target in targets:
            if not isinstance(target, SparseTarget):
                raise TypeError(f"expected SparseTargets, not {type(target).__name__}")
            target.check()
        sizes = sorted({target.num_labels for target in targets})
        if len(sizes) > 1:
            raise ValueError(f"the targets have different numbers of labels: {sizes}")
        return cls(*concatenate(targets))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SparseTarget":
        """The same on another device.

        Raises:
            TypeError: for a dtype: labels are int32 or int64, offsets int64.
        """
        if not isinstance(device, torch.device | str | int):
            raise TypeError(f"a SparseTarget goes to a device, not to {device!r}")
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
        # To one element more: a mask would have a length that the host waits for.
        size = num_rows * num_labels + 1
        places = self._compute_places(outside=size - 1)
        if self.values is None:
            dense = torch.zeros(size, dtype=torch.bool, device=self.indices.device)
            dense = (
                dense.index_fill(0, places, 1) if in_graph() else dense.index_fill_(0, places, 1)
            )
            return dense[:-1].view(num_rows, num_labels)
        # Of bool there is no maximum.
        values = self.values.to(torch.promote_types(self.values.dtype, torch.uint8))
        dense = values.new_zeros(size)
        # In place where that is nobody's affair, for there would be two of it.
        functional = in_graph() or values.requires_grad
        scatter = dense.scatter_reduce if functional else dense.scatter_reduce_
        isnan = values.isnan() if values.requires_grad else None
        given = values if isnan is None else values.masked_fill(isnan, 0)
        dense = scatter(0, places, given, "amax", include_self=False)
        if isnan is not None:
            # The derivative of amax at nan is nan, also where the loss ignores nan.
            dense = dense.index_fill(0, places.masked_fill(~isnan, size - 1), math.nan)
        return dense[:-1].view(num_rows, num_labels).to(self.values.dtype)

    def like_dense(self) -> Tensor:
        """A tensor of the shape, dtype and device of :meth:`to_dense`, without its memory."""
        one = self.indices if self.values is None else self.values
        dtype = torch.bool if self.values is None else one.dtype
        return one.new_zeros((), dtype=dtype).expand(self.shape)

    def check(self) -> None:
        """Raises what the losses raise for it: see the class."""
        self.check_structure()
        if is_readable(self.indices):
            check_numbers(self)
        elif is_assertable(self.indices):
            assert_numbers(self)

    def check_structure(self) -> None:
        """The same for all but the numbers."""
        check_structure(self)

    def read_values(self) -> Tensor | None:
        """The values, with 0 for those that no row has."""
        if self.values is None:
            return None
        return self.values.masked_fill(~is_read(self), 0)

    def has_floats(self) -> bool:
        """Whether a value may be nan."""
        return self.values is not None and self.values.is_floating_point()

    def count_without_nan(self) -> Tensor:
        """How many elements of :meth:`to_dense`, which has floats, are not nan, in float64."""
        assert self.values is not None
        isnan = self.values.isnan()
        size = (self.offsets.shape[0] - 1) * self.num_labels
        # vmap refuses a branch on a tensor's values.
        if is_readable(isnan) and _transform() is None and not isnan.any():
            return isnan.new_full((), size, dtype=torch.float64)
        # A label may occur several times in a row, so count the distinct places. Only a sort does
        # that with a length known beforehand: torch.unique would make the host wait.
        places = self._compute_places(outside=-1).masked_fill(~isnan, -1).sort().values
        changes = places.diff(prepend=places.new_full((1,), -1)) != 0
        return size - changes.sum(dtype=torch.float64)

    def _compute_places(self, outside: int) -> Tensor:
        """Where in the flat matrix each target goes; ``outside`` for those that no row has."""
        num_rows, num_labels = self.shape
        places = torch.arange(self.indices.shape[0], device=self.offsets.device)
        rows = torch.searchsorted(self.offsets, places, right=True) - 1
        inside = (rows >= 0) & (rows < num_rows)
        inside = inside & (self.indices >= 0) & (self.indices < num_labels)
        return torch.where(inside, rows * num_labels + self.indices, outside)


def _take_all_fields_at_once(make):
    """Libraries rebuild a container as ``type(data)(move(v) for v in data)``: one argument."""

    @functools.wraps(make)
    def make_from_any(cls, *fields, **named):
        if len(fields) == 1 and not named and isinstance(fields[0], list | tuple | Iterator):
            fields = tuple(fields[0])
            if len(fields) != len(cls._fields):
                raise TypeError(
                    f"a SparseTarget has 4 fields, not {len(fields)}; label numbers become one by "
                    "from_lists or from_padded"
                )
        return make(cls, *fields, **named)

    return make_from_any


# Not in the class, which typing forbids, nor in a subclass, which torch.compile would not take.
SparseTarget.__new__ = _take_all_fields_at_once(SparseTarget.__new__)  # type: ignore[method-assign]

torch.serialization.add_safe_globals([SparseTarget])
if hasattr(pytree, "_register_namedtuple"):  # for torch.export.save
    pytree._register_namedtuple(SparseTarget, serialized_type_name="fused_bce.SparseTarget")


def as_sparse(target: Tensor | SparseTarget) -> Tensor | SparseTarget:
    """The same, but that a sparse tensor becomes a SparseTarget. It keeps its values, also if all
    are 1: dtypes must not depend on numbers.
    """
    if not isinstance(target, Tensor) or (layout := layout_of(target)) not in SPARSE:
        return target
    if layout is torch.sparse_csr:
        sparse = SparseTarget(*fields_of_csr(target))
        sparse.check_structure()
        return sparse
    if layout is not torch.sparse_coo:
        raise TypeError(f"target must be of layout torch.sparse_csr or sparse_coo, not {layout}")
    return SparseTarget.from_coo(*entries_of_coo(target))


def _labels_dtype(labels: Tensor) -> torch.dtype:
    return labels.dtype if labels.dtype in LABELS else torch.int64


def _without_ones(target: SparseTarget) -> SparseTarget:
    values = target.values
    ones = values is not None and is_readable(values) and bool((values == 1).all())
    return target._replace(values=None) if ones else target
