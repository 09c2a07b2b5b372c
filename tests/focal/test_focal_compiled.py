"""The focal loss in torch.compile with numbers that vary; the rest is in tests/pointwise."""

import torch
from focal_reference import by_torchvision
from helpers import IN_COMPILERS, evaluate
from torch._dynamo.utils import counters

from fused_bce.functional import sigmoid_focal_loss

pytestmark = IN_COMPILERS


def scheduled(logits, target, p):
    # The same number arrives as a factor, too: what makes the compiler mistake one for the other.
    numbers = numbers_at(p)
    return p * sigmoid_focal_loss(logits * 1.0, target, reduction="sum", **numbers)


def numbers_at(p):
    return {"alpha": p / 2, "gamma": 2 - p, "gamma_neg": 3 * p, "label_smoothing": p / 4}


def check_schedule(step, device, values):
    logits, target = torch.randn(6, 5, device=device) * 3, torch.rand(6, 5, device=device).round()
    for p in values:
        got = evaluate(lambda x, t, p=p: step(x, t, p), logits, target)
        options = {"reduction": "sum", "grad_loss": torch.tensor(p)} | numbers_at(p)
        want = evaluate(by_torchvision, logits.double(), target.double(), **options)
        # Float32, with the tolerance of a sum of thirty
        for ours, theirs in zip(got[:2], (p * want.loss, want.grad_logits), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    # The first number's, and one for all others
    assert counters["stats"]["unique_graphs"] <= 2


def test_schedule(device, monkeypatch):
    # With CI set the compiler refuses to keep what has a decomposition.
    monkeypatch.setenv("CI", "1")
    step = torch.compile(scheduled, fullgraph=True)
    check_schedule(step, device, [0.95, 0.9, 0.8, 0.7])
