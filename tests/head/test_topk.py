"""The largest logits and their labels against torch.topk on whole logits. Operands are small whole
numbers, of which every product and sum is exact: so values and labels are the same, and many values
tie."""

import math
import random
import re

import pytest
import torch
from head_cases import CHUNKS, FEATURES, LABELS, ROWS, by_chunk, by_head_dtype
from memory import bytes_of
from torch import nn

from fused_bce import LinearBCEWithLogitsLoss, decomposition_table

OP = torch.ops.fused_bce._linear_topk.default


def by_composite(*arguments):
    """What devices without a kernel run."""
    return OP._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


WAYS = {"kernel": OP, "composite": by_composite}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def draw_layer(device, dtype=torch.float32, rows=ROWS, labels=LABELS):
    """Input, weight and bias."""
    input = torch.randint(-2, 3, (rows, FEATURES))
    weight, bias = torch.randint(-2, 3, (labels, FEATURES)), torch.randint(-2, 3, (labels,))
    return [t.to(device, dtype) for t in (input, weight, bias)]


def make_head(weight, bias, **options):
    head = LinearBCEWithLogitsLoss.from_linear(nn.Linear(FEATURES, len(weight), device="meta"))
    head.linear.weight = nn.Parameter(weight)
    head.linear.bias = None if bias is None else nn.Parameter(bias)
    for name, value in options.items():
        setattr(head, name, value)
    return head


class Topk(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head.topk(x, 5)


def exact_topk(logits, k):
    """torch's values, and of equal ones the lower label first: torch names any of them."""
    values = logits.topk(k).values
    labels = logits.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return values, labels


def assert_same(got, logits, k):
    values, labels = exact_topk(logits, k)
    assert (got[0].dtype, got[1].dtype) == (logits.dtype, torch.int64)
    torch.testing.assert_close(got[0], values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], labels)


@by_way
@by_chunk
@by_head_dtype
def test_dtypes(dtype, chunk_bytes, way, device):
    input, weight, bias = draw_layer(device, dtype)
    logits = (input.double() @ weight.double().t() + bias).to(dtype)
    for k in (0, 1, 5, LABELS):
        assert_same(way(input, weight, bias, k, dtype, chunk_bytes or 0), logits, k)


@by_way
def test_random_calls(way, device):
    """Of every size, also where rows are more than labels and a block has fewer labels than k."""
    draw = random.Random(0)
    for _ in range(1000):
        rows, labels = draw.choice([(0, 3), (1, 1), (3, 40), (40, 3), (7, 7), (2, 300), (300, 2)])
        input, weight, bias = draw_layer(
            device, draw.choice([torch.float32, torch.float64]), rows, labels
        )
        bias = draw.choice([None, bias])
        logits = nn.functional.linear(input, weight, bias)
        k = draw.randint(0, labels)
        assert_same(way(input, weight, bias, k, None, draw.choice([0, 1, 100, 1000])), logits, k)


@by_way
@by_chunk
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity(dtype, chunk_bytes, way, device):
    """nan is the largest, as in torch.topk, whatever its sign; -0 is 0."""
    special = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0]
    bias = torch.tensor(random.Random(0).choices(special, k=LABELS), device=device, dtype=dtype)
    input = torch.zeros(ROWS, FEATURES, device=device, dtype=dtype)
    weight = torch.zeros(LABELS, FEATURES, device=device, dtype=dtype)
    logits = bias.expand(ROWS, LABELS)
    for k in (1, 40, LABELS):
        assert_same(way(input, weight, bias, k, None, chunk_bytes or 0), logits, k)


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
def test_head(shape, chunk_bytes, device):
    _, weight, bias = draw_layer(device)
    input = torch.randint(-2, 3, (*shape, FEATURES), device=device).float().requires_grad_()
    for given in (None, bias):
        head = make_head(weight, given, chunk_bytes=chunk_bytes)
        got = head.topk(input, 5)
        assert not got[0].requires_grad
        assert_same(got, head.linear(input).detach(), 5)


def test_values_that_are_not_whole(device):
    """The logits are rounded as in blocks: by one unit of the sum at most."""
    input, weight = torch.randn(ROWS, 64, device=device), torch.randn(5000, 64, device=device)
    values, labels = OP(input, weight, None, 7, None, 2**14)
    logits = input.double() @ weight.double().t()
    want = logits.topk(7)
    torch.testing.assert_close(values.double(), want.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.gather(1, labels), want.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(half, device):
    """In its dtype, as torch's layer; float64 stays."""
    for dtype in (torch.float32, torch.float64):
        input, weight, bias = draw_layer(device, dtype)
        with torch.autocast(device, half):
            got = make_head(weight, bias).topk(input, 5)
        assert_same(
            got,
            nn.functional.linear(input, weight, bias).to(half if dtype is torch.float32 else dtype),
            5,
        )


def test_a_layer_that_was_replaced(device):
    input, weight, bias = draw_layer(device)
    head = make_head(weight, bias)
    head.linear.register_forward_hook(lambda module, arguments, logits: 2 * logits)
    assert_same(head.topk(input, 5), 2 * nn.functional.linear(input, weight, bias), 5)


def test_transforms(device):
    """On whole logits."""
    input, weight, bias = draw_layer(device)
    head = make_head(weight, bias)
    got = torch.func.vmap(lambda x: head.topk(x, 5))(input)
    assert_same(got, nn.functional.linear(input, weight, bias), 5)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_compiled_and_traced(device):
    input, weight, bias = draw_layer(device)
    head = make_head(weight, bias).requires_grad_(False)

    logits = nn.functional.linear(input, weight, bias)
    torch.compiler.reset()
    compiled = torch.compile(Topk(head), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Topk(head), (input,)).module()
    traced = torch.fx.symbolic_trace(Topk(head))
    for predict in (compiled, exported, traced):
        assert_same(predict(input), logits, 5)
    assert_same(compiled(input[:7]), logits[:7], 5)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # torch's own
def test_lowered(device):
    """For exporters: torch.topk, which names any of equal logits."""
    input, weight, bias = draw_layer(device)
    head = make_head(weight, bias).requires_grad_(False)
    program = torch.export.export(Topk(head), (input,))
    lowered = program.run_decompositions(decomposition_table())
    assert not any("fused_bce" in str(node.target) for node in lowered.graph.nodes)
    logits = nn.functional.linear(input, weight, bias)
    values, labels = lowered.module()(input)
    assert torch.equal(values, logits.topk(5).values)
    assert torch.equal(logits.gather(1, labels), values)


def test_operator(device):
    input, weight, bias = draw_layer(device)
    torch.library.opcheck(OP, (input, weight, bias, 5, None, 1000))
    torch.library.opcheck(OP, (input, weight, None, 5, torch.bfloat16, 0))


REFUSED = {
    "k": (
        {"k": LABELS + 1},
        RuntimeError,
        f"k must lie between 0 and the number of labels, {LABELS}",
    ),
    "negative k": ({"k": -1}, RuntimeError, "k must lie between 0 and the number of labels"),
    "float k": ({"k": 2.0}, TypeError, "k must be an integer, not 2.0"),
    "features": ({"input": torch.zeros(2, 3)}, RuntimeError, "input must be of shape"),
    "dtype": (
        {"input": torch.zeros(2, FEATURES, dtype=torch.float64)},
        RuntimeError,
        "input has dtype torch.float64 but linear_weight torch.float32",
    ),
    "array": ({"input": [1.0]}, TypeError, "input must be a tensor, not list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, kind, message = REFUSED[case]
    _, weight, bias = draw_layer("cpu")
    arguments = {"input": torch.zeros(2, FEATURES), "k": 3} | options
    head = make_head(weight, bias)
    with pytest.raises(kind, match=re.escape(message)):
        head.topk(**arguments)


@by_way
def test_operator_refuses(way):
    input, weight, bias = draw_layer("cpu")
    with pytest.raises(RuntimeError, match=f"k must lie between 0 and {LABELS}"):
        way(input, weight, bias, LABELS + 1)
    with pytest.raises(RuntimeError, match="linear_weight does not fit"):
        way(input, weight[:, 1:], bias, 1)
    with pytest.raises(RuntimeError, match="linear_bias does not fit"):
        way(input, weight, bias[1:], 1)


@by_head_dtype
def test_memory(dtype, device):
    """One block of logits; on the CPU three for half types, which are widened and rounded."""
    rows, labels, chunk_bytes = 64, 100_000, 2**19
    input = torch.randn(rows, FEATURES, device=device, dtype=dtype)
    head = LinearBCEWithLogitsLoss(
        FEATURES, labels, device=device, dtype=dtype, chunk_bytes=chunk_bytes
    )
    blocks = 3 if dtype.itemsize == 2 else 1
    if device == "cuda":
        blocks = 20  # int64 keys, and what torch.topk takes
    results = (8 + 8 + 8) * 5 * rows
    features = 12 * input.numel() + 4096
    assert (
        bytes_of(lambda: head.topk(input, 5), device).peak
        <= blocks * chunk_bytes + results + features
    )
