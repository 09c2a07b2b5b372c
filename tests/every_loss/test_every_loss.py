"""What holds of any loss: values, derivatives of any order, the same bits by every path."""

import itertools

import pytest
import torch
from helpers import FLOATS, assert_double_close
from loss_calls import CALLS, MIXED, OTHERS, by_call, exactly, loss_and_grads, move, widen
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)"),
    # A trace is of so many rows.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
]


def assert_all_close(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert_double_close(ours.detach().cpu(), theirs.detach())


@by_call
def test_values(call, device):
    for reduction in call.reductions:
        leaves, rest = call.operands(device)
        got = loss_and_grads(call, leaves, rest, reduction, 0.3)
        assert_all_close(got, exactly(call, leaves, rest, reduction, 0.3))


@by_call
def test_same_bits_by_every_path(call, device):
    """A gradient that is stored in forward, and what computes it again."""
    for dtype in FLOATS:
        check_paths(call, *call.operands(device, dtype))


def check_paths(call, leaves, rest):
    def grads(loss, grad_loss, **options):
        return torch.autograd.grad(loss, leaves, torch.full_like(loss, grad_loss), **options)

    for reduction, grad_loss in itertools.product(call.reductions, (1.0, 0.3)):

        def loss(reduction=reduction):
            return call(*leaves, *rest, reduction=reduction)

        stored = grads(loss(), grad_loss)
        assert [g.dtype for g in stored] == [t.dtype for t in leaves]
        twice = loss()
        grads(twice, 7.0, retain_graph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            hooked = loss()
        for other in (twice, hooked, checkpoint(loss, use_reentrant=False)):
            assert all(map(torch.equal, grads(other, grad_loss), stored))


@by_call
def test_accumulation(call, device):
    """What backward hands over is not touched by the next."""
    leaves, rest = call.operands(device)
    for factor in (1, 2):
        call(*leaves, *rest, reduction="sum").backward()
        if factor == 1:
            first = [t.grad.clone() for t in leaves]
    for t, grad in zip(leaves, first, strict=True):
        assert torch.equal(t.grad, 2 * grad)


@by_call
def test_batched_gradients(call, device):
    leaves, rest = call.operands(device)
    loss = call(*leaves, *rest, reduction="sum")
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    got = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True)
    _, *want = exactly(call, leaves, rest, "sum")
    for batch, grad in zip(got, want, strict=True):
        assert_all_close(batch, [factor * grad for factor in factors.tolist()])


DERIVED = [call for call in CALLS if not call.detaches]


@pytest.mark.parametrize("call", DERIVED, ids=lambda call: call.name)
def test_gradcheck(call, device):
    for reduction in call.reductions:
        operands = call.operands(device, target_grad=call.target_has_gradient)
        leaves, rest = operands
        if call.target_has_gradient:  # numerical differences leave [0, 1] else
            leaves[-1] = leaves[-1].detach().clamp(0.1, 0.9).requires_grad_()

        def loss(*leaves, rest=rest, reduction=reduction):
            return call(*leaves, *rest, reduction=reduction)

        check = {"nondet_tol": 0, "fast_mode": True}  # of a product with one vector
        torch.autograd.gradcheck(loss, leaves, check_forward_ad=True, **check)
        torch.autograd.gradgradcheck(
            loss, leaves, gen_non_contig_grad_outputs=True, check_fwd_over_rev=True, **check
        )
        if reduction == "sum" and call not in MIXED:  # and of each element
            torch.autograd.gradcheck(loss, leaves, check_batched_grad=True, nondet_tol=0)
            torch.autograd.gradgradcheck(loss, leaves, nondet_tol=0)


@by_call
def test_second_derivatives(call, device):
    """Of what is detached and of hard targets, too."""
    for reduction in call.reductions:
        leaves, rest = call.operands(device, target_grad=call.target_has_gradient)
        wide = [widen(t).requires_grad_() for t in leaves]
        results = []
        for function, some, others in (
            (call, leaves, rest),
            (call.exact, wide, move(rest, "cpu")),
        ):
            loss = function(*some, *others, reduction=reduction)
            steps = torch.linspace(1, 2, loss.numel(), dtype=torch.float64, device=loss.device)
            grads = torch.autograd.grad(loss, some, steps.view_as(loss), create_graph=True)
            penalty = sum(g.square().sum() for g in grads)
            results.append((*grads, *torch.autograd.grad(penalty, some)))
        assert_all_close(*results)


def of_dual(function, leaves):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in leaves]
        return forward_ad.unpack_dual(function(*duals)).tangent


def summed(function):
    return lambda *leaves: function(*leaves).sum()


TRANSFORMS = {
    "grad": lambda f, leaves: torch.func.grad(summed(f), tuple(range(len(leaves))))(*leaves),
    "jacrev": lambda f, leaves: torch.func.jacrev(f)(*leaves),
    "vmap": lambda f, leaves: torch.vmap(f)(*(torch.stack([t, t / 2]) for t in leaves)),
    "jvp": lambda f, leaves: torch.func.jvp(f, (*leaves,), tuple(map(torch.ones_like, leaves)))[1],
    "hessian": lambda f, leaves: torch.func.hessian(summed(f))(*leaves),
    "forward mode": of_dual,
}


@by_call
def test_transforms(call, device):
    """As ATen operations."""
    for transform, reduction in itertools.product(TRANSFORMS.values(), call.reductions):
        leaves, rest = call.operands(device, target_grad=call.target_has_gradient)
        results = []
        for function, some in (
            (call, (leaves, rest)),
            (call.exact, ([widen(t) for t in leaves], move(rest, "cpu"))),
        ):

            def loss(*leaves, function=function, rest=some[1], reduction=reduction):
                return function(*leaves, *rest, reduction=reduction)

            result = transform(loss, [t.detach() for t in some[0]])
            results.append(result if isinstance(result, tuple) else (result,))
        assert_all_close(*results)


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: call.name)
def test_trace(call, device):
    leaves, rest = call.operands(device)
    operands = [t.detach() for t in leaves]

    def loss(*leaves):
        return call(*leaves, *rest, reduction="sum")

    assert_double_close(torch.jit.trace(loss, (*operands,))(*operands), loss(*operands))
