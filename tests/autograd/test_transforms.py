"""Forward mode, torch.func, batches of gradients, compiled autograd.

The transforms of torch.func run torch's own function; what matters is that they do.
"""

import itertools

import pytest
import torch
from autograd_cases import DOUBLE, problem, same_for_both
from helpers import (
    REDUCTIONS,
    assert_double_close,
    assert_no_worse,
    by_reduction,
    by_weights,
    dtype_name,
    fused,
    make_weights,
    reference,
    torch_bce,
)
from torch.autograd import forward_ad

from fused_bce import BCEWithLogitsLoss

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")


@by_reduction
@by_weights
@pytest.mark.parametrize("dual", ["logits", "target", "both"])
def test_forward_mode(dual, weights, reduction, device):
    logits, target = (t.detach() for t in problem(device))
    weights = make_weights(weights, 4, device, DOUBLE)
    tangents = torch.randn(2, 3, 4, dtype=DOUBLE, device=device)

    def compute(function):
        with forward_ad.dual_level():
            x = logits if dual == "target" else forward_ad.make_dual(logits, tangents[0])
            t = target if dual == "logits" else forward_ad.make_dual(target, tangents[1])
            loss = function(x, t, reduction=reduction, **weights)
            return tuple(forward_ad.unpack_dual(loss))

    same_for_both(compute)


@by_reduction
def test_forward_over_reverse(reduction, device):
    logits, target = problem(device)
    tangent = torch.randn(3, 4, dtype=DOUBLE, device=device)

    def compute(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(logits, tangent)
            loss = function(dual, target, reduction=reduction).sum()
            (grad,) = torch.autograd.grad(loss, dual)
            return tuple(forward_ad.unpack_dual(grad))

    same_for_both(compute)


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, DOUBLE], ids=dtype_name)
def test_tangent_of_grad_loss(dtype, reduction, device):
    # The loss is computed before forward mode begins, so that it is fused; only grad_loss is dual.
    logits, target = problem(device, dtype, target_grad=True)

    def tangents(function):
        loss = function(logits, target, reduction=reduction)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
            grads = torch.autograd.grad(loss, (logits, target), dual)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    ours, theirs = tangents(fused), tangents(torch_bce)
    # The gradient is linear in grad_loss: its tangent is the gradient for that of grad_loss.
    twos = torch.full((3, 4) if reduction == "none" else (), 2.0)
    exact = reference(logits, target, grad_loss=twos, reduction=reduction)
    assert_no_worse(ours[0], theirs[0], exact.grad_logits)
    assert_no_worse(ours[1], theirs[1], exact.grad_target)


@by_reduction
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=["logits", "target", "both"])
def test_func_grad(argnums, reduction, device):
    logits, target = (t.detach() for t in problem(device))
    same_for_both(
        lambda f: torch.func.grad(
            lambda x, t: f(x, t, reduction=reduction).pow(2).sum(), argnums=argnums
        )(logits, target)
    )


BATCHED = [s for n in range(1, 5) for s in itertools.combinations(range(4), n)]


@pytest.mark.parametrize(
    "batched",
    BATCHED,
    ids=["+".join(("logits", "target", "weight", "pos_weight")[i] for i in s) for s in BATCHED],
)
@by_reduction
def test_func_vmap(batched, reduction, device):
    shapes = ((3, 4), (3, 4), (4,), (4,))
    operands = [
        torch.rand((5, *s) if i in batched else s, dtype=DOUBLE, device=device)
        for i, s in enumerate(shapes)
    ]
    in_dims = tuple(0 if i in batched else None for i in range(4))

    def compute(function):
        def loss(logits, target, weight, pos_weight):
            return function(logits, target, weight, pos_weight=pos_weight, reduction=reduction)

        return torch.func.vmap(loss, in_dims=in_dims)(*operands)

    same_for_both(compute)


def test_func_vmap_over_the_last_dimension(device):
    logits, target = (t.detach() for t in problem(device))
    batched = same_for_both(lambda f: torch.func.vmap(f, in_dims=1)(logits, target))
    assert_double_close(batched, torch_bce(logits, target, reduction="none").mean(0))


def test_per_sample_gradients(device):
    model = torch.nn.Linear(4, 2, dtype=DOUBLE, device=device)
    criterion = {fused: BCEWithLogitsLoss(), torch_bce: torch.nn.BCEWithLogitsLoss()}
    samples = torch.randn(5, 4, dtype=DOUBLE, device=device)
    target = torch.rand(5, 2, dtype=DOUBLE, device=device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def compute(function):
        def loss(parameters, sample, target):
            return criterion[function](
                torch.func.functional_call(model, parameters, (sample,)), target
            )

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, samples, target)

    same_for_both(compute)


FUNC_TRANSFORMS = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(f)(x),
    "linearize": lambda f, x, v: torch.func.linearize(f, x)[1](v),
    "vmap_of_grad": lambda f, x, v: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(
        torch.stack((x, v))
    ),
    "grad_of_grad": lambda f, x, v: torch.func.grad(
        lambda y: torch.func.grad(lambda z: f(z).sum())(y).pow(2).sum()
    )(x),
}


@by_reduction
@pytest.mark.parametrize("transform", FUNC_TRANSFORMS.values(), ids=FUNC_TRANSFORMS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # linearize
def test_func_transforms(transform, reduction, device):
    logits, target = (t.detach() for t in problem(device))
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)
    vector = torch.randn(3, 4, dtype=DOUBLE, device=device)
    same_for_both(
        lambda f: transform(lambda x: f(x, target, reduction=reduction, **weights), logits, vector)
    )


AUTOGRAD_FUNCTIONAL = {
    "jacobian": lambda f, x, v: torch.autograd.functional.jacobian(f, x),
    "vectorized_jacobian": lambda f, x, v: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward_mode_jacobian": lambda f, x, v: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda f, x, v: torch.autograd.functional.hessian(lambda y: f(y).sum(), x),
    "vectorized_hessian": lambda f, x, v: torch.autograd.functional.hessian(
        lambda y: f(y).sum(), x, vectorize=True
    ),
    "hvp": lambda f, x, v: torch.autograd.functional.hvp(lambda y: f(y).sum(), x, v),
    "jvp_by_double_backward": lambda f, x, v: torch.autograd.functional.jvp(f, x, v),
}


@by_reduction
@pytest.mark.parametrize("derivative", AUTOGRAD_FUNCTIONAL.values(), ids=AUTOGRAD_FUNCTIONAL)
def test_autograd_functional(derivative, reduction, device):
    # Unlike torch.func these differentiate the fused node itself, with batches of grad_loss.
    logits, target = (t.detach() for t in problem(device))
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)
    vector = torch.randn(3, 4, dtype=DOUBLE, device=device)
    same_for_both(
        lambda f: derivative(lambda x: f(x, target, reduction=reduction, **weights), logits, vector)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
def test_batched_gradients_in_low_precision(dtype, device):
    # A batch of grad_loss takes the formula in torch's operations, for any dtype.
    logits, target = problem(device, dtype)
    batch = torch.rand(6, 3, 4, device=device).to(dtype)
    for reduction in REDUCTIONS:
        grad_loss = batch if reduction == "none" else batch[:, 0, 0]
        grads = [
            torch.autograd.grad(
                f(logits, target, reduction=reduction), logits, grad_loss, is_grads_batched=True
            )[0]
            for f in (fused, torch_bce)
        ]
        exact = torch.stack(
            [reference(logits, target, grad_loss=g, reduction=reduction)[1] for g in grad_loss]
        )
        assert_no_worse(grads[0], grads[1], exact)


@by_reduction
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_autograd(reduction, device):
    # It runs the backward with a copy of the node's state, so that taking the stored gradient out
    # of the node there leaves it in the node itself.
    logits, target = problem(device)

    def compute(function):
        loss = 2 * function(logits, target, reduction=reduction).sum()
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled = torch.compile(
                lambda: loss.backward(retain_graph=True), backend="eager", dynamic=False
            )
            grads = []
            for backward in (compiled, compiled, loss.backward):
                logits.grad = None
                backward()
                grads.append(logits.grad)
        return [g.clone() for g in grads]

    same_for_both(compute)
