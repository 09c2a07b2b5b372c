"""Rows of label numbers: their constructors, checks, and what carries them about."""

import copy
import inspect
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from head_cases import as_rows, draw_target, ignore_csr, matrix_of
from memory import bytes_of
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate, default_convert

from fused_bce import SparseTarget
from fused_bce.sparse import as_sparse

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


def test_padding_is_compared_as_a_number(device):
    """-1 is no number of uint8, 255 no padding."""
    padded = torch.tensor([[255, 3]], dtype=torch.uint8, device=device)
    dense = torch.zeros(1, 256, dtype=torch.bool)
    dense[0, [3, 255]] = True
    check(SparseTarget.from_padded(padded, 256), dense)


@pytest.mark.parametrize(
    "row", [np.array([3, 0]), torch.tensor([3, 0]), (np.int32(3), 0), range(0, 4, 3)], ids=repr
)
def test_rows_of_every_kind(row, device):
    check(SparseTarget.from_lists([row, [], [1]], np.int64(4), device=device))


def test_default_devices():
    with torch.device("meta"):
        target = SparseTarget.from_lists([[3, 0], [], [1]], 4, device="cpu")
        assert SparseTarget.from_lists([[3]], 4).indices.is_meta
        assert SparseTarget.identity(4).offsets.is_meta
    check(target)


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


def test_entries_of_scipy_that_occur_twice():
    """They are added up, as by SciPy; and the matrix stays as it was."""
    scipy = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    parts = np.array([0.25, 0.5, 0.125]), np.array([3, 1, 3]), np.array([0, 0, 3])
    matrix = scipy.csr_array(parts, shape=(2, 4))
    check(SparseTarget.from_csr(matrix), torch.tensor(matrix.toarray()))
    assert matrix.nnz == 3
    rows = np.array([1, 1, 1])
    coo = scipy.coo_array((parts[0], (rows, parts[1])), shape=(2, 4))
    check(SparseTarget.from_csr(coo), torch.tensor(coo.toarray()))


def test_buffers_of_scipy_are_copied():
    """A read-only one does not warn, nor does an edit change the target."""
    scipy = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    matrix = scipy.csr_array(DENSE.numpy() * 0.5)
    for array in (matrix.data, matrix.indices, matrix.indptr):
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = SparseTarget.from_csr(matrix)
    matrix.data.setflags(write=True)
    matrix.data[:] = 7
    check(target, DENSE.double() * 0.5)


@ignore_csr
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
def test_dtypes_of_sparse_tensors_do_not_depend_on_numbers(layout, dtype, device):
    """Given to a loss; the constructor leaves out what the host sees to be 1."""
    matrix = DENSE.to(dtype).to_sparse(layout=layout).to(device)
    assert as_sparse(matrix).values.dtype is dtype
    check(as_sparse(matrix), DENSE.to(dtype))
    if layout is torch.sparse_csr and device == "cpu":
        assert SparseTarget.from_csr(matrix).values is None


def test_entries_of_a_tensor_that_occur_twice(device):
    """They are added up, as by to_dense."""
    places = torch.tensor([[0, 0, 1], [2, 2, 0]])
    values = torch.tensor([0.25, 0.5, 1.0])
    matrix = torch.sparse_coo_tensor(places, values, (2, 3), check_invariants=True).to(device)
    check(as_sparse(matrix), matrix.to_dense())


def test_identity(device):
    target = SparseTarget.identity(5, device=device)
    check(target, torch.eye(5, dtype=torch.bool))
    target.indices.add_(-1)
    assert target.offsets[0] == 0  # another tensor's memory


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
    "a list of values": (target_of([0], [0, 1], 4, [1.0]), TypeError, "values must be a tensor"),
    "complex values": (
        target_of([0], [0, 1], 4, torch.ones(1, dtype=torch.complex64)),
        TypeError,
        "values must be of a dtype that a loss takes, not torch.complex64",
    ),
    "uint16 values": (
        target_of([0], [0, 1], 4, torch.ones(1, dtype=torch.uint16)),
        TypeError,
        "values must be of a dtype that a loss takes, not torch.uint16",
    ),
    "float8 values": (
        target_of([0], [0, 1], 4, torch.ones(1).to(torch.float8_e4m3fn)),
        TypeError,
        "values must be of a dtype that a loss takes, not torch.float8_e4m3fn",
    ),
    "no vector of offsets": (target_of([0], 0), TypeError, "offsets must be a vector of int64"),
    "float num_labels": (target_of([0], [0, 1], 4.0), TypeError, "num_labels must be an integer"),
    "bool num_labels": (target_of([0], [0, 1], True), TypeError, "num_labels must be an integer"),
    "negative num_labels": (
        target_of([], [0]).to("cpu")._replace(indices=torch.tensor([0]), num_labels=-4),
        ValueError,
        "num_labels must not be negative, as -4",
    ),
    "devices": (
        target_of([0], [0, 1])._replace(offsets=torch.tensor([0, 1], device="meta")),
        RuntimeError,
        "indices are on cpu, but offsets on meta",
    ),
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


ONES = torch.ones(2, dtype=torch.int64)
of = SparseTarget
CONSTRUCTORS = {
    "padded floats": (
        lambda: of.from_padded(torch.zeros(2, 2), 3),
        TypeError,
        "indices must be of integers, not torch.float32",
    ),
    "padded vector": (lambda: of.from_padded(ONES, 3), ValueError, "must be of shape (N, K)"),
    "padded array": (
        lambda: of.from_padded(np.zeros((2, 2), int), 3),
        TypeError,
        "indices must be a tensor, not ndarray",
    ),
    "padded lists": (
        lambda: of.from_padded([[1]], 3),
        TypeError,
        "indices must be a tensor, not list",
    ),
    "padding": (
        lambda: of.from_padded(ONES[None], 3, padding_value=-1.0),
        TypeError,
        "padding_value must be an integer",
    ),
    "float labels": (lambda: of.from_lists([[0, 1.5]], 3), TypeError, "not of float"),
    "multi-hot": (
        lambda: of.from_lists([[True, False, True]], 3),
        TypeError,
        "labels must be integers, not of bool",
    ),
    "multi-hot array": (
        lambda: of.from_lists(np.array([[True, False, True]]), 3),
        TypeError,
        "labels must be",
    ),
    "multi-hot tensor": (
        lambda: of.from_lists(torch.tensor([[True, False, True]]), 3),
        TypeError,
        "labels must be of integers, not torch.bool",
    ),
    "names": (
        lambda: of.from_lists([["cat"]], 3),
        TypeError,
        "labels must be integers, not of str",
    ),
    "num_labels": (
        lambda: of.from_lists([[0]], 3.0),
        TypeError,
        "num_labels must be an integer, not 3.0",
    ),
    "negative num_labels": (
        lambda: of.from_lists([[]], -3),
        ValueError,
        "num_labels must not be negative, as -3",
    ),
    "row": (
        lambda: of.from_coo(ONES, ONES, (1, 3)),
        IndexError,
        "row 1 is out of range for 1 rows",
    ),
    "columns": (
        lambda: of.from_coo(ONES, ONES[:1], (2, 3)),
        ValueError,
        "vectors of the same length",
    ),
    "rows": (lambda: of.from_coo([0], ONES, (2, 3)), TypeError, "rows must be a tensor, not list"),
    "number of values": (
        lambda: of.from_coo(ONES, ONES, (2, 3), torch.ones(3)),
        ValueError,
        "values must be as many as rows, 2, not of torch.float32 and shape (3,)",
    ),
    "list of values": (
        lambda: of.from_coo(ONES, ONES, (2, 3), [1.0, 1.0]),
        TypeError,
        "values must be a tensor, not list",
    ),
    "complex values": (
        lambda: of.from_coo(ONES, ONES, (2, 3), torch.ones(2, dtype=torch.complex64)),
        TypeError,
        "values must be of a dtype that a loss takes",
    ),
    "dense": (lambda: of.from_csr(DENSE), TypeError, "expected a CSR matrix of scipy or torch"),
    "batch of CSR": (
        lambda: of.from_csr(torch.stack([DENSE, DENSE]).float().to_sparse_csr()),
        ValueError,
        "a sparse target must be a matrix (N, C)",
    ),
    "three dimensions": (
        lambda: as_sparse(torch.ones(2, 3, 4).to_sparse()),
        ValueError,
        "a sparse target must be a matrix (N, C) of numbers, not of shape (2, 3, 4)",
    ),
    "hybrid COO": (
        lambda: as_sparse(DENSE.to_sparse(1)),
        ValueError,
        "with 1 dense dimensions",
    ),
    "CSC": (
        lambda: as_sparse(DENSE.float().to_sparse_csc()),
        TypeError,
        "target must be of layout torch.sparse_csr or sparse_coo, not torch.sparse_csc",
    ),
    "BSR": (
        lambda: as_sparse(torch.ones(2, 2).to_sparse_bsr((1, 1))),
        TypeError,
        "target must be of layout",
    ),
    "dtype": (
        lambda: of.identity(3).to(torch.int32),
        TypeError,
        "a SparseTarget goes to a device, not to torch.int32",
    ),
    "identity": (lambda: of.identity(2.5), TypeError, "n must be an integer, not 2.5"),
}


@ignore_csr
@pytest.mark.filterwarnings("ignore:Sparse (CSC|BSR) tensor support is in beta state")
@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors_refuse(case):
    make, kind, message = CONSTRUCTORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        make()


@pytest.mark.parametrize("values", [None, torch.float32, torch.bool], ids=str)
def test_memory_of_the_matrix(values, device):
    """It is filled in place."""
    target = SparseTarget.from_padded(torch.randint(5000, (100, 5), device=device), 5000)
    if values is not None:
        target = target._replace(values=torch.ones(500, device=device).to(values))
    # Of bool there is no maximum, and no cast in place.
    copies = 2 if values is torch.bool else 1
    size = 500_000 * (4 if values is torch.float32 else 1)
    # Some numbers of 8 bytes for each of 500 positives
    assert bytes_of(target.to_dense_unchecked, device).peak <= copies * size + 500 * 100


@pytest.mark.parametrize("values", [None, 0.5])
def test_is_saved_and_loaded(values):
    """By torch.load's default, which takes no classes that it does not know."""
    target = SparseTarget.from_lists([[3, 0], [], [1]], 4)
    if values is not None:
        target = target._replace(values=torch.full((3,), values))
    file = io.BytesIO()
    torch.save(target, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, SparseTarget)
    assert torch.equal(loaded.to_dense(), target.to_dense())


def test_is_carried_like_tensors(device):
    target = as_rows(draw_target(5, 7), torch.rand(5, 7))
    moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), target)
    assert isinstance(moved, SparseTarget)
    for other in (moved, target.to(device), pickle.loads(pickle.dumps(target)), copy.copy(target)):
        assert torch.equal(other.to_dense().cpu(), target.to_dense())
    if device == "cuda":
        pinned = target._replace(**{n: getattr(target, n).pin_memory() for n in ("indices",)})
        assert pinned.to(device, non_blocking=True).indices.is_cuda


REBUILDERS = {
    "transformers": lambda move, data: type(data)(move(v) for v in data),
    "a list": lambda move, data: type(data)([move(v) for v in data]),
    "a tuple": lambda move, data: type(data)(tuple(map(move, data))),
    "map": lambda move, data: type(data)(map(move, data)),
    "accelerate": lambda move, data: type(data)(*[move(v) for v in data]),
    "by name": lambda move, data: type(data)(**{n: move(v) for n, v in data._asdict().items()}),
    "_make": lambda move, data: type(data)._make(map(move, data)),
    "pytree": lambda move, data: pytree.tree_map(move, data),
    "torch.distributed": lambda move, data: _apply_to_tensors(move, data),
    "default_convert": lambda move, data: default_convert(move_each(move, data)),
    "without None": lambda move, data: type(data)(*(move(v) for v in data if v is not None)),
}


def move_each(move, data):
    return data._replace(**{name: move(value) for name, value in data._asdict().items()})


@pytest.mark.parametrize("values", [None, 0.5])
@pytest.mark.parametrize("rebuild", REBUILDERS.values(), ids=REBUILDERS)
def test_is_rebuilt(rebuild, values):
    """By what moves a batch: the tensors moved, the number of labels and None as they are."""
    target = SparseTarget.from_lists([[3, 0], [], [1]], 4)
    if values is not None:
        target = target._replace(values=torch.full((3,), values))

    def move(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    moved = rebuild(move, target)
    assert type(moved) is SparseTarget
    assert type(moved.num_labels) is int
    assert (moved.values is None) == (values is None)
    check(moved, target.to_dense())
    assert moved.indices is not target.indices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0, 3], [], [1]],), "has 4 fields, not 3; label numbers become one by from_lists"),
        ((iter([]),), "has 4 fields, not 0"),
        (("four",), "missing 2 required positional arguments: 'offsets' and 'num_labels'"),
        ((torch.zeros(4),), "missing 2 required positional arguments"),
        ((np.zeros(4),), "missing 2 required positional arguments"),
        (([0], [0, 1]), "missing 1 required positional argument: 'num_labels'"),
        (([0], [0, 1], 4, None, 5), "takes from 4 to 5 positional arguments but 6 were given"),
    ],
    ids=["lists", "iterator", "text", "tensor", "array", "two", "five"],
)
def test_too_few_fields(arguments, message):
    with pytest.raises(TypeError, match=message):
        SparseTarget(*arguments)
    assert [*inspect.signature(SparseTarget).parameters] == [*SparseTarget._fields]


def collate(rows):
    return SparseTarget.from_lists(rows, 4)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_comes_out_of_a_data_loader(device):
    """Where there is a GPU, in pinned memory."""
    loader = DataLoader([[0, 3], [], [1]], batch_size=3, collate_fn=collate, pin_memory=True)
    (batch,) = loader
    assert isinstance(batch, SparseTarget)
    assert batch.indices.is_pinned() == batch.offsets.is_pinned() == torch.cuda.is_available()
    check(batch.to(device, non_blocking=True))


def test_is_a_batch_itself():
    """Of several torch's collate makes nothing that a loss would take."""
    target = SparseTarget.from_lists([[0], [1]], 4)
    with pytest.raises(TypeError, match="NoneType"):
        default_collate([target, target])
    stacked = default_collate([target._replace(values=torch.ones(2))] * 2)
    with pytest.raises(TypeError, match="indices must be a vector"):
        stacked.check()
