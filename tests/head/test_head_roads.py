"""The head in torch's own operations, and what it refuses."""

import contextlib
import math
import re

import numpy as np
import pytest
import torch
from head_cases import (
    FEATURES,
    FORMS,
    LABELS,
    ROWS,
    Operands,
    as_rows,
    assert_near,
    by_head_dtype,
    by_reduction,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    matrix_of,
    on_whole_logits,
    relative_error,
)
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import fused_bce
from fused_bce import LinearBCEWithLogitsLoss, SparseTarget, why_not_fused

DOUBLE = 1e-13  # see test_head.py


def loss_of(operands, target, function=head, **options):
    return function(*operands[:2], target, linear_bias=operands.linear_bias, **options)


def grads_of(loss, operands, grad_loss, **options):
    ones = torch.full_like(loss, grad_loss)
    return torch.autograd.grad(loss, operands.leaves(), ones, **options)


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
    second = torch.autograd.grad(sum(g.double().square().sum() for g in grads), operands.leaves())
    want = second_order(operands, target, **options)
    # As above; what the first derivatives lost is here, too, and in a product.
    for ours, truth in zip(second, want, strict=True):
        assert relative_error(ours, truth) <= max(DOUBLE, 16 * torch.finfo(dtype).eps)


def second_order(operands, target, **options):
    """Of the sum of the squared gradients, by torch in float64."""
    wide = Operands(*(t.detach().cpu() for t in operands)).detached(torch.float64)
    loss = loss_of(wide, matrix_of(target).double(), function=on_whole_logits, **options)
    grads = grads_of(loss, wide, 1.0, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), wide.leaves())


# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")
def test_why_not_fused_in_transforms(device):
    input, weight, bias = (t.detach() for t in draw_operands(device, torch.float64))
    target = as_rows(draw_target()).to(device)

    def reason(weight):
        reasons.append(why_not_fused(input, target, linear_weight=weight, linear_bias=bias))
        return weight.sum()

    reasons = []
    torch.func.grad(reason)(weight)
    torch.func.vmap(reason)(torch.stack([weight, weight]))
    assert reasons == ["inside a torch.func transform"] * 2
    with forward_ad.dual_level():
        reason(forward_ad.make_dual(weight, torch.ones_like(weight)))
    assert reasons[2:] == ["inside forward-mode differentiation"]
    assert why_not_fused(input, target, linear_weight=weight, linear_bias=bias) is None


def test_vmap_over_values(device):
    """Also where mean counts those that are not nan."""
    input, weight, _ = (t.detach() for t in draw_operands(device, torch.float64, rows=2))
    rows = SparseTarget.from_lists([[3, 3, 5], [7]], LABELS, device=device)
    values = torch.rand(3, 4, dtype=torch.float64, device=device)
    values[0, :2] = values[1, 2] = math.nan

    def loss(values):
        return head(input, weight, rows._replace(values=values), ignore_index=math.nan)

    want = torch.stack([loss(v) for v in values])
    torch.testing.assert_close(torch.func.vmap(loss)(values), want, rtol=1e-13, atol=0)


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


def test_fx(device):
    operands = draw_operands(device, torch.float64)
    input, weight, bias = (t.detach() for t in operands)
    target = draw_target().to(device)
    want = exact(operands, target).loss

    def function(input, weight, bias):
        return head(input, weight, target, linear_bias=bias)

    traced = torch.fx.symbolic_trace(function)
    assert relative_error(traced(input, weight, bias), want) <= DOUBLE


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


SAVED = [
    "input",
    "linear_weight",
    "linear_bias",
    "indices",
    "offsets",
    "values",
    "target",
    "weight",
    "pos_weight",
]


@pytest.mark.parametrize("name", SAVED)
def test_edits_of_what_is_saved(name, device):
    operands = draw_operands(device)
    rows = as_rows(draw_target(), torch.rand(ROWS, LABELS)).to(device)
    target = rows.to_dense() if name == "target" else rows
    weights = {n: torch.rand(LABELS, device=device) for n in ("weight", "pos_weight")}
    loss = loss_of(operands, target, **weights)
    everything = operands._asdict() | rows._asdict() | weights | {"target": target}
    with torch.no_grad():
        everything[name].add_(0)
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
        "input has dtype torch.float32 but linear_weight torch.float64",
    ),
    **{
        f"bias of {dtype}": (
            {"linear_bias": torch.zeros(LABELS, dtype=dtype)},
            RuntimeError,
            f"input has dtype torch.float32 but linear_bias {dtype}",
        )
        for dtype in (torch.float64, torch.int64, torch.complex64)
    },
    **{
        f"{name} of lists": (
            {name: [0.0] * LABELS},
            TypeError,
            f"{name} must be a tensor, not list",
        )
        for name in ("input", "linear_weight", "linear_bias", "weight", "pos_weight")
    },
    "array": (
        {"input": np.zeros((ROWS, FEATURES), np.float32)},
        TypeError,
        "input must be a tensor, not ndarray",
    ),
    "rows of lists": ({"target": SparseTarget([0], [0, 1], 4)}, TypeError, "indices must be"),
    "dtype of values": (
        {"target": ROW._replace(values=torch.zeros(ROWS, dtype=torch.complex64))},
        TypeError,
        "values must be of a dtype",
    ),
    "matrix of weights": (
        {"weight": torch.ones(ROWS, LABELS)},
        RuntimeError,
        "there is no matrix of logits",
    ),
    "weights of other rows": (
        {"weight": torch.ones(ROWS + 1, 1)},
        RuntimeError,
        "there is no matrix of logits",
    ),
    **{
        f"weights of shape {shape}": (
            {"input": torch.zeros(ROWS, 1, FEATURES), "weight": torch.ones(shape)},
            RuntimeError,
            f"weight has shape {[*shape]}, but must be one number, one for each of {LABELS} "
            f"labels, or of shape ({ROWS}, 1, 1)",
        )
        for shape in [(ROWS + 1, 1, 1), (ROWS, 2, 1), (1, ROWS, 1, 1), (ROWS, 1, LABELS), (2, 1)]
    },
    "pos_weight": ({"pos_weight": torch.ones(3)}, RuntimeError, "pos_weight has shape [3]"),
    "ignore_index": ({"ignore_index": 1}, ValueError, "ignore_index goes with dense targets"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in [0, 1)"),
    "chunk": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive"),
    "large chunk": ({"chunk_bytes": 2**63}, ValueError, "chunk_bytes must be positive and less"),
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
        "input must be float16, bfloat16, float32 or float64, not torch.int64",
    ),
}
ROADS = {"fused": contextlib.nullcontext, "torch": forward_ad.dual_level}
by_road = pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)


@by_road
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, road, device):
    """Whoever would compute it; and that is a reason."""
    options, kind, message = REFUSED[case]
    defaults = {
        "input": torch.zeros(ROWS, FEATURES),
        "linear_weight": torch.zeros(LABELS, FEATURES),
        "target": ROW,
    }
    on_device = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), defaults | options)
    with road(), pytest.raises(kind, match=re.escape(message)):
        head(**on_device)
    with road():
        assert message in why_not_fused(**on_device)


def test_ignore_index_of_rows(device):
    """In the plain loss as in the head: a label can be left out."""
    fused = fused_bce.functional.binary_cross_entropy_with_logits
    for target in (ROW, ROW.to_dense(torch.float32).to_sparse()):
        with pytest.raises(ValueError, match="ignore_index goes with dense targets"):
            fused(torch.zeros(ROWS, LABELS, device=device), target.to(device), ignore_index=1)


def test_missing_values_of_rows(device):
    """nan is what they can be ignored by, in the plain losses as well."""
    values = torch.tensor([1, math.nan], device=device)
    indices, offsets = torch.tensor([0, 2], device=device), torch.tensor([0, 2], device=device)
    rows = SparseTarget(indices, offsets, 3, values)
    logits = torch.tensor([[1.0, 2, math.inf]], device=device)
    for loss in (
        fused_bce.functional.binary_cross_entropy_with_logits,
        fused_bce.functional.sigmoid_focal_loss,
    ):
        got = loss(logits, rows, reduction="mean", ignore_index=math.nan)
        want = loss(logits[:, :2], rows.to_dense()[:, :2], reduction="mean")
        torch.testing.assert_close(got, want)
        with pytest.raises(ValueError, match="nan with the values of a SparseTarget"):
            loss(logits, rows._replace(values=None), ignore_index=math.nan)


def test_rows_of_another_dtype_are_a_reason():
    logits = torch.zeros(ROWS, LABELS)
    for bad in (SparseTarget([0], [0, 1], 4), ROW._replace(offsets=ROW.offsets.int())):
        assert "must be a vector" in why_not_fused(logits, bad)


def test_autocast_casts_no_float64(device):
    """Of weight and bias, by every road: as torch's layer."""
    operands = draw_operands(device)._replace(
        linear_bias=torch.zeros(LABELS, device=device).double()
    )
    for road in ROADS.values():
        bad_bias = pytest.raises(RuntimeError, match=r"linear_bias torch\.float64")
        with road(), torch.autocast(device, torch.bfloat16), bad_bias:
            loss_of(operands, draw_target().to(device))


def test_values_that_no_row_has_are_not_validated(device):
    rows = SparseTarget.from_lists([[1], [2, 3]], LABELS)
    values = torch.tensor([0.5, 1.0, 7.0])
    target = rows._replace(offsets=torch.tensor([0, 1, 2]), values=values).to(device)
    input, weight, _ = draw_operands(device, rows=2)
    head(input, weight, target, validate_targets=True)
    for road in ROADS.values():
        with road(), pytest.raises(ValueError, match=r"target\[2\] is 7.0, outside \[0, 1\]"):
            head(input, weight, rows._replace(values=values).to(device), validate_targets=True)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"label_smoothing": -1},
        {"chunk_bytes": -1},
        {"ignore_index": 2**24},
    ],
    ids=str,
)
def test_module_refuses_early(options):
    with pytest.raises(ValueError, match=r"must|none"):
        LinearBCEWithLogitsLoss(3, 4, **options)


@by_reduction
@pytest.mark.parametrize("form", ["rows", "values", "bool", "coo"])
def test_on_whole_logits(form, reduction, device):
    """What is left to torch has the same loss and gradients."""
    operands = draw_operands(device, torch.float64)
    target = FORMS[form](draw_target())
    options = {
        "reduction": reduction,
        "label_smoothing": 0.1,
        "weight": torch.rand(ROWS, 1, dtype=torch.float64),
        "pos_weight": torch.rand(LABELS, dtype=torch.float64),
    }
    on_device = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    with forward_ad.dual_level():
        got = evaluate(operands, target.to(device), **on_device)
    assert_near(got, exact(operands, target, **options), DOUBLE)


def bad_operator_calls():
    """What only the operator as such is called with: arguments, type and message."""
    rows = SparseTarget.from_lists([[0]] * ROWS, LABELS)
    values = torch.ones(ROWS)
    yield {"target": torch.zeros(ROWS, LABELS), "values": values}, ValueError, "values go with"
    yield {"chunk_bytes": -1}, ValueError, "chunk_bytes must not be negative"
    yield {"target": torch.zeros(ROWS, LABELS - 1)}, ValueError, "target does not fit"
    for name, bad in {
        "input": torch.zeros(FEATURES),
        "linear_weight": torch.zeros(LABELS, FEATURES - 1),
        "linear_bias": torch.zeros(LABELS - 1),
        "offsets": rows.offsets[1:],
        "values": values[1:],
        "weight": torch.ones(ROWS, LABELS),
        "pos_weight": torch.ones(LABELS - 1),
    }.items():
        misfit = "linear_weight" if name == "input" else name
        yield {name: bad}, RuntimeError, f"{misfit} (does not fit|must be as many)"
    on_meta = "does not fit: it is .* on meta, input .* on cpu"
    for name in ("linear_weight", "linear_bias", "offsets"):
        of = {"linear_weight": torch.zeros(LABELS, FEATURES), "linear_bias": torch.zeros(LABELS)}
        of["offsets"] = rows.offsets
        yield {name: of[name].to("meta")}, RuntimeError, f"{name} {on_meta}"
    for name in ("weight", "pos_weight"):
        for size in ((), (LABELS,)):
            yield {name: torch.ones(size, device="meta")}, RuntimeError, f"{name} {on_meta}"
    for name in ("label_smoothing", "divisor"):
        yield {name: torch.ones((), device="meta")}, RuntimeError, f"{name} {on_meta}"
    double = torch.zeros(LABELS).double()
    yield {"linear_bias": double}, RuntimeError, "linear_bias does not fit: it is Double"
    whole = torch.zeros(LABELS).long()
    yield (
        {"linear_bias": whole, "dtype": torch.bfloat16},
        RuntimeError,
        "linear_bias does not fit: it is Long",
    )


CALLS = list(bad_operator_calls())


@pytest.mark.parametrize("case", range(len(CALLS)))
def test_operator_refuses(case):
    """Instead of numbers that nobody wrote, in forward and with gradients."""
    bad, kind, message = CALLS[case]
    call = {
        "input": torch.zeros(ROWS, FEATURES),
        "linear_weight": torch.zeros(LABELS, FEATURES),
        "linear_bias": None,
        "target": ROW.indices,
        "offsets": None if "target" in bad else ROW.offsets,
    } | bad
    for op, more in ((OPS.linear_binary_cross_entropy_with_logits, {}), (GRADS, NO_GRAD_LOSS)):
        with pytest.raises(kind, match=message):
            op(**more, **call)


OPS = torch.ops.fused_bce
GRADS = OPS._linear_binary_cross_entropy_with_grads
NO_GRAD_LOSS = {"wanted": [True, True, False], "grad_loss": None}


def test_operator_refuses_the_gradient_of_another_device():
    call = (
        torch.zeros(ROWS, FEATURES),
        torch.zeros(LABELS, FEATURES),
        None,
        ROW.indices,
        ROW.offsets,
    )
    with pytest.raises(RuntimeError, match="grad_loss does not fit"):
        GRADS([True, True, False], torch.ones((), device="meta"), *call)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)")
@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "values", "weight"])
def test_operator_refuses_tangents(name, device):
    """Instead of a derivative of 0."""
    call = draw_operands(device)._asdict()
    rows = as_rows(draw_target(), torch.rand(ROWS, LABELS)).to(device)
    call |= {"target": rows.indices, "offsets": rows.offsets, "values": rows.values}
    call["weight"] = torch.rand(LABELS, device=device)
    call = {n: t.detach() for n, t in call.items()}
    with forward_ad.dual_level():
        call[name] = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            OPS.linear_binary_cross_entropy_with_logits(**call)
