"""Rows of label numbers: their constructors, checks, and what carries them about."""

import copy
import pickle

import pytest
import torch
from head_cases import as_rows, draw_target, ignore_csr, matrix_of
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from fused_bce import SparseTarget

DENSE = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


def check(target, dense=DENSE):
    assert target.shape == dense.shape
    assert torch.equal(matrix_of(target), dense.cpu())
    got = target.to_dense()
    assert got.device == target.indices.device
    assert torch.equal(got.cpu(), dense.cpu())
    like = target.like_dense()
    assert (like.shape, like.dtype, like.device) == (got.shape, got.dtype, got.device)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_from_padded(dtype, device):
    padded = torch.tensor([[-1, 3, -1, 0], [-1, -1, -1, -1], [1, -1, 1, -1]]).to(device, dtype)
    check(SparseTarget.from_padded(padded, 4))
    check(SparseTarget.from_padded(torch.where(padded < 0, 99, padded), 4, padding_value=99))
    check(SparseTarget.from_padded(padded[:, :0], 4), torch.zeros(3, 4, dtype=torch.bool))
    check(SparseTarget.from_padded(padded[:0], 4), torch.zeros(0, 4, dtype=torch.bool))


def test_from_lists(device):
    check(SparseTarget.from_lists([[3, 0], [], [1, 1]], 4, device=device))
    check(SparseTarget.from_lists([], 4, device=device), torch.zeros(0, 4, dtype=torch.bool))


def test_from_coo(device):
    rows, columns = (t.to(device) for t in DENSE.nonzero().flip(0).t())
    check(SparseTarget.from_coo(rows, columns, (3, 4)))
    values = torch.tensor([0.5, 0.25, 1.0], device=device)
    soft = torch.tensor([[1.0, 0, 0, 0.25], [0, 0, 0, 0], [0, 0.5, 0, 0]])
    check(SparseTarget.from_coo(rows, columns, (3, 4), values), soft)
    assert torch.equal(as_rows(DENSE).to(device).to_dense(torch.float16).cpu(), DENSE.half())


@ignore_csr
def test_from_csr(device):
    check(SparseTarget.from_csr(DENSE.float().to_sparse_csr().to(device)), DENSE.float())
    soft = DENSE * 0.5
    check(SparseTarget.from_csr(soft.to_sparse_csr().to(device)), soft)


def test_from_scipy():
    scipy = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    for make in (scipy.csr_matrix, scipy.csr_array, scipy.coo_array, scipy.csc_matrix):
        target = SparseTarget.from_csr(make(DENSE.numpy()))
        assert target.values is None
        check(target)
    soft = DENSE * 0.5
    check(SparseTarget.from_csr(scipy.csr_array(soft.numpy())), soft)


def test_identity(device):
    check(SparseTarget.identity(5, device=device), torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64],
)
def test_values_of_every_dtype(dtype, device):
    target = SparseTarget.from_lists([[0, 2], [2]], 3, device=device)
    values = torch.tensor([1, 0, 1], device=device).to(dtype)
    check(target._replace(values=values), torch.tensor([[1, 0, 0], [0, 0, 1]]).to(dtype))


def test_the_largest_of_several_values(device):
    target = SparseTarget.from_lists([[1, 1, 1], [1]], 2, device=device)
    values = torch.tensor([-0.25, -0.75, -0.5, -1.0], device=device)
    dense = target._replace(values=values).to_dense().cpu()
    assert torch.equal(dense, torch.tensor([[0, -0.25], [0, -1]]))


def target_of(indices, offsets, num_labels=4, values=None):
    return SparseTarget(torch.tensor(indices), torch.tensor(offsets), num_labels, values)


BAD = {
    "label": (target_of([0, 4], [0, 2]), IndexError, "label 4 is out of range for 4 labels"),
    "negative label": (target_of([-1], [0, 1]), IndexError, "label -1 is out of range"),
    "first offset": (target_of([0, 1], [1, 2]), ValueError, "must begin with 0"),
    "last offset": (target_of([0], [0, 2]), ValueError, "at most the number of indices, 1"),
    "negative offset": (target_of([0], [0, -1]), ValueError, "at most the number of indices"),
    "descending": (target_of([0, 1, 2], [0, 2, 1, 3]), ValueError, "fall behind row 1"),
    "no offsets": (SparseTarget(torch.tensor([0]), torch.empty(0).long(), 4), ValueError, "one"),
    "float labels": (target_of([0.5], [0, 1]), TypeError, "indices must be a vector of int32"),
    "matrix of labels": (target_of([[0]], [0, 1]), TypeError, "indices must be a vector"),
    "float offsets": (target_of([0], [0.0, 1]), TypeError, "offsets must be a vector of int64"),
    "lists": (SparseTarget([0], [0, 1], 4), TypeError, "indices must be a vector"),
    "values": (target_of([0, 1], [0, 2], 4, torch.ones(1)), TypeError, "as many as indices"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    """On a GPU these are assertions of the device, after which a process can do no more."""
    target, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        target.check()
    with pytest.raises(kind, match=message):
        target.to_dense()


def test_what_lies_behind_the_last_offset_is_not_read(device):
    target = SparseTarget(torch.tensor([1, 77, -9]), torch.tensor([0, 0, 1]), 3).to(device)
    check(target, torch.tensor([[0, 0, 0], [0, 1, 0]], dtype=torch.bool))


def test_constructors_refuse():
    with pytest.raises(TypeError, match=r"indices must be of integers, not torch.float32"):
        SparseTarget.from_padded(torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match=r"must be of shape \(N, K\)"):
        SparseTarget.from_padded(torch.zeros(2, dtype=torch.int64), 3)
    ones = torch.ones(2, dtype=torch.int64)
    with pytest.raises(IndexError, match="row 1 is out of range for 1 rows"):
        SparseTarget.from_coo(ones, ones, (1, 3))
    with pytest.raises(ValueError, match="vectors of the same length"):
        SparseTarget.from_coo(ones, ones[:1], (2, 3))
    with pytest.raises(TypeError, match="expected a CSR matrix of scipy or torch, not Tensor"):
        SparseTarget.from_csr(DENSE)


def test_is_carried_like_tensors(device):
    target = as_rows(draw_target(5, 7), torch.rand(5, 7))
    moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), target)
    assert isinstance(moved, SparseTarget)
    for other in (moved, target.to(device), pickle.loads(pickle.dumps(target)), copy.copy(target)):
        assert torch.equal(other.to_dense().cpu(), target.to_dense())
    if device == "cuda":
        pinned = target._replace(**{n: getattr(target, n).pin_memory() for n in ("indices",)})
        assert pinned.to(device, non_blocking=True).indices.is_cuda


def collate(rows):
    return SparseTarget.from_lists(rows, 4)


def test_comes_out_of_a_data_loader():
    batches = list(DataLoader([[0, 3], [], [1]], batch_size=3, collate_fn=collate))
    check(batches[0])
