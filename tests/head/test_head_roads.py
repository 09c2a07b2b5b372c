"""The gradients of the head by every road: stored or computed again, eagerly or in torch's own
operations; and what it refuses."""

import math
import re

import pytest
import torch
from head_cases import (
    FEATURES,
    LABELS,
    ROWS,
    Operands,
    as_rows,
    assert_near,
    by_chunk,
    by_head_dtype,
    by_reduction,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    on_whole_logits,
    relative_error,
)
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fused_bce import LinearBCEWithLogitsLoss, SparseTarget, why_not_fused

DOUBLE = 1e-13  # see test_head.py


def loss_of(operands, target, **options):
    return head(*operands[:2], target, linear_bias=operands.linear_bias, **options)


def grads_of(loss, operands, grad_loss, **options):
    ones = torch.full_like(loss, grad_loss)
    return torch.autograd.grad(loss, operands.leaves(), ones, **options)


def assert_same_bits(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@by_chunk
@by_head_dtype
@pytest.mark.parametrize("grad_loss", [1.0, 0.3])
def test_same_bits_by_every_road(grad_loss, dtype, chunk_bytes, device):
    operands = draw_operands(device, dtype)
    target = as_rows(draw_target()).to(device)
    options = {"reduction": "batchmean", "chunk_bytes": chunk_bytes}
    stored = grads_of(loss_of(operands, target, **options), operands, grad_loss)

    loss = loss_of(operands, target, **options)
    grads_of(loss, operands, 7.0, retain_graph=True)
    assert_same_bits(grads_of(loss, operands, grad_loss), stored)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss = loss_of(operands, target, **options)
    assert_same_bits(grads_of(loss, operands, grad_loss), stored)

    loss = checkpoint(loss_of, operands, target, use_reentrant=False, **options)
    assert_same_bits(grads_of(loss, operands, grad_loss), stored)


def test_accumulation_of_a_second_step(device):
    """What backward hands over is not touched by the next."""
    operands = draw_operands(device, torch.float64)
    target = as_rows(draw_target()).to(device)
    loss_of(operands, target).backward()
    first = [t.grad.clone() for t in operands.leaves()]
    loss_of(operands, target).backward()
    for t, grad in zip(operands.leaves(), first, strict=True):
        torch.testing.assert_close(t.grad, 2 * grad)


def test_batched_gradients(device):
    operands = draw_operands(device, torch.float64)
    target = as_rows(draw_target())
    loss = loss_of(operands, target.to(device))
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    grads = torch.autograd.grad(loss, operands.leaves(), factors, is_grads_batched=True)
    for got, want in zip(grads, exact(operands, target).grads, strict=True):
        for k, factor in enumerate(factors.tolist()):
            assert relative_error(got[k], factor * want) <= DOUBLE


@by_reduction
@pytest.mark.parametrize("fast_mode", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("form", [torch.Tensor.double, as_rows], ids=["dense", "rows"])
def test_gradcheck(form, fast_mode, reduction, device):
    operands = draw_operands(device, torch.float64, rows=3, labels=5)
    target = form(draw_target(3, 5)).to(device)
    options = {
        "reduction": reduction,
        "weight": torch.rand(3, 1, device=device).double() + 0.5,
        "pos_weight": torch.rand(5, device=device).double() + 0.5,
        "label_smoothing": 0.1,
        "chunk_bytes": 48,
    }

    def function(*leaves):
        return loss_of(Operands(*leaves), target, **options)

    assert gradcheck(function, operands.leaves(), fast_mode=fast_mode)
    assert gradgradcheck(function, operands.leaves(), fast_mode=fast_mode)


@by_head_dtype
def test_create_graph(dtype, device):
    """In torch's operations: the same gradients within the rounding of the dtype."""
    operands = draw_operands(device, dtype)
    target = as_rows(draw_target()).to(device)
    options = {"reduction": "batchmean"}
    loss = loss_of(operands, target, **options)
    grads = grads_of(loss, operands, 1.0, create_graph=True)
    want = exact(operands, target, **options).grads
    for grad, truth in zip(grads, want, strict=True):
        assert grad.dtype is dtype
        assert relative_error(grad.detach(), truth) <= max(DOUBLE, 8 * torch.finfo(dtype).eps)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in grads), operands.leaves())
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in second)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)")
def test_transforms_go_to_torch(device):
    operands = draw_operands(device, torch.float64)
    target = as_rows(draw_target()).to(device)
    want = exact(operands, target)
    input, weight, bias = (t.detach() for t in operands)

    def function(weight):
        reasons.append(why_not_fused(input, target, linear_weight=weight, linear_bias=bias))
        return head(input, weight, target, linear_bias=bias)

    reasons = []
    assert relative_error(torch.func.grad(function)(weight), want.grads[1]) <= DOUBLE
    _, tangent = torch.func.jvp(function, (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(tangent.cpu(), want.grads[1].sum())
    both = torch.func.vmap(function)(torch.stack([weight, weight]))
    torch.testing.assert_close(both.cpu(), want.loss.expand(2))
    assert reasons == ["inside a torch.func transform"] * 3
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(weight, torch.ones_like(weight)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent.cpu(), want.grads[1].sum())
    assert reasons[3:] == ["inside forward-mode differentiation"]
    assert why_not_fused(input, target, linear_weight=weight, linear_bias=bias) is None


@by_reduction
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_transforms_of_every_shape(shape, reduction, device):
    """The same value in torch's operations, also where there are no rows or rows of rows."""
    rows = max(1, math.prod(shape))
    _, weight, bias = (t.detach() for t in draw_operands(device, torch.float64))
    input = torch.randn(*shape, FEATURES, dtype=torch.float64, device=device)
    target = as_rows(torch.rand(rows, LABELS) < 0.1).to(device)
    options = {"linear_bias": bias, "reduction": reduction}
    options["weight"] = torch.rand(rows, 1, device=device).double()
    value = head(input, weight, target, **options)
    by_torch, _ = torch.func.vjp(lambda x: head(x, weight, target, **options), input)
    torch.testing.assert_close(by_torch, value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
def test_tracers(device):
    operands = draw_operands(device, torch.float64)
    input, weight, bias = (t.detach() for t in operands)
    target = draw_target().to(device)
    want = exact(operands, target).loss

    def function(input, weight, bias):
        return head(input, weight, target, linear_bias=bias)

    for trace in (
        lambda: torch.jit.trace(function, (input, weight, bias)),
        lambda: torch.fx.symbolic_trace(function),
    ):
        assert relative_error(trace()(input, weight, bias), want) <= DOUBLE


def test_targets_that_require_gradients(device):
    operands = draw_operands(device, torch.float64)
    values = torch.rand(3, dtype=torch.float64, device=device).requires_grad_()
    rows = SparseTarget.from_lists([[1], [], [5, 7]], LABELS, device=device)
    target = rows._replace(values=values)
    input = operands.input[:3]
    loss = head(input, operands.linear_weight, target)
    (grad,) = torch.autograd.grad(loss, values)
    # That of the loss by a target is minus the logit.
    logits = (input @ operands.linear_weight.t()).detach()
    assert relative_error(grad, -logits[[0, 2, 2], [1, 5, 7]].cpu() / (3 * LABELS)) <= DOUBLE


@pytest.mark.parametrize("name", ["input", "linear_weight", "target"])
def test_edits_of_what_is_saved(name, device):
    operands = draw_operands(device)
    target = draw_target().to(device).float()
    loss = loss_of(operands, target)
    edited = target if name == "target" else getattr(operands, name)
    with torch.no_grad():
        edited.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ROW = SparseTarget.from_lists([[0]] * ROWS, LABELS)
REFUSED = {
    "none": ({"reduction": "none"}, ValueError, "as large as the logits"),
    "no reduction": ({"reduction": "max"}, ValueError, "max is not a valid value for reduction"),
    "padded": (
        {"target": torch.zeros(ROWS, 5, dtype=torch.int64)},
        ValueError,
        "SparseTarget.from_padded",
    ),
    "size": ({"target": torch.zeros(ROWS, LABELS + 1)}, ValueError, "Target size"),
    "rows": ({"target": ROW._replace(offsets=ROW.offsets[:-1])}, ValueError, "Target size"),
    "labels": ({"target": ROW._replace(num_labels=7)}, ValueError, "Target size"),
    "no target": ({"target": [[1]]}, TypeError, "must be a SparseTarget or a tensor"),
    "features": ({"linear_weight": torch.zeros(LABELS, 3)}, RuntimeError, "must be of shape"),
    "weight": ({"linear_weight": torch.zeros(LABELS)}, RuntimeError, "must be of shape"),
    "bias": ({"linear_bias": torch.zeros(3)}, RuntimeError, "linear_bias must be of shape"),
    "dtypes": (
        {"linear_weight": torch.zeros(LABELS, FEATURES, dtype=torch.float64)},
        RuntimeError,
        "input has dtype Float but linear_weight Double",
    ),
    "matrix of weights": (
        {"weight": torch.ones(ROWS, LABELS)},
        RuntimeError,
        "there is no matrix of logits",
    ),
    "pos_weight": ({"pos_weight": torch.ones(3)}, RuntimeError, "pos_weight has shape [3]"),
    "ignore_index": ({"ignore_index": 1}, ValueError, "ignore_index goes with dense targets"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in [0, 1)"),
    "chunk": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive"),
    "no chunk": ({"chunk_bytes": 1.5}, TypeError, "chunk_bytes must be an integer"),
    "invalid": (
        {"target": torch.full((ROWS, LABELS), 1.5), "validate_targets": True},
        ValueError,
        "outside [0, 1]",
    ),
    "invalid values": (
        {"target": ROW._replace(values=torch.full((ROWS,), -1.0)), "validate_targets": True},
        ValueError,
        "outside [0, 1]",
    ),
    "integers": (
        {
            "input": torch.zeros(ROWS, FEATURES, dtype=torch.int64),
            "linear_weight": torch.zeros(LABELS, FEATURES, dtype=torch.int64),
        },
        NotImplementedError,
        "logits must be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, device):
    options, kind, message = REFUSED[case]
    defaults = {
        "input": torch.zeros(ROWS, FEATURES),
        "linear_weight": torch.zeros(LABELS, FEATURES),
        "target": ROW,
    }
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor | SparseTarget) else value
        for name, value in (defaults | options).items()
    }
    with pytest.raises(kind, match=re.escape(message)):
        head(**on_device)


@pytest.mark.parametrize(
    "options", [{"reduction": "none"}, {"label_smoothing": -1}, {"chunk_bytes": -1}], ids=str
)
def test_module_refuses_early(options):
    with pytest.raises(ValueError, match=r"must|none"):
        LinearBCEWithLogitsLoss(3, 4, **options)


def test_reference_is_differentiable_alike(device):
    """The function that these tests compare with agrees with the fallback."""
    operands = draw_operands(device, torch.float64)
    target = draw_target().double().to(device)
    got = evaluate(operands, target, function=on_whole_logits)
    assert_near(got, exact(operands, target), DOUBLE)
