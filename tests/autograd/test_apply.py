"""BCEWithLogitsFunction.apply itself."""

import re

import pytest
import torch
from autograd_cases import DOUBLE, problem
from helpers import (
    assert_double_close,
    assert_no_worse,
    by_reduction,
    by_weights,
    evaluate,
    make_weights,
    reference,
    torch_bce,
)
from torch.autograd import forward_ad

from fused_bce import BCEWithLogitsFunction

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")


REDUCTION_ENUM = {"none": 0, "mean": 1, "sum": 2}


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
