"""Every pointwise loss called as its users call it, against its definition in float64."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from helpers import (
    assert_double_close,
    by_dtype_pair,
    by_reduction,
    draw,
    dtype_name,
    evaluate,
    outcome,
)
from loss_calls import mixed_options
from loss_cases import BCE, FOCAL, LOSSES, QUALITY_FOCAL
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import fused_bce
from fused_bce import _C, SparseTarget

# torch scripts its forward-mode formulas itself when they are first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")

INTEGERS = (torch.bool, torch.uint8, torch.int64)


by_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
CALLS = [
    pytest.param(case, options, id=f"{case.name}-{name}")
    for case in (*LOSSES, BCE)
    for name, options in [*case.options.items(), *mixed_options(case)]
]
by_call_of_all = pytest.mark.parametrize(("case", "options"), CALLS)
by_call = pytest.mark.parametrize(("case", "options"), [p for p in CALLS if p.values[0] != BCE])
OWN = [
    pytest.param(case, options, id=f"{case.name}-{name}")
    for case in (*LOSSES, BCE)
    for name, options in case.options.items()
]
by_own_options = pytest.mark.parametrize(("case", "options"), OWN)


def batch(device, options, dtype=torch.float32, target_dtype=torch.float32):
    logits, target = draw((6, 5), device, dtype)
    if not target_dtype.is_floating_point:
        target = target.round()
    target = target.to(target_dtype)
    if options.get("ignore_index") is math.nan:
        target[0, :3] = math.nan
    return logits, target, moved(options, device)


def moved(options, *to):
    return {n: v.to(*to) if torch.is_tensor(v) else v for n, v in options.items()}


def exact(case, logits, target, options, reduction="none", target_grad=True):
    return evaluate(
        case.reference,
        logits.detach().cpu().double(),
        target.detach().cpu().double(),
        reduction=reduction,
        target_grad=target_grad,
        **moved(options, "cpu", torch.double),
    )


def assert_near(got, want):
    """Some units of the largest value: of each factor, of a soft target's complement, of a sum."""
    assert got.shape == want.shape
    slack = 16 * torch.finfo(got.dtype).eps * want.abs().max()
    assert (got.cpu().double() - want).abs().max() <= slack


@by_call
@by_reduction
def test_any_call(reduction, case, options, device):
    check_call(case, reduction, torch.float32, torch.float32, options, device)


@by_dtype_pair
@by_loss
def test_any_dtypes(case, logits_dtype, target_dtype, device):
    for reduction, options in zip(("none", "mean", "sum"), case.options.values(), strict=False):
        check_call(case, reduction, logits_dtype, target_dtype, options, device)


def check_call(case, reduction, logits_dtype, target_dtype, options, device):
    logits, target, options = batch(device, options, logits_dtype, target_dtype)
    got = evaluate(case.function, logits, target, reduction=reduction, target_grad=True, **options)
    want = exact(case, logits, target, options, reduction)
    assert got.loss.dtype is torch.promote_types(logits_dtype, target_dtype)
    assert got.grad_logits.dtype is logits_dtype
    assert got.grad_target.dtype is target_dtype
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs)


@by_loss
def test_ordinary_calls_are_fused(case, device):
    logits, target, _ = batch(device, {})
    for reduction in ("none", "mean", "sum", "batchmean"):
        for options in case.options.values():
            loss = case.function(
                logits.requires_grad_(), target, reduction=reduction, **moved(options, device)
            )
            assert case.is_fused(loss)


@pytest.mark.parametrize("target_dtype", INTEGERS, ids=dtype_name)
@by_loss
def test_integer_targets(case, target_dtype, device):
    logits, target, _ = batch(device, {}, torch.bfloat16, target_dtype)
    for reduction in ("none", "mean", "sum"):
        got = evaluate(case.function, logits, target, reduction=reduction)
        want = evaluate(case.function, logits, target.bfloat16(), reduction=reduction)
        assert got.loss.dtype is torch.bfloat16
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.grad_logits, want.grad_logits)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (17, 33), (1, 3, 4, 5)], ids=str)
@by_loss
def test_shapes(case, shape, device):
    logits, target = draw(shape, device, torch.float64, torch.float64)
    for reduction in ("none", "mean", "sum"):
        got = evaluate(case.function, logits, target, reduction=reduction)
        want = exact(case, logits, target, {}, reduction, target_grad=False)
        torch.testing.assert_close(got.loss.cpu(), want.loss, equal_nan=True)
        torch.testing.assert_close(got.grad_logits.cpu(), want.grad_logits)


@by_own_options
def test_batchmean(case, options, device):
    logits, target, options = batch(device, options)
    got = evaluate(case.function, logits, target, reduction="batchmean", **options)
    want = exact(case, logits, target, options, "batchmean", target_grad=False)
    assert_near(got.loss, want.loss)
    assert_near(got.grad_logits, want.grad_logits)
    module = case.module(reduction="batchmean", **options)
    assert torch.equal(module(logits, target), got.loss)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["rows", "csr", "coo"])
@by_loss
def test_sparse_targets(case, layout, device):
    logits, target, _ = batch(device, {}, target_dtype=torch.bool)
    rows, columns = target.nonzero(as_tuple=True)
    sparse = {
        "rows": lambda: SparseTarget.from_coo(rows, columns, target.shape),
        "csr": target.to_sparse_csr,
        "coo": target.to_sparse,
    }[layout]()
    got = evaluate(lambda x, _: case.function(x, sparse, reduction="sum"), logits, target)
    want = evaluate(case.function, logits, target, reduction="sum")
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_logits, want.grad_logits)
    assert fused_bce.why_not_fused(logits, sparse) is None
    with pytest.raises(ValueError, match="goes with dense targets"):
        case.function(logits, sparse, ignore_index=1)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
@by_loss
def test_layouts(case, layout, device):
    logits, target = draw((4, 6, 8, 10), device, torch.float64, torch.float64)
    arranged = {
        "transposed": lambda t: t.transpose(1, 3),
        "sliced": lambda t: t[:, ::2, 1:],
        "expanded": lambda t: t[:1].expand_as(t),
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    }[layout]
    logits, target = arranged(logits), arranged(target)
    got = evaluate(case.function, logits, target, reduction="none")
    want = exact(case, logits, target, {}, target_grad=False)
    assert_double_close(got.loss.cpu(), want.loss)
    assert_double_close(got.grad_logits.cpu(), want.grad_logits)
    assert got.grad_logits.stride() == torch.empty_like(logits).stride()


@by_loss
def test_any_number_of_threads(case):
    logits, target = draw((300_001,), "cpu")
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(evaluate(case.function, logits, target, reduction="mean"))
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert torch.equal(result.grad_logits, results[0].grad_logits)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@by_loss
def test_sums(case, instruction_set):
    """To the last digit, with a tail in each vector and chunk."""
    before = _C.current_instruction_set()
    _C.use_instruction_set(instruction_set)
    logits, target = draw((40_003,), "cpu")
    got = [case.function(logits, target, reduction=r).item() for r in ("sum", "mean")]
    _C.use_instruction_set(before)
    want = case.reference(logits.double(), target.double(), reduction="sum").item()
    assert abs(got[0] - want) <= 2.0**-22 * want
    assert abs(got[1] - want / len(logits)) <= 2.0**-22 * want / len(logits)


@by_call
def test_subclasses(case, options, device):
    """As ATen operations: the same loss and gradient."""
    logits, target, options = batch(device, options)

    class Tagged(torch.Tensor):
        pass

    for reduction in ("none", "mean", "sum"):
        tagged = logits.as_subclass(Tagged).requires_grad_()
        loss = case.function(tagged, target, reduction=reduction, **options)
        assert not case.is_fused(loss)
        (grad,) = torch.autograd.grad(loss.sum(), tagged)
        want = exact(case, logits, target, options, reduction)
        assert_near(loss.detach().as_subclass(torch.Tensor), want.loss)
        assert_near(grad.as_subclass(torch.Tensor), want.grad_logits)


@by_call_of_all
def test_jit(case, options, device):
    logits, target, options = batch(device, options)
    for reduction in ("none", "mean", "batchmean"):
        module = case.module(reduction=reduction, **options).to(device)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(module), file)
        file.seek(0)
        programs = [torch.jit.load(file)]
        # A trace would be of the values that are validated; that of BCE is in test_module.py.
        if case is not BCE and "validate_targets" not in options:
            programs.append(torch.jit.trace(module, (logits, target)))
        if reduction == "batchmean" and options.get("ignore_index") is not math.nan:
            target = target.round().long()
        want = evaluate(module, logits, target)
        for program in programs:
            got = evaluate(program, logits, target)
            torch.testing.assert_close(got[:2], want[:2])


@by_loss
def test_fx(case, device):
    name = next(iter(case.numbers))
    module = case.module(**{name: 0.5})
    traced = torch.fx.symbolic_trace(module)
    logits, target, _ = batch(device, {})
    assert torch.equal(traced(logits, target), module(logits, target))
    assert case.function in [node.target for node in traced.graph.nodes]


@by_loss
def test_two_tensors(case, device):
    logits, target, _ = batch(device, {})
    loss = case.function(TwoTensor(logits, 2 * logits), TwoTensor(target, target))
    torch.testing.assert_close(loss.a, case.function(logits, target))
    torch.testing.assert_close(loss.b, case.function(2 * logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=dtype_name)
@by_loss
def test_autocast(case, dtype, device):
    logits, target, _ = batch(device, {}, dtype, dtype)
    with torch.autocast(device, torch.bfloat16):
        got = evaluate(case.function, logits, target, reduction="none")
    assert got.loss.dtype is torch.promote_types(dtype, torch.float32)
    assert got.grad_logits.dtype is dtype
    want = exact(case, logits, target, {}, target_grad=False)
    assert_near(got.loss, want.loss)
    assert_near(got.grad_logits, want.grad_logits)


@by_reduction
@by_loss
def test_what_is_ignored_has_no_gradient(case, reduction, device):
    logits = torch.tensor([math.nan, math.inf, 1.0], device=device, requires_grad=True)
    target = torch.tensor([255.0, 255, 1], device=device)
    loss = case.function(logits, target, reduction=reduction, ignore_index=255)
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, math.inf))
    assert grad[:2].tolist() == [0, 0]
    alone = case.function(logits[2:], target[2:], reduction=reduction)
    assert torch.equal(loss if reduction != "none" else loss[2:], alone)


@pytest.mark.parametrize("case", [*LOSSES, BCE], ids=lambda case: case.name)
def test_what_is_ignored_has_no_derivatives(case, device):
    """Neither as ATen operations, where 0 times nan is nan."""
    logits = torch.tensor([math.nan, math.inf, 1.0], dtype=torch.float64, device=device)
    target = torch.tensor([255.0, 255, 1], dtype=torch.float64, device=device)

    def loss(x, t):
        return case.function(x, t, reduction="sum", ignore_index=255)

    for derivative in (torch.func.grad, torch.func.hessian):
        got, alone = derivative(loss)(logits, target), derivative(loss)(logits[2:], target[2:])
        assert_double_close(got.flatten()[-1:], alone.flatten())
        assert not got.flatten()[:-1].any()


ERRORS = {
    "reduction": (ValueError, {"reduction": "max"}),
    "size": (ValueError, {"target": torch.zeros(4)}),
    "weight": (RuntimeError, {"weight": torch.ones(2, 3)}),
    "integer logits": (NotImplementedError, {"input": torch.zeros(3, dtype=torch.int64)}),
    "complex target": (NotImplementedError, {"target": torch.zeros(3, dtype=torch.complex64)}),
    "complex weight": (RuntimeError, {"weight": torch.ones(3, dtype=torch.complex64)}),
    "no tensor": (TypeError, {"input": [0.0, 0.0, 0.0]}),
    "no weight": (TypeError, {"weight": 2.0}),
    "smoothing": (ValueError, {"label_smoothing": 1.0}),
    "ignore_index": (TypeError, {"ignore_index": "255"}),
    "a target": (ValueError, {"target": torch.tensor([0, 2.0, 1]), "validate_targets": True}),
}


@pytest.mark.parametrize(("error", "arguments"), ERRORS.values(), ids=ERRORS)
@by_loss
def test_errors(case, error, arguments):
    operands = {"input": torch.zeros(3), "target": torch.ones(3)} | arguments
    with pytest.raises(error) as caught:
        case.function(operands.pop("input"), operands.pop("target"), **operands)
    assert caught.type is error


@pytest.mark.parametrize(
    ("error", "number"),
    [(TypeError, "0.25"), (TypeError, []), (RuntimeError, torch.ones(2))],
    ids=["string", "list", "does not broadcast"],
)
@by_loss
def test_errors_of_numbers(case, error, number):
    for name in case.floats:
        with pytest.raises(error) as caught:
            case.function(torch.zeros(3), torch.ones(3), **{name: number})
        assert caught.type is error


def message(name, value):
    return rf"{name} must lie in \[0, 1(e6)?\]( or be -1)?, not (be )?{value}"


@by_loss
def test_numbers_out_of_range(case):
    logits = torch.zeros(3)
    operator = getattr(torch.ops.fused_bce, case.name)
    for numbers in case.out_of_range:
        ((name, value),) = numbers.items()
        with pytest.raises(ValueError, match=message(name, value)):
            case.module(**numbers)
        if numbers in case.errors:
            with pytest.raises(ValueError, match=message(name, value)):
                case.function(logits, logits, **numbers)
        with pytest.raises(ValueError, match=rf"{name} must lie in"):
            operator(logits, logits, None, *case.own_operands(numbers), 0)


@by_loss
def test_modules_take_no_tensors_for_numbers(case):
    """They would not be trained."""
    for name in case.floats:
        with pytest.raises(TypeError, match=f"{name} must be a number, not a tensor"):
            case.module(**{name: Parameter(torch.tensor(0.5))})


@pytest.mark.parametrize("shape", [(), (5,), (6, 5), (2, 1, 5)], ids=str)
@by_loss
def test_tensors_for_numbers(case, shape, device):
    """They broadcast, and get gradients."""
    logits, target, _ = batch(device, {}, torch.float64, torch.float64)
    logits.requires_grad_()
    for name in case.floats:
        if name == "alpha" and case is FOCAL and shape:
            continue  # torchvision does not take it: see test_focal_numbers.py
        number = Parameter((torch.rand(shape) / 2 + 0.1).to(device, torch.double))
        results = []
        for function in (case.function, case.reference):
            losses = function(logits, target, reduction="none", **{name: number})
            grad_losses = torch.linspace(0.5, 2, losses.numel(), device=device)
            total = (losses * grad_losses.reshape(losses.shape)).sum()
            results.append((losses, *torch.autograd.grad(total, (logits, number))))
        for got, want in zip(*results, strict=True):
            assert_double_close(got, want)


@pytest.mark.parametrize(
    "case", [c for c in LOSSES if "detach_weight" in c.numbers], ids=lambda case: case.name
)
def test_tensors_for_numbers_of_a_detached_weight(case, device):
    logits, target, _ = batch(device, {}, torch.float64, torch.float64)
    for name in case.floats:
        options = {name: torch.tensor(0.3, device=device), "detach_weight": True}
        got, want = (
            evaluate(f, logits, target, target_grad=True, reduction="none", **options)
            for f in (case.function, case.reference)
        )
        for ours, theirs in zip(got, want, strict=True):
            assert_double_close(ours, theirs)


@by_loss
def test_edit_between_forward_and_backward(case):
    logits, target = draw((4,), "cpu")
    loss = case.function(logits.requires_grad_(), target, reduction="sum")
    target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_loss
def test_a_weight_that_requires_a_gradient_gets_one(case, device):
    logits, target = draw((6,), device, torch.float64, torch.float64)
    names = ["weight", "pos_weight"] if case.takes_pos_weight else ["weight"]
    for name in names:
        results = []
        for function in (case.function, case.reference):
            weight = torch.ones(6, device=device, dtype=torch.float64, requires_grad=True)
            loss = function(logits, target, reduction="sum", **{name: weight})
            results.append(torch.autograd.grad(loss, weight)[0])
        assert_double_close(*results)


@by_own_options
def test_modules(case, options, device):
    options = options | {"weight": torch.full((5,), 2.0)}
    module = case.module(**options).to(device)
    logits, target, options = batch(device, options)
    expected = evaluate(case.function, logits, target, reduction="mean", **options)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got = evaluate(one, logits, target)
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad_logits, expected.grad_logits)
        assert repr(one) == repr(module)
    buffers = [name for name in ("weight", "pos_weight") if name in options]
    assert list(module.state_dict()) == buffers


@pytest.mark.parametrize("case", [*LOSSES, BCE], ids=lambda case: case.name)
def test_descriptions_of_modules(case):
    module = case.module()
    assert not module.state_dict()
    assert module.extra_repr() == case.described
    assert "label_smoothing=0.1" in repr(case.module(label_smoothing=0.1))


@by_loss
def test_more_arguments_are_keywords_only(case):
    in_order = [
        p.default
        for p in inspect.signature(case.function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    operands = torch.zeros(3), torch.ones(3), *in_order[2:]
    assert outcome(case.function, *operands).error is None
    assert outcome(case.function, *operands, None).error[0] is TypeError


@pytest.mark.parametrize(
    ("case", "numbers"),
    [(FOCAL, {"alpha": -1, "gamma": 0}), (QUALITY_FOCAL, {"beta": 0})],
    ids=["focal", "quality focal"],
)
def test_exponent_0_and_cross_entropy_share_their_bits(case, numbers, device):
    logits, target = draw((1000,), device)
    got = evaluate(case.function, logits, target, reduction="mean", **numbers)
    want = evaluate(BCE.function, logits, target)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_logits, want.grad_logits)
