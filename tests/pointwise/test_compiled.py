"""What pointwise losses have of their own in graphs: numbers that vary, operators, modules."""

import math

import pytest
import torch
from helpers import IN_COMPILERS, evaluate
from loss_calls import EXTRAS
from loss_cases import BCE, LOSSES
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fused_bce

OPS = torch.ops.fused_bce
NUMBERS = {"none": 0, "mean": 1, "sum": 2}


def list_cases():
    """Each loss's own options, each with one reduction; and what all take, each with one loss: the
    code is the same."""
    for case in (BCE, *LOSSES):
        for i, (name, options) in enumerate(case.options.items()):
            reduction = list(NUMBERS)[i % 3]
            yield pytest.param(case, options, reduction, id=f"{case.name}-{name}-{reduction}")
    for i, (name, extras) in enumerate(EXTRAS.items()):
        for case, reduction in ((LOSSES[i % 4], "mean"), (LOSSES[(i + 2) % 4], "none")):
            yield pytest.param(case, extras, reduction, id=f"{case.name}-{name}-{reduction}")


by_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
by_case = pytest.mark.parametrize(("case", "options", "reduction"), [*list_cases()])

pytestmark = IN_COMPILERS


def batch(device, options):
    logits = torch.randn(6, 5, device=device) * 3
    target = torch.rand(6, 5, device=device).round()
    if options.get("ignore_index") is math.nan:
        target[0, :3] = math.nan
    return logits, target, moved(options, device)


def moved(options, *to):
    return {n: v.to(*to) if torch.is_tensor(v) else v for n, v in options.items()}


def exact(case, logits, target, options, reduction):
    options = moved(options, torch.double)
    return evaluate(
        case.reference, logits.double(), target.double(), reduction=reduction, **options
    )


def assert_close(got, want):
    # Float32, with the tolerance of a sum of thirty
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    # float16 computes its gradient in backward, the others in forward.
    [(torch.float16, "sum"), (torch.float32, "mean"), (torch.float32, "none")],
)
@by_loss
def test_opcheck(case, dtype, reduction, device):
    logits, target, _ = batch(device, {})
    logits, target = logits.to(dtype), target.to(dtype)
    weight = torch.rand(5, device=device) + 0.5
    rest = (weight, *case.own_operands({}), NUMBERS[reduction])
    extras = None, torch.tensor(0.1, dtype=torch.float64), 1
    operator, with_grad, backward = (
        getattr(OPS, name.format(case.name)).default
        for name in ("{}", "_{}_with_grad", "_{}_backward")
    )
    opcheck(operator, (logits.clone().requires_grad_(), target, *rest, *extras))
    opcheck(with_grad, (logits, target, *rest, *extras))
    loss = operator(logits, target, *rest)
    opcheck(backward, (torch.ones_like(loss), logits, target, *rest))


@by_loss
def test_numbers_that_vary(case, device):
    """More of them than a function may be compiled for."""

    def step(x, t, p):
        # The same number arrives as a factor, too: what makes the compiler mistake one for the
        # other.
        return p * case.function(x * 1.0, t, reduction="sum", **numbers_at(p))

    # Each is another multiple of p, and none is a constant.
    factors = {name: (i + 1) / 4 for i, name in enumerate(case.floats)} | {"label_smoothing": 0.2}

    def numbers_at(p):
        return {name: p * factor for name, factor in factors.items()}

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    logits, target, _ = batch(device, {})
    for p in (0.95 - 0.05 * k for k in range(10)):
        got = evaluate(lambda x, t, p=p: compiled(x, t, p), logits, target)
        want = exact(case, logits, target, numbers_at(p), "sum")
        assert_close(got.loss, p * want.loss)
        assert_close(got.grad_logits, p * want.grad_logits)
    # The first number's, and one for all others
    assert counters["stats"]["unique_graphs"] <= 2


@by_loss
def test_numbers_of_a_module_that_vary(case, device):
    module = case.module(reduction="sum")
    compiled = torch.compile(module, backend="aot_eager")
    logits, target, _ = batch(device, {})
    for value in (0.2, 0.5, 0.0, 0.9, 0.2):
        numbers = dict.fromkeys(case.floats, value)
        for name in numbers:
            setattr(module, name, value)
        got = evaluate(compiled, logits, target)
        want = exact(case, logits, target, numbers, "sum")
        assert_close(got.loss, want.loss)
        assert_close(got.grad_logits, want.grad_logits)


@pytest.mark.parametrize("case", [c for c in LOSSES if c.errors], ids=lambda case: case.name)
def test_numbers_out_of_range(case):
    """A constant in compiled code, that eager code does not take"""
    numbers = case.errors[0]
    compiled = torch.compile(lambda x: case.function(x, x, **numbers), backend="eager")
    with pytest.raises(ValueError, match="must lie in"):
        compiled(torch.zeros(3))


def ours_in(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fused_bce" in str(node.target)]


@by_loss
def test_what_is_not_fused_is_exported_as_aten(case, device):
    logits, target, _ = batch(device, {})
    module = case.module()
    # Of which kernels know nothing
    module.weight = torch.nn.Parameter(torch.rand(5, device=device))
    program = export(module, (logits, target))
    assert not ours_in(program.graph)
    assert_close(program.module()(logits, target), module(logits, target).double())


@by_case
def test_decomposed_gradients(reduction, case, options, device):
    logits, target, options = batch(device, options)
    ignore_index, smoothing = options.get("ignore_index"), options.get("label_smoothing")
    ignore_nan = ignore_index is math.nan
    if reduction == "none" and not ignore_nan:
        target = target.long()
    rest = (
        options.get("weight"),
        *case.own_operands(options),
        NUMBERS[reduction],
        None,
        None if smoothing is None else torch.tensor(smoothing, dtype=torch.float64),
        None if ignore_nan else ignore_index,
        ignore_nan,
    )

    def both(logits, target):
        loss, grad = getattr(OPS, f"_{case.name}_with_grad")(logits, target, *rest)
        backward = getattr(OPS, f"_{case.name}_backward")
        return loss, grad, backward(torch.ones_like(loss), logits, target, *rest)

    lowered = make_fx(both, decomposition_table=fused_bce.decomposition_table())(logits, target)
    assert not ours_in(lowered.graph)
    want = exact(case, logits, target, options, reduction)
    loss, *grads = lowered(logits, target)
    assert_close(loss, want.loss)
    for grad in grads:
        assert_close(grad, want.grad_logits)


@by_loss
def test_compiled_autograd(case, device):
    """It takes the numbers from what the node has saved, not from an earlier node."""
    logits, target, _ = batch(device, {})
    logits.requires_grad_()
    for value in (0.8, 0.3):
        numbers = dict.fromkeys(case.floats, value)
        expected = evaluate(case.function, logits, target, reduction="sum", **numbers).grad_logits
        logits.grad = None
        with compiled_autograd._enable(torch.compile(backend="eager")):
            case.function(logits, target, reduction="sum", **numbers).backward()
        assert torch.equal(logits.grad, expected)
