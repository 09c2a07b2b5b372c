"""The linear head against torch's layer and loss on whole logits in float64."""

import math

import pytest
import torch
from head_cases import (
    CHUNKS,
    FEATURES,
    FORMS,
    LABELS,
    ROWS,
    Operands,
    Result,
    as_rows,
    assert_near,
    by_chunk,
    by_half,
    by_head_dtype,
    by_reduction,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    ignore_csr,
    matrix_of,
    on_whole_logits,
    relative_error,
)
from helpers import as_rows_with_nan_again, dtype_name

import fused_bce
from fused_bce import LinearBCEWithLogitsLoss, SparseTarget

# Sums of some hundred terms in float64, in another order; label numbers are exact.
DOUBLE = 1e-13


@ignore_csr
@by_chunk
@by_reduction
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_targets(form, reduction, chunk_bytes, device):
    operands = draw_operands(device, torch.float64)
    target = FORMS[form](draw_target())
    got = evaluate(
        operands, target.to(device), reduction=reduction, chunk_bytes=chunk_bytes, grad_loss=0.3
    )
    assert got.loss.dtype is torch.float64
    assert_near(got, exact(operands, target, reduction=reduction, grad_loss=0.3), DOUBLE)


WEIGHTS = {
    "number": (),
    "labels": (LABELS,),
    "labels, one row": (1, LABELS),
    "rows": (ROWS, 1),
    "one": (1,),
}
OPTIONS = {
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 1},
    "ignored, nearly all": {"ignore_index": 0},
}


@by_chunk
@by_reduction
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", WEIGHTS)
def test_weights(shape, bias, reduction, chunk_bytes, device):
    operands = draw_operands(device, torch.float64, bias)
    target = as_rows(draw_target())
    weights = {n: (torch.rand(WEIGHTS[shape]) + 0.5).double() for n in ("weight", "pos_weight")}
    got = evaluate(
        operands,
        target.to(device),
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        **{name: t.to(device) for name, t in weights.items()},
    )
    assert_near(got, exact(operands, target, reduction=reduction, **weights), DOUBLE)


@by_chunk
@by_reduction
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, reduction, chunk_bytes, device):
    operands = draw_operands(device, torch.float64)
    target = draw_target().long()
    got = evaluate(
        operands, target.to(device), reduction=reduction, chunk_bytes=chunk_bytes, **options
    )
    assert_near(got, exact(operands, target, reduction=reduction, **options), DOUBLE)


@by_chunk
@by_reduction
def test_nan_named_again_is_one_element(reduction, chunk_bytes, device):
    operands = draw_operands(device, torch.float64)
    dense = draw_target().double()
    dense[2, ::3] = math.nan
    target = as_rows_with_nan_again(dense).to(device)
    options = {"ignore_index": math.nan, "reduction": reduction}
    want = exact(operands, dense, **options)
    assert_near(evaluate(operands, target, chunk_bytes=chunk_bytes, **options), want, DOUBLE)
    target.values.requires_grad_()  # on whole logits
    assert_near(evaluate(operands, target, **options), want, DOUBLE)


def test_values_that_are_ignored_have_no_gradient(device):
    """A number beside a nan neither."""
    input, weight, _ = draw_operands(device, torch.float64, rows=2)
    values = torch.tensor([math.nan, 0.5, math.nan, 0.25], dtype=torch.float64, device=device)
    rows = SparseTarget.from_lists([[3, 3, 5, 7], []], LABELS, device=device)
    logits = (input @ weight.t()).detach()
    for loss in (
        lambda target: head(input, weight, target, ignore_index=math.nan, reduction="sum"),
        lambda target: fused_bce.functional.binary_cross_entropy_with_logits(
            logits, target, ignore_index=math.nan, reduction="sum"
        ),
    ):
        leaf = values.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(rows._replace(values=leaf)), leaf)
        assert grad[:3].tolist() == [0, 0, 0]
        # That of the loss by a target is minus the logit.
        assert relative_error(grad[3], -logits[0, 7].cpu()) <= DOUBLE


@by_chunk
@pytest.mark.parametrize(
    ("rows", "labels"), [(300, 7), (7, 300), (1, 40), (40, 1), (3, 0), (0, 3)], ids=str
)
def test_sizes(rows, labels, chunk_bytes, device):
    """Blocks go along the longer side."""
    operands = draw_operands(device, torch.float64, rows=rows, labels=labels)
    dense = torch.rand(rows, labels) < 0.2
    got = evaluate(operands, as_rows(dense).to(device), chunk_bytes=chunk_bytes, reduction="sum")
    assert_near(got, exact(operands, dense, reduction="sum"), DOUBLE)


def test_no_positives_and_nothing_else(device):
    operands = draw_operands(device, torch.float64)
    for dense in (torch.zeros(ROWS, LABELS).bool(), torch.ones(ROWS, LABELS).bool()):
        assert_near(evaluate(operands, as_rows(dense).to(device)), exact(operands, dense), DOUBLE)


@pytest.mark.parametrize(("rows", "labels"), [(3, 0), (0, 3)], ids=str)
def test_mean_of_nothing(rows, labels, device):
    """As torch's: nan. batchmean divides by the rows alone."""
    operands = draw_operands(device, torch.float64, rows=rows, labels=labels)
    target = torch.zeros(rows, labels, device=device)
    for reduction in ("mean", "batchmean"):
        got = evaluate(operands, target, reduction=reduction).loss
        want = exact(operands, target, reduction=reduction).loss
        assert torch.equal(got.isnan().cpu(), want.isnan())
        assert want.isnan() or got == 0


@by_chunk
@by_head_dtype
def test_dtypes(dtype, chunk_bytes, device):
    """Loss and gradients are as near to float64 as those of torch's layer and the fused loss."""
    operands = draw_operands(device, dtype)
    target = draw_target()
    options = {"reduction": "batchmean", "chunk_bytes": chunk_bytes}
    got = evaluate(operands, as_rows(target).to(device), **options)
    assert got.loss.dtype is torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in got.grads] == [dtype] * 3
    want = exact(operands, target, reduction="batchmean")
    theirs = evaluate(operands, target.to(device, dtype), function=on_whole_logits, **options)
    eps = torch.finfo(dtype).eps
    # Theirs may be 0 by chance: the loss is one number. The logits are rounded to the dtype, by up
    # to half a unit at their largest, 16, whose gradients are added up.
    slack = DOUBLE if dtype is torch.float64 else 2 * eps
    for ours, by_torch, truth in zip(
        (got.loss, *got.grads), (theirs.loss, *theirs.grads), (want.loss, *want.grads), strict=True
    ):
        assert relative_error(ours, truth) <= 1.5 * relative_error(by_torch, truth) + slack


@by_half
def test_more_blocks_are_no_worse(dtype, device):
    """Sums over blocks are in float32: their error does not grow with their number."""
    operands = draw_operands(device, dtype, rows=8, labels=4096)
    target = draw_target(8, 4096, 0.01)
    want = exact(operands, target, reduction="sum")
    errors = [
        [relative_error(ours, theirs) for ours, theirs in zip(got.grads, want.grads, strict=True)]
        for chunk_bytes in (None, 2 * 8 * 512, 2 * 8 * 16)
        for got in [evaluate(operands, target.to(device), reduction="sum", chunk_bytes=chunk_bytes)]
    ]
    for of_blocks in errors[1:]:
        for ours, of_one in zip(of_blocks, errors[0], strict=True):
            # Half a unit of the result is the least that can be.
            assert ours <= 1.1 * of_one + 0.1 * torch.finfo(dtype).eps


@by_half
def test_positives_go_through_the_formula(dtype, device):
    """A sigmoid from which 1 is taken afterwards has lost the gradient at a logit of 8."""
    # exp(-20) is less than float16 holds.
    sizes = [5.0, 8.0, 10.0, *([20.0] if dtype is torch.bfloat16 else [])]
    logits = torch.tensor(sizes, device=device)
    operands = Operands(
        torch.ones(1, 1, device=device, dtype=dtype).requires_grad_(),
        logits[:, None].to(dtype).requires_grad_(),
        None,
    )
    target = SparseTarget.from_lists([range(len(sizes))], len(sizes), device=device)
    got = evaluate(operands, target, reduction="sum")
    want = exact(operands, target, reduction="sum")
    relative = (got.grads[1].cpu().double() / want.grads[1] - 1).abs()
    # Each is rounded once to the dtype, of which exp(-10) has all bits but one.
    assert (relative <= torch.finfo(dtype).eps).all()
    # The loss is added up in float64 and rounded once to float32.
    assert relative_error(got.loss, want.loss) <= 1e-6


def test_half_of_a_tiny_mean(device):
    """float16 does not hold 1e-8, by which mean over 1e8 elements multiplies; a loss scale comes
    too late for what is 0 by then."""
    rows, labels, scale = 1000, 100_000, 2.0**16
    input = torch.ones(rows, 1, device=device, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(labels, 1, device=device, dtype=torch.float16).requires_grad_()
    target = SparseTarget.from_padded(torch.full((rows, 1), labels - 1, device=device), labels)
    got = evaluate(Operands(input, weight, None), target, grad_loss=scale)
    # Each logit is 0 and has 1/2 for a gradient, but the last of each row, which has -1/2.
    want = torch.full((labels, 1), scale / labels / 2)
    want[-1] *= -1
    assert relative_error(got.grads[1], want.double()) <= torch.finfo(torch.float16).eps


DEMANDS = ["input", "linear_weight", "linear_bias", "input linear_weight", "linear_bias input"]


@pytest.mark.parametrize("names", DEMANDS)
def test_only_what_is_demanded(names, device):
    operands = draw_operands(device, torch.float64)
    target = draw_target()
    want = dict(zip(Operands._fields, exact(operands, target).grads, strict=True))
    wanted = names.split()
    for name, t in zip(Operands._fields, operands, strict=True):
        t.requires_grad_(name in wanted)
    loss = head(*operands[:2], target.to(device), linear_bias=operands.linear_bias)
    loss.backward()
    for name, t in zip(Operands._fields, operands, strict=True):
        assert (t.grad is not None) == (name in wanted)
        if t.grad is not None:
            assert relative_error(t.grad, want[name]) <= DOUBLE


def test_without_gradients(device):
    operands = draw_operands(device, torch.float64)
    target = draw_target()
    with torch.no_grad():
        loss = head(*operands[:2], target.to(device), linear_bias=operands.linear_bias)
    assert not loss.requires_grad
    assert relative_error(loss, exact(operands, target).loss) <= DOUBLE


def test_transposed_and_tied_weights(device):
    """A weight may be the transpose of another, or an embedding that is used before."""
    embedding = torch.randn(FEATURES, LABELS, dtype=torch.float64, device=device).requires_grad_()
    rows = torch.randint(LABELS, (ROWS,), device=device)
    target = draw_target()

    def step(function, embedding, rows, target):
        return function(embedding.t()[rows], embedding.t(), target)

    (got,) = torch.autograd.grad(step(head, embedding, rows, as_rows(target).to(device)), embedding)
    alone = embedding.detach().cpu().requires_grad_()
    want = step(on_whole_logits, alone, rows.cpu(), target.double())
    assert relative_error(got, *torch.autograd.grad(want, alone)) <= DOUBLE


def test_slices_and_leading_dimensions(device):
    """Odd strides, odd numbers of labels, and rows in several dimensions or none."""
    input = torch.randn(4, 5, 2 * FEATURES, dtype=torch.float64, device=device)[..., ::2]
    weight = torch.randn(2 * LABELS, FEATURES + 3, dtype=torch.float64, device=device)[1::2, 3:]
    dense = torch.rand(4, 5, LABELS) < 0.05
    operands = Operands(input.requires_grad_(), weight.requires_grad_(), None)
    rows = as_rows(dense.flatten(0, 1)).to(device)
    for reduction in ("mean", "batchmean"):
        want = exact(operands, dense, reduction=reduction)
        assert_near(evaluate(operands, dense.to(device), reduction=reduction), want, DOUBLE)
        assert_near(evaluate(operands, rows, reduction=reduction), want, DOUBLE)
    one = head(input[0, 0], weight, SparseTarget.from_lists([[3, 7]], LABELS, device=device))
    assert one.shape == ()


# Of logits (4, 5, C); and a matrix of 20 rows
SHAPES_OF_WEIGHTS = [(4, 5, 1), (5, 1), (4, 1, 1), (1, 5, 1), (1, 1, LABELS), (1, LABELS), (20, 1)]


@pytest.mark.parametrize("layer", ["own", "hooked"])
@by_reduction
@pytest.mark.parametrize("shape", SHAPES_OF_WEIGHTS, ids=str)
def test_weights_of_leading_dimensions(shape, reduction, layer, device):
    """They broadcast as in torch's loss."""
    dense = torch.rand(4, 5, LABELS) < 0.05
    weights = {n: torch.rand(shape).double() + 0.5 for n in ("weight", "pos_weight")}
    on_device = {n: t.to(device) for n, t in weights.items()}
    module = LinearBCEWithLogitsLoss(
        FEATURES, LABELS, dtype=torch.float64, reduction=reduction, **on_device
    ).to(device)
    if layer == "hooked":  # on whole logits
        module.linear.register_forward_hook(lambda *_: None)
    input = torch.randn(4, 5, FEATURES, dtype=torch.float64, device=device).requires_grad_()
    operands = Operands(input, module.linear.weight, None)
    if shape == (20, 1):
        weights = {n: t.view(4, 5, 1) for n, t in weights.items()}
    want = exact(operands, dense, reduction=reduction, **weights)
    for target in (dense, as_rows(dense.flatten(0, 1))):
        loss = module(input, target.to(device))
        grads = torch.autograd.grad(loss, operands.leaves())
        assert_near(Result(loss.detach(), grads), want, DOUBLE)


@pytest.mark.parametrize("form", ["bool", "rows", "values"])
def test_a_row_of_nan(form, device):
    """It is in its row of the input's gradient, and in all of the weight's, as in torch's."""
    operands = draw_operands(device, torch.float64)
    with torch.no_grad():
        operands.input[3, 0] = math.nan
    target = FORMS[form](draw_target())
    got = evaluate(operands, target.to(device), chunk_bytes=4000)
    want = exact(operands, target)
    for ours, theirs in zip(got.grads, want.grads, strict=True):
        assert torch.equal(ours.isnan().cpu(), theirs.isnan())


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_same_bits_each_time(chunk_bytes, device):
    size = (ROWS, LABELS) if chunk_bytes == 1 else (64, 1000)  # a block of each logit
    operands = draw_operands(device, rows=size[0], labels=size[1])
    target = as_rows(draw_target(*size)).to(device)
    first, second = (evaluate(operands, target, chunk_bytes=chunk_bytes) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.grads, second.grads, strict=True))


@by_chunk
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_autocast(dtype, half, chunk_bytes, device):
    """The layer in the half type but for float64, the loss in float32."""
    operands = draw_operands(device, dtype)
    target = draw_target()
    with torch.autocast(device, half):
        got = evaluate(operands, as_rows(target).to(device), chunk_bytes=chunk_bytes)
        theirs = evaluate(operands, target.to(device, dtype), function=on_whole_logits)
    assert got.loss.dtype is dtype
    assert [g.dtype for g in got.grads] == [dtype] * 3
    want = exact(operands, target)
    slack = DOUBLE if dtype is torch.float64 else 2 * torch.finfo(half).eps
    for ours, by_torch, truth in zip(
        (got.loss, *got.grads), (theirs.loss, *theirs.grads), (want.loss, *want.grads), strict=True
    ):
        assert relative_error(ours, truth) <= 1.5 * relative_error(by_torch, truth) + slack


def test_autocast_leaves_no_copy_of_the_weight(device):
    """Its cache would hold it until autocast ends."""
    operands = draw_operands(device)
    with torch.autocast(device, torch.bfloat16):
        loss = head(*operands[:2], draw_target().to(device))
        names = {type(node).__name__ for node, _ in loss.grad_fn.next_functions if node}
    assert names == {"AccumulateGrad"}


class TestModule:
    def test_is_the_function(self, device):
        module = LinearBCEWithLogitsLoss(
            FEATURES,
            LABELS,
            bias=True,
            dtype=torch.float64,
            pos_weight=torch.rand(LABELS) + 1,
            reduction="batchmean",
            label_smoothing=0.1,
            chunk_bytes=5000,
        ).to(device)
        input = torch.randn(ROWS, FEATURES, dtype=torch.float64, device=device)
        target = as_rows(draw_target())
        want = exact(
            Operands(input, module.linear.weight, module.linear.bias),
            target,
            pos_weight=module.pos_weight,
            reduction="batchmean",
            label_smoothing=0.1,
        )
        assert relative_error(module(input, target.to(device)).detach(), want.loss) <= DOUBLE
        logits = torch.nn.functional.linear(input, module.linear.weight, module.linear.bias)
        assert torch.equal(module.linear(input), logits)

    def test_state_and_repr(self):
        module = LinearBCEWithLogitsLoss(3, 4, pos_weight=torch.ones(4), ignore_index=-1)
        assert set(module.state_dict()) == {"linear.weight", "pos_weight"}
        other = LinearBCEWithLogitsLoss(3, 4, pos_weight=torch.zeros(4))
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.pos_weight, torch.ones(4))
        assert "reduction='mean', ignore_index=-1" in repr(module)

    def test_hooks_of_the_layer_fire(self, device):
        """What brings a weight from elsewhere hangs on the forward of the module that owns it."""
        module = LinearBCEWithLogitsLoss(FEATURES, LABELS).to(device)
        calls = []
        module.linear.register_forward_pre_hook(lambda *_: calls.append("before"))
        module.linear.register_forward_hook(lambda *_: calls.append("after"))
        target = SparseTarget.from_lists([[1]], LABELS, device=device)
        module(torch.randn(1, FEATURES, device=device), target)
        assert calls == ["before", "after"]


def test_plain_loss_of_sparse_targets(device):
    logits = torch.randn(ROWS, LABELS, dtype=torch.float64, device=device).requires_grad_()
    target = as_rows(draw_target())
    fused = fused_bce.functional.binary_cross_entropy_with_logits
    want = exact(Operands(logits, torch.eye(LABELS), None), target, label_smoothing=0.1)
    loss = fused(logits, target.to(device), label_smoothing=0.1)
    assert "BCEWithLogitsFunction" in loss.grad_fn.name()
    assert fused_bce.why_not_fused(logits, target.to(device)) is None
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert relative_error(loss.detach(), want.loss) <= DOUBLE
    assert relative_error(grad.detach(), want.grads[0]) <= DOUBLE
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    alone = logits.detach().cpu().requires_grad_()
    by_torch = on_whole_logits(
        alone, torch.eye(LABELS).double(), matrix_of(target).double(), label_smoothing=0.1
    )
    (theirs,) = torch.autograd.grad(by_torch, alone, create_graph=True)
    assert relative_error(second, *torch.autograd.grad(theirs.square().sum(), alone)) <= DOUBLE
    module = fused_bce.BCEWithLogitsLoss(label_smoothing=0.1)
    assert torch.equal(module(logits, target.to(device)), loss)


@ignore_csr
@pytest.mark.parametrize("form", FORMS)
def test_plain_loss_of_every_form(form, device):
    logits = torch.randn(ROWS, LABELS, dtype=torch.float64, device=device)
    target = FORMS[form](draw_target())
    got = fused_bce.functional.binary_cross_entropy_with_logits(logits, target.to(device))
    want = exact(Operands(logits, torch.eye(LABELS), None), matrix_of(target)).loss
    assert relative_error(got, want) <= DOUBLE


@by_chunk
@pytest.mark.parametrize("beyond", [0, 2**32], ids=["near", "far"])
def test_labels_beyond_the_matrix_write_nowhere(beyond, chunk_bytes, device):
    """Called past the checks, as a shard is, the operator passes over what is not its own; also if
    it would be in 32 bits."""
    operands = draw_operands(device, torch.float64)
    target = as_rows(draw_target())
    labels = target.indices - 50
    labels = torch.where(labels < 0, labels + beyond + (50 if beyond else 0), labels)
    op = torch.ops.fused_bce.linear_binary_cross_entropy_with_logits
    options = {"chunk_bytes": chunk_bytes or 0}
    got = op(*operands, labels.to(device), target.offsets.to(device), **options)
    dense = torch.zeros(ROWS, LABELS)
    dense[:, : LABELS - 50] = matrix_of(target)[:, 50:]
    assert relative_error(got.detach(), exact(operands, dense).loss) <= DOUBLE
