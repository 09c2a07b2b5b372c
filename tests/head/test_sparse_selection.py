"""Rows and labels of a SparseTarget, and several as one: as of the matrix, indexed by torch."""

import re

import numpy as np
import pytest
import torch
from head_cases import as_rows, draw_target, matrix_of

from fused_bce import SparseTarget
from fused_bce.functional import linear_binary_cross_entropy_with_logits as head

ROWS, LABELS = 9, 12


def draw(kind, device, rows=ROWS):
    """A target with an empty row, a full one, labels named twice, and some that no row has."""
    dense = draw_target(rows, LABELS, 0.3)
    values = torch.rand(rows, LABELS) + 0.1 if kind == "values" else None
    target = as_rows(dense, values)
    more = torch.tensor([77, -5])
    target = target._replace(indices=torch.cat([target.indices, more]))
    if kind == "values":
        target = target._replace(values=torch.cat([target.values, more.float()]))
    if kind == "int32":
        target = target._replace(indices=target.indices.int())
    return target.to(device)


by_kind = pytest.mark.parametrize("kind", ["ones", "int32", "values"])


def compiled(function):
    """Where the numbers are not at hand, as on a GPU."""
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


WAYS = {"eager": lambda function: function, "compiled": compiled}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def check(got, want):
    got.check()
    assert got.num_rows == len(want)
    assert torch.equal(matrix_of(got), want)
    assert got.indices.device == got.offsets.device


@by_kind
@by_way
@pytest.mark.parametrize("bounds", [(0, ROWS), (0, 1), (1, 5), (4, 4), (7, ROWS)], ids=str)
def test_rows(bounds, way, kind, device):
    target = draw(kind, device)
    got = way(lambda target: target.rows(*bounds))(target)
    check(got, matrix_of(target)[slice(*bounds)])
    assert got.indices.dtype == target.indices.dtype


@by_kind
@pytest.mark.parametrize("index", [[3], [8, 0, 0, 1], [], range(ROWS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_of_an_index(dtype, index, kind, device):
    target, index = draw(kind, device), torch.tensor(index, dtype=dtype)
    check(target.rows(index.to(device)), matrix_of(target)[index.long()])
    assert np.int64(3) == target.rows(0, np.int64(3)).num_rows
    check(target.rows(5), matrix_of(target)[5:])


@by_kind
@by_way
@pytest.mark.parametrize("bounds", [(0, LABELS), (0, 1), (3, 8), (5, 5), (11, LABELS)], ids=str)
def test_labels(bounds, way, kind, device):
    target = draw(kind, device)
    got = way(lambda target: target.labels(*bounds))(target)
    assert got.num_labels == bounds[1] - bounds[0]
    check(got, matrix_of(target)[:, slice(*bounds)])


@by_way
@pytest.mark.parametrize(
    "kinds", [["ones"], ["ones", "int32"], ["values"] * 3, ["int32", "values", "ones"]], ids=str
)
def test_cat(kinds, way, device):
    targets = [draw(kind, device, rows) for kind, rows in zip(kinds, (4, 2, 5), strict=False)]
    got = way(lambda *targets: SparseTarget.cat(targets))(*targets)
    check(got, torch.cat([matrix_of(t) for t in targets]))
    assert (got.values is None) == ("values" not in kinds)


def test_cat_of_values_of_several_dtypes(device):
    one = SparseTarget.from_lists([[1], [0, 1]], 2, device=device)
    whole = one._replace(values=torch.tensor([1, 0, 1], device=device))
    half = one._replace(values=torch.tensor([0.5, 0, 0.25], device=device).half())
    assert SparseTarget.cat([whole, half]).values.dtype is torch.float16
    check(
        SparseTarget.cat([whole, half, one]), torch.cat([matrix_of(t) for t in (whole, half, one)])
    )


def test_parts_of_rows_and_of_labels_make_the_whole(device):
    target = draw("values", device)
    whole = matrix_of(target)
    parts = [target.rows(i, min(i + 4, ROWS)) for i in range(0, ROWS, 4)]
    check(SparseTarget.cat(parts), whole)
    columns = [matrix_of(target.labels(i, i + 3)) for i in range(0, LABELS, 3)]
    assert torch.equal(torch.cat(columns, 1), whole)


def test_accumulated_micro_batches(device):
    """Their sums are the loss and the gradient of the batch."""
    target = draw("ones", device)
    input = torch.randn(ROWS, 5, dtype=torch.float64, device=device)
    weight = torch.randn(LABELS, 5, dtype=torch.float64, device=device).requires_grad_()
    whole = head(input, weight, target, reduction="sum")
    (want,) = torch.autograd.grad(whole, weight)
    sum_ = 0
    for begin in range(0, ROWS, 2):
        end = min(begin + 2, ROWS)
        loss = head(input[begin:end], weight, target.rows(begin, end), reduction="sum")
        loss.backward()
        sum_ += loss.detach()
    torch.testing.assert_close(sum_, whole.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(weight.grad, want, rtol=1e-12, atol=1e-13)


def test_gradients_of_values(device):
    target = draw("values", device)
    leaf = target.values.clone().requires_grad_()
    part = target._replace(values=leaf).labels(2, 7).rows(1, 5)
    (grad,) = torch.autograd.grad(part.values.sum(), leaf)
    rows = (
        torch.searchsorted(target.offsets, torch.arange(len(leaf), device=device), right=True) - 1
    )
    inside = (rows >= 1) & (rows < 5) & (target.indices >= 2) & (target.indices < 7)
    assert torch.equal(grad, inside.float())


ONE = SparseTarget.from_lists([[0], [1, 2]], 4)
BAD = ONE._replace(indices=torch.tensor([0, 1, 9]))
REFUSED = {
    "end": (lambda: ONE.rows(0, 3), IndexError, "rows 0 to 3 are out of range for 2 rows"),
    "begin": (lambda: ONE.rows(-1, 2), IndexError, "rows -1 to 2 are out of range"),
    "descending": (lambda: ONE.rows(2, 1), IndexError, "rows 2 to 1 are out of range"),
    "float": (lambda: ONE.rows(0.0, 1), TypeError, "begin must be an integer, not 0.0"),
    "row": (lambda: ONE.rows(torch.tensor([0, 2])), IndexError, "row 2 is out of range for 2 rows"),
    "negative": (lambda: ONE.rows(torch.tensor([-1])), IndexError, "row -1 is out of range"),
    "mask": (
        lambda: ONE.rows(torch.tensor([True, False])),
        TypeError,
        "index must be of integers, not torch.bool",
    ),
    "matrix": (
        lambda: ONE.rows(torch.tensor([[0]])),
        ValueError,
        "index must be a vector, not of shape (1, 1)",
    ),
    "both": (lambda: ONE.rows(torch.tensor([0]), 1), TypeError, "or one vector of row numbers"),
    "list": (lambda: ONE.rows([0]), TypeError, "begin must be an integer, not [0]"),
    "labels": (lambda: ONE.labels(0, 5), IndexError, "labels 0 to 5 are out of range for 4 labels"),
    "label": (lambda: BAD.labels(0, 2), IndexError, "label 9 is out of range for 4 labels"),
    "rows of a bad label": (lambda: BAD.rows(0, 1), IndexError, "label 9 is out of range"),
    "nothing": (lambda: SparseTarget.cat([]), ValueError, "expected at least one SparseTarget"),
    "tensor": (
        lambda: SparseTarget.cat([ONE, torch.zeros(2, 4)]),
        TypeError,
        "expected SparseTargets, not Tensor",
    ),
    "a target": (lambda: SparseTarget.cat(ONE), TypeError, "expected SparseTargets, not Tensor"),
    "other labels": (
        lambda: SparseTarget.cat([ONE, ONE._replace(num_labels=5)]),
        ValueError,
        "the targets have different numbers of labels: [4, 5]",
    ),
    "bad label in one": (lambda: SparseTarget.cat([ONE, BAD]), IndexError, "label 9 is out of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    function, kind, message = REFUSED[case]
    with pytest.raises(kind, match=re.escape(message)):
        function()
