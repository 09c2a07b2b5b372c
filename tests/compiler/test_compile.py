"""torch.compile, torch.export and other tracers: what is in the graph, values, gradients."""

import contextlib
import io
import math

import pytest
import torch
from helpers import (
    IN_COMPILERS,
    by_dtype_pair,
    by_reduction,
    draw,
    evaluate,
    fused,
    make_weights,
    outcome,
    reference,
    torch_bce,
)
from torch import nn
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor

from fused_bce import BCEWithLogitsLoss, why_not_fused

OPS = torch.ops.fused_bce
LOSS = OPS.binary_cross_entropy_with_logits.default
REDUCTION_NUMBERS = {"none": 0, "mean": 1, "sum": 2}

pytestmark = [
    *IN_COMPILERS,
    # In loading an exported program
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


def compiled(function, backend="aot_eager", **options):
    """Without a graph break. aot_eager traces as inductor does, and then runs the operators."""
    return torch.compile(function, backend=backend, fullgraph=True, **options)


class Graphs:
    """A backend that keeps the graphs which it is given, forward and backward."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph_module, example_inputs):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def keep_in(graphs):
            def compiler(traced, _):
                graphs.append([n.target for n in traced.graph.nodes if n.op == "call_function"])
                return make_boxed_func(traced.forward)

            return compiler

        backend = aot_autograd(
            fw_compiler=keep_in(self.forward), bw_compiler=keep_in(self.backward)
        )
        return backend(graph_module, example_inputs)


def operators(graph_module) -> list:
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


class Classifier(nn.Module):
    """Its logits are not a leaf."""

    def __init__(self, loss_class, reduction="mean"):
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.loss = loss_class(pos_weight=torch.linspace(0.5, 2, 4), reduction=reduction)

    def forward(self, x, target):
        return self.loss(self.head(x), target)


def classifiers(device, reduction="mean"):
    ours, theirs = (
        Classifier(cls, reduction).to(device, torch.float64)
        for cls in (BCEWithLogitsLoss, nn.BCEWithLogitsLoss)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch_of(size, device):
    return (
        torch.randn(size, 5, device=device, dtype=torch.float64),
        torch.rand(size, 4, device=device, dtype=torch.float64),
    )


def check_step(ours, model, theirs, data) -> None:
    """``ours(*data)`` and the gradients that it leaves in ``model`` are those of ``theirs``."""
    for network in (model, theirs):
        network.zero_grad()
    loss, expected = ours(*data), theirs(*data)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    for got, want in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


# Operators


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize(
    ("dtype", "layout", "reduction"),
    # float16 computes its gradient in backward, the others in forward.
    [
        (torch.float16, "sliced", "none"),
        (torch.float16, "transposed", "mean"),
        (torch.float32, "sliced", "mean"),
        (torch.float32, "transposed", "sum"),
    ],
)
def test_opcheck(dtype, layout, reduction, device):
    # Schema, autograd registration, fake kernel, and tracing with dynamic shapes.
    number = REDUCTION_NUMBERS[reduction]
    for names in ((), ("weight", "pos_weight")):
        logits, target = draw((4, 6), device, dtype)
        logits, target = LAYOUTS[layout](logits), LAYOUTS[layout](target)
        weights = make_weights(names, 6, device)
        arguments = (logits, target, weights.get("weight"), weights.get("pos_weight"), number)
        for grads in ((True, False), (False, True)):
            leaves = [
                t.detach().requires_grad_(g) for t, g in zip(arguments[:2], grads, strict=True)
            ]
            opcheck(LOSS, (*leaves, *arguments[2:]))
        opcheck(LOSS, arguments, {"dtype": torch.float64})
        opcheck(OPS._binary_cross_entropy_with_logits_with_grad.default, arguments)
        grad_loss = torch.rand((4, 6) if reduction == "none" else (), device=device)
        opcheck(OPS._binary_cross_entropy_with_logits_backward.default, (grad_loss, *arguments))
        opcheck(OPS._scale_.default, (logits.clone(), grad_loss))
        if reduction == "mean":
            divisor = torch.tensor(7.0, device=device)
            opcheck(LOSS, arguments, {"divisor": divisor})
            opcheck(
                OPS._binary_cross_entropy_with_logits_backward.default,
                (grad_loss, *arguments),
                {"divisor": divisor},
            )


@by_dtype_pair
def test_divisor(logits_dtype, target_dtype, device):
    # What mean divides by, for a part of a whole: in forward, backward and the derivative of that.
    logits, target = draw((3, 50), device, logits_dtype, target_dtype)
    for divisor in (torch.tensor(400.0), torch.tensor(400.0, device=device, dtype=torch.float64)):

        def mean(x, t, divisor=divisor):
            return LOSS(x, t, None, None, 1, divisor=divisor)

        def by_hand(x, t):
            return torch_bce(x, t, reduction="sum") / 400

        exact = evaluate(by_hand, logits.double(), target.double(), target_grad=True)
        got = evaluate(mean, logits, target, target_grad=True)
        for g, e in zip(got, exact, strict=True):
            rtol = 4 * torch.finfo(g.dtype).eps
            torch.testing.assert_close(
                g.double(), e, rtol=rtol, atol=rtol * e.abs().max().item(), check_device=False
            )
    x = logits.double().requires_grad_()
    torch.autograd.gradcheck(lambda x: mean(x, target.double()), x)
    torch.autograd.gradgradcheck(lambda x: mean(x, target.double()), x)


def test_divisor_of_nothing(device):
    # 0: nothing was counted, so there was nothing to add.
    logits = torch.zeros(0, device=device, requires_grad=True)
    divisor = torch.zeros((), device=device)
    loss = LOSS(logits, torch.zeros(0, device=device), None, None, 1, divisor=divisor)
    assert loss.item() == 0
    with pytest.raises(RuntimeError, match="divisor has shape"):
        LOSS(logits, logits, None, None, 1, divisor=torch.ones(1, device=device))


# torch.compile


def test_graph_of_a_training_step(device):
    ours, theirs = classifiers(device)
    graphs = Graphs()
    check_step(compiled(ours, backend=graphs), ours, theirs, batch_of(6, device))
    (forward,), (backward,) = graphs.forward, graphs.backward
    # One pass makes the loss and its gradient; backward multiplies that by grad_loss, in an
    # operation that a compiler fuses with what follows.
    assert forward.count(OPS._binary_cross_entropy_with_logits_with_grad.default) == 1
    fused_operators = [target for target in backward if "fused_bce" in str(target)]
    assert fused_operators == []
    assert backward.count(torch.ops.aten.mul.Tensor) == 1


def test_graph_without_gradients(device):
    ours, _ = classifiers(device)
    graphs = Graphs()
    with torch.no_grad():
        compiled(ours, backend=graphs)(*batch_of(6, device))
    assert LOSS in graphs.forward[0]
    assert OPS._binary_cross_entropy_with_logits_with_grad.default not in graphs.forward[0]


@by_reduction
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiled_layouts(layout, reduction, device):
    logits, target = (layout(t) for t in draw((6, 4), device))
    got = evaluate(compiled(fused), logits, target, reduction=reduction)
    expected = evaluate(fused, logits, target, reduction=reduction)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, check_stride=True)


@by_reduction
def test_compiled_gradient_of_the_target(reduction, device):
    logits, target = draw((6, 4), device, torch.float64, torch.float64)
    got = evaluate(
        compiled(fused, dynamic=True), logits, target, target_grad=True, reduction=reduction
    )
    exact = reference(logits, target, reduction=reduction)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.cpu(), e)


EXTRAS = {
    "bool": (torch.bool, {}),
    "int64": (torch.int64, {}),
    "label_smoothing": (torch.uint8, {"label_smoothing": 0.1}),
    "ignore_index": (torch.uint8, {"ignore_index": 1}),
    "ignore_index of floats": (torch.float32, {"ignore_index": 0, "label_smoothing": 0.1}),
    "ignore nan": (torch.float32, {"ignore_index": math.nan}),
    "recompute": (torch.float32, {"recompute": True}),
}
by_extras = pytest.mark.parametrize(("target_dtype", "extras"), EXTRAS.values(), ids=EXTRAS)


def some_ignored(target, extras):
    if extras.get("ignore_index") is math.nan:
        target[0] = math.nan
    return target


@by_extras
def test_extras(target_dtype, extras, device):
    """What floats do not show, compiled; and the operator."""
    for dtype, reduction in ((torch.float16, "none"), (torch.float32, "mean")):
        logits, target = draw((6, 4), device, dtype)
        target = some_ignored(target.round().to(target_dtype), extras)
        if not target.is_floating_point():
            torch.compiler.reset()
            options = {"reduction": reduction, **extras}
            got = evaluate(compiled(fused), logits, target, **options)
            expected = evaluate(fused, logits, target, **options)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        number = REDUCTION_NUMBERS[reduction]
        operands = dict(extras)
        if "label_smoothing" in extras:
            smoothing = torch.tensor(extras["label_smoothing"], dtype=torch.float64)
            operands["label_smoothing"] = smoothing
        if operands.get("ignore_index") is math.nan:
            operands = {"ignore_nan": True}
        opcheck(LOSS, (logits.requires_grad_(), target, None, None, number), operands)
    if "ignore_index" in extras:
        opcheck(OPS._count_unignored.default, (target, 1))
        opcheck(OPS._count_unignored.default, (target, None, True))


@by_extras
def test_exported_extras(target_dtype, extras, device):
    loss = BCEWithLogitsLoss(**extras)
    logits, target = draw((6, 4), device)
    target = some_ignored(target.round().to(target_dtype), extras)
    exported = torch.export.export(loss, (logits, target))
    assert operators(exported.graph_module).count(LOSS) == 1
    torch.testing.assert_close(exported.module()(logits, target), loss(logits, target))


def test_compiled_validation(device):
    logits, target = draw((6, 4), device)
    function = compiled(lambda x, t: fused(x, t, validate_targets=True))
    torch.testing.assert_close(function(logits, target), fused(logits, target), rtol=0, atol=0)
    if device == "cpu":  # on a GPU the assertion takes the process's context with it
        with pytest.raises(RuntimeError, match="a target lies outside"):
            function(logits, target + 1)


def test_no_recompilation_for_another_batch_size(device):
    ours, theirs = classifiers(device)
    function = compiled(ours, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (6, 9, 33):
            check_step(function, ours, theirs, batch_of(size, device))


@pytest.mark.parametrize(
    ("ci", "mode"), [("", "max-autotune-no-cudagraphs"), ("true", "default")], ids=["", "CI"]
)
def test_inductor(ci, mode, device, monkeypatch):
    # Where this is set, inductor refuses to keep operators for which torch knows decompositions.
    monkeypatch.setenv("CI", ci)
    ours, theirs = classifiers(device)
    check_step(compiled(ours, backend="inductor", mode=mode), ours, theirs, batch_of(6, device))


def test_inductor_dynamic(device):
    ours, theirs = classifiers(device)
    function = compiled(ours, backend="inductor", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (6, 9):
            check_step(function, ours, theirs, batch_of(size, device))


def test_compiled_second_backward(device):
    logits, target = draw((6, 4), device, torch.float64, torch.float64)
    logits.requires_grad_()
    loss = compiled(fused)(logits, target)
    first = torch.autograd.grad(loss, logits, torch.full_like(loss, 3), retain_graph=True)
    second = torch.autograd.grad(loss, logits, torch.full_like(loss, 3))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_compiled_wrapper_subclass(device):
    # A wrapper with __torch_dispatch__ sees the operator, and applies it to what it wraps.
    logits, target = (TwoTensor(t, t.clone()) for t in draw((6, 4), device))
    loss = compiled(fused)(logits, target)
    assert type(loss) is TwoTensor
    torch.testing.assert_close(loss.a, fused(logits.a, target.a), rtol=0, atol=0)


TRANSFORMS = {
    "vmap": lambda f, x, t: torch.vmap(f)(x, t),
    "grad": lambda f, x, t: torch.func.grad(f)(x, t),
    "jvp": lambda f, x, t: torch.func.jvp(lambda y: f(y, t), (x,), (x,)),
    "hessian": lambda f, x, t: torch.func.hessian(f)(x, t),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compiled_transforms(transform, device):
    # torch's own function runs.
    data = draw((4, 3), device, torch.float64, torch.float64)
    got = compiled(lambda x, t: transform(fused, x, t))(*data)
    torch.testing.assert_close(got, transform(torch_bce, *data))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_compiled_deprecated_arguments(device):
    data = draw((4, 3), device)
    got = compiled(lambda x, t: fused(x, t, size_average=False))(*data)
    torch.testing.assert_close(got, torch_bce(*data, reduction="sum"))


BAD_CALLS = {
    "sizes differ": lambda f, x, t: f(x, t[:2]),
    "weight requires a gradient": lambda f, x, t: f(
        x, t, torch.ones_like(x[0], requires_grad=True)
    ),
    "weight does not broadcast": lambda f, x, t: f(x, t, x.new_ones(5)),
    "pos_weight enlarges": lambda f, x, t: f(x, t, pos_weight=x.new_ones(1, 4, 3)),
    "weight is no tensor": lambda f, x, t: f(x, t, 2.0),
    "reduction": lambda f, x, t: f(x, t, reduction="average"),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_compiled_errors(call, device):
    # The compiler wraps them in errors of its own, alike for torch's function.
    data = draw((4, 3), device)
    errors = {}
    for function in (fused, torch_bce):
        torch.compiler.reset()
        with contextlib.redirect_stderr(io.StringIO()):
            error = outcome(compiled(lambda x, t, f=function: call(f, x, t)), *data).error
        assert error is not None
        errors[function] = error
    assert issubclass(errors[fused][0], RuntimeError)
    assert issubclass(errors[torch_bce][0], RuntimeError)


def test_why_not_fused_when_compiled(device):
    logits, target = draw((4, 3), device)

    def reasons(x, t):
        return (
            why_not_fused(x, t),
            why_not_fused(x, t[:2]),
            why_not_fused(x, t, 2.0),
            why_not_fused(x.to(torch.complex64), t),
            why_not_fused(x, t, reduction="max"),
            why_not_fused(x, t, size_average=False),
        )

    assert torch.compile(reasons, backend="eager")(logits, target) == (
        None,
        "input and target differ in size",
        "weight is not a tensor",
        "input has dtype torch.complex64",
        "max is not a valid value for reduction",
        "size_average and reduce are not fused in compiled code",
    )


# Other tracers


@pytest.mark.parametrize(("strict", "reduction"), [(False, "none"), (True, "mean"), (False, "sum")])
def test_export(strict, reduction, device):
    ours, theirs = classifiers(device, reduction)
    size = torch.export.Dim("size")
    exported = torch.export.export(
        ours, batch_of(6, device), dynamic_shapes=({0: size}, {0: size}), strict=strict
    )
    assert operators(exported.graph_module).count(LOSS) == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, exported.run_decompositions(), torch.export.load(file)):
        loaded = program.module()
        for size in (6, 11):
            check_step(loaded, loaded, theirs, batch_of(size, device))


@pytest.mark.large
def test_aot_inductor(device, tmp_path):
    ours, theirs = classifiers(device)
    data = batch_of(6, device)
    with torch.no_grad():
        exported = torch.export.export(ours, data)
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(*data), theirs(*data))
