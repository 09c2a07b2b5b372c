"""What the head has of its own in graphs: sparse targets and their checks, any number of rows."""

import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from head_cases import (
    FEATURES,
    LABELS,
    ROWS,
    Operands,
    as_rows,
    assert_near,
    by_head_dtype,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    ignore_csr,
    relative_error,
)
from helpers import IN_COMPILERS, as_rows_with_nan_again
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fused_bce
from fused_bce import LinearBCEWithLogitsLoss, SparseTarget

OPS = torch.ops.fused_bce
DOUBLE = 1e-13  # see test_head.py

pytestmark = IN_COMPILERS


def test_nan_named_again_is_one_element(device):
    """In graphs of any number of entries, which cannot look at the values."""
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True, dynamic=True)
    operands = draw_operands(device, torch.float64)
    for step in (2, 3, 200):
        dense = draw_target().double()
        dense[2, ::step] = math.nan
        target = as_rows_with_nan_again(dense).to(device)
        got = evaluate(operands, target, function=compiled, ignore_index=math.nan)
        assert_near(got, exact(operands, dense, ignore_index=math.nan), DOUBLE)


def test_inductor(device, monkeypatch):
    # With CI set the compiler refuses to keep what has a decomposition.
    monkeypatch.setenv("CI", "1")
    module = LinearBCEWithLogitsLoss(FEATURES, LABELS, bias=True, dtype=torch.float64).to(device)
    compiled = torch.compile(lambda x, t: module(2 * x, t), fullgraph=True, dynamic=True)
    for rows in (ROWS, 2 * ROWS, 5):
        input = torch.randn(rows, FEATURES, dtype=torch.float64, device=device)
        target = as_rows(draw_target(rows))
        operands = Operands(2 * input, module.linear.weight, module.linear.bias)
        want = exact(operands, target)
        loss = compiled(input, target.to(device))
        grads = torch.autograd.grad(loss, list(module.parameters()))
        assert relative_error(loss.detach(), want.loss) <= DOUBLE
        for grad, truth in zip(grads, want.grads[1:], strict=True):
            assert relative_error(grad, truth) <= DOUBLE


CONSTRUCTORS = {
    "padded": lambda labels: SparseTarget.from_padded(labels, LABELS, padding_value=8),
    "coo": lambda labels: SparseTarget.from_coo(
        torch.zeros_like(labels[0]), labels[0], (2, LABELS), labels[1] * 0.1
    ),
    "lists": lambda labels: SparseTarget.from_lists([[3, 5], []], LABELS, device=labels.device),
    "identity": lambda labels: SparseTarget.identity(2, device=labels.device)._replace(
        num_labels=LABELS
    ),
}


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_constructors_compile(constructor, device):
    weight = torch.randn(LABELS, FEATURES, device=device)
    input = torch.randn(2, FEATURES, device=device)
    labels = torch.tensor([[3, 5, 2], [8, 7, 0]], device=device)

    def step(input, labels):
        return head(input, weight, CONSTRUCTORS[constructor](labels))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(input, labels), step(input, labels))


class Head(torch.nn.Module):
    """Of rows and labels as they come from elsewhere, with every check."""

    def __init__(self):
        super().__init__()
        self.head = LinearBCEWithLogitsLoss(FEATURES, LABELS, validate_targets=True)

    def forward(self, input, target):
        return self.head(input, target)


class HeadOfPlaces(Head):
    def forward(self, input, rows, columns):
        return self.head(input, SparseTarget.from_coo(rows, columns, (len(input), LABELS)))


def compile_whole(module, arguments):
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def export_strictly(module, arguments):
    return export(module, arguments, strict=True).module()


def export_module(module, arguments):
    return export(module, arguments, strict=False).module()


by_graph = pytest.mark.parametrize("make", [compile_whole, export_strictly, export_module])

GOOD = SparseTarget(
    torch.tensor([0, 7, 5]), torch.tensor([0, 1, 3]), LABELS, torch.tensor([0.5, 1.0, 0.0])
)
BAD = {
    "label": (GOOD._replace(indices=GOOD.indices + LABELS - 5), "a label is out of range"),
    "negative label": (GOOD._replace(indices=GOOD.indices - 1), "a label is out of range"),
    "offsets": (GOOD._replace(offsets=torch.tensor([0, 3, 1])), "bad offsets"),
    "first offset": (GOOD._replace(offsets=torch.tensor([1, 1, 3])), "bad offsets"),
    "last offset": (GOOD._replace(offsets=torch.tensor([0, 1, 4])), "bad offsets"),
    "value": (GOOD._replace(values=torch.tensor([0, 1.5, 0])), r"outside \[0, 1\]"),
}


@by_graph
def test_graphs_check_numbers(make):
    """By assertions in the graph, hence of another type."""
    input = torch.randn(2, FEATURES)
    module = Head()
    graph = make(module, (input, GOOD))
    assert torch.equal(graph(input, GOOD), module(input, GOOD))
    for bad, message in BAD.values():
        with pytest.raises(RuntimeError, match=message):
            graph(input, bad)
    unread = GOOD._replace(offsets=torch.tensor([0, 1, 2]), values=torch.tensor([0, 1, 1.5]))
    assert torch.equal(graph(input, unread), module(input, unread))


@by_graph
def test_graphs_check_rows(make):
    input, rows, columns = torch.randn(2, FEATURES), torch.tensor([1, 0]), torch.tensor([3, 9])
    module = HeadOfPlaces()
    graph = make(module, (input, rows, columns))
    assert torch.equal(graph(input, rows, columns), module(input, rows, columns))
    for bad in (rows + 1, rows - 1):
        with pytest.raises(RuntimeError, match="a row is out of range"):
            graph(input, bad, columns)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_any_number_of_rows(strict, device):
    """Saved and loaded, too."""
    module = LinearBCEWithLogitsLoss(FEATURES, LABELS, dtype=torch.float64).to(device)
    any_size = {0: Dim.AUTO}
    of_target = SparseTarget(any_size, any_size, None, None)

    def arguments(rows):
        input = torch.randn(rows, FEATURES, dtype=torch.float64, device=device)
        return input, as_rows(draw_target(rows)).to(device)

    program = export(
        module,
        arguments(ROWS),
        dynamic_shapes={"input": any_size, "target": of_target},
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 3 * ROWS):
        input, target = arguments(rows)
        want = exact(Operands(input, module.linear.weight, None), target).loss
        for one in (program.module(), loaded):
            assert relative_error(one(input, target).detach(), want) <= DOUBLE


@ignore_csr
@pytest.mark.filterwarnings("ignore:.*sparse tensor")  # torch's, of the break
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
def test_sparse_tensors_break_the_graph(layout, device):
    """torch.compile takes none into a graph; it goes on behind."""
    operands = draw_operands(device, torch.float64)
    compiled = torch.compile(head, backend="aot_eager")
    target = (draw_target() * 0.5).to_sparse(layout=layout)
    got = evaluate(operands, target.to(device), function=compiled)
    assert_near(got, exact(operands, target), DOUBLE)


TRACED = {
    "rows": lambda indices, offsets, padded: SparseTarget(indices, offsets, LABELS),
    "values": lambda indices, offsets, padded: SparseTarget(
        indices, offsets, LABELS, indices.double() / LABELS
    ),
    "padded": lambda indices, offsets, padded: SparseTarget.from_padded(padded, LABELS),
}


@pytest.mark.parametrize("form", TRACED)
def test_a_trace_serves_other_rows(form, device):
    """Nothing of ours looks at numbers or sizes in it, of which torch would warn."""

    def function(input, weight, *tensors):
        return head(input, weight, TRACED[form](*tensors))

    def arguments(rows):
        padded = torch.randint(-1, LABELS, (rows, 3))
        target = SparseTarget.from_padded(padded, LABELS)
        return [t.to(device) for t in (torch.randn(rows, FEATURES), *target[:2], padded)]

    weight = torch.randn(LABELS, FEATURES, device=device)
    input, *tensors = arguments(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(function, (input, weight, *tensors))
    package = Path(fused_bce.__file__).parent
    assert not [w for w in caught if package in Path(w.filename).parents]
    input, *tensors = arguments(5)
    torch.testing.assert_close(traced(input, weight, *tensors), function(input, weight, *tensors))


def operator_calls(device):
    operands = draw_operands(device, torch.float64)
    rows = as_rows(draw_target(), torch.rand(ROWS, LABELS).double()).to(device)
    dense = draw_target().to(device)
    weights = (torch.rand(LABELS, device=device), torch.rand(ROWS, 1, device=device))
    smoothing = torch.tensor(0.1, dtype=torch.float64)
    yield (*operands, rows.indices, rows.offsets, None, *weights, 1, None, smoothing)
    yield (*operands, rows.indices, rows.offsets, rows.values, None, None, 2)
    yield (*operands[:2], None, dense, None, None, *weights, 1, None, None, 1)


@pytest.mark.parametrize("case", range(3))
def test_opcheck(case, device):
    call = list(operator_calls(device))[case]
    opcheck(OPS.linear_binary_cross_entropy_with_logits.default, call)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in call]
    bias = call[2] is not None
    for wanted in ([True, True, bias], [False, True, False]):
        opcheck(OPS._linear_binary_cross_entropy_with_grads.default, (wanted, None, *detached))


@pytest.mark.parametrize("case", range(3))
def test_decomposed_gradients(case, device):
    call = [
        t.detach() if isinstance(t, torch.Tensor) else t for t in list(operator_calls(device))[case]
    ]
    wanted = [True, True, call[2] is not None]

    def function(*tensors):
        operands = iter(tensors)
        rest = [next(operands) if isinstance(t, torch.Tensor) else t for t in call]
        return OPS._linear_binary_cross_entropy_with_grads(wanted, None, *rest)

    tensors = [t for t in call if isinstance(t, torch.Tensor)]
    lowered = make_fx(function, decomposition_table=fused_bce.decomposition_table())(*tensors)
    assert not any("fused_bce" in str(node.target) for node in lowered.graph.nodes)
    for got, want in zip(lowered(*tensors), function(*tensors), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert relative_error(got, want.cpu().double()) <= DOUBLE


@by_head_dtype
@pytest.mark.parametrize("case", range(3))
def test_operator_without_numbers(case, dtype, device):
    """The operators as such: torch computes calls of the function on meta tensors."""
    call = list(operator_calls(device))[case]
    call = [t.detach() if isinstance(t, torch.Tensor) else t for t in call]
    call[:3] = [t if t is None else t.to(dtype) for t in call[:3]]
    wanted = [True, False, call[2] is not None]
    on_meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in call]
    got = OPS._linear_binary_cross_entropy_with_grads(wanted, None, *on_meta)
    want = OPS._linear_binary_cross_entropy_with_grads(wanted, None, *call)
    for ours, real in zip(got, want, strict=True):
        assert ours.is_meta
        assert (ours.shape, ours.dtype) == (real.shape, real.dtype)
    loss = OPS.linear_binary_cross_entropy_with_logits(*on_meta)
    assert (loss.shape, loss.dtype, loss.is_meta) == ((), want[0].dtype, True)
