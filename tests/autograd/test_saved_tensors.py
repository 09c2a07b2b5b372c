"""What backward needs: edits in place, hooks, checkpoints, and when it is released."""

import gc
import re
import weakref

import pytest
import torch
from autograd_cases import DOUBLE, problem, same_for_both
from helpers import (
    assert_double_close,
    by_reduction,
    dtype_name,
    evaluate,
    fused,
    make_weights,
    torch_bce,
)
from torch.utils.checkpoint import checkpoint


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


def test_a_view_of_the_losses_may_be_edited(device):
    logits, target = problem(device)

    def compute(function):
        losses = function(logits, target, reduction="none")
        losses[0].mul_(2)
        losses[1:, 0] = 0
        return losses.detach(), *torch.autograd.grad(losses.sum(), logits)

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
