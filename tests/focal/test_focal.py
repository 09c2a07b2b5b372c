"""The focal loss called as its users call it, against torchvision's arithmetic in float64."""

import copy
import math
import pickle

import pytest
import torch
from focal_reference import by_torchvision
from helpers import (
    assert_double_close,
    by_dtype,
    by_dtype_pair,
    by_reduction,
    draw,
    dtype_name,
    evaluate,
    fused,
    outcome,
)
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import fused_bce
from fused_bce import _C, SigmoidFocalLoss, SparseTarget
from fused_bce.functional import sigmoid_focal_loss

# The compiler's own, on its way through torch
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")

INTEGERS = (torch.bool, torch.uint8, torch.int64)
OPTIONS = {
    "plain": {},
    "power": {"alpha": 0.5, "gamma": 1.7},
    "no alpha": {"alpha": -1, "gamma": 1},
    "gamma_neg": {"gamma": 0.5, "gamma_neg": 3},
    "weight": {"weight": torch.linspace(0.5, 2, 6)[:, None]},
    "smoothed": {"label_smoothing": 0.2, "gamma": 1.5},
    "ignored": {"ignore_index": 1},
    "ignored nan": {"ignore_index": math.nan, "gamma": 0},
    "recompute": {"recompute": True},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def is_fused(loss) -> bool:
    return "SigmoidFocalFunction" in loss.grad_fn.name()


def batch(device, options, dtype=torch.float32, target_dtype=torch.float32):
    logits, target = draw((6, 5), device, dtype)
    if not target_dtype.is_floating_point:
        target = target.round()
    target = target.to(target_dtype)
    if options.get("ignore_index") is math.nan:
        target[0, :3] = math.nan
    return logits, target, on(device, options)


def on(device, options):
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}


def exact(logits, target, options, reduction="none", target_grad=True, grad_loss=None):
    known = {n: v for n, v in on("cpu", options).items() if n != "recompute"}
    if "weight" in known:
        known["weight"] = known["weight"].double()
    return evaluate(
        by_torchvision,
        logits.detach().cpu().double(),
        target.detach().cpu().double(),
        reduction=reduction,
        target_grad=target_grad,
        grad_loss=grad_loss,
        **known,
    )


def assert_near(got, want, roundings=16):
    """Some units of the largest value: of each factor, of a soft target's complement, of a sum."""
    assert got.shape == want.shape
    slack = roundings * torch.finfo(got.dtype).eps * want.abs().max()
    assert (got.cpu().double() - want).abs().max() <= slack


@by_options
@by_reduction
def test_any_call(reduction, options, device):
    check_call(reduction, torch.float32, torch.float32, options, device)


@by_dtype_pair
@by_reduction
def test_any_dtypes(reduction, logits_dtype, target_dtype, device):
    check_call(reduction, logits_dtype, target_dtype, OPTIONS["power"], device)


def check_call(reduction, logits_dtype, target_dtype, options, device):
    logits, target, options = batch(device, options, logits_dtype, target_dtype)
    got = evaluate(
        sigmoid_focal_loss, logits, target, reduction=reduction, target_grad=True, **options
    )
    want = exact(logits, target, options, reduction)
    assert got.loss.dtype is torch.promote_types(logits_dtype, target_dtype)
    assert got.grad_logits.dtype is logits_dtype
    assert got.grad_target.dtype is target_dtype
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs)


@by_reduction
@pytest.mark.parametrize("target_dtype", INTEGERS, ids=dtype_name)
def test_integer_targets(target_dtype, reduction, device):
    logits, target, _ = batch(device, {}, torch.bfloat16, target_dtype)
    got = evaluate(sigmoid_focal_loss, logits, target, reduction=reduction)
    want = evaluate(sigmoid_focal_loss, logits, target.bfloat16(), reduction=reduction)
    assert got.loss.dtype is torch.bfloat16
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_logits, want.grad_logits)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (17, 33), (1, 3, 4, 5)], ids=str)
@by_reduction
def test_shapes(reduction, shape, device):
    logits, target = draw(shape, device, torch.float64, torch.float64)
    got = evaluate(sigmoid_focal_loss, logits, target, reduction=reduction)
    want = exact(logits, target, {}, reduction, target_grad=False)
    torch.testing.assert_close(got.loss.cpu(), want.loss, equal_nan=True)
    torch.testing.assert_close(got.grad_logits.cpu(), want.grad_logits)


def test_batchmean(device):
    logits, target, _ = batch(device, {})
    got = evaluate(sigmoid_focal_loss, logits, target, reduction="batchmean")
    want = exact(logits, target, {}, "sum", target_grad=False)
    assert_near(got.loss, want.loss / len(logits))
    assert_near(got.grad_logits, want.grad_logits / len(logits))
    assert torch.equal(SigmoidFocalLoss(reduction="batchmean")(logits, target), got.loss)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["rows", "csr", "coo"])
def test_sparse_targets(layout, device):
    logits, target, _ = batch(device, {}, target_dtype=torch.bool)
    rows, columns = target.nonzero(as_tuple=True)
    sparse = {
        "rows": lambda: SparseTarget.from_coo(rows, columns, target.shape),
        "csr": target.to_sparse_csr,
        "coo": target.to_sparse,
    }[layout]()
    got = evaluate(lambda x, _: sigmoid_focal_loss(x, sparse, reduction="sum"), logits, target)
    want = evaluate(sigmoid_focal_loss, logits, target, reduction="sum")
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_logits, want.grad_logits)
    assert fused_bce.why_not_fused(logits, sparse) is None
    with pytest.raises(ValueError, match="goes with dense targets"):
        sigmoid_focal_loss(logits, sparse, ignore_index=1)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
def test_layouts(layout, device):
    logits, target = draw((4, 6, 8, 10), device, torch.float64, torch.float64)
    arranged = {
        "transposed": lambda t: t.transpose(1, 3),
        "sliced": lambda t: t[:, ::2, 1:],
        "expanded": lambda t: t[:1].expand_as(t),
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    }[layout]
    logits, target = arranged(logits), arranged(target)
    got = evaluate(sigmoid_focal_loss, logits, target)
    want = exact(logits, target, {}, target_grad=False)
    assert_double_close(got.loss.cpu(), want.loss)
    assert_double_close(got.grad_logits.cpu(), want.grad_logits)
    assert got.grad_logits.stride() == torch.empty_like(logits).stride()


@by_options
@by_dtype
@by_reduction
def test_same_bits_by_every_road(reduction, dtype, options, device):
    """Stored in forward, once more, and computed in backward."""
    logits, target, options = batch(device, options, dtype)
    logits.requires_grad_()

    def grads(recompute, times=1):
        loss = sigmoid_focal_loss(
            logits, target, reduction=reduction, **options | {"recompute": recompute}
        )
        grad_loss = torch.full_like(loss, 0.7)
        for _ in range(times):
            (grad,) = torch.autograd.grad(loss, logits, grad_loss, retain_graph=True)
        return grad

    first = grads(recompute=False)
    assert torch.equal(first, grads(recompute=True))
    assert torch.equal(first, grads(recompute=False, times=2))


def test_any_number_of_threads():
    logits, target = draw((300_001,), "cpu")
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(evaluate(sigmoid_focal_loss, logits, target, reduction="mean"))
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert torch.equal(result.grad_logits, results[0].grad_logits)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums(reduction, instruction_set):
    """To the last digit, with a tail in each vector and chunk."""
    before = _C.current_instruction_set()
    _C.use_instruction_set(instruction_set)
    logits, target = draw((40_003,), "cpu")
    got = sigmoid_focal_loss(logits, target, reduction=reduction)
    _C.use_instruction_set(before)
    want = by_torchvision(logits.double(), target.double(), reduction=reduction)
    assert abs(got.item() - want.item()) <= 2.0**-22 * want.item()


@pytest.mark.parametrize("options", [{}, {"gamma": 1.5}, {"gamma": 0.5, "gamma_neg": 3}])
@by_reduction
def test_gradcheck(reduction, options, device):
    logits, target = draw((2, 2), device, torch.float64, torch.float64)
    target = target.clamp(0.1, 0.9)  # numerical differences leave [0, 1] else
    operands = logits.requires_grad_(), target.requires_grad_()

    def loss(x, t):
        return sigmoid_focal_loss(x, t, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, operands)
    assert torch.autograd.gradgradcheck(loss, operands)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x, t: f(x, t).sum()),
    "vmap": torch.vmap,
    "jacrev": torch.func.jacrev,
    "jvp": lambda f: lambda x, t: torch.func.jvp(f, (x, t), (torch.ones_like(x),) * 2)[1],
    "hessian": lambda f: torch.func.hessian(lambda x, t: f(x, t).sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["plain", "gamma_neg", "smoothed", "no alpha"])
def test_func_transforms(name, transform, device):
    logits, target, options = batch(device, OPTIONS[name])
    logits, target = logits.double(), target.double().clamp(0.01, 0.99)
    results = [
        transform(lambda x, t, f=f: f(x, t, **options))(logits, target)
        for f in (sigmoid_focal_loss, by_torchvision)
    ]
    assert_double_close(*results)


def test_forward_mode(device):
    logits, target = draw((6,), device, torch.float64, torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        tangents = [
            forward_ad.unpack_dual(f(dual, target)).tangent
            for f in (sigmoid_focal_loss, by_torchvision)
        ]
    assert_double_close(*tangents)


@by_options
@by_reduction
def test_left_to_torch(reduction, options, device):
    """In torch's operations, as under a subclass: the same loss and gradient."""
    logits, target, options = batch(device, options)

    class Tagged(torch.Tensor):
        pass

    tagged = logits.as_subclass(Tagged).requires_grad_()
    loss = sigmoid_focal_loss(tagged, target, reduction=reduction, **options)
    assert not is_fused(loss)
    (grad,) = torch.autograd.grad(loss.sum(), tagged)
    want = exact(logits, target, options, reduction)
    assert_near(loss.detach().as_subclass(torch.Tensor), want.loss)
    assert_near(grad.as_subclass(torch.Tensor), want.grad_logits)


@by_options
@by_reduction
def test_jit(reduction, options, device):
    logits, target, options = batch(device, options)
    module = SigmoidFocalLoss(reduction=reduction, **options).to(device)
    scripted = torch.jit.script(module)
    traced = torch.jit.trace(module, (logits, target))
    for program in (scripted, traced):
        torch.testing.assert_close(program(logits, target), module(logits, target))


def test_jit_of_integers_for_floats_and_bools(device):
    module = SigmoidFocalLoss(1, 2, label_smoothing=0, recompute=1)
    logits, target, _ = batch(device, {})
    torch.testing.assert_close(torch.jit.script(module)(logits, target), module(logits, target))

    def of_integers(x: torch.Tensor, t: torch.Tensor):
        return sigmoid_focal_loss(x, t, alpha=1, gamma=2, gamma_neg=3)

    scripted = torch.jit.script(of_integers)
    torch.testing.assert_close(scripted(logits, target), of_integers(logits, target))


def test_fx(device):
    module = SigmoidFocalLoss(gamma=1.5)
    traced = torch.fx.symbolic_trace(module)
    logits, target, _ = batch(device, {})
    assert torch.equal(traced(logits, target), module(logits, target))
    assert sigmoid_focal_loss in [node.target for node in traced.graph.nodes]


def test_two_tensors(device):
    logits, target, _ = batch(device, {})
    loss = sigmoid_focal_loss(TwoTensor(logits, 2 * logits), TwoTensor(target, target))
    torch.testing.assert_close(loss.a, sigmoid_focal_loss(logits, target))
    torch.testing.assert_close(loss.b, sigmoid_focal_loss(2 * logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=dtype_name)
def test_autocast(dtype, device):
    logits, target, _ = batch(device, {}, dtype, dtype)
    with torch.autocast(device, torch.bfloat16):
        got = evaluate(sigmoid_focal_loss, logits, target)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert got.loss.dtype is expected
    assert got.grad_logits.dtype is dtype
    want = exact(logits, target, {}, target_grad=False)
    assert_near(got.loss, want.loss)
    assert_near(got.grad_logits, want.grad_logits)


@by_reduction
def test_what_is_ignored_has_no_gradient(reduction, device):
    logits = torch.tensor([math.nan, math.inf, 1.0], device=device, requires_grad=True)
    target = torch.tensor([255.0, 255, 1], device=device)
    loss = sigmoid_focal_loss(logits, target, reduction=reduction, ignore_index=255)
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, math.inf))
    assert grad[:2].tolist() == [0, 0]
    alone = sigmoid_focal_loss(logits[2:], target[2:], reduction=reduction)
    assert torch.equal(loss if reduction != "none" else loss[2:], alone)


ERRORS = {
    "alpha a string": (TypeError, {"alpha": "0.25"}),
    "gamma missing": (TypeError, {"gamma": None}),
    "gamma that does not broadcast": (RuntimeError, {"gamma": torch.ones(2)}),
    "reduction": (ValueError, {"reduction": "max"}),
    "size": (ValueError, {"targets": torch.zeros(4)}),
    "weight": (RuntimeError, {"weight": torch.ones(2, 3)}),
    "integer logits": (NotImplementedError, {"inputs": torch.zeros(3, dtype=torch.int64)}),
    "complex targets": (NotImplementedError, {"targets": torch.zeros(3, dtype=torch.complex64)}),
    "complex weight": (RuntimeError, {"weight": torch.ones(3, dtype=torch.complex64)}),
    "no tensor": (TypeError, {"inputs": [0.0, 0.0, 0.0]}),
    "no weight": (TypeError, {"weight": 2.0}),
    "smoothing": (ValueError, {"label_smoothing": 1.0}),
    "ignore_index": (TypeError, {"ignore_index": "255"}),
    "a target": (ValueError, {"targets": torch.tensor([0, 2.0, 1]), "validate_targets": True}),
}


@pytest.mark.parametrize(("error", "arguments"), ERRORS.values(), ids=ERRORS)
def test_errors(error, arguments):
    operands = {"inputs": torch.zeros(3), "targets": torch.ones(3)}
    with pytest.raises(error) as caught:
        sigmoid_focal_loss(**operands | arguments)
    assert caught.type is error


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"alpha": 2}),
        (ValueError, {"gamma": -1}),
        # It would not be trained.
        (TypeError, {"gamma": torch.nn.Parameter(torch.tensor(2.0))}),
        (ValueError, {"label_smoothing": 1}),
    ],
)
def test_errors_of_the_module(error, arguments):
    with pytest.raises(error, match=next(iter(arguments))):
        SigmoidFocalLoss(**arguments)


@pytest.mark.parametrize(
    "numbers", [(1.5, 2.0, 2.0), (0.25, -1.0, 2.0), (0.25, 2.0, math.nan), (0.25, math.inf, 2.0)]
)
def test_errors_of_the_operator(numbers):
    operands = torch.zeros(3), torch.ones(3), None
    with pytest.raises(ValueError, match="must lie in"):
        torch.ops.fused_bce.sigmoid_focal_loss(*operands, *numbers, 0)


def test_edit_between_forward_and_backward():
    logits, target = draw((4,), "cpu")
    loss = sigmoid_focal_loss(logits.requires_grad_(), target, reduction="sum")
    target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_requires_a_gradient_gets_one(device):
    logits, target = draw((6,), device, torch.float64, torch.float64)
    weight = torch.ones(6, device=device, dtype=torch.float64, requires_grad=True)
    loss = sigmoid_focal_loss(logits, target, weight=weight, reduction="sum")
    assert fused_bce.why_not_fused(logits, target, weight) == "weight requires a gradient"
    (grad,) = torch.autograd.grad(loss, weight)
    assert_double_close(grad, sigmoid_focal_loss(logits, target))


def test_module(device):
    module = SigmoidFocalLoss(0.4, 1.5, weight=torch.full((5,), 2.0)).to(device)
    logits, target, _ = batch(device, {})
    expected = 2 * sigmoid_focal_loss(logits, target, 0.4, 1.5, "mean")
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(one(logits, target), expected, rtol=1e-6, atol=0)
    assert list(module.state_dict()) == ["weight"]
    assert not SigmoidFocalLoss().state_dict()
    assert repr(module) == "SigmoidFocalLoss(alpha=0.4, gamma=1.5, reduction='mean')"
    assert repr(SigmoidFocalLoss(gamma_neg=4)).endswith("reduction='mean', gamma_neg=4.0)")


def test_more_arguments_are_keywords_only():
    tensor = torch.zeros(3)
    assert outcome(sigmoid_focal_loss, tensor, tensor, 0.25, 2, "none", 2).error[0] is TypeError


def test_gamma_0_and_cross_entropy_share_their_bits(device):
    logits, target = draw((1000,), device)
    got = evaluate(sigmoid_focal_loss, logits, target, alpha=-1, gamma=0, reduction="mean")
    want = evaluate(fused, logits, target)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_logits, want.grad_logits)
