"""Numbers from Python in compiled code: none becomes a constant of a graph and is then used for the
next value (pytorch 197889), in this process or, from the cache on disk, in the next."""

import math

import pytest
import torch
from helpers import IN_COMPILERS, fused, reference
from torch._dynamo.utils import counters

import fused_bce

# The compiler's own, on its way through torch
pytestmark = IN_COMPILERS

SCHEDULE = [0.9 - 0.05 * k for k in range(12)]


def batch(device):
    logits = torch.randn(16, 5, device=device, requires_grad=True)
    return logits, torch.rand(16, 5, device=device).round()


def check_step(loss, logits, target, label_smoothing, scale=1.0):
    """Loss and gradient are scale times the loss that is smoothed by this number."""
    (grad,) = torch.autograd.grad(loss, logits)
    exact = reference(
        logits, target, label_smoothing=label_smoothing, grad_loss=torch.tensor(scale)
    )
    # A few roundings of float32; the error that this is about is 1e-3.
    torch.testing.assert_close(loss.detach().cpu().double(), scale * exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.cpu().double(), exact.grad_logits, rtol=1e-5, atol=1e-8)


def check_schedule(step, device, values):
    logits, target = batch(device)
    for p in values:
        check_step(step(logits, target, p), logits, target, 0.5 * (1 - p), p)


def smoothed_and_scaled(logits, target, p):
    # The same number arrives as a factor, too: what makes the compiler mistake one for the other.
    return p * fused(logits * 1.0, target, label_smoothing=0.5 * (1 - p))


# To no smoothing at all, or from it, which is not another graph.
@pytest.mark.parametrize(
    ("values", "fullgraph"),
    [([*SCHEDULE, 1.0], False), ([1 - 0.04 * k for k in range(20)], True)],
)
def test_two_graphs_for_every_value(values, fullgraph, device):
    check_schedule(torch.compile(smoothed_and_scaled, fullgraph=fullgraph), device, values)
    assert counters["stats"]["unique_graphs"] <= 2


def test_attribute_of_a_module(device):
    module = fused_bce.BCEWithLogitsLoss(label_smoothing=0.3)
    compiled = torch.compile(module)
    logits, target = batch(device)
    for label_smoothing in (0.3, 0.25, 0.2, 0.15, 0.1, 0.0, 0.05):
        module.label_smoothing = label_smoothing
        check_step(compiled(logits, target), logits, target, label_smoothing)
    assert counters["stats"]["unique_graphs"] <= 2


# The frame that raises is resumed after logits * 1.0, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_out_of_range_is_an_error_in_a_graph_for_any_value(device):
    step = torch.compile(smoothed_and_scaled)
    logits, target = batch(device)
    check_schedule(step, device, SCHEDULE[:3])
    with pytest.raises(Exception, match=r"label_smoothing must lie in \[0, 1\)"):
        step(logits, target, 2.0)


def test_ignore_index(device):
    compiled = torch.compile(lambda x, t, i: fused(x * 1.0, t, reduction="sum", ignore_index=i))
    logits = torch.randn(16, 5, device=device, requires_grad=True)
    target = torch.randint(2, 9, (16, 5), device=device).float()
    for ignore_index in (2, 3, 4, 5, None, math.nan, 6, 7):
        (grad,) = torch.autograd.grad(compiled(logits, target, ignore_index), logits)
        ignored = target == (-1 if ignore_index is None else ignore_index)
        assert torch.equal(grad == 0, ignored)


def test_no_stale_graph_from_the_cache_on_disk(device):
    """Where all that was compiled in this process is forgotten, as in the next one."""
    values = SCHEDULE[:4]

    # Not of the other tests' function, for they fill the cache, too
    def step(logits, target, p):
        return p * fused(logits * 2.0 * 0.5, target, label_smoothing=0.5 * (1 - p))

    check_schedule(torch.compile(step), device, values)
    assert counters["inductor"]["fxgraph_cache_hit"] == 0
    torch.compiler.reset()
    check_schedule(torch.compile(step), device, values[::-1])
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
