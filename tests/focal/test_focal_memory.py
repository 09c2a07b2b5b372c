"""What a step takes where ATen operations compute the focal loss."""

import pytest
import torch
from helpers import draw
from memory import bytes_of

from fused_bce.functional import sigmoid_focal_loss


def by_torchvision(inputs, targets, alpha, gamma):
    """As it is published, with no term kept longer than there"""
    p = torch.sigmoid(inputs)
    ce = torch.nn.functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * ((1 - p_t) ** gamma)
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("gamma", [2, 1.5])
def test_no_more_than_torchvision(gamma, device):
    logits, target = draw((2**18,), device)

    def step(loss, logits):
        leaf = logits.detach().requires_grad_()
        loss(leaf, target, 0.25, gamma).sum().backward()
        return leaf.grad

    ours, theirs = (
        bytes_of(lambda args=args: step(*args), device).peak
        for args in (
            (sigmoid_focal_loss, logits.as_subclass(Tagged)),
            (by_torchvision, logits),
        )
    )
    assert ours <= theirs + 2**12  # some numbers beside
