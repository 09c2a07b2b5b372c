"""What the focal loss has of its own as torchvision's; the rest is in tests/pointwise."""

import inspect

import pytest
import torch
from focal_reference import by_torchvision
from helpers import draw, outcome

import fused_bce
from fused_bce import SigmoidFocalLoss
from fused_bce.functional import sigmoid_focal_loss

# The compiler's own, on its way through torch
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")


def test_arguments_are_those_of_torchvision(device):
    logits, target = draw((6, 5), device, torch.float64, torch.float64)
    got = sigmoid_focal_loss(inputs=logits, targets=target)
    torch.testing.assert_close(got, by_torchvision(logits, target, 0.25, 2))
    got = sigmoid_focal_loss(logits, target, 0.4, 1.5, "mean")
    torch.testing.assert_close(got, by_torchvision(logits, target, 0.4, 1.5).mean())
    names = list(inspect.signature(sigmoid_focal_loss).parameters)
    assert names[:5] == ["inputs", "targets", "alpha", "gamma", "reduction"]


@pytest.mark.parametrize("numbers", [{"alpha": "0.25"}, {"gamma": None}])
def test_what_is_no_number(numbers):
    assert (
        outcome(sigmoid_focal_loss, torch.zeros(3), torch.ones(3), **numbers).error[0] is TypeError
    )


def test_the_exponent_of_negatives_is_shown():
    assert repr(SigmoidFocalLoss(gamma_neg=4)).endswith("reduction='mean', gamma_neg=4.0)")


def test_why_a_weight_that_requires_a_gradient_is_not_fused():
    logits, target = draw((6,), "cpu")
    weight = torch.ones(6, requires_grad=True)
    assert fused_bce.why_not_fused(logits, target, weight) == "weight requires a gradient"


def test_jit_of_integers_for_floats_and_bools(device):
    module = SigmoidFocalLoss(1, 2, label_smoothing=0, recompute=1)
    logits, target = draw((6, 5), device)
    torch.testing.assert_close(torch.jit.script(module)(logits, target), module(logits, target))

    def of_integers(x: torch.Tensor, t: torch.Tensor):
        return sigmoid_focal_loss(x, t, alpha=1, gamma=2, gamma_neg=3)

    scripted = torch.jit.script(of_integers)
    torch.testing.assert_close(scripted(logits, target), of_integers(logits, target))
