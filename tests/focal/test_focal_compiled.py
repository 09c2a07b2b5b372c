"""The focal loss in torch.compile, torch.export and other tracers, and in decompositions."""

import contextlib
import math

import pytest
import torch
from focal_reference import by_torchvision
from helpers import evaluate
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import default_decompositions, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fused_bce
from fused_bce import SigmoidFocalLoss
from fused_bce.functional import sigmoid_focal_loss

OPS = torch.ops.fused_bce
NUMBERS = {"none": 0, "mean": 1, "sum": 2}
OPTIONS = {
    "plain": {},
    "power": {"alpha": 0.5, "gamma": 1.5, "gamma_neg": 3.0},
    "weight": {"alpha": -1, "weight": torch.linspace(0.5, 2, 6)[:, None]},
    "smoothed": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 1},
    "ignored nan": {"ignore_index": math.nan},
    "recompute": {"recompute": True},
}
# Every reduction of the plain loss, and one of them with each option: the code is the same.
REDUCTIONS = ("none", "mean", "sum")
CASES = [("plain", reduction) for reduction in REDUCTIONS]
CASES += [(name, REDUCTIONS[i % 3]) for i, name in enumerate(OPTIONS) if name != "plain"]
by_case = pytest.mark.parametrize(
    ("options", "reduction"),
    [pytest.param(OPTIONS[name], reduction, id=f"{name}-{reduction}") for name, reduction in CASES],
)

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
    counters.clear()
    yield
    torch.compiler.reset()


def batch(device, options):
    logits = torch.randn(6, 5, device=device) * 3
    target = torch.rand(6, 5, device=device).round()
    if options.get("ignore_index") is math.nan:
        target[0, :3] = math.nan
    on_device = {n: v.to(device) if hasattr(v, "to") else v for n, v in options.items()}
    return logits, target, on_device


def exact(logits, target, options, reduction="none"):
    known = {n: v for n, v in options.items() if n != "recompute"}
    return evaluate(by_torchvision, logits.double(), target.double(), reduction=reduction, **known)


def assert_close(got, want):
    # Float32, with the tolerance of a sum of thirty
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "reduction", "gamma"),
    # float16 computes its gradient in backward, the others in forward.
    [(torch.float16, "sum", 2.5), (torch.float32, "mean", 2.0), (torch.float32, "none", 0.0)],
)
def test_opcheck(dtype, reduction, gamma, device):
    logits, target, _ = batch(device, {})
    logits, target = logits.to(dtype), target.to(dtype)
    weight = torch.rand(5, device=device) + 0.5
    rest = (weight, 0.25, gamma, gamma, NUMBERS[reduction])
    smoothing = torch.tensor(0.1, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    opcheck(OPS.sigmoid_focal_loss.default, (leaf, target, *rest, None, smoothing, 1))
    opcheck(OPS._sigmoid_focal_loss_with_grad.default, (logits, target, *rest, None, smoothing, 1))
    loss = OPS.sigmoid_focal_loss(logits, target, *rest)
    opcheck(
        OPS._sigmoid_focal_loss_backward.default, (torch.ones_like(loss), logits, target, *rest)
    )


@by_case
def test_compiled(reduction, options, device):
    logits, target, options = batch(device, options)

    def step(x, t):
        return sigmoid_focal_loss(x, t, reduction=reduction, **options)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    got, want = (evaluate(f, logits, target) for f in (compiled, step))
    # The very kernels
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_logits, want.grad_logits)


def scheduled(logits, target, p):
    # The same number arrives as a factor, too: what makes the compiler mistake one for the other.
    numbers = numbers_at(p)
    return p * sigmoid_focal_loss(logits * 1.0, target, reduction="sum", **numbers)


def numbers_at(p):
    return {"alpha": p / 2, "gamma": 2 - p, "gamma_neg": 3 * p, "label_smoothing": p / 4}


def check_schedule(step, device, values):
    logits, target, _ = batch(device, {})
    for p in values:
        got = evaluate(lambda x, t, p=p: step(x, t, p), logits, target)
        want = exact(logits, target, numbers_at(p), "sum")
        assert_close(got.loss, p * want.loss)
        assert_close(got.grad_logits, p * want.grad_logits)
    # The first number's, and one for all others
    assert counters["stats"]["unique_graphs"] <= 2


def test_schedule(device, monkeypatch):
    # With CI set the compiler refuses to keep what has a decomposition.
    monkeypatch.setenv("CI", "1")
    step = torch.compile(scheduled, fullgraph=True)
    check_schedule(step, device, [0.95, 0.9, 0.8, 0.7])


def test_schedule_of_twelve_values(device):
    # More than a function may be compiled for
    step = torch.compile(scheduled, backend="aot_eager", fullgraph=True)
    check_schedule(step, device, [0.95 - 0.05 * k for k in range(12)])


def test_schedule_of_a_module(device):
    module = SigmoidFocalLoss(reduction="sum")
    compiled = torch.compile(module, backend="aot_eager")
    logits, target, _ = batch(device, {})
    for gamma, alpha in (
        (2.0, 0.25),
        (1.5, 0.25),
        (1.0, 0.5),
        (0.0, -1.0),
        (3.0, 0.75),
        (2.0, 0.25),
    ):
        module.gamma, module.alpha = gamma, alpha
        got = evaluate(compiled, logits, target)
        want = exact(logits, target, {"gamma": gamma, "alpha": alpha}, "sum")
        assert_close(got.loss, want.loss)
        assert_close(got.grad_logits, want.grad_logits)


def ours_in(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fused_bce" in str(node.target)]


@by_case
def test_export_and_decompositions(reduction, options, device):
    logits, target, options = batch(device, options)
    if reduction == "none" and options.get("ignore_index") is not math.nan:
        target = target.long()
    module = SigmoidFocalLoss(reduction=reduction, **options).to(device)
    program = export(module, (logits, target))
    assert ours_in(program.graph)
    table = default_decompositions()
    table.update(fused_bce.decomposition_table())
    lowered = program.run_decompositions(table)
    assert not ours_in(lowered.graph)
    want = exact(logits, target, options, reduction).loss
    for one in (program.module(), lowered.module()):
        assert_close(one(logits, target), want)


def test_what_is_not_fused_is_exported_as_aten(device):
    logits, target, _ = batch(device, {})
    module = SigmoidFocalLoss(gamma=1.5)
    module.weight = torch.nn.Parameter(
        torch.rand(5, device=device)
    )  # of which kernels know nothing
    program = export(module, (logits, target))
    assert not ours_in(program.graph)
    assert_close(program.module()(logits, target), module(logits, target).double())


@by_case
def test_decomposed_gradients(reduction, options, device):
    logits, target, options = batch(device, options)
    ignore_index, smoothing = options.get("ignore_index"), options.get("label_smoothing")
    ignore_nan = ignore_index is math.nan
    gamma = options.get("gamma", 2.0)
    operands = (logits, target, options.get("weight"), options.get("alpha", 0.25), gamma)
    operands += (options.get("gamma_neg", gamma), NUMBERS[reduction])
    extras = (
        None if smoothing is None else torch.tensor(smoothing, dtype=torch.float64),
        None if ignore_nan else ignore_index,
        ignore_nan,
    )

    def both(logits, target):
        rest = operands[2:]
        loss, grad = OPS._sigmoid_focal_loss_with_grad(logits, target, *rest, None, *extras)
        ones = torch.ones_like(loss)
        return (
            loss,
            grad,
            OPS._sigmoid_focal_loss_backward(ones, logits, target, *rest, None, *extras),
        )

    lowered = make_fx(both, decomposition_table=fused_bce.decomposition_table())(logits, target)
    assert not ours_in(lowered.graph)
    want = exact(logits, target, options, reduction)
    loss, *grads = lowered(logits, target)
    assert_close(loss, want.loss)
    for grad in grads:
        assert_close(grad, want.grad_logits)


@by_case
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_numbers(kind, reduction, options, device):
    logits, target, options = batch(device, options)
    mode = FakeTensorMode()
    to = mode.from_tensor if kind == "fake" else lambda t: t.to("meta")
    logits, target = to(logits), to(target)
    options = {n: to(v) if torch.is_tensor(v) else v for n, v in options.items()}
    with mode if kind == "fake" else contextlib.nullcontext():
        check_without_numbers(logits, target, reduction, options)


def check_without_numbers(logits, target, reduction, options):
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, target, reduction=reduction, **options)
    assert loss.dtype is torch.float32
    assert loss.shape == (logits.shape if reduction == "none" else ())
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert (grad.shape, grad.dtype, grad.device) == (logits.shape, logits.dtype, logits.device)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode, device):
    logits, target, _ = batch(device, {})
    traced = make_fx(lambda x, t: sigmoid_focal_loss(x, t), tracing_mode=tracing_mode)(
        logits, target
    )
    assert_close(traced(logits, target), exact(logits, target, {}).loss)


def test_compiled_autograd(device):
    """It takes gamma from what the node has saved, not from an earlier node."""
    logits, target, _ = batch(device, {})
    logits.requires_grad_()
    for gamma in (2.0, 0.5):
        expected = evaluate(sigmoid_focal_loss, logits, target, gamma=gamma).grad_logits
        logits.grad = None
        with compiled_autograd._enable(torch.compile(backend="eager")):
            sigmoid_focal_loss(logits, target, gamma=gamma).sum().backward()
        assert torch.equal(logits.grad, expected)
