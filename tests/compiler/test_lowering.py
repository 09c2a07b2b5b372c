"""The operators in torch's own: decompositions for exporters, and tensors without numbers."""

import math

import pytest
import torch
from helpers import by_reduction, dtype_name, fused, reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import default_decompositions, export
from torch.export.experimental import _export_forward_backward
from torch.fx.experimental.proxy_tensor import make_fx

import fused_bce

# torch.export's own
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")

OPS = torch.ops.fused_bce
OPTIONS = {
    "plain": {},
    "weights": {"weight": torch.rand(6, 1) + 0.5, "pos_weight": torch.rand(5) + 0.5},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 1},
    "ignored nan": {"ignore_index": math.nan, "label_smoothing": 0.2},
    "recompute": {"recompute": True},
    "validated": {"validate_targets": True},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
TARGETS = (torch.float32, torch.bool, torch.int64)
by_target = pytest.mark.parametrize("target_dtype", TARGETS, ids=dtype_name)


def ignores_nan(options) -> bool:
    return options.get("ignore_index") is math.nan


def batch(device, target_dtype, options):
    """Logits and targets, and the options on the device."""
    logits = torch.randn(6, 5, device=device)
    target = torch.rand(6, 5, device=device).round().to(target_dtype)
    if ignores_nan(options):
        target[0, :3] = math.nan
    return (
        logits,
        target,
        {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        },
    )


def exact_of(logits, target, options, reduction):
    known = {n: v for n, v in options.items() if n not in ("recompute", "validate_targets")}
    return reference(logits, target, reduction=reduction, **known)


def assert_close(got, exact):
    # torch's formula in float32 loses digits that ours keeps.
    torch.testing.assert_close(got.detach().cpu().double(), exact, rtol=1e-5, atol=1e-6)


def ours_in(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fused_bce" in str(node.target)]


class Loss(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.loss = fused_bce.BCEWithLogitsLoss(**options)

    def forward(self, logits, target):
        return self.loss(logits * self.scale, target)


@pytest.mark.parametrize(
    ("target_dtype", "name"),
    [(torch.bool, "weights"), (torch.int64, "ignored"), (torch.float32, "ignored nan")],
)
def test_run_decompositions(target_dtype, name, device):
    """Of a module, beside torch's own table, and of integers; the rest is in tests/every_loss."""
    logits, target, options = batch(device, target_dtype, OPTIONS[name])
    program = export(Loss(**options).to(device), (logits, target))
    assert ours_in(program.graph)
    table = default_decompositions()
    table.update(fused_bce.decomposition_table())
    lowered = program.run_decompositions(table)
    assert not ours_in(lowered.graph)
    exact = exact_of(logits, target, options, "mean").loss
    for module in (program.module(), lowered.module()):
        assert_close(module(logits, target), exact)


@by_options
def test_export_of_forward_and_backward(options, device):
    logits, target, options = batch(device, torch.float32, options)
    model = Loss(**options).to(device)
    joint = _export_forward_backward(export(model, (logits, target)))
    # It keeps what is not aten, and what it keeps runs.
    assert ours_in(joint.graph)
    lowered = joint.run_decompositions(fused_bce.decomposition_table())
    assert not ours_in(lowered.graph)
    exact = exact_of(logits, target, options, "mean")
    slope = (exact.grad_logits * logits.cpu().double()).sum()
    for program in (joint, lowered):
        loss, grad_scale = program.graph_module(
            model.scale, *program.constants.values(), *buffers(model), logits, target
        )
        assert_close(loss, exact.loss)
        assert_close(grad_scale, slope)


def buffers(model):
    return [buffer for _, buffer in model.named_buffers()]


@by_target
@by_reduction
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_numbers(kind, reduction, target_dtype, device):
    logits, target, _ = batch(device, target_dtype, {})
    to = FakeTensorMode().from_tensor if kind == "fake" else lambda t: t.to("meta")
    logits, target = to(logits).requires_grad_(), to(target)
    loss = fused(logits, target, reduction=reduction)
    assert loss.dtype is torch.float32
    assert loss.shape == (logits.shape if reduction == "none" else ())
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert (grad.shape, grad.dtype, grad.device) == (logits.shape, logits.dtype, logits.device)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_validation_in_make_fx(tracing_mode):
    for target_dtype in (torch.float32, torch.int64):
        logits, target, _ = batch("cpu", target_dtype, {})
        traced = make_fx(
            lambda x, t: fused(x, t, validate_targets=True), tracing_mode=tracing_mode
        )(logits, target)
        assert_close(traced(logits, target), exact_of(logits, target, {}, "mean").loss)
        with pytest.raises(RuntimeError, match="outside"):
            traced(logits, target + 2)


@by_target
def test_validation_in_a_compiled_vmap(target_dtype, device):
    # No batching rule for an assertion: it is left out.
    logits, target, _ = batch(device, target_dtype, {})

    def per_row(x, t):
        return torch.vmap(lambda x, t: fused(x, t, validate_targets=True))(x, t)

    torch.compiler.reset()
    compiled = torch.compile(per_row, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), per_row(logits, target))
