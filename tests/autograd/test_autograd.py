"""Gradients of the first and second order, the life of the saved tensors, torch.func."""

import gc
import itertools
import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    REDUCTIONS,
    assert_double_close,
    assert_no_worse,
    by_dtype,
    by_reduction,
    by_weights,
    dtype_name,
    evaluate,
    fused,
    is_fused,
    make_weights,
    reference,
    torch_bce,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fused_bce import BCEWithLogitsFunction, BCEWithLogitsLoss

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")

DOUBLE = torch.float64
REDUCTION_ENUM = {"none": 0, "mean": 1, "sum": 2}

by_target_grad = pytest.mark.parametrize(
    "target_grad", [False, True], ids=["constant_target", "target_grad"]
)


def problem(device, dtype=DOUBLE, target_grad=False, shape=(3, 4)):
    """Leaves: logits that require a gradient, and targets."""
    logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
    target = torch.rand(shape, device=device).to(dtype).requires_grad_(target_grad)
    return logits, target


def same_for_both(compute):
    """Checks that compute(ours) equals compute(torch's), in float64; returns ours."""
    ours = compute(fused)
    assert_double_close(ours, compute(torch_bce))
    return ours


@by_reduction
@by_weights
@by_target_grad
def test_gradcheck(target_grad, weights, reduction, device):
    logits, target = problem(device, target_grad=target_grad, shape=(2, 3))
    weights = make_weights(weights, 3, device, DOUBLE)

    def loss(logits, target):
        return fused(logits, target, reduction=reduction, **weights)

    assert is_fused(loss(logits, target))
    torch.autograd.gradcheck(loss, (logits, target), check_forward_ad=True, check_batched_grad=True)


@by_reduction
@by_weights
@by_target_grad
def test_gradgradcheck(target_grad, weights, reduction, device):
    logits, target = problem(device, target_grad=target_grad, shape=(2, 3))
    weights = make_weights(weights, 3, device, DOUBLE)
    torch.autograd.gradgradcheck(
        lambda logits, target: fused(logits, target, reduction=reduction, **weights),
        (logits, target),
        gen_non_contig_grad_outputs=True,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recompute"])
@pytest.mark.parametrize("weights", [(), ("weight", "pos_weight")], ids=["unweighted", "both"])
@by_reduction
def test_gradcheck_in_fast_mode(reduction, weights, recompute, device):
    # It calls backward twice with a random grad_loss, and wants the same bits.
    logits, target = problem(device)
    weights = make_weights(weights, 4, device, DOUBLE)

    def loss(logits):
        return fused(logits, target, reduction=reduction, recompute=recompute, **weights)

    for fast_mode in (False, True):
        torch.autograd.gradcheck(loss, logits, fast_mode=fast_mode, nondet_tol=0)
        torch.autograd.gradgradcheck(loss, logits, fast_mode=fast_mode, nondet_tol=0)


@by_reduction
def test_gradcheck_of_large_logits(reduction, device):
    # On both branches of the formula, away from the kink of |x| at 0.
    logits = torch.tensor([-30.0, -5.0, -0.5, 0.5, 5.0, 30.0], dtype=DOUBLE, device=device)
    target = torch.tensor([0.0, 1.0, 0.3, 0.7, 0.0, 1.0], dtype=DOUBLE, device=device)
    inputs = (logits.requires_grad_(), target.requires_grad_())
    torch.autograd.gradcheck(lambda x, t: fused(x, t, reduction=reduction), inputs)
    torch.autograd.gradgradcheck(lambda x, t: fused(x, t, reduction=reduction), inputs)


@by_reduction
def test_gradient_at_zero_is_smooth(reduction, device):
    # |x| has a kink at 0; the loss has none.
    logits = torch.zeros(3, 4, dtype=DOUBLE, device=device, requires_grad=True)
    target = torch.rand(3, 4, dtype=DOUBLE, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x, t: fused(x, t, reduction=reduction), (logits, target))
    torch.autograd.gradgradcheck(lambda x, t: fused(x, t, reduction=reduction), (logits, target))


# What is stored and what is recomputed depends on the dtype (float16) and on the reduction (none).


@by_dtype
@by_reduction
@by_target_grad
def test_backward_again_and_again(target_grad, reduction, dtype, device):
    logits, target = problem(device, dtype, target_grad)
    leaves = (logits, target) if target_grad else (logits,)
    loss = fused(logits, target, reduction=reduction)
    grad_loss = torch.full_like(loss, 3.0)
    first, second, third = (
        torch.autograd.grad(loss, leaves, grad_loss, retain_graph=True) for _ in range(3)
    )
    assert_no_worse(
        first[0],
        evaluate(torch_bce, logits, target, grad_loss=grad_loss, reduction=reduction).grad_logits,
        reference(logits, target, grad_loss=grad_loss, reduction=reduction).grad_logits,
    )
    # Recomputed with another order of roundings: grad_loss meets 1/N before the gradient, not after
    torch.testing.assert_close(second, first)
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


@by_reduction
def test_second_backward_needs_retain_graph(reduction, device):
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


@by_reduction
def test_different_grad_loss_each_time(reduction, device):
    # A stored gradient that has been scaled once must not be scaled again.
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction)
    unit = evaluate(torch_bce, logits, target, reduction=reduction).grad_logits
    for scale in (2.0, 0.5, 1.0, -4.0):
        grad_loss = torch.full_like(loss, scale)
        (grad,) = torch.autograd.grad(loss, logits, grad_loss, retain_graph=True)
        assert_double_close(grad, scale * unit)


GRAD_LOSSES = {
    "random": lambda t: torch.rand_like(t),
    "expanded_number": lambda t: torch.tensor(2.0, dtype=t.dtype, device=t.device).expand(t.shape),
    "expanded_row": lambda t: torch.rand(4, dtype=t.dtype, device=t.device).expand(t.shape),
    "expanded_column": lambda t: torch.rand(3, 1, dtype=t.dtype, device=t.device).expand(t.shape),
    "transposed": lambda t: torch.rand(4, 3, dtype=t.dtype, device=t.device).t(),
    "sliced": lambda t: torch.rand(3, 8, dtype=t.dtype, device=t.device)[:, 1::2],
    "flipped_sign_view": lambda t: torch._neg_view(torch.rand_like(t)),
    "zeros_without_memory": lambda t: torch._efficientzerotensor(
        t.shape, dtype=t.dtype, device=t.device
    ),
    "nan": lambda t: torch.full_like(t, torch.nan),
}


@by_dtype
@pytest.mark.parametrize("make", GRAD_LOSSES.values(), ids=GRAD_LOSSES)
def test_grad_loss_of_any_layout(make, dtype, device):
    logits, target = problem(device, dtype, target_grad=True)
    with torch.no_grad():
        grad_loss = make(target)
    grads = [
        torch.autograd.grad(f(logits, target, reduction="none"), (logits, target), grad_loss)
        for f in (fused, torch_bce)
    ]
    exact = reference(logits, target, grad_loss=grad_loss, reduction="none")
    if grad_loss.isnan().any():
        assert all(g.isnan().all() for g in grads[0])
    else:
        assert_no_worse(grads[0][0], grads[1][0], exact.grad_logits)
        assert_no_worse(grads[0][1], grads[1][1], exact.grad_target)


@by_reduction
@pytest.mark.parametrize("make", [torch._neg_view, torch.zeros_like], ids=["neg_view", "zero"])
def test_unusual_numbers_as_grad_loss(make, reduction, device):
    logits, target = problem(device)

    def compute(function):
        loss = function(logits, target, reduction=reduction)
        return torch.autograd.grad(loss, logits, make(torch.ones_like(loss)))

    same_for_both(compute)


@by_reduction
@by_weights
def test_none_then_reduced_by_hand(weights, reduction, device):
    # The usual way to mask: the gradient of the sum is a number expanded to the whole shape.
    logits, target = problem(device)
    mask = torch.rand(3, 4, device=device) < 0.5
    weights = make_weights(weights, 4, device, DOUBLE)

    def compute(function):
        losses = function(logits, target, reduction="none", **weights)
        loss = {"none": losses * mask, "mean": losses.mean(), "sum": losses.sum()}[reduction]
        return torch.autograd.grad(loss.sum(), logits)

    same_for_both(compute)


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, DOUBLE], ids=dtype_name)
@pytest.mark.parametrize("edited", ["logits", "target", "weight", "pos_weight"])
def test_in_place_edit_before_backward(edited, dtype, reduction, device):
    leaf, target = problem(device, dtype)
    logits = leaf * 1
    weights = make_weights(("weight", "pos_weight"), 4, device, dtype)
    loss = fused(logits, target, reduction=reduction, **weights).sum()
    {"logits": logits, "target": target, **weights}[edited].mul_(2)
    message = "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


@by_reduction
def test_in_place_edit_between_two_backwards(reduction, device):
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    target.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_edit_is_worded_as_torch_does(device):
    logits, target = problem(device)
    messages = []
    for function in (fused, torch_bce):
        loss = function(logits, target)
        target.mul_(2)
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
        # The version numbers differ, for the target is edited twice.
        messages.append(re.sub(r"version \d+", "version N", str(caught.value)))
    assert messages[0] == messages[1]


@by_reduction
def test_loss_may_be_edited_in_place(reduction, device):
    # Nothing of the backward depends on the value of the loss.
    logits, target = problem(device)

    def compute(function):
        loss = function(logits, target, reduction=reduction)
        loss.mul_(3)
        loss += 1
        return torch.autograd.grad(loss.sum(), logits)

    same_for_both(compute)


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
def test_gradient_belongs_to_the_user(dtype, reduction, device):
    # The stored buffer becomes x.grad itself; editing it must not reach a later backward.
    logits, target = problem(device, dtype)
    loss = fused(logits, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    first = logits.grad
    expected = first.clone()
    first.fill_(1000.0)
    logits.grad = None
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, expected)
    logits.grad.mul_(2)
    loss.backward()
    torch.testing.assert_close(logits.grad, 3 * expected)
    assert (first == 1000).all()


@by_reduction
def test_two_losses_share_no_memory(reduction, device):
    logits, target = problem(device)
    pointers = set()
    grads = []
    for _ in range(3):
        loss = fused(logits, target, reduction=reduction)
        grads += torch.autograd.grad(loss.sum(), logits)
        pointers.add(grads[-1].data_ptr())
    assert len(pointers) == 3
    assert torch.equal(grads[0], grads[2])


@by_reduction
def test_hooks_see_the_saved_tensors(reduction, device):
    logits, target = problem(device)
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)
    packed, unpacked = [], []

    def pack(t):
        packed.append(t)
        return len(packed) - 1

    def unpack(index):
        unpacked.append(index)
        return packed[index]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = fused(logits, target, reduction=reduction, **weights)
    for operand in (logits, target, *weights.values()):
        assert any(p.data_ptr() == operand.data_ptr() for p in packed)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert sorted(unpacked) == list(range(len(packed)))
    expected = evaluate(torch_bce, logits, target, reduction=reduction, **weights)
    assert_double_close(grad, expected.grad_logits)


@by_reduction
def test_second_backward_uses_what_the_hooks_return(reduction, device):
    # The recomputation starts from the unpacked tensors, not from references kept elsewhere.
    logits, target = problem(device)
    swapped = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.detach() * 0.5)
    with swapped:
        loss = fused(logits, target, reduction=reduction).sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = evaluate(torch_bce, logits * 0.5, target * 0.5, reduction=reduction)
    assert_double_close(grad, expected.grad_logits)


@by_reduction
def test_save_on_cpu(reduction, device):
    logits, target = problem(device, target_grad=True)
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)

    def compute(function):
        with torch.autograd.graph.save_on_cpu():
            loss = function(logits, target, reduction=reduction, **weights).sum()
        first = torch.autograd.grad(loss, (logits, target), retain_graph=True)
        return first + torch.autograd.grad(loss, (logits, target))

    same_for_both(compute)


@by_reduction
@by_weights
@by_target_grad
def test_gradient_penalty(target_grad, weights, reduction, device):
    # WGAN-GP and its kin: a gradient stored as a constant would give second derivatives of 0.
    logits, target = problem(device, target_grad=target_grad)
    weights = make_weights(weights, 4, device, DOUBLE)
    leaves = (logits, target) if target_grad else (logits,)

    def compute(function):
        loss = function(logits, target, reduction=reduction, **weights)
        first = torch.autograd.grad((loss**2).sum(), leaves, create_graph=True)
        penalty = sum((g**2).sum() for g in first)
        return (*first, *torch.autograd.grad(penalty, leaves))

    second = same_for_both(compute)[len(leaves)]
    assert second.abs().max() > 0


@by_reduction
def test_create_graph_then_a_plain_backward(reduction, device):
    logits, target = problem(device, target_grad=True)

    def compute(function):
        loss = function(logits, target, reduction=reduction).sum()
        (penalty,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(loss + penalty.pow(2).sum(), (logits, target))

    same_for_both(compute)


def test_third_derivative(device):
    logits, target = problem(device)

    def compute(function):
        value = function(logits, target, reduction="sum")
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, logits, create_graph=True)
            value = grad.sum()
        return grad.detach()

    same_for_both(compute)


def test_grad_loss_that_requires_grad(device):
    # The gradient is linear in grad_loss, which may be a variable of its own.
    logits, target = problem(device)
    vector = torch.rand(3, 4, dtype=DOUBLE, device=device, requires_grad=True)

    def compute(function):
        loss = function(logits, target, reduction="none")
        (grad,) = torch.autograd.grad(loss, logits, vector, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (vector, logits))

    same_for_both(compute)


@by_dtype
@by_reduction
@by_weights
def test_gradient_of_the_target_alone(weights, reduction, dtype, device):
    logits = torch.randn(3, 4, device=device).to(dtype)
    target = torch.rand(3, 4, device=device).to(dtype).requires_grad_()
    options = {"reduction": reduction, **make_weights(weights, 4, device, dtype)}
    losses = [f(logits, target, **options) for f in (fused, torch_bce)]
    assert is_fused(losses[0])
    ours, theirs = (torch.autograd.grad(loss.sum(), target)[0] for loss in losses)
    assert logits.grad is None
    assert_no_worse(ours, theirs, reference(logits, target, **options).grad_target)


@by_reduction
def test_one_gradient_at_a_time(reduction, device):
    # Asked for the target's gradient first, the node keeps or drops what it stored for the logits.
    logits, target = problem(device, target_grad=True)

    def compute(function):
        loss = function(logits, target, reduction=reduction).sum()
        order = (target, logits, target, logits)
        return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in order]

    same_for_both(compute)


@by_reduction
def test_accumulation(reduction, device):
    # Two losses of the same logits, on top of a gradient that is already there.
    logits, target = problem(device)
    other = torch.rand_like(target)

    def compute(function):
        logits.grad = torch.full_like(logits, 7.0)
        function(logits, target, reduction=reduction).sum().backward()
        first = logits.grad.clone()
        both = function(logits, target, reduction=reduction) * 2
        (both + function(logits, other, reduction=reduction)).sum().backward()
        return first, logits.grad

    same_for_both(compute)


def test_hooks_on_logits_may_replace_the_gradient(device):
    logits, target = problem(device)
    hidden = logits * 2

    def compute(function):
        handle = hidden.register_hook(lambda g: g.mul(10))
        loss = function(hidden, target)
        grads = torch.autograd.grad(loss, (logits, hidden), retain_graph=True)
        handle.remove()
        return grads

    same_for_both(compute)


@by_reduction
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint(use_reentrant, reduction, device):
    leaf, target = problem(device)
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)

    def compute(function):
        def block(x):
            return function(torch.tanh(x) * 3, target, reduction=reduction, **weights).sum()

        loss = checkpoint(block, leaf, use_reentrant=use_reentrant)
        # The reentrant kind knows .backward() only.
        leaf.grad = None
        loss.backward()
        return loss.detach(), leaf.grad

    same_for_both(compute)


@pytest.mark.parametrize("scale", [1.0, 256.0, 65536.0], ids=["no_scale", "256", "65536"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_half_precision_with_a_loss_scale(dtype, reduction, scale, device):
    # As GradScaler does: the mean of 2^20 float16 gradients underflows unless the scale is in time.
    numel = 2**20 if reduction == "mean" else 2**10
    scale = scale if reduction == "mean" else min(scale, 256.0)
    logits = torch.randn(numel, device=device).to(dtype).requires_grad_()
    target = torch.randint(2, (numel,), device=device).float()
    loss = fused(logits, target, reduction=reduction)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, scale))
    grad_loss = torch.full_like(loss, scale)
    exact = reference(logits, target, grad_loss=grad_loss, reduction=reduction).grad_logits
    rounding = torch.finfo(dtype).eps / 2
    # Stored rounded and then scaled, or the other way round: two roundings at most; below the
    # smallest normal float16 the spacing is fixed.
    spacing = 2.0**-24 if dtype is torch.float16 else 0.0
    assert ((grad.cpu().double() - exact).abs() <= 2 * rounding * exact.abs() + spacing).all()
    assert grad.dtype == dtype


def teacher_problem(device):
    """A task that a small network can learn."""
    samples = torch.randn(512, 20)
    target = (samples @ torch.randn(20, 10) > 0).float()
    return samples.to(device), target.to(device)


def train(function, half, device, steps=60):
    """Losses of a small network, under autocast and with a loss scale if ``half``."""
    torch.manual_seed(0)
    samples, target = teacher_problem(device)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=half)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16, enabled=half):
            logits = model(samples)
            loss = function(logits, target)
        assert logits.dtype == (torch.float16 if half else torch.float32)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def test_training_with_a_loss_scale(device):
    half, single, theirs = (
        train(function, half, device)
        for function, half in ((fused, True), (fused, False), (torch_bce, False))
    )
    assert single == pytest.approx(theirs, rel=1e-4)
    # Matrix products of float16 have 11 bits.
    assert half == pytest.approx(single, rel=1e-2)
    assert half[-1] < 0.5 * half[0]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@by_reduction
def test_no_gradient_wanted(context, reduction, device):
    logits, target = problem(device)
    # Allowed here, since nothing is differentiated.
    weight = torch.rand(4, dtype=DOUBLE, device=device, requires_grad=True)
    expected = fused(logits, target, weight.detach(), reduction=reduction).detach()
    with context():
        loss = fused(logits, target, weight, reduction=reduction)
        assert torch.equal(loss, expected)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert loss.is_inference() == (context is torch.inference_mode)


def test_inference_tensors(device):
    with torch.inference_mode():
        logits, target = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    torch.testing.assert_close(fused(logits, target), torch_bce(logits, target))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        fused(torch.zeros(3, 4, device=device, requires_grad=True), target)


def test_constant_logits_have_no_graph(device):
    loss = fused(torch.zeros(3, device=device), torch.ones(3, device=device))
    assert not loss.requires_grad
    assert loss.grad_fn is None


# BCEWithLogitsFunction.apply itself


@by_reduction
@by_weights
@pytest.mark.parametrize("loss_dtype", [None, torch.float32, DOUBLE], ids=str)
def test_apply(loss_dtype, weights, reduction, device):
    logits, target = problem(device, torch.bfloat16, target_grad=True)
    weights = make_weights(weights, 4, device)
    operands = (weights.get("weight"), weights.get("pos_weight"))
    loss = BCEWithLogitsFunction.apply(
        logits, target, *operands, REDUCTION_ENUM[reduction], loss_dtype
    )
    assert loss.dtype == (loss_dtype or torch.bfloat16)
    grads = torch.autograd.grad(loss.sum(), (logits, target))
    theirs = evaluate(torch_bce, logits, target, target_grad=True, reduction=reduction, **weights)
    exact = reference(logits, target, reduction=reduction, **weights)
    assert_no_worse(loss.to(torch.bfloat16), theirs.loss, exact.loss)
    assert_no_worse(grads[0], theirs.grad_logits, exact.grad_logits)
    assert_no_worse(grads[1], theirs.grad_target, exact.grad_target)


@by_weights
def test_apply_gradcheck(weights, device):
    logits, target = problem(device, target_grad=True, shape=(2, 3))
    weights = make_weights(weights, 3, device, DOUBLE)
    operands = (weights.get("weight"), weights.get("pos_weight"))
    for enum in REDUCTION_ENUM.values():

        def loss(logits, target, enum=enum):
            return BCEWithLogitsFunction.apply(logits, target, *operands, enum, None)

        torch.autograd.gradcheck(loss, (logits, target), check_batched_grad=True)
        torch.autograd.gradgradcheck(loss, (logits, target), check_batched_grad=True)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_apply_refuses_weights_that_require_grad(name, device):
    logits, target = problem(device)
    weights = dict.fromkeys(("weight", "pos_weight"))
    weights[name] = torch.ones(4, dtype=DOUBLE, device=device, requires_grad=True)
    message = (
        "The function 'binary_cross_entropy_with_logits' is not differentiable with respect to "
        f"argument '{name}'. This input cannot have requires_grad True."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        BCEWithLogitsFunction.apply(logits, target, *weights.values(), 1, None)
    with torch.no_grad():
        loss = BCEWithLogitsFunction.apply(logits, target, *weights.values(), 1, None)
    assert_double_close(loss, torch_bce(logits, target).detach())


def test_apply_checks_sizes(device):
    logits, target = problem(device)
    with pytest.raises(ValueError, match="must be the same as input size"):
        BCEWithLogitsFunction.apply(logits, target[0], None, None, 1, None)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "requires_grad"])
@pytest.mark.parametrize("role", ["logits", "target"])
def test_apply_never_loses_a_tangent(role, requires_grad, device):
    # It has no forward-mode derivative; an error, not a tangent of zero, must say so.
    logits, target = (t.detach().requires_grad_(requires_grad) for t in problem(device))
    with forward_ad.dual_level():
        operands = {"logits": logits, "target": target}
        tangent = torch.ones(3, 4, dtype=DOUBLE, device=device)
        operands[role] = forward_ad.make_dual(operands[role], tangent)
        with pytest.raises(RuntimeError):
            BCEWithLogitsFunction.apply(*operands.values(), None, None, 1, None)


# Forward mode


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


# torch.func. Its transforms run torch's own function; what matters is that they do.


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


@by_reduction
def test_concurrent_backwards(reduction, device):
    # Several threads ask one node for its gradient; one of them gets the stored one.
    logits, target = problem(device)
    loss = fused(logits, target, reduction=reduction).sum()
    unit = evaluate(torch_bce, logits, target, reduction=reduction).grad_logits

    def backward(scale):
        grad_loss = torch.full_like(loss, scale)
        return torch.autograd.grad(loss, logits, grad_loss, retain_graph=True)[0]

    with ThreadPoolExecutor(4) as pool:
        for scale, grad in enumerate(pool.map(backward, range(20))):
            assert_double_close(grad, scale * unit)


@by_reduction
@pytest.mark.parametrize("backward", [False, True], ids=["unused", "after_backward"])
def test_memory_is_released(backward, reduction, device):
    # Without waiting for the garbage collector; a loss that is kept for a log holds no logits.
    logits, target = problem(device)
    gc.disable()
    try:
        hidden = logits * 2
        released = weakref.ref(hidden)
        loss = fused(hidden, target, reduction=reduction).sum()
        del hidden
        assert released() is not None
        if backward:
            loss.backward()
        else:
            del loss
        assert released() is None
    finally:
        gc.enable()


def test_hooks_on_the_node(device):
    logits, target = problem(device)
    seen = []

    def compute(function):
        loss = function(logits, target)
        loss.grad_fn.register_prehook(lambda grad_loss: (grad_loss[0] * 5,))
        loss.grad_fn.register_hook(lambda grads, grad_losses: seen.append(grads[0].clone()))
        loss.register_hook(lambda grad_loss: grad_loss * 3)
        return torch.autograd.grad(loss, logits)

    (ours,) = same_for_both(compute)
    assert_double_close(seen[0], ours)
    assert_double_close(ours, 15 * evaluate(torch_bce, logits, target).grad_logits)


def test_a_view_of_the_losses_may_be_edited(device):
    logits, target = problem(device)

    def compute(function):
        losses = function(logits, target, reduction="none")
        losses[0].mul_(2)
        losses[1:, 0] = 0
        return losses.detach(), *torch.autograd.grad(losses.sum(), logits)

    same_for_both(compute)


def test_anomaly_mode(device):
    logits, target = problem(device)
    with torch.autograd.set_detect_anomaly(True):
        (grad,) = torch.autograd.grad(fused(logits, target), logits)
    assert_double_close(grad, evaluate(torch_bce, logits, target).grad_logits)


def test_backward_inside_and_outside_autocast(device):
    # Backward must not depend on the autocast state of the caller.
    logits, target = problem(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = torch.autograd.grad(fused(logits, target), logits)[0]
        loss = fused(logits, target, reduction="none")
    outside = torch.autograd.grad(loss.sum(), logits)[0]
    exact = reference(logits, target)
    sums = reference(logits, target, reduction="none")
    torch.testing.assert_close(inside.cpu().double(), exact.grad_logits, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(outside.cpu().double(), sums.grad_logits, rtol=1e-5, atol=1e-7)
