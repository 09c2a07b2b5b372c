"""The head where its layer was replaced, wrapped, hooked or changed: the loss of the logits that it
then returns, against torch in float64."""

import functools
import logging
import re

import pytest
import torch
from head_cases import FEATURES, LABELS, ROWS, as_rows, draw_target, relative_error
from helpers import torch_bce
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from fused_bce import LinearBCEWithLogitsLoss, SparseTarget

DOUBLE = 1e-13  # see test_head.py


class LoRA(nn.Module):
    """As peft wraps a layer: it passes on what it does not know, and adds to the result."""

    def __init__(self, base_layer, rank=3):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.a = nn.Linear(FEATURES, rank, bias=False).double()
        self.b = nn.Linear(rank, LABELS, bias=False).double()

    def forward(self, x, *arguments, **options):
        return self.base_layer(x, *arguments, **options) + self.b(self.a(x))


class Doubled(nn.Linear):
    """As a library swaps the class of a layer, for float8 or for quantization."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledWeight(torch.Tensor):
    """As a library swaps the class of a weight."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, arguments, options)
        with torch._C.DisableTorchFunctionSubclass():
            return 2 * function(*arguments, **(options or {}))


def wrap(head):
    head.linear = LoRA(head.linear)
    wrapped = head.linear
    return lambda x: x @ (wrapped.base_layer.weight + wrapped.b.weight @ wrapped.a.weight).t() + (
        wrapped.base_layer.bias
    )


def replace(head):
    head.linear = layer = nn.Linear(FEATURES, LABELS).double()
    return lambda x: x @ layer.weight.t() + layer.bias


def logits_of(layer, factor=1):
    return lambda x: factor * (x @ layer.weight.t() + layer.bias)


def swap_class(head):
    head.linear.__class__ = Doubled
    return logits_of(head.linear, 2)


def swap_class_of_weight(head):
    weight = head.linear.weight.detach()
    head.linear.weight = nn.Parameter(weight.as_subclass(DoubledWeight), requires_grad=False)
    return lambda x: 2 * (x @ weight.t() + head.linear.bias)


def add_hook(head):
    head.linear.register_forward_hook(lambda module, arguments, logits: 2 * logits)
    return logits_of(head.linear, 2)


def add_global_hook(head):
    def double_layers(module, arguments, result):
        return 2 * result if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(double_layers)
    head.register_forward_hook(lambda *_: handle.remove())  # after the layer's
    return logits_of(head.linear, 2)


def replace_forward(head):
    forward = head.linear.forward
    head.linear.forward = lambda x: 2 * forward(x)
    return logits_of(head.linear, 2)


def replace_method(head):
    """As accelerate and others do, who keep the names of what they replace."""
    forward = head.linear.forward

    def doubled(x):
        return 2 * forward(x)

    head.linear.forward = functools.update_wrapper(functools.partial(doubled), forward)
    return logits_of(head.linear, 2)


def parametrize(head):
    parametrizations.weight_norm(head.linear)
    return logits_of(head.linear)


def prune_half(head):
    prune.l1_unstructured(head.linear, "weight", 0.5)
    mask = head.linear.weight_mask
    assert mask.mean() == pytest.approx(0.5, abs=1e-3)
    return lambda x: x @ (head.linear.weight_orig * mask).t() + head.linear.bias


CHANGES = {
    "LoRA": (wrap, "a LoRA"),
    "another layer": (replace, "a Linear"),
    "class": (swap_class, "a Doubled"),
    "class of the weight": (swap_class_of_weight, "overrides torch functions"),
    "hook": (add_hook, "has hooks"),
    "global hook": (add_global_hook, "has hooks"),
    "forward": (replace_forward, "was replaced"),
    "forward by a partial": (replace_method, "was replaced"),
    "parametrization": (parametrize, None),
    "pruned": (prune_half, None),
}


def make_head(**options):
    return LinearBCEWithLogitsLoss(FEATURES, LABELS, bias=True, dtype=torch.float64, **options)


def evaluate(loss, leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def is_fused(loss):
    return "LinearBCEWithLogitsFunction" in loss.grad_fn.name()


@pytest.fixture
def reasons(caplog, monkeypatch):
    """What is logged, once, of calls that are not fused."""
    monkeypatch.setattr("fused_bce.coverage._logged", {})
    caplog.set_level(logging.INFO, "fused_bce")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("change", CHANGES)
def test_loss_of_what_the_layer_returns(change, reduction, reasons):
    change_head, reason = CHANGES[change]
    weights = {"weight": torch.rand(ROWS, 1), "pos_weight": torch.rand(LABELS) + 1}
    weights = {name: t.double() for name, t in weights.items()}
    head = make_head(reduction=reduction, **weights)
    compute_logits = change_head(head)
    dense = draw_target()
    input = torch.randn(ROWS, FEATURES, dtype=torch.float64).requires_grad_()
    leaves = [input, *(p for p in head.parameters() if p.requires_grad)]
    for target in (as_rows(dense), dense, dense.double()):
        loss = head(input, target)
        assert is_fused(loss) == (reason is None)
        got = evaluate(loss, leaves)
        sums = "sum" if reduction == "batchmean" else reduction
        want = torch_bce(compute_logits(input), dense.double(), reduction=sums, **weights)
        want = evaluate(want / ROWS if reduction == "batchmean" else want, leaves)
        for ours, exact in zip(got, want, strict=True):
            assert relative_error(ours, exact) <= DOUBLE
        if change == "global hook":
            break  # it is gone by now
    assert len(reasons()) == (reason is not None)
    assert reason is None or reason in reasons()[0]


def test_tied_weight():
    """Gradients of both uses add up."""
    head = make_head()
    embedding = nn.Embedding(LABELS, FEATURES).double()
    head.linear.weight = embedding.weight
    dense, rows = draw_target(), torch.arange(ROWS)
    loss = head(embedding(rows), as_rows(dense))
    assert is_fused(loss)
    got = evaluate(loss, list(embedding.parameters()))
    logits = embedding(rows) @ embedding.weight.t() + head.linear.bias
    want = evaluate(torch_bce(logits, dense.double()), list(embedding.parameters()))
    for ours, exact in zip(got, want, strict=True):
        assert relative_error(ours, exact) <= DOUBLE


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, torch.compile], ids=lambda f: f.__name__)
def test_wrappers_that_pass_on_calls_stay_fused(wrapper):
    head, dense = make_head(), draw_target()
    want = head(torch.ones(ROWS, FEATURES).double(), dense)
    options = {"backend": "aot_eager"} if wrapper is torch.compile else {}
    head.linear = wrapper(head.linear, **options)
    loss = head(torch.ones(ROWS, FEATURES).double(), dense)
    torch.compiler.reset()
    torch.testing.assert_close(loss, want, rtol=DOUBLE, atol=0)
    assert head.linear(torch.ones(2, FEATURES).double()).shape == (2, LABELS)
    if wrapper is checkpoint_wrapper:
        assert is_fused(loss)
        head.linear = wrapper(nn.Linear(FEATURES, LABELS).double())
        assert not is_fused(head(torch.ones(ROWS, FEATURES).double(), dense))


def test_hooks_see_logits():
    """And the gradient of the logits, whose sum over rows is that of the bias."""
    head, dense = make_head(), draw_target()
    seen = []
    head.linear.register_forward_hook(lambda _, arguments, logits: seen.append(logits))
    head.linear.register_full_backward_hook(lambda _, of_input, of_logits: seen.extend(of_logits))
    input = torch.randn(ROWS, FEATURES, dtype=torch.float64).requires_grad_()
    head(input, dense).backward()
    logits, grad = seen
    assert torch.equal(logits, nn.functional.linear(input, head.linear.weight, head.linear.bias))
    torch.testing.assert_close(grad.sum(0), head.linear.bias.grad, rtol=1e-12, atol=0)


def test_compiled_and_traced():
    head, dense = make_head(), draw_target()
    compute_logits = wrap(head)
    input = torch.randn(ROWS, FEATURES, dtype=torch.float64)
    want = torch_bce(compute_logits(input), dense.double())
    torch.compiler.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    traced = torch.fx.symbolic_trace(head)
    for function in (compiled, traced):
        for target in (as_rows(dense), dense):
            torch.testing.assert_close(function(input, target), want, rtol=DOUBLE, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated")
def test_quantized_layer():
    """What torch.ao.quantization.quantize_dynamic makes of it."""
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantized kernels")
    head, dense = LinearBCEWithLogitsLoss(FEATURES, LABELS), draw_target()
    head.linear = nn.Linear(FEATURES, LABELS)
    head = torch.ao.quantization.quantize_dynamic(head)
    assert type(head.linear) is torch.ao.nn.quantized.dynamic.Linear
    input = torch.randn(ROWS, FEATURES)
    want = torch_bce(head.linear(input).double(), dense.double())
    # Of one sum in float32
    torch.testing.assert_close(head(input, as_rows(dense)).double(), want, rtol=1e-6, atol=0)


def test_half_logits_have_a_loss_in_float32():
    """As the head's own, whoever computes the logits."""
    head = LinearBCEWithLogitsLoss(FEATURES, LABELS, dtype=torch.bfloat16)
    input, dense = torch.randn(ROWS, FEATURES).bfloat16(), draw_target()
    fused = head(input, dense)
    head.linear.register_forward_hook(lambda *_: None)
    loss = head(input, dense)
    assert loss.dtype is fused.dtype is torch.float32
    # A logit may be rounded to the other neighbour, which is 2^-8 of it.
    torch.testing.assert_close(loss, fused, rtol=2**-8, atol=0)


REFUSED = {
    "one number": (lambda x: x.sum(), RuntimeError, "logits must be of shape (*, C)"),
    "a pair": (lambda x: (x, x), TypeError, "logits must be a tensor, not tuple"),
    "labels": (lambda x: x, ValueError, f"must be that of the logits ({(ROWS, FEATURES)})"),
    "integers": (
        lambda x: torch.zeros(ROWS, LABELS, dtype=torch.int64),
        NotImplementedError,
        "logits must be float16, bfloat16, float32 or float64, not torch.int64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_are_no_logits_are_refused(case):
    function, kind, message = REFUSED[case]

    class Layer(nn.Module):
        def forward(self, x):
            return function(x)

    head = make_head()
    head.linear = Layer()
    with pytest.raises(kind) as error:
        head(torch.ones(ROWS, FEATURES).double(), as_rows(draw_target()))
    assert message in str(error.value)


def test_options_are_checked_where_the_layer_was_replaced():
    head = make_head(validate_targets=True)
    head.linear = nn.Linear(FEATURES, LABELS)
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 1.5, outside \[0, 1\]"):
        head(torch.ones(ROWS, FEATURES), torch.full((ROWS, LABELS), 1.5))
    head.reduction = "none"
    with pytest.raises(ValueError, match="as large as the logits"):
        head(torch.ones(ROWS, FEATURES), torch.ones(ROWS, LABELS))


def test_from_linear():
    layer = nn.Linear(FEATURES, LABELS)
    head = LinearBCEWithLogitsLoss.from_linear(layer, reduction="batchmean", label_smoothing=0.1)
    assert head.linear.weight is layer.weight
    assert head.linear.bias is layer.bias
    input, dense = torch.randn(ROWS, FEATURES), draw_target()
    loss = head(input, as_rows(dense))
    assert is_fused(loss)
    smoothed = dense.double() * 0.9 + 0.05
    want = torch_bce(layer(input).double(), smoothed, reduction="sum") / ROWS
    # Of one sum in float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    without = LinearBCEWithLogitsLoss.from_linear(nn.Linear(3, 4, bias=False))
    assert [name for name, _ in without.named_parameters()] == ["linear.weight"]
    with pytest.raises(TypeError, match="parameter"):
        LinearBCEWithLogitsLoss.from_linear(prune.l1_unstructured(layer, "weight", 0.5))


def quantized_by_torch():
    return torch.ao.nn.quantized.dynamic.Linear(FEATURES, LABELS)


def with_weight(weight):
    layer = nn.Linear(FEATURES, LABELS)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


NOT_SHARED = {
    "embedding": (
        lambda: nn.Embedding(3, 4),
        "not torch.nn.modules.sparse.Embedding; set head.lin",
    ),
    "quantized": (quantized_by_torch, "not torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "own forward": (
        lambda: Doubled(FEATURES, LABELS),
        "Doubled computes its logits in its own way",
    ),
    "int8": (
        lambda: with_weight(torch.zeros(LABELS, FEATURES, dtype=torch.int8)),
        "its weight is of torch.int8, as that of a quantized layer",
    ),
    "subclass": (
        lambda: with_weight(torch.zeros(LABELS, FEATURES).as_subclass(DoubledWeight)),
        "its weight is a DoubledWeight, as that of a quantized layer, so a head cannot share it: "
        "set head.linear to the layer instead",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated")
@pytest.mark.parametrize("case", NOT_SHARED)
def test_from_linear_refuses(case):
    make, message = NOT_SHARED[case]
    if case == "quantized" and not torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantized kernels")
    with pytest.raises(TypeError, match=re.escape(message)):
        LinearBCEWithLogitsLoss.from_linear(make())


def test_single_rows_and_leading_dimensions():
    head = make_head(reduction="batchmean")
    input = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    dense = torch.rand(2, 3, LABELS) < 0.1
    rows = as_rows(dense.flatten(0, 1))
    one = SparseTarget.from_lists([[5]], LABELS)
    want = [head(input, dense), head(input, rows), head(input[0, 0], one)]
    head.linear.register_forward_hook(lambda *_: None)
    got = [head(input, dense), head(input, rows), head(input[0, 0], one)]
    torch.testing.assert_close(got, want, rtol=DOUBLE, atol=0)
