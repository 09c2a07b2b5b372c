"""Loss and gradients against torch in float64: dtype x layout x reduction x weights x shape."""

import pytest
import torch
from helpers import (
    by_dtype,
    by_dtype_pair,
    by_reduction,
    by_weights,
    check,
    draw,
    draw_weights,
    evaluate,
    fused,
    is_fused,
    reference,
)

SHAPE = (4, 5, 3, 7)

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every_second_row": lambda t: t.repeat_interleave(2, 0)[::2],
    "offset_by_one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
}

# name: shape of a weight for logits (4, 5, 3, 7)
WEIGHT_SHAPES = {
    "scalar": (),
    "one": (1,),
    "columns": (7,),
    "channels": (5, 1, 1),
    "channels_of_a_batch": (1, 5, 1, 1),
    "rows": (4, 1, 1, 1),
    "image": (3, 7),
    "row_and_channel": (4, 5, 1, 1),
    "two_separate_dims": (4, 1, 3, 1),
    "full": SHAPE,
}

# name: (shape of logits, shape of the weights); what each is there for
LARGE = {
    "several_chunks": ((3, 20_001), (20_001,)),
    "short_period": ((5000, 10), (10,)),
    "period_that_does_not_divide_a_tile": ((61, 150), (150,)),
    "period_longer_than_a_tile": ((61, 700), (700,)),
    "weight_for_each_row": ((2500, 10), (2500, 1)),
    "long_run_of_one_channel": ((2, 3, 6000), (3, 1)),
    "full_weight": ((40_000,), (40_000,)),
    "one_weight": ((40_001,), ()),
}


@by_dtype_pair
@by_reduction
@by_weights
def test_dtypes(device, logits_dtype, target_dtype, reduction, weights):
    # Longer than a tile and no multiple of a vector
    logits, target = draw((23, 37), device, logits_dtype, target_dtype)
    options = draw_weights(weights, (37,), device)
    check(logits, target, reduction=reduction, **options)


@by_reduction
@by_weights
@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("logits_layout", LAYOUTS)
def test_layouts(device, logits_layout, target_layout, reduction, weights):
    logits, target = draw(SHAPE, device)
    logits, target = LAYOUTS[logits_layout](logits), LAYOUTS[target_layout](target)
    options = draw_weights(weights, (5, 1, 1), device)
    check(logits, target, reduction=reduction, **options)


@by_reduction
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second_row"])
@pytest.mark.parametrize("shape", WEIGHT_SHAPES.values(), ids=WEIGHT_SHAPES)
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weight_shapes(device, name, shape, layout, reduction):
    logits, target = draw(SHAPE, device)
    options = draw_weights([name], shape, device)
    check(LAYOUTS[layout](logits), LAYOUTS[layout](target), reduction=reduction, **options)


@by_reduction
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts(device, layout, reduction):
    """A full weight in another layout than the logits, strided and overlapping ones too."""
    logits, target = draw(SHAPE, device)
    weights = draw_weights(["weight", "pos_weight"], SHAPE, device)
    weights = {name: LAYOUTS[layout](weight) for name, weight in weights.items()}
    check(logits, target, reduction=reduction, **weights)


@by_dtype
@by_reduction
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weight_dtypes(device, dtype, weight_dtype, reduction):
    logits, target = draw((31, 700), device, dtype, dtype)
    options = draw_weights(["weight", "pos_weight"], (700,), device, weight_dtype)
    check(logits, target, reduction=reduction, **options)


@by_dtype
@by_reduction
@by_weights
@pytest.mark.parametrize(("shape", "weight_shape"), LARGE.values(), ids=LARGE)
def test_sizes_beyond_a_tile(device, dtype, shape, weight_shape, weights, reduction):
    logits, target = draw(shape, device, dtype, dtype)
    options = draw_weights(weights, weight_shape, device)
    check(logits, target, reduction=reduction, **options)


@by_reduction
@pytest.mark.parametrize(
    "numel", [*range(1, 70), 127, 128, 129, 511, 512, 513, 16383, 16384, 16385]
)
def test_every_tail(device, numel, reduction):
    """Around the widths of vectors, tiles and chunks."""
    check(*draw((numel,), device), reduction=reduction)


@pytest.mark.parametrize("grad_loss", ["each_its_own", "expanded", "transposed", "negative"])
@by_dtype
def test_grad_loss_of_none(device, dtype, grad_loss):
    logits, target = draw((40, 30), device, dtype, dtype)
    # Moved to the device first: a view that is moved arrives as an ordinary tensor.
    make = {
        "each_its_own": lambda t: t,
        "expanded": lambda t: t[0, 0].expand(40, 30),
        "transposed": lambda t: t.view(30, 40).t(),
        "negative": torch._neg_view,
    }
    numbers = torch.randn(40, 30).to(device, dtype)
    options = draw_weights(["weight", "pos_weight"], (30,), device)
    check(logits, target, make[grad_loss](numbers), reduction="none", **options)


@pytest.mark.parametrize("grad_loss", [1.0, 2.5, -1.0, 0.0, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_grad_loss_of_a_number(device, dtype, reduction, grad_loss):
    logits, target = draw((40, 30), device, dtype, dtype)
    check(logits, target, torch.tensor(grad_loss, device=device), reduction=reduction)


@pytest.mark.parametrize("numel", [2**20 + 1, 2**23 + 2**22 + 1])
def test_large_blocks_are_reused_clean(device, numel):
    """Large gradients live in memory that is used again: each must be fresh all the same."""
    kept = []
    for _ in range(3):
        logits, target = draw((numel,), device)
        result = evaluate(fused, logits, target)
        exact = reference(logits, target)
        torch.testing.assert_close(
            result.grad_logits.cpu().double(), exact.grad_logits, atol=1e-12, rtol=1e-5
        )
        kept.append((result.grad_logits, result.grad_logits.clone()))
        kept = kept[-2:]
    for gradient, copy in kept:
        assert torch.equal(gradient, copy)


def test_these_calls_are_fused(device):
    """What the other tests of this file check is the kernel, not torch's own function."""
    logits, target = draw(SHAPE, device)
    for layout in LAYOUTS.values():
        for shape in WEIGHT_SHAPES.values():
            options = draw_weights(["weight", "pos_weight"], shape, device)
            assert is_fused(fused(layout(logits).requires_grad_(), layout(target), **options))
