"""The sigmoid loss of pairs against the formula of its authors, on whole logits in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import FLOATS, as_rows_with_nan_again, dtype_name, rounded
from torch.nn.functional import logsigmoid, normalize

from fused_bce import SigLipLoss, SparseTarget
from fused_bce.functional import pairwise_sigmoid_loss

by_shape = pytest.mark.parametrize("shape", [(12, 12), (12, 7), (7, 12), (1, 1)], ids=str)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
CHUNKS = {"tiniest": 1, "ragged": 4 * 12 * 5, "whole": None}
by_chunk = pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
FEATURES = 16


def of_authors(
    input1,
    input2,
    scale=1.0,
    bias=0.0,
    positives=None,
    reduction="batchmean",
    dtype=torch.float64,
):
    """Zhai et al., algorithm 1: labels of 1 and -1. Rounded to the dtype is what a layer rounds:
    its operands, the first one scaled, and the logits."""
    scaled, input2, bias = (
        rounded(torch.as_tensor(t), dtype) for t in (input1 * scale, input2, bias)
    )
    logits = rounded(scaled @ input2.t() + bias, dtype)
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


@by_chunk
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_pairs_left_out(reduction, chunk_bytes, device):
    """Whose value is nan: neither positive nor negative, as two captions of like images."""
    leaves = draw((12, 7), device)
    values = torch.eye(12, 7, dtype=torch.float64)
    values[torch.rand(12, 7) < 0.2] = math.nan
    rows = as_rows_with_nan_again(values).to(device)
    input1, input2, scale, bias = wide = [t.detach().cpu().requires_grad_() for t in leaves]
    logits = (input1 @ input2.t() * scale + bias)[~values.isnan()]
    signs = 2 * values[~values.isnan()] - 1
    want = -logsigmoid(signs * logits).sum()
    want = want / {"batchmean": 12, "mean": len(logits), "sum": 1}[reduction]
    want = want.detach(), torch.autograd.grad(want, wide)
    options = {"reduction": reduction, "chunk_bytes": chunk_bytes}
    got = evaluate(pairwise_sigmoid_loss, leaves, positives=rows, **options)
    assert max(errors(got, want)) <= 1e-13
    rows.values.requires_grad_()
    got = evaluate(pairwise_sigmoid_loss, leaves, positives=rows, **options)  # on whole logits
    assert max(errors(got, want)) <= 1e-13


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
    # The gradients are rounded once as they leave, and those of the logits before, where a block is
    # of a half type: by eps / 2 each. In float32 the reference's logits are rounded another way.
    slack = {torch.float64: 1e-13, torch.float32: 16 * torch.finfo(torch.float32).eps}
    most = slack.get(dtype, torch.finfo(dtype).eps)
    assert max(errors(got, exact(leaves, dtype=dtype))) <= most


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The sum over 2^18 pairs in float32; with gradients of logits in a half type, rounded by up to
    # 2^-9 of bfloat16 and 2^-12 of float16, of which 2^9 are independent in a sum
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float16, 1e-5)],
    ids=["float32", "bfloat16", "float16"],
)
def test_gradient_of_the_scale_keeps_its_digits(dtype, tolerance, device):
    """It is the sum of gradients times products, of either sign; what is left is a few per cent of
    its terms. In float32 for half types, too: a scaled input held in them would miss by some 1e-3
    in bfloat16, and 2e-4 in float16."""
    leaves = draw((512, 512), device, dtype)
    leaves[2] = leaves[2].detach().float().requires_grad_()
    (got,) = torch.autograd.grad(pairwise_sigmoid_loss(*leaves), leaves[2])
    want = exact(leaves, dtype=dtype)[1][2]
    assert got.item() == pytest.approx(want.item(), rel=tolerance)


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


def test_compiled_numbers(device):
    compiled = torch.compile(pairwise_sigmoid_loss, backend="aot_eager", fullgraph=True)
    features = [t.detach() for t in draw((12, 7), device)[:2]]
    for numbers in ((3.0, -2.0), (4.0, -3.0), (5, -4)):
        want = pairwise_sigmoid_loss(*features, *numbers).item()
        assert compiled(*features, *numbers).item() == pytest.approx(want, rel=1e-13)


def test_a_compiled_call_is_not_smoothed(device):
    """Not by a number that changes, either, as a default's is with dynamic=True."""
    calls = []

    def backend(module, _):
        calls.extend(n for n in module.graph.nodes if n.target is LOSS)
        return module

    compiled = torch.compile(pairwise_sigmoid_loss, backend=backend, dynamic=True, fullgraph=True)
    compiled(torch.ones(3, 4, device=device), torch.ones(5, 4, device=device), 2.0, -3.0)
    (call,) = calls
    operands = dict(zip((a.name for a in LOSS._schema.arguments), call.args, strict=False))
    assert operands["label_smoothing"] is None


LOSS = torch.ops.fused_bce.linear_binary_cross_entropy_with_logits.default


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(half, device):
    leaves = draw((12, 12), device, torch.float32)
    with torch.autocast(device, half):
        got = evaluate(pairwise_sigmoid_loss, leaves)
    assert got[0].dtype is torch.float32
    assert max(errors(got, exact(leaves, dtype=half))) <= torch.finfo(half).eps  # see test_dtypes


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast_of_two_dtypes(other, device):
    """As of a layer: a tower that ends in a normalisation, which autocast runs in float32, and one
    that ends in a layer."""
    half = torch.bfloat16
    for first in (0, 1):
        leaves = draw((12, 7), device, torch.float32)
        leaves[first] = leaves[first].detach().to(other).requires_grad_()
        with torch.autocast(device, half):
            got = evaluate(pairwise_sigmoid_loss, leaves)
            transformed = torch.func.vmap(
                lambda x, rest: pairwise_sigmoid_loss(x, *rest), (0, None)
            )
            whole = transformed(leaves[0].detach()[None], [t.detach() for t in leaves[1:]])
        assert [g.dtype for g in got[1]] == [t.dtype for t in leaves]
        want = exact(leaves, dtype=half)
        most = torch.finfo(half).eps  # see test_dtypes
        assert max(errors(got, want)) <= most
        assert whole.item() == pytest.approx(want[0].item(), rel=most)


@by_dtype
def test_scale_and_bias_of_any_dtype_and_shape(dtype, device):
    """They change neither the dtype nor, under autocast, what is rounded."""
    features = draw((12, 7), device, dtype)[:2]
    numbers = 10.0, -3.0
    want = evaluate(pairwise_sigmoid_loss, draw_numbers(features, numbers, dtype, ()))
    with torch.autocast(device, torch.bfloat16):
        autocast = pairwise_sigmoid_loss(*features, *numbers)
    for number_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        for shape in ((), (1,), (1, 1), (1, 1, 1)):
            leaves = draw_numbers(features, numbers, number_dtype, shape)
            loss = pairwise_sigmoid_loss(*leaves)
            assert torch.equal(loss, want[0])
            assert loss.dtype is want[0].dtype
            differentiable = [t for t in leaves if t.requires_grad]
            grads = torch.autograd.grad(loss, differentiable)
            assert [(g.dtype, g.shape) for g in grads] == [
                (t.dtype, t.shape) for t in differentiable
            ]
            assert all(map(torch.equal, grads[:2], want[1]))
            with torch.autocast(device, torch.bfloat16):
                assert torch.equal(pairwise_sigmoid_loss(*leaves), autocast)


def draw_numbers(features, numbers, dtype, shape):
    tensors = [torch.full(shape, n, dtype=dtype, device=features[0].device) for n in numbers]
    return [*features, *(t.requires_grad_(dtype.is_floating_point) for t in tensors)]


def test_other_numbers(device):
    """Python's and numpy's, in no dtype but the inputs'."""
    features = [t.detach() for t in draw((5, 5), device, torch.float32)[:2]]
    want = pairwise_sigmoid_loss(*features, 3.0, -2.0)
    for kind in (int, np.float32, np.float64, np.int64):
        assert torch.equal(pairwise_sigmoid_loss(*features, kind(3), kind(-2)), want)
    if device != "cpu":  # which go with any device
        on_cpu = torch.tensor(3.0), torch.tensor([-2.0])
        assert torch.equal(pairwise_sigmoid_loss(*features, *on_cpu), want)


def test_whole_logits_have_the_same_dtype(device):
    """Of the loss, which is that of ``values`` where they are wider."""
    positives = SparseTarget.from_lists([[0], [1], []], num_labels=3, device=device)
    for values in (torch.float16, torch.float64):
        target = positives._replace(values=torch.tensor([0.3, 0.7], device=device).to(values))
        input1, input2 = (t.detach() for t in draw((3, 3), device, torch.float16)[:2])

        def function(scale, input1=input1, input2=input2, target=target):
            return pairwise_sigmoid_loss(input1, input2, scale, positives=target)

        scale = torch.tensor(10.0, device=device)
        ours, whole = function(scale), torch.func.vmap(function)(scale[None])[0]
        assert ours.dtype is whole.dtype is torch.promote_types(values, torch.float32)
        # torch's product may round a logit to the other neighbour.
        assert ours.item() == pytest.approx(whole.item(), rel=torch.finfo(torch.float16).eps)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks of the sizes
def test_a_trace_takes_batches_of_another_size(device):
    def loss(*inputs):
        return pairwise_sigmoid_loss(*inputs, logit_scale=10.0, logit_bias=-3.0)

    traced = torch.jit.trace(loss, tuple(t.detach() for t in draw((12, 7), device)[:2]))
    inputs = [t.detach() for t in draw((9, 14), device)[:2]]
    torch.testing.assert_close(traced(*inputs), loss(*inputs))


def test_fx_traces_one_call(device):
    class Model(torch.nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.loss = loss

        def forward(self, image, text, scale):
            return self.loss(image * 2, text, scale)

    leaves = draw((6, 6), device)[:3]
    for loss in (pairwise_sigmoid_loss, SigLipLoss(), SigLipLoss(chunk_size=2)):
        traced = torch.fx.symbolic_trace(Model(loss))
        assert [n.op for n in traced.graph.nodes].count("call_function") == 2
        assert torch.equal(traced(*leaves), loss(leaves[0] * 2, *leaves[1:]))


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
    "no tensor": ((ONES, [[1.0]]), {}, TypeError, "input2 must be a tensor, not list"),
    "integers": (
        (ONES.long(), ONES.long()),
        {},
        NotImplementedError,
        "input1 must be .* not torch.int64",
    ),
    "dtypes": ((ONES, ONES.double()), {}, RuntimeError, "inputs have dtypes"),
    "devices": ((ONES, ONES.to("meta")), {}, RuntimeError, "inputs are on cpu and meta"),
    "complex": ((ONES, ONES, torch.tensor(1j)), {}, TypeError, "logit_scale must be real"),
    "complex number": ((ONES, ONES, 1j), {}, TypeError, "logit_scale must be a number or a tensor"),
    "array": ((ONES, ONES, 1.0, np.ones(3)), {}, TypeError, "logit_bias must be .* not ndarray"),
    "no scale": ((ONES, ONES, None), {}, TypeError, "logit_scale must be .* not NoneType"),
    "scale's device": (
        (ONES, ONES, torch.ones((), device="meta")),
        {},
        RuntimeError,
        "logit_scale is on meta, the inputs on cpu",
    ),
    "positives' type": (
        (ONES, ONES),
        {"positives": np.eye(3)},
        TypeError,
        "a SparseTarget or None, not ndarray$",
    ),
    "dense positives": (
        (ONES, ONES),
        {"positives": torch.eye(3)},
        TypeError,
        "a SparseTarget or None, not Tensor$",
    ),
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
    def test_blocks_have_no_more_logits_than_chunk_size_asks_for(self, dtype, device, monkeypatch):
        """In bytes of their dtype, which under autocast is not that of the features."""
        given = []

        def loss(*_, chunk_bytes):
            given.append(chunk_bytes)
            return torch.zeros(())

        monkeypatch.setattr("fused_bce.siglip.pairwise_sigmoid_loss", loss)
        features = [t.detach() for t in draw((12, 12), device, dtype)[:2]]
        SigLipLoss(chunk_size=5)(*features, 1.0)
        with torch.autocast(device, torch.bfloat16):
            SigLipLoss(chunk_size=5)(*features, 1.0)
        SigLipLoss()(*features, 1.0)
        assert given == [5 * 12 * dtype.itemsize, 5 * 12 * 2, None]

    def test_needs_a_group(self):
        with pytest.raises(RuntimeError, match="over 2 processes needs"):
            SigLipLoss(world_size=2)(ONES, ONES, 1.0)

    def test_constructor(self):
        """open_clip's, in its order."""
        module = SigLipLoss(True, 1, 4, "shift", 128)
        assert module.cache_labels
        assert repr(module) == (
            "SigLipLoss(rank=1, world_size=4, dist_impl='shift', chunk_size=128)"
        )
        assert not SigLipLoss().cache_labels
        assert SigLipLoss().dist_impl == "bidir"
        with pytest.raises(ValueError, match="dist_impl must be one of"):
            SigLipLoss(dist_impl="ring")
