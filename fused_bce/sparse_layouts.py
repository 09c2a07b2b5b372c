"""What torch's sparse tensors hold, as the fields of a SparseTarget."""

import torch
from torch import Tensor

SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def layout_of(target: Tensor) -> torch.layout:
    if torch.compiler.is_compiling():
        return target.layout
    with torch._C.DisableTorchFunction():  # a subclass would see it being asked for
        return target.layout


def fields_of_csr(matrix: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
    _check_matrix(matrix)
    offsets = matrix.crow_indices().to(torch.int64)
    return matrix.col_indices(), offsets, matrix.shape[1], _values_of(matrix)


def entries_of_coo(matrix: Tensor) -> tuple[Tensor, Tensor, tuple[int, int], Tensor]:
    """Rows, columns, shape and values; entries that occur twice are added up."""
    _check_matrix(matrix)
    matrix = matrix.coalesce()
    rows, columns = matrix.indices()
    num_rows, num_labels = matrix.shape
    return rows, columns, (num_rows, num_labels), _values_of(matrix)


def _values_of(matrix: Tensor) -> Tensor:
    # Not a view of a sparse tensor: torch.compile, which leaves those out of its graphs, fails on
    # views of them.
    return matrix.values().clone()


def _check_matrix(matrix: Tensor) -> None:
    if matrix.dim() != 2 or matrix.dense_dim() != 0:
        raise ValueError(
            f"a sparse target must be a matrix (N, C) of numbers, not of shape "
            f"{tuple(matrix.shape)} with {matrix.dense_dim()} dense dimensions"
        )
