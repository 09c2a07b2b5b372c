"""What holds of any loss in torch.compile, torch.export, other tracers and decompositions."""

import contextlib

import torch
from helpers import IN_COMPILERS, assert_double_close
from loss_calls import by_graph, exactly, loss_and_grads
from torch import nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fused_bce

pytestmark = IN_COMPILERS


def assert_same_bits(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_all_close(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert_double_close(ours.detach().cpu(), theirs.detach())


@by_graph
def test_compiled(call, reduction, dtype, device):
    """The very kernels: also in a checkpoint, under autocast, and of the next batch."""
    leaves, rest = call.operands(device, dtype)

    def step(*operands, reduction):
        def block(*leaves):
            return call(*leaves, *operands[len(leaves) :], reduction=reduction)

        kept = checkpoint(block, *operands[: len(leaves)], use_reentrant=False)
        with torch.autocast(device, torch.bfloat16):
            return kept + call(*operands, reduction=reduction)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got, want = (loss_and_grads(f, leaves, rest, reduction, 0.3) for f in (compiled, step))
        assert_same_bits(got, want)
        leaves, rest = call.operands(device, dtype)


@by_graph
def test_compiled_autograd(call, reduction, dtype, device):
    leaves, rest = call.operands(device)
    _, *want = exactly(call, leaves, rest, reduction)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        call(*leaves, *rest, reduction=reduction).sum().backward()
    assert_all_close([t.grad for t in leaves], want)


def ours_in(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fused_bce" in str(node.target)]


class Module(nn.Module):
    def __init__(self, call, reduction):
        super().__init__()
        self.call, self.reduction = call, reduction

    def forward(self, *operands):
        return self.call(*operands, reduction=self.reduction)


@by_graph
def test_export_and_decompositions(call, reduction, dtype, device):
    leaves, rest = call.operands(device)
    operands = (*(t.detach() for t in leaves), *rest)
    program = export(Module(call, reduction), operands)
    assert ours_in(program.graph)
    lowered = program.run_decompositions(fused_bce.decomposition_table())
    assert not ours_in(lowered.graph)
    want = exactly(call, leaves, rest, reduction)[:1]
    for one in (program.module(), lowered.module()):
        assert_all_close([one(*operands)], want)


@by_graph
def test_without_values(call, reduction, dtype, device):
    leaves, rest = call.operands(device, dtype)
    want = loss_and_grads(call, leaves, rest, reduction)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for where, to, context in (
        (device, mode.from_tensor, mode),
        ("meta", lambda t: t.to("meta"), contextlib.nullcontext()),
    ):
        some = [to(t.detach()).requires_grad_() for t in leaves]
        others = pytree.tree_map_only(torch.Tensor, to, rest)
        with context:
            got = loss_and_grads(call, some, others, reduction)
        for ours, real in zip(got, want, strict=True):
            assert (ours.shape, ours.dtype) == (real.shape, real.dtype)
            assert ours.device.type == where


@by_graph
def test_make_fx(call, reduction, dtype, device):
    """Loss and gradients as ATen operations."""
    leaves, rest = call.operands(device)
    want = exactly(call, leaves, rest, reduction)
    leaves = [t.detach() for t in leaves]

    def step(*leaves):
        return loss_and_grads(call, [t.detach().requires_grad_() for t in leaves], rest, reduction)

    for mode in ("real", "symbolic"):
        traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(*leaves)
        assert not ours_in(traced.graph)
        assert_all_close(traced(*leaves), want)
