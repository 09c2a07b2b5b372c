"""The sigmoid loss of pairs against the formula of its authors, on whole logits in float64."""

import math

import pytest
import torch
from helpers import FLOATS, dtype_name
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import logsigmoid, normalize

from fused_bce import SigLipLoss, SparseTarget
from fused_bce.functional import pairwise_sigmoid_loss

by_shape = pytest.mark.parametrize("shape", [(12, 12), (12, 7), (7, 12), (1, 1)], ids=str)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
CHUNKS = {"tiniest": 1, "ragged": 4 * 12 * 5, "whole": None}
by_chunk = pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
FEATURES = 16


def of_authors(input1, input2, scale=1.0, bias=None, positives=None, reduction="batchmean"):
    """Zhai et al., algorithm 1: labels of 1 and -1."""
    logits = input1 @ input2.t() * scale + (0 if bias is None else bias)
    if positives is None:
        positives = torch.eye(*logits.shape, dtype=torch.bool)
    total = -logsigmoid(torch.where(positives, logits, -logits)).sum()
    return total / {"batchmean": len(input1), "mean": logits.numel(), "sum": 1}[reduction]


def draw(shape, device, dtype=torch.float64):
    """Two towers' features, and SigLIP's scale and bias at some point of a training run."""
    inputs = [normalize(torch.randn(n, FEATURES)) for n in shape]
    numbers = [torch.tensor(10.0), torch.tensor(-3.0)]
    return [t.to(device, dtype).requires_grad_() for t in (*inputs, *numbers)]


def evaluate(function, leaves, **options):
    loss = function(*leaves, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def exact(leaves, **options):
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    return evaluate(of_authors, wide, **options)


def errors(got, want) -> list[float]:
    """Of the loss and the gradients, as parts of the largest value of each."""
    pairs = zip((got[0], *got[1]), (want[0], *want[1]), strict=True)
    return [((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@by_chunk
@by_shape
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_diagonal(reduction, shape, chunk_bytes, device):
    leaves = draw(shape, device)
    got = evaluate(pairwise_sigmoid_loss, leaves, reduction=reduction, chunk_bytes=chunk_bytes)
    # Sums of a few hundred terms in float64
    assert max(errors(got, exact(leaves, reduction=reduction))) <= 1e-13


@by_shape
def test_other_positives(shape, device):
    leaves = draw(shape, device)
    none = torch.zeros(shape, dtype=torch.bool)
    several = torch.rand(shape) < 0.3
    rows = SparseTarget.from_coo(*several.nonzero().t(), shape).to(device)
    for positives, matrix in ((None, none), (rows, several)):
        got = evaluate(pairwise_sigmoid_loss, leaves, positives=positives)
        assert max(errors(got, exact(leaves, positives=matrix))) <= 1e-13


def test_numbers_and_no_bias(device):
    input1, input2, *_ = draw((5, 5), device)
    got = pairwise_sigmoid_loss(input1, input2, 7.0, -2)
    torch.testing.assert_close(got.cpu(), of_authors(input1.cpu(), input2.cpu(), 7.0, -2))
    got = pairwise_sigmoid_loss(input1, input2)
    torch.testing.assert_close(got.cpu(), of_authors(input1.cpu(), input2.cpu()))


@by_dtype
def test_dtypes(dtype, device):
    leaves = draw((12, 7), device, dtype)
    got = evaluate(pairwise_sigmoid_loss, leaves)
    assert got[0].dtype is torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in got[1]] == [dtype] * 4
    theirs = evaluate(of_authors, [t.detach().cpu().requires_grad_() for t in leaves])
    want = exact(leaves)
    # Theirs may be exact by chance. A logit of 10 is rounded by up to half a unit, its gradient
    # with it.
    slack = 1e-13 if dtype is torch.float64 else 16 * torch.finfo(dtype).eps
    for ours, by_torch in zip(errors(got, want), errors(theirs, want), strict=True):
        assert ours <= by_torch + slack


def test_gradient_of_the_scale_keeps_its_digits(device):
    """It is the sum of gradients times products, of either sign; what is left is a few per cent of
    its terms. In float32 for half types, too."""
    for dtype in (torch.float32, torch.bfloat16):
        leaves = draw((512, 512), device, dtype)
        wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
        logits = wide[0] @ wide[1].t() * wide[2] + wide[3]
        # The logits are rounded to the dtype, as a layer's are.
        rounded = logits + (logits.to(dtype).double() - logits).detach()
        eye = torch.eye(512, dtype=torch.bool)
        loss = -logsigmoid(torch.where(eye, rounded, -rounded)).sum() / 512
        want = torch.autograd.grad(loss, wide[2])[0].item()
        scale = leaves[2].detach().float().requires_grad_()
        got = torch.autograd.grad(pairwise_sigmoid_loss(*leaves[:2], scale, leaves[3]), scale)[
            0
        ].item()
        # Products of bfloat16 are exact in float32; the scaled input is rounded to bfloat16.
        assert got == pytest.approx(want, rel=1e-5 if dtype is torch.float32 else 2e-2)


def test_a_trained_batch_keeps_its_digits(device):
    """log(1 + exp(-12)) has lost half of its digits, and 1 - sigmoid(12) as many."""
    logits = torch.full((64, 64), -15.0)
    logits.fill_diagonal_(12.0)
    input1 = logits.to(device).requires_grad_()
    input2 = torch.eye(64, device=device)
    loss = pairwise_sigmoid_loss(input1, input2)
    (grad,) = torch.autograd.grad(loss, input1)
    want = 64 * math.log1p(math.exp(-12)) + 64 * 63 * math.log1p(math.exp(-15))
    assert loss.item() == pytest.approx(want / 64, rel=1e-6)
    assert grad[0, 0].item() == pytest.approx(-1 / (1 + math.exp(12)) / 64, rel=1e-6)
    assert grad[0, 1].item() == pytest.approx(1 / (1 + math.exp(15)) / 64, rel=1e-6)


@pytest.mark.parametrize("fast_mode", [True, False], ids=["fast", "slow"])
def test_gradcheck(fast_mode, device):
    leaves = draw((4, 3), device)

    def function(*leaves):
        return pairwise_sigmoid_loss(*leaves, chunk_bytes=32)

    assert gradcheck(function, leaves, fast_mode=fast_mode)
    assert gradgradcheck(function, leaves, fast_mode=fast_mode)


def test_compiled(device):
    leaves = draw((12, 7), device)
    compiled = torch.compile(pairwise_sigmoid_loss, backend="aot_eager", fullgraph=True)
    assert max(errors(evaluate(compiled, leaves), exact(leaves))) <= 1e-13


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(half, device):
    leaves = draw((12, 12), device, torch.float32)
    with torch.autocast(device, half):
        got = evaluate(pairwise_sigmoid_loss, leaves)
    assert got[0].dtype is torch.float32
    assert max(errors(got, exact(leaves))) <= 16 * torch.finfo(half).eps  # see test_dtypes


def test_transforms_go_to_torch(device):
    leaves = draw((5, 5), device)
    want = exact(leaves)[1][1]
    input1, input2, scale, bias = (t.detach() for t in leaves)
    got = torch.func.grad(lambda x: pairwise_sigmoid_loss(input1, x, scale, bias))(input2)
    torch.testing.assert_close(got.cpu(), want)


ONES = torch.ones(3, 4)
REFUSED = {
    "none": ((ONES, ONES), {"reduction": "none"}, ValueError, "as large as the logits"),
    "positives": ((ONES, ONES), {"positives": "all"}, ValueError, "must be 'diagonal'"),
    "positives' shape": (
        (ONES, ONES),
        {"positives": SparseTarget.identity(4)},
        ValueError,
        "do not fit pairs of 3 and 3",
    ),
    "features": ((ONES, torch.ones(3, 5)), {}, RuntimeError, "must be of shapes"),
    "dimensions": ((ONES, torch.ones(4)), {}, RuntimeError, "must be of shapes"),
    "dtypes": ((ONES, ONES.double()), {}, RuntimeError, "inputs have dtypes"),
    "scale": ((ONES, ONES, torch.ones(3)), {}, RuntimeError, "logit_scale must be one number"),
    "bias": ((ONES, ONES, 1.0, torch.ones(3)), {}, RuntimeError, "logit_bias must be one"),
    "chunk": ((ONES, ONES), {"chunk_bytes": -1}, ValueError, "chunk_bytes must be positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    operands, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        pairwise_sigmoid_loss(*operands, **options)


class TestSigLipLoss:
    @pytest.mark.parametrize("chunk_size", [0, 1, 5, 100])
    def test_is_the_function(self, chunk_size, device):
        leaves = draw((12, 12), device)
        module = SigLipLoss(chunk_size=chunk_size)
        assert max(errors(evaluate(module, leaves), exact(leaves))) <= 1e-13
        output = module(*leaves, output_dict=True)
        assert list(output) == ["contrastive_loss"]
        assert torch.equal(output["contrastive_loss"], module(*leaves))

    def test_constructor(self):
        """open_clip's, in its order."""
        module = SigLipLoss(True, 1, 4, "shift", 128)
        assert repr(module) == "SigLipLoss(rank=1, world_size=4, dist_impl='shift')"
        assert SigLipLoss().dist_impl == "bidir"
        with pytest.raises(ValueError, match="dist_impl must be one of"):
            SigLipLoss(dist_impl="ring")
