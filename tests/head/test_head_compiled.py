"""The head in torch.compile, torch.export and other tracers, and in decompositions."""

import contextlib

import pytest
import torch
from head_cases import (
    FEATURES,
    LABELS,
    ROWS,
    Operands,
    as_rows,
    assert_near,
    by_reduction,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    relative_error,
)
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import default_decompositions, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_bce
from fused_bce import LinearBCEWithLogitsLoss, SparseTarget

OPS = torch.ops.fused_bce
DOUBLE = 1e-13  # see test_head.py

# torch's own, in its compiler, in opcheck and in torch.export
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


FORMS = {
    "rows": as_rows,
    "values": lambda dense: as_rows(dense, dense.double() * 0.75),
    "dense": torch.Tensor.double,
    "int64": torch.Tensor.long,
}
by_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@by_form
@by_reduction
def test_compiled(reduction, form, device):
    operands = draw_operands(device, torch.float64)
    target = form(draw_target())
    options = {"reduction": reduction, "label_smoothing": 0.1}
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    got = evaluate(operands, target.to(device), grad_loss=0.3, function=compiled, **options)
    assert_near(got, exact(operands, target, grad_loss=0.3, **options), DOUBLE)


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


def test_constructors_compile(device):
    weight = torch.randn(LABELS, FEATURES, device=device)
    input = torch.randn(2, FEATURES, device=device)
    padded = torch.tensor([[3, -1, 5], [-1, -1, 0]], device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(input, padded):
        return head(input, weight, SparseTarget.from_padded(padded, LABELS))

    target = SparseTarget.from_padded(padded, LABELS)
    assert torch.equal(step(input, padded), head(input, weight, target))


def test_labels_out_of_range_compiled():
    """From an assertion in the graph, hence of another type."""
    target = SparseTarget.from_lists([[LABELS]], LABELS)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="a label is out of range"):
        compiled(torch.randn(1, FEATURES), torch.randn(LABELS, FEATURES), target)


def test_compiled_autograd(device):
    operands = draw_operands(device, torch.float64)
    target = as_rows(draw_target())
    want = exact(operands, target).grads
    with compiled_autograd._enable(torch.compile(backend="eager")):
        head(*operands[:2], target.to(device), linear_bias=operands.linear_bias).backward()
    for leaf, grad in zip(operands.leaves(), want, strict=True):
        assert relative_error(leaf.grad, grad) <= DOUBLE


def test_compiled_checkpoint(device):
    operands = draw_operands(device, torch.float64)
    target = as_rows(draw_target()).to(device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*leaves):
        def block(input):
            return head(input, leaves[1], target, linear_bias=leaves[2])

        return checkpoint(block, leaves[0], use_reentrant=False)

    grads = torch.autograd.grad(step(*operands), operands.leaves())
    for got, want in zip(grads, exact(operands, target).grads, strict=True):
        assert relative_error(got, want) <= DOUBLE


def test_under_autocast(device):
    operands = draw_operands(device)
    target = as_rows(draw_target()).to(device)

    def step(*leaves):
        with torch.autocast(device, torch.bfloat16):
            return head(*leaves[:2], target, linear_bias=leaves[2])

    want = step(*operands)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*operands)
    assert torch.equal(got, want)


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
        opcheck(OPS.linear_binary_cross_entropy_with_grads.default, (wanted, None, *detached))


def ours_in(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fused_bce" in str(node.target)]


@by_form
def test_export_and_decompositions(form, device):
    module = LinearBCEWithLogitsLoss(FEATURES, LABELS, bias=True, dtype=torch.float64).to(device)
    input = torch.randn(ROWS, FEATURES, dtype=torch.float64, device=device)
    target = form(draw_target())
    # A named tuple as such: what a graph takes are tensors.
    program = export(module, (input, target.to(device)))
    assert len(ours_in(program.graph)) == 1
    table = default_decompositions()
    table.update(fused_bce.decomposition_table())
    lowered = program.run_decompositions(table)
    assert not ours_in(lowered.graph)
    want = exact(Operands(input, module.linear.weight, module.linear.bias), target).loss
    for one in (program.module(), lowered.module()):
        assert relative_error(one(input, target.to(device)).detach(), want) <= DOUBLE


@pytest.mark.parametrize("case", range(3))
def test_decomposed_gradients(case, device):
    call = [
        t.detach() if isinstance(t, torch.Tensor) else t for t in list(operator_calls(device))[case]
    ]
    wanted = [True, True, call[2] is not None]

    def function(*tensors):
        operands = iter(tensors)
        rest = [next(operands) if isinstance(t, torch.Tensor) else t for t in call]
        return OPS.linear_binary_cross_entropy_with_grads(wanted, None, *rest)

    tensors = [t for t in call if isinstance(t, torch.Tensor)]
    lowered = make_fx(function, decomposition_table=fused_bce.decomposition_table())(*tensors)
    assert not ours_in(lowered.graph)
    for got, want in zip(lowered(*tensors), function(*tensors), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert relative_error(got, want.cpu().double()) <= DOUBLE


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_numbers(kind, device):
    operands = draw_operands(device, torch.bfloat16)
    target = as_rows(draw_target()).to(device)
    mode = FakeTensorMode()

    def to(t):
        return mode.from_tensor(t) if kind == "fake" else t.to("meta")

    leaves = [to(t.detach()).requires_grad_() for t in operands]
    target = target._replace(indices=to(target.indices), offsets=to(target.offsets))
    with mode if kind == "fake" else contextlib.nullcontext():
        loss = head(*leaves[:2], target, linear_bias=leaves[2])
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    for grad, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)
