"""Small problems, and a comparison of both losses on them."""

import pytest
import torch
from helpers import assert_double_close, fused, torch_bce

DOUBLE = torch.float64

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
