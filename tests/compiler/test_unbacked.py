"""Numbers and sizes that the compiled graph itself computes, of which it can guard nothing."""

import pytest
import torch
from helpers import draw, fused

from fused_bce.functional import sigmoid_focal_loss

LOSSES = {"bce": fused, "focal": sigmoid_focal_loss}
by_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def _scalars_in_graphs():
    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("loss", "name", "values"),
    [
        (sigmoid_focal_loss, "gamma", (1.7, 0.5, 2.0)),
        (sigmoid_focal_loss, "gamma", (2, 3)),
        (sigmoid_focal_loss, "gamma_neg", (1.7, 2.0)),
        (sigmoid_focal_loss, "alpha", (0.3, 0.9, -1.0)),
        (sigmoid_focal_loss, "label_smoothing", (0.1, 0.3)),
        (fused, "label_smoothing", (0.1, 0.3)),
        (sigmoid_focal_loss, "ignore_index", (1, 0)),
        (fused, "ignore_index", (1, 0)),
    ],
)
def test_numbers(loss, name, values, device):
    logits, target = draw((6, 5), device)
    target = target.round()
    step = compiled(lambda x, t, value: loss(x, t, **{name: value.item()}))
    for value in values:
        got = step(logits, target, torch.tensor(value))
        # One side may be by the kernels, the other as ATen operations, of some twenty roundings.
        torch.testing.assert_close(got, loss(logits, target, **{name: value}), rtol=5e-6, atol=1e-7)


@by_loss
@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_bad_number(value, loss, device):
    logits, target = draw((6, 5), device)
    step = compiled(lambda x, t, value: loss(x, t, label_smoothing=value.item()))
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        step(logits, target, torch.tensor(value))


@by_loss
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_sizes(reduction, loss, device):
    logits, target = draw((6, 5), device)
    step = compiled(lambda x, t, kept: loss(x[kept], t[kept], reduction=reduction))
    for size in (4, 1, 0):
        kept = torch.arange(6, device=device) < size
        got = step(logits, target, kept)
        want = loss(logits[kept], target[kept], reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)
