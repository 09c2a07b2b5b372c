"""A head whose weight is in parts: the same values, one part's gradient at a time."""

import copy
import math
import re

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
    by_half,
    by_reduction,
    draw_operands,
    draw_target,
    evaluate,
    exact,
    head,
    ignore_csr,
    relative_error,
)
from memory import bytes_of
from torch import nn

import fused_bce
from fused_bce import LinearBCEWithLogitsLoss, SparseTarget

DOUBLE = 1e-13  # see test_head.py
# One label; several with none between; all in one
SIZES = {"even": [50, 51], "ragged": [1, 40, 30, 30], "empty": [60, 0, 41], "single": [LABELS]}
by_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def in_parts(sizes):
    """The head as a function of the whole weight."""

    def function(input, linear_weight, target, **options):
        return head(input, [*linear_weight.split(sizes)], target, **options)

    return function


@ignore_csr
@by_reduction
@by_sizes
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_targets(form, sizes, reduction, device):
    operands = draw_operands(device, torch.float64)
    target = FORMS[form](draw_target())
    options = {"reduction": reduction, "grad_loss": 0.3}
    got = evaluate(operands, target.to(device), function=in_parts(sizes), **options)
    assert_near(got, exact(operands, target, **options), DOUBLE)


OPTIONS = {
    "weights of labels": {"weight": torch.rand(LABELS), "pos_weight": torch.rand(1, LABELS)},
    "weights of rows": {"weight": torch.rand(ROWS, 1), "pos_weight": torch.rand(())},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 1},
}


@by_reduction
@by_sizes
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, sizes, reduction, device):
    operands = draw_operands(device, torch.float64)
    target = draw_target().long()
    options = {
        n: v.double() if isinstance(v, torch.Tensor) else v for n, v in OPTIONS[name].items()
    }
    options["reduction"] = reduction
    on_device = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    got = evaluate(operands, target.to(device), function=in_parts(sizes), **on_device)
    assert_near(got, exact(operands, target, **options), DOUBLE)


def test_nothing(device):
    operands = draw_operands(device, torch.float64, rows=0)
    target = SparseTarget.from_lists([], LABELS, device=device)
    for reduction, want in (("mean", math.nan), ("sum", 0.0)):
        loss = in_parts(SIZES["even"])(*operands[:2], target, reduction=reduction).item()
        assert loss == want or math.isnan(loss) == math.isnan(want)


@by_half
def test_half_types(dtype, device):
    """The gradient of the input is rounded once, however many parts there are."""
    operands = draw_operands(device, dtype, labels=4096, rows=8)
    target = draw_target(8, 4096, 0.01)
    want = exact(operands, target, reduction="sum")
    whole = evaluate(operands, target.to(device), reduction="sum")
    parts = evaluate(operands, target.to(device), reduction="sum", function=in_parts([64] * 64))
    for ours, of_one, exact_grad in zip(parts.grads, whole.grads, want.grads, strict=True):
        assert ours.dtype is dtype
        # Half a unit of the result is the least that can be.
        slack = 0.1 * torch.finfo(dtype).eps
        assert relative_error(ours, exact_grad) <= 1.1 * relative_error(of_one, exact_grad) + slack


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, half, device):
    """Also of an input that autocast has cast before, as encoders return it."""
    operands = draw_operands(device)
    input = operands.input.detach().to(dtype).requires_grad_()
    operands = operands._replace(input=input)
    target = draw_target()
    with torch.autocast(device, half):
        got = evaluate(operands, as_rows(target).to(device), function=in_parts(SIZES["even"]))
        whole = evaluate(operands, as_rows(target).to(device))
    want = exact(operands, target)
    assert [g.dtype for g in got.grads] == [dtype, torch.float32, torch.float32]
    eps = torch.finfo(half).eps
    for ours, of_one, truth in zip(
        (got.loss, *got.grads), (whole.loss, *whole.grads), (want.loss, *want.grads), strict=True
    ):
        assert relative_error(ours, truth) <= 1.1 * relative_error(of_one, truth) + eps


def test_leading_dimensions(device):
    operands = draw_operands(device, torch.float64, rows=20)
    input = operands.input.detach().view(4, 5, FEATURES).requires_grad_()
    operands, dense = operands._replace(input=input), torch.rand(4, 5, LABELS) < 0.05
    weight = torch.rand(4, 1, 1).double()
    want = exact(operands, dense, weight=weight, reduction="batchmean")
    for target in (dense, as_rows(dense.flatten(0, 1))):
        got = evaluate(
            operands,
            target.to(device),
            function=in_parts(SIZES["even"]),
            weight=weight.to(device),
            reduction="batchmean",
        )
        assert_near(got, want, DOUBLE)


@pytest.mark.parametrize("names", ["input", "linear_weight", "linear_bias", "linear_bias input"])
def test_only_what_is_demanded(names, device):
    operands = draw_operands(device, torch.float64)
    target = draw_target()
    want = dict(zip(Operands._fields, exact(operands, target).grads, strict=True))
    for name, t in zip(Operands._fields, operands, strict=True):
        t.requires_grad_(name in names.split())
    input, weight, bias = operands
    in_parts(SIZES["even"])(input, weight, target.to(device), linear_bias=bias).backward()
    for name, t in zip(Operands._fields, operands, strict=True):
        assert (t.grad is not None) == (name in names.split())
        if t.grad is not None:
            assert relative_error(t.grad, want[name]) <= DOUBLE


def test_frozen_parts(device):
    """Some parts may be frozen."""
    head_ = make_head(4, device)
    head_.linear.weight[1].requires_grad_(False)
    input, target = draw_batch(device)
    head_(input, target).backward()
    assert [part.grad is not None for part in head_.linear.weight] == [True, False, True, True]


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, torch.fx.symbolic_trace], ids=lambda f: f.__name__
)
def test_is_carried(carry, device):
    module, (input, target) = make_head(3, device), draw_batch(device)
    torch.testing.assert_close(
        carry(module)(input, target), module(input, target), rtol=DOUBLE, atol=0
    )
    half = copy.deepcopy(module).to(torch.float32)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(
        half(input.float(), target).double(), module(input, target), rtol=1e-5, atol=0
    )


def make_head(parts, device, dtype=torch.float64, **options):
    torch.manual_seed(3)
    options = {"bias": True, "reduction": "batchmean"} | options
    return LinearBCEWithLogitsLoss(
        FEATURES, LABELS, parts=parts, dtype=dtype, device=device, **options
    )


def draw_batch(device, dtype=torch.float64):
    input = torch.randn(ROWS, FEATURES, dtype=dtype, device=device)
    return input, as_rows(draw_target()).to(device)


@pytest.mark.parametrize("parts", [2, 7, LABELS])
def test_module(parts, device):
    module, (input, target) = make_head(parts, device), draw_batch(device)
    sizes = [len(part) for part in module.linear.weight]
    assert sum(sizes) == LABELS
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    weight = torch.cat([*module.linear.weight])
    bound = FEATURES**-0.5  # as of torch.nn.Linear
    assert 0.9 * bound < weight.abs().max() <= bound
    logits = nn.functional.linear(input, weight, module.linear.bias)
    torch.testing.assert_close(module.linear(input), logits, rtol=DOUBLE, atol=DOUBLE)
    want = exact(Operands(input, weight, module.linear.bias), target, reduction="batchmean")
    assert relative_error(module(input, target).detach(), want.loss) <= DOUBLE
    values, labels = module.topk(input, 9)
    torch.testing.assert_close(values, logits.topk(9).values, rtol=DOUBLE, atol=DOUBLE)
    assert torch.equal(labels, logits.topk(9).indices)
    assert f"parts={parts}" in repr(module)


def step_in_backward(module, make_optimizer):
    """As users do: an optimizer for each part, that steps and frees its gradient."""
    seen = []
    for part in module.linear.weight:
        optimizer = make_optimizer([part])

        def step(part, optimizer=optimizer):
            seen.append(sum(p.grad is not None for p in module.linear.weight))
            optimizer.step()
            optimizer.zero_grad()

        part.register_post_accumulate_grad_hook(step)
    return seen


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_backward(name, device):
    """The same as of one optimizer after backward, with one gradient at a time."""
    make_optimizer = OPTIMIZERS[name]
    parts, whole = make_head(5, device), make_head(1, device)
    whole.load_state_dict(parts.state_dict())
    seen = step_in_backward(parts, make_optimizer)
    of_whole = make_optimizer([whole.linear.weight])
    for step in range(4):
        input, target = draw_batch(device)
        inputs = [input.clone().requires_grad_() for _ in range(2)]
        losses = [h(x, target) for h, x in zip((parts, whole), inputs, strict=True)]
        for loss in losses:
            loss.backward()
        of_whole.step()
        of_whole.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        # Of the weight before the step
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-14)
        weight = torch.cat([*parts.linear.weight])
        torch.testing.assert_close(weight, whole.linear.weight, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(parts.linear.bias.grad, whole.linear.bias.grad)
        assert seen == [1] * 5 * (step + 1)


def test_a_step_that_fails_says_which_parts_were_updated(device):
    module, (input, target) = make_head(5, device), draw_batch(device)
    step_in_backward(module, OPTIMIZERS["SGD"])
    assert module.linear.updated_parts() == []
    before = copy.deepcopy(module.linear.weight)
    with pytest.raises(IndexError, match=f"label {LABELS} is out of range"):
        module(input, target._replace(indices=target.indices + 1))
    assert module.linear.updated_parts() == []

    def fail(part):
        raise MemoryError("of the test")

    module.linear.weight[1].register_hook(fail)
    with pytest.raises(MemoryError, match="of the test"):
        module(input, target).backward()
    module.topk(input, 3)
    assert module.linear.updated_parts() == [2, 3, 4]
    for number, (now, then) in enumerate(zip(module.linear.weight, before, strict=True)):
        assert torch.equal(now, then) == (number < 2)
    module(input, target)
    assert module.linear.updated_parts() == []


def test_stepping_forbids_a_second_backward(device):
    """Its gradients would be of other weights."""
    module, (input, target) = make_head(3, device), draw_batch(device)
    step_in_backward(module, OPTIMIZERS["SGD"])
    loss = module(input, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("given", [1, 2, 3, 7])
@pytest.mark.parametrize("own", [1, 3, 7])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(given, own, assign, device):
    """Any head loads that of any other."""
    source, target = make_head(given, device), make_head(own, device)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(3)
    state = source.state_dict()
    keys = set(state)
    target.load_state_dict(state, assign=assign)
    assert set(state) == keys
    input, _ = draw_batch(device)
    torch.testing.assert_close(target.linear(input), source.linear(input), rtol=DOUBLE, atol=DOUBLE)
    outer = nn.ModuleDict({"a": nn.Identity(), "head": make_head(own, device)})
    outer.load_state_dict({f"head.{key}": t for key, t in state.items()})
    assert torch.equal(outer["head"].linear.bias, source.linear.bias)


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("given", [1, 2, 3])
def test_state_dicts_of_other_shapes_are_refused(given, own, device):
    for labels, features in ((LABELS + 1, FEATURES), (LABELS, FEATURES - 1)):
        other = LinearBCEWithLogitsLoss(features, labels, parts=given, device=device)
        module = make_head(own, device, bias=False)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(RuntimeError, match=r"size mismatch for linear\.weight") as error:
            module.load_state_dict(other.state_dict())
        assert "Missing" not in str(error.value)
        assert "Unexpected" not in str(error.value)
        for name, t in module.state_dict().items():
            assert torch.equal(t, before[name])


def test_from_linear(device):
    """The parts lie in the memory of the layer."""
    layer = nn.Linear(FEATURES, LABELS, device=device).double()
    module = LinearBCEWithLogitsLoss.from_linear(layer, parts=4, reduction="batchmean")
    assert module.linear.bias is layer.bias
    step_in_backward(module, OPTIMIZERS["SGD"])
    before = layer.weight.detach().clone()
    module(*draw_batch(device)).backward()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(torch.cat([*module.linear.weight]), layer.weight)


REFUSED = {
    "more than labels": (
        {"parts": LABELS + 1},
        ValueError,
        f"labels, {LABELS}, not be {LABELS + 1}",
    ),
    "none": ({"parts": 0}, ValueError, "parts must lie between 1 and the number of labels"),
    "half a part": ({"parts": 2.5}, TypeError, "parts must be an integer, not 2.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_module_refuses(case):
    options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=re.escape(message)):
        LinearBCEWithLogitsLoss(FEATURES, LABELS, **options)


PARTS_REFUSED = {
    "no parts": ([], TypeError, "linear_weight must be a tensor, not list"),
    "numbers": ([[0.0]], TypeError, "linear_weight must be a tensor, not list"),
    "a vector": ([torch.zeros(50, FEATURES), torch.zeros(51)], RuntimeError, "not (51,)"),
    "features": (
        [torch.zeros(50, FEATURES), torch.zeros(51, FEATURES - 1)],
        RuntimeError,
        f"linear_weight must be of shape (C, F), in parts or whole, not (51, {FEATURES - 1})",
    ),
    "labels": ([torch.zeros(50, FEATURES)] * 2, ValueError, "Target size"),
    "dtypes": (
        [torch.zeros(50, FEATURES), torch.zeros(51, FEATURES).double()],
        RuntimeError,
        "input has dtype torch.float32 but linear_weight torch.float64",
    ),
}


@pytest.mark.parametrize("case", PARTS_REFUSED)
def test_parts_refused(case):
    parts, kind, message = PARTS_REFUSED[case]
    input, target = draw_batch("cpu", torch.float32)
    with pytest.raises(kind, match=re.escape(message)):
        head(input, parts, target)
    assert message in fused_bce.why_not_fused(input, target, linear_weight=parts)


def test_recompute(device):
    """Of a whole weight: nothing of gradient size is held, and the values are the same."""
    operands = draw_operands(device, rows=64, labels=20_000)
    target = as_rows(draw_target(64, 20_000, 1e-3)).to(device)
    input, weight, _ = operands
    gradients = 4 * (input.numel() + weight.numel())
    assert (
        bytes_of(lambda: head(input, weight, target, recompute=True), device).held <= gradients / 10
    )
    results = [evaluate(operands, target, recompute=recompute) for recompute in (False, True)]
    for stored, computed in zip(results[0].grads, results[1].grads, strict=True):
        assert torch.equal(stored, computed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_peak_of_a_step(name, device):
    """With 16 parts a step takes at most 1/8 of the weight beyond it and the optimizer's state."""
    labels, features = 100_000, 256
    module = LinearBCEWithLogitsLoss(
        features, labels, parts=16, reduction="batchmean", device=device, chunk_bytes=2**21
    )
    step_in_backward(module, OPTIMIZERS[name])
    input = torch.randn(64, features, device=device).requires_grad_()
    target = SparseTarget.from_padded(torch.randint(labels, (64, 5), device=device), labels)

    def step():
        module(input, target).backward()

    step()  # makes the state
    assert bytes_of(step, device).peak <= 4 * labels * features / 8
