"""The same answers as torch.nn's loss: errors, warnings, dtypes, layouts, unusual values."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers import (
    FLOATS,
    REDUCTIONS,
    assert_no_worse,
    assert_results_no_worse,
    by_dtype,
    by_dtype_pair,
    by_reduction,
    by_weights,
    dtype_name,
    evaluate,
    fused,
    is_fused,
    make_weights,
    outcome,
    reference,
    torch_bce,
)

import fused_bce
from fused_bce import BCEWithLogitsLoss

INF, NAN = math.inf, math.nan


def through(module_class):
    """The loss as a function of the same arguments, but through the module."""

    def call(
        input,
        target,
        weight=None,
        size_average=None,
        reduce=None,
        reduction="mean",
        pos_weight=None,
    ):
        return module_class(weight, size_average, reduce, reduction, pos_weight)(input, target)

    return call


by_face = pytest.mark.parametrize(
    ("ours", "theirs"),
    [(fused, torch_bce), (through(BCEWithLogitsLoss), through(torch.nn.BCEWithLogitsLoss))],
    ids=["function", "module"],
)


def matrices(device, dtype=torch.float32):
    """The logits and targets of a small multi-label problem."""
    return torch.randn(3, 4, device=device, dtype=dtype), torch.rand(3, 4, device=device).to(dtype)


def ones(*shape, dtype=torch.float32, **options):
    """A function of the device: the tensor has to be made where the test runs."""
    return lambda device: torch.ones(shape, device=device, **options).to(dtype)


BAD_WEIGHTS = {
    "enlarges_by_a_dimension_of_one": ones(1, 3, 4),
    "enlarges_by_a_dimension_of_two": ones(2, 3, 4),
    "enlarges_though_few_elements": ones(1, 1, 4),
    "too_long": ones(5),
    "as_long_as_the_batch": ones(3),
    "column_of_the_wrong_length": ones(4, 1),
    "half_a_batch": ones(2, 4),
    "empty": ones(0),
    "complex": ones(4, dtype=torch.complex64),
    "float8": ones(4, dtype=torch.float8_e4m3fn),
    "requires_grad": ones(4, requires_grad=True),
    "requires_grad_and_too_long": ones(5, requires_grad=True),
    "list": lambda _: [1.0, 1.0, 1.0, 1.0],
    "number": lambda _: 1.0,
}


@by_face
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("make", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weight(ours, theirs, make, name, requires_grad, device):
    logits, target = matrices(device)
    logits.requires_grad_(requires_grad)
    for reduction in REDUCTIONS:
        options = {name: make(device), "reduction": reduction}
        expected = outcome(theirs, logits, target, **options).error
        assert expected is not None
        assert outcome(ours, logits, target, **options).error == expected


@by_reduction
def test_bool_pos_weight(reduction, device):
    # A bool weight is a mask and allowed; a bool pos_weight is not, for 1 is subtracted from it.
    call = (*matrices(device), None, None, None, reduction, ones(4, dtype=torch.bool)(device))
    expected = outcome(torch_bce, *call).error
    assert issubclass(expected[0], RuntimeError)
    assert outcome(fused, *call).error == expected


@by_face
@pytest.mark.parametrize(
    ("weight", "pos_weight"),
    [((1, 3, 4), (5,)), ((5,), (1, 3, 4)), ((5,), (7,))],
    ids=["enlarging_and_too_long", "too_long_and_enlarging", "both_too_long"],
)
def test_both_weights_bad(ours, theirs, weight, pos_weight, device):
    # The error is that of pos_weight, which torch applies first.
    call = matrices(device)
    options = {"weight": ones(*weight)(device), "pos_weight": ones(*pos_weight)(device)}
    expected = outcome(theirs, *call, **options).error
    assert expected is not None
    assert outcome(ours, *call, **options).error == expected


@by_face
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_one_dimension_enlarges_a_number(ours, theirs, name, device):
    call = (torch.tensor(1.0, device=device), torch.tensor(1.0, device=device))
    expected = outcome(theirs, *call, **{name: ones(1)(device)}).error
    assert expected == (RuntimeError, "output with shape [] doesn't match the broadcast shape [1]")
    assert outcome(ours, *call, **{name: ones(1)(device)}).error == expected


@by_face
@by_reduction
@pytest.mark.parametrize(
    ("logits_shape", "target_shape"),
    [((3,), (4,)), ((3,), (3, 1)), ((3, 4), (4,)), ((), (1,)), ((3, 4), (4, 3)), ((0,), (1,))],
    ids=["lengths", "column_target", "row_target", "number", "transposed", "empty"],
)
def test_sizes_differ(ours, theirs, logits_shape, target_shape, reduction, device):
    call = (torch.zeros(logits_shape, device=device), torch.zeros(target_shape, device=device))
    expected = outcome(theirs, *call, reduction=reduction).error
    assert expected[0] is ValueError
    assert expected[1].startswith("Target size (torch.Size(")
    assert outcome(ours, *call, reduction=reduction).error == expected


@by_face
@pytest.mark.parametrize(
    "reduction",
    ["Mean", "", None, 1, ["mean"], "average"],
    ids=["capital", "empty", "None", "number", "unhashable", "average"],
)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
def test_unknown_reduction(ours, theirs, reduction, requires_grad, device):
    logits, target = matrices(device)
    logits.requires_grad_(requires_grad)
    expected = outcome(theirs, logits, target, reduction=reduction).error
    assert expected == (ValueError, f"{reduction} is not a valid value for reduction")
    assert outcome(ours, logits, target, reduction=reduction).error == expected


def test_constructor_takes_any_reduction(device):
    criterion = BCEWithLogitsLoss(reduction="Mean").to(device)
    with pytest.raises(ValueError, match=r"^Mean is not a valid value for reduction$"):
        criterion(*matrices(device))


UNSUPPORTED = {
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "complex": torch.complex64,
    "float8": torch.float8_e4m3fn,
}


@by_face
@pytest.mark.parametrize("dtype", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_logits(ours, theirs, dtype, device):
    logits, target = torch.ones(3, 4, device=device).to(dtype), torch.ones(3, 4, device=device)
    expected = outcome(theirs, logits, target).error
    assert expected[0] is NotImplementedError
    assert outcome(ours, logits, target).error == expected


@by_face
@pytest.mark.parametrize("argument", ["target", "weight", "pos_weight"])
def test_devices_differ(ours, theirs, argument, device):
    logits, target = matrices(device)
    arguments = {"target": target, argument: torch.ones(3, 4, device="meta")}
    expected = outcome(theirs, logits, **arguments).error
    got = outcome(ours, logits, **arguments).error
    assert got[0] is expected[0] is RuntimeError
    assert "meta" in got[1]
    assert device in got[1]


@by_face
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_number_on_the_cpu_weighs_logits_anywhere(ours, theirs, name, device):
    call = matrices(device)
    options = {name: torch.tensor(2.5)}
    torch.testing.assert_close(ours(*call, **options), theirs(*call, **options))


@by_face
def test_not_tensors(ours, theirs, device):
    logits, target = matrices(device)
    for call in ((None, target), (logits, None), ([0.0], target), (1.0, 1.0)):
        expected = outcome(theirs, *call).error
        assert expected is not None
        assert outcome(ours, *call).error == expected


def test_missing_arguments(device):
    logits = torch.zeros(3, device=device)
    assert outcome(fused, logits).error == outcome(torch_bce, logits).error
    assert outcome(BCEWithLogitsLoss(), logits).error[0] is TypeError


@by_face
def test_reduction_is_checked_before_size_and_size_before_the_rest(ours, theirs, device):
    logits, wrong_size = torch.zeros(3, device=device), torch.zeros(4, device=device)
    bad_weight = ones(5, requires_grad=True)(device)
    for reduction, message in (("Mean", "Mean is not a valid value"), ("mean", "Target size")):
        call = (logits.long(), wrong_size, bad_weight)
        expected = outcome(theirs, *call, reduction=reduction).error
        assert expected[1].startswith(message)
        assert outcome(ours, *call, reduction=reduction).error == expected


class Recording(torch.Tensor):
    """Notes each torch function that it is given to."""

    calls: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return "overridden"


@by_face
@pytest.mark.parametrize("role", ["input", "target", "weight", "pos_weight"])
def test_overrides_come_before_all_checks(ours, theirs, role, device):
    # A reduction that is unknown, sizes that differ: the subclass decides what they mean.
    arguments = {
        "input": torch.zeros(3, device=device),
        "target": torch.zeros(4, device=device),
        "weight": torch.ones(5, device=device),
        "pos_weight": torch.ones(6, device=device),
    }
    arguments[role] = arguments[role].as_subclass(Recording)
    for function in (theirs, ours):
        Recording.calls = []
        assert function(**arguments, reduction="Mean") == "overridden"
        assert Recording.calls == [torch_bce]


@by_face
@pytest.mark.parametrize(
    ("size_average", "reduce"),
    [pair for pair in itertools.product((None, True, False), repeat=2) if pair != (None, None)],
)
def test_size_average_and_reduce(ours, theirs, size_average, reduce, device):
    call = matrices(device)
    # They override the reduction, even one that is unknown.
    options = {"size_average": size_average, "reduce": reduce, "reduction": "Mean"}
    expected, got = outcome(theirs, *call, **options), outcome(ours, *call, **options)
    assert len(expected.warnings) == 1
    assert got.warnings == expected.warnings
    torch.testing.assert_close(got.value, expected.value)


def test_module_warns_in_its_constructor_only(device):
    with pytest.warns(UserWarning, match="please use reduction='sum' instead"):
        criterion = BCEWithLogitsLoss(size_average=False)
    call = matrices(device)
    got = outcome(criterion, *call)
    assert got.warnings == []
    torch.testing.assert_close(got.value, torch_bce(*call, reduction="sum"))


@by_face
def test_elementwise_mean(ours, theirs, device):
    call = matrices(device)
    expected = outcome(theirs, *call, reduction="elementwise_mean")
    got = outcome(ours, *call, reduction="elementwise_mean")
    assert len(expected.warnings) == 1
    assert got.warnings == expected.warnings
    torch.testing.assert_close(got.value, expected.value)


@by_dtype_pair
@by_reduction
def test_dtypes(logits_dtype, target_dtype, reduction, device):
    logits = (torch.randn(40, 25, device=device) * 3).to(logits_dtype)
    target = torch.rand(40, 25, device=device).to(target_dtype)
    theirs = evaluate(torch_bce, logits, target, reduction=reduction, target_grad=True)
    ours = evaluate(fused, logits, target, reduction=reduction, target_grad=True)
    assert ours.loss.dtype == target_dtype
    assert ours.grad_logits.dtype == logits_dtype
    assert ours.grad_target.dtype == target_dtype
    assert_results_no_worse(ours, theirs, reference(logits, target, reduction=reduction))
    # Without a gradient another kernel runs.
    assert torch.equal(fused(logits, target, reduction=reduction), ours.loss)


WEIGHT_DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


@by_dtype
@pytest.mark.parametrize(
    ("name", "weight_dtype"),
    # A bool pos_weight is an error, tested above.
    [("weight", d) for d in WEIGHT_DTYPES] + [("pos_weight", d) for d in WEIGHT_DTYPES[:-1]],
    ids=str,
)
def test_weight_dtypes(name, weight_dtype, dtype, device):
    logits, target = matrices(device, dtype)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction}
        options[name] = torch.tensor([0, 1, 2, 3], device=device).to(weight_dtype)
        theirs = evaluate(torch_bce, logits, target, **options)
        ours = evaluate(fused, logits, target, **options)
        assert ours.loss.dtype == dtype
        exact = reference(logits, target, **options)
        assert_results_no_worse(ours, theirs, exact._replace(grad_target=None))


@by_dtype_pair
@by_reduction
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(autocast_dtype, logits_dtype, target_dtype, reduction, device):
    logits = (torch.randn(40, 25, device=device) * 3).to(logits_dtype)
    target = torch.rand(40, 25, device=device).to(target_dtype)
    options = {"reduction": reduction, "target_grad": True}
    with torch.autocast(device, dtype=autocast_dtype):
        theirs = evaluate(torch_bce, logits, target, **options)
        ours = evaluate(fused, logits, target, **options)
        without_grad = fused(logits, target, reduction=reduction)
    wide = torch.float64 if target_dtype is torch.float64 else torch.float32
    assert ours.loss.dtype == wide
    assert ours.grad_logits.dtype == logits_dtype
    assert ours.grad_target.dtype == target_dtype
    assert_results_no_worse(ours, theirs, reference(logits, target, reduction=reduction))
    assert torch.equal(without_grad, ours.loss)


@by_reduction
@pytest.mark.parametrize("weight_dtype", [*FLOATS, torch.int64], ids=dtype_name)
def test_autocast_weights(weight_dtype, reduction, device):
    # Not even a float64 weight makes the loss float64.
    logits, target = matrices(device, torch.bfloat16)
    weights = make_weights(("weight", "pos_weight"), 4, device, weight_dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        theirs = evaluate(torch_bce, logits, target, reduction=reduction, **weights)
        ours = evaluate(fused, logits, target, reduction=reduction, **weights)
    exact = reference(logits, target, reduction=reduction, **weights)
    assert_results_no_worse(ours, theirs, exact._replace(grad_target=None))


@by_reduction
def test_autocast_training_step(reduction, device):
    # The linear layer gives bfloat16 logits; the backward runs outside the autocast block.
    layer = torch.nn.Linear(8, 4).to(device)
    samples, target = torch.randn(5, 8, device=device), torch.rand(5, 4, device=device)
    grads = []
    for function in (torch_bce, fused):
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = layer(samples)
            loss = function(logits, target, reduction=reduction)
        assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
        grads.append(torch.autograd.grad(loss.sum(), layer.weight)[0])
    # Both round the logits' gradient to bfloat16 before the matrix product.
    torch.testing.assert_close(grads[1], grads[0], rtol=2**-7, atol=1e-3)


@by_face
@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 4)], ids=str)
def test_empty(ours, theirs, shape, reduction, dtype, device):
    logits = torch.zeros(shape, device=device, dtype=dtype)
    target = torch.zeros(shape, device=device, dtype=dtype)
    expected = evaluate(theirs, logits, target, reduction=reduction, target_grad=True)
    got = evaluate(ours, logits, target, reduction=reduction, target_grad=True)
    assert got.loss.dtype == dtype
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=0, atol=0, equal_nan=True)
    number = {"mean": NAN, "sum": 0.0}
    if reduction in number:
        assert str(got.loss.item()) == str(number[reduction])
    assert torch.equal(fused(logits, target, reduction=reduction).isnan(), expected.loss.isnan())


@by_reduction
@by_weights
def test_empty_batch_with_weights(weights, reduction, device):
    logits, target = torch.zeros(0, 4, device=device), torch.zeros(0, 4, device=device)
    options = {"reduction": reduction, **make_weights(weights, 4, device)}
    expected = evaluate(torch_bce, logits, target, **options)
    got = evaluate(fused, logits, target, **options)
    torch.testing.assert_close(tuple(got)[:2], tuple(expected)[:2], equal_nan=True)


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    ("shape", "weight_shape"),
    [((0,), (0,)), ((0, 4), (0, 4)), ((0, 4), (0, 1)), ((4, 0), (4, 1)), ((4, 0), (4, 0))],
    ids=str,
)
def test_empty_weights(shape, weight_shape, dtype, reduction, device):
    # A weight without elements has a period of 0.
    logits, target = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    weights = {name: torch.ones(weight_shape, device=device) for name in ("weight", "pos_weight")}
    expected = evaluate(torch_bce, logits, target, reduction=reduction, **weights)
    got = evaluate(fused, logits, target, reduction=reduction, **weights)
    torch.testing.assert_close(tuple(got)[:2], tuple(expected)[:2], equal_nan=True)


@by_reduction
@by_weights
def test_single_number(weights, reduction, device):
    logits, target = torch.tensor(0.7, device=device), torch.tensor(0.3, device=device)
    options = {"reduction": reduction}
    options |= {name: torch.tensor(2.5, device=device) for name in weights}
    theirs = evaluate(torch_bce, logits, target, target_grad=True, **options)
    ours = evaluate(fused, logits, target, target_grad=True, **options)
    assert ours.loss.shape == ours.grad_logits.shape == ()
    assert_results_no_worse(ours, theirs, reference(logits, target, **options))


@by_reduction
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (5,), (1, 5), (4, 1), (4, 5), (3, 1, 1), (3, 4, 1), (2, 1, 1, 1), (2, 3, 4, 5)],
    ids=str,
)
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weight_shapes(name, shape, reduction, device):
    logits = torch.randn(2, 3, 4, 5, device=device)
    target = torch.rand(2, 3, 4, 5, device=device)
    options = {name: torch.rand(shape, device=device) + 0.5, "reduction": reduction}
    theirs = evaluate(torch_bce, logits, target, **options)
    ours = evaluate(fused, logits, target, **options)
    exact = reference(logits, target, **options)
    assert_results_no_worse(ours, theirs, exact._replace(grad_target=None))


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def reversed_strides(t):
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def two_dimensions_swapped(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(t):
    return torch.stack((t, torch.zeros_like(t)), dim=-1).flatten(-2)[..., ::2]


def inside_a_larger_one(t):
    return torch.nn.functional.pad(t, (1, 2, 1, 1))[..., 1:-1, 1:-2]


def swapped_inside_a_larger_one(t):
    return two_dimensions_swapped(inside_a_larger_one(two_dimensions_swapped(t)))


def expanded(t):
    return t[:1, :, :1].expand(t.shape)


def overlapping(t):
    # Steps of 1 in every dimension: an element stands in many places.
    return t.reshape(-1).as_strided(t.shape, (1, 1, 1, 1))


def negated_view(t):
    # The imaginary part of a conjugate: memory holds the numbers with the wrong sign.
    view = torch.complex(t, -t).conj().imag
    assert view.is_neg()
    return view


LAYOUTS = {
    f.__name__: f
    for f in (
        torch.Tensor.contiguous,
        channels_last,
        reversed_strides,
        two_dimensions_swapped,
        every_second,
        inside_a_larger_one,
        swapped_inside_a_larger_one,
        expanded,
        overlapping,
        negated_view,
    )
}

UNUSUAL = [layout for layout in LAYOUTS if layout != "contiguous"]
LAYOUT_PAIRS = [
    ("contiguous", "contiguous"),
    *((layout, "contiguous") for layout in UNUSUAL),
    *(("contiguous", layout) for layout in UNUSUAL),
    *((layout, layout) for layout in UNUSUAL),
    ("channels_last", "reversed_strides"),
    ("reversed_strides", "two_dimensions_swapped"),
    ("expanded", "channels_last"),
]


@by_reduction
@pytest.mark.parametrize(("logits_layout", "target_layout"), LAYOUT_PAIRS)
def test_layouts(logits_layout, target_layout, reduction, device):
    shape = (2, 3, 4, 5)
    logits = LAYOUTS[logits_layout](torch.randn(shape, device=device))
    target = LAYOUTS[target_layout](torch.rand(shape, device=device))
    options = {"reduction": reduction, "weight": torch.rand(3, 1, 1, device=device)}
    theirs = evaluate(torch_bce, logits, target, target_grad=True, **options)
    ours = evaluate(fused, logits, target, target_grad=True, **options)
    assert_results_no_worse(ours, theirs, reference(logits, target, **options))

    assert ours.grad_logits.stride() == theirs.grad_logits.stride()
    assert ours.loss.stride() == theirs.loss.stride()


@by_reduction
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts(layout, reduction, device):
    logits, target = torch.randn(2, 3, 4, 5, device=device), torch.rand(2, 3, 4, 5, device=device)
    options = {"reduction": reduction, "pos_weight": torch.rand(3, 1, 1, device=device)}
    options["weight"] = LAYOUTS[layout](torch.rand(2, 3, 4, 5, device=device))
    theirs = evaluate(torch_bce, logits, target, **options)
    ours = evaluate(fused, logits, target, **options)
    exact = reference(logits, target, **options)
    assert_results_no_worse(ours, theirs, exact._replace(grad_target=None))


def test_strides_of_dimensions_of_one(device):
    # They lead nowhere, and torch leaves odd numbers in them after a view or a transposition.
    logits = torch.randn(6, device=device).as_strided((3, 1, 2), (2, 77, 1))
    target = torch.rand(6, device=device).as_strided((3, 1, 2), (2, 1, 1))
    for reduction in ("none", "mean"):
        theirs = evaluate(torch_bce, logits, target, reduction=reduction)
        ours = evaluate(fused, logits, target, reduction=reduction)
        exact = reference(logits, target, reduction=reduction)
        assert_results_no_worse(ours, theirs, exact._replace(grad_target=None))


@by_reduction
@pytest.mark.parametrize("layout", [expanded, overlapping, every_second])
def test_gradient_of_the_base_of_a_view(layout, reduction, device):
    # The places that share an element sum their gradients.
    base = torch.randn(2, 3, 4, 5, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 4, 5, device=device, dtype=torch.float64)
    grads = [
        torch.autograd.grad(f(layout(base), target, reduction=reduction).sum(), base)[0]
        for f in (fused, torch_bce)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_logits_as_target(device):
    logits = torch.rand(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(f(logits, logits), logits)[0] for f in (fused, torch_bce)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


@by_reduction
@by_weights
@by_dtype
def test_targets_outside_the_unit_interval(weights, reduction, dtype, device):
    # Unchecked: the formula is linear in the target and simply goes on.
    logits = (torch.randn(5, 6, device=device) * 4).to(dtype)
    row = torch.tensor([-3.0, -0.5, 1.25, 2.0, 10.0, 0.5], device=device, dtype=dtype)
    target = row.expand(5, 6)
    weights = make_weights(weights, 6, device, dtype)
    options = {"reduction": reduction, **weights}
    theirs = evaluate(torch_bce, logits, target, target_grad=True, **options)
    ours = evaluate(fused, logits, target, target_grad=True, **options)
    exact = reference(logits, target, **options)
    assert ours.loss.dtype == theirs.loss.dtype
    # Losses of both signs cancel in a sum: its error is a part of what was added up. 4 ULP of each,
    # the goal of the kernels, 4 for the sum, and the rounding of the result.
    terms = reference(logits, target, reduction="none", **weights).loss.abs()
    scale = terms if reduction == "none" else getattr(terms, reduction)()
    slack = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * scale
    slack += torch.finfo(dtype).eps * exact.loss.abs()
    assert ((ours.loss.cpu().double() - exact.loss).abs() <= slack).all()
    assert_no_worse(ours.grad_logits, theirs.grad_logits, exact.grad_logits)
    assert_no_worse(ours.grad_target, theirs.grad_target, exact.grad_target)


@by_dtype
def test_zero_weight_is_not_a_mask(dtype, device):
    logits = torch.tensor([NAN, 1.0, NAN, -2.0] * 8, device=device, dtype=dtype)
    target = torch.ones_like(logits)
    weight = torch.tensor([0.0, 0.0, 1.0, 1.0] * 8, device=device, dtype=dtype)
    result = evaluate(fused, logits, target, weight=weight, reduction="none")
    expected = evaluate(torch_bce, logits, target, weight=weight, reduction="none")
    assert torch.equal(result.loss.isnan(), logits.isnan())
    assert torch.equal(result.grad_logits.isnan(), logits.isnan())
    assert torch.equal(result.loss.isnan(), expected.loss.isnan())
    assert (result.loss[1::4] == 0).all()
    assert (result.grad_logits[1::4] == 0).all()
    for reduction in ("mean", "sum"):
        assert fused(logits, target, weight=weight, reduction=reduction).isnan()


@by_dtype
@pytest.mark.parametrize("role", ["logits", "target", "weight", "pos_weight"])
def test_nan_stays_in_its_element(role, dtype, device):
    # 71 elements: whole vectors and a tail on every instruction set; the nan visits both.
    options = {"reduction": "none"}
    for place in (0, 3, 37, 70):
        operands = {
            name: torch.rand(71, device=device).to(dtype)
            for name in ("logits", "target", "weight", "pos_weight")
        }
        operands[role][place] = NAN
        logits, target = operands.pop("logits"), operands.pop("target")
        result = evaluate(fused, logits, target, **operands, **options)
        only_there = torch.arange(71, device=device) == place
        assert torch.equal(result.loss.isnan(), only_there)
        assert torch.equal(result.grad_logits.isnan(), only_there)
        mean = evaluate(fused, logits, target, **operands)
        assert mean.loss.isnan()
        assert torch.equal(mean.grad_logits.isnan(), only_there)


P = 2.5  # the weight of positive targets below
INFINITE = [  # logit, target, loss, gradient
    pytest.param(INF, 0.0, INF, 1.0, id="plus_inf-negative"),
    pytest.param(INF, 0.25, INF, 0.75, id="plus_inf-soft"),
    pytest.param(INF, 1.0, 0.0, 0.0, id="plus_inf-positive"),
    pytest.param(-INF, 0.0, 0.0, 0.0, id="minus_inf-negative"),
    pytest.param(-INF, 0.25, INF, -0.25, id="minus_inf-soft"),
    pytest.param(-INF, 1.0, INF, -1.0, id="minus_inf-positive"),
]


@by_dtype
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "pos_weight"])
@pytest.mark.parametrize(("logit", "target", "loss", "grad"), INFINITE)
def test_infinite_logits(logit, target, loss, grad, weighted, dtype, device):
    # The limits, where torch answers nan; 37 elements hold whole vectors and a tail.
    logits = torch.full((37,), logit, device=device, dtype=dtype)
    targets = torch.full_like(logits, target)
    options = {"pos_weight": torch.tensor(P, device=device)} if weighted else {}
    if weighted and logit < 0:
        grad *= P  # of a positive target only the other side of the loss is weighted
    for reduction in ("none", "sum", "mean"):
        result = evaluate(fused, logits, targets, reduction=reduction, **options)
        assert torch.equal(result.loss, torch.full_like(result.loss, loss))
        share = 1 / 37 if reduction == "mean" else 1.0
        expected = torch.full_like(logits, grad * share)
        # Only the division by 37 rounds.
        eps = torch.finfo(dtype).eps if reduction == "mean" else 0
        torch.testing.assert_close(result.grad_logits, expected, rtol=eps, atol=0)


def test_infinite_logit_leaves_its_neighbours_alone(device):
    logits = torch.randn(37, device=device)
    target = torch.rand(37, device=device)
    expected = evaluate(fused, logits, target, reduction="none")
    for place in (0, 5, 36):
        changed = logits.clone()
        changed[place] = INF
        result = evaluate(fused, changed, target, reduction="none")
        others = torch.arange(37, device=device) != place
        assert torch.equal(result.loss[others], expected.loss[others])
        assert torch.equal(result.grad_logits[others], expected.grad_logits[others])


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 87), (torch.float64, 700)],
    ids=["float32", "float64"],
)
def test_tails_keep_their_digits(dtype, largest, device):
    # torch gives 0 from a logit of 17 (float32) or 37 (float64); here digits last to the smallest
    # normal number. 4 ULP is the goal of the kernels; the spacing is at most eps times the value.
    size = torch.tensor([17.5, 40.0, 60.0, 87.0, 200.0, 700.0], dtype=dtype)
    size = size[size <= largest]
    tails = [math.exp(-s) for s in size.tolist()]
    true_loss = torch.tensor([math.log1p(e) for e in tails], dtype=torch.float64)
    true_grad = torch.tensor([e / (1 + e) for e in tails], dtype=torch.float64)
    bound = 4 * torch.finfo(dtype).eps
    for sign, target in ((-1, 0.0), (1, 1.0)):
        logits = (sign * size).to(device)
        result = evaluate(fused, logits, torch.full_like(logits, target), reduction="none")
        loss, grad = result.loss.cpu().double(), result.grad_logits.cpu().double()
        assert ((loss - true_loss).abs() <= bound * true_loss).all()
        assert ((grad + sign * true_grad).abs() <= bound * true_grad).all()


@by_dtype
def test_both_tails_are_the_same(dtype, device):
    # torch gives 0 for (-100, 0) and 3.9e-44 for (100, 1).
    logits = torch.linspace(-110, 110, 441, device=device).to(dtype)
    negatives = evaluate(fused, logits, torch.zeros_like(logits), reduction="none")
    positives = evaluate(fused, -logits, torch.ones_like(logits), reduction="none")
    assert torch.equal(negatives.loss, positives.loss)
    assert torch.equal(negatives.grad_logits, -positives.grad_logits)
    assert (negatives.loss >= 0).all()


@by_reduction
@by_dtype
def test_random_values_no_worse_than_torch(reduction, dtype, device):
    logits = (torch.randn(1000, device=device) * 8).to(dtype)
    target = torch.randint(2, (1000,), device=device).to(dtype)
    theirs = evaluate(torch_bce, logits, target, reduction=reduction, target_grad=True)
    ours = evaluate(fused, logits, target, reduction=reduction, target_grad=True)
    assert_results_no_worse(ours, theirs, reference(logits, target, reduction=reduction))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@by_reduction
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(reduction, device):
    logits, target = torch.randn(7, 300, device=device), torch.rand(7, 300, device=device)
    weights = make_weights(("weight", "pos_weight"), 300, device)
    first = evaluate(fused, logits, target, reduction=reduction, **weights)
    torch.use_deterministic_algorithms(False)
    second = evaluate(fused, logits, target, reduction=reduction, **weights)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.grad_logits, second.grad_logits)
    exact = reference(logits, target, reduction=reduction, **weights)
    theirs = evaluate(torch_bce, logits, target, reduction=reduction, **weights)
    assert_no_worse(first.loss, theirs.loss, exact.loss)


@by_reduction
@pytest.mark.parametrize("default", ["cpu", "cuda", "meta"])
def test_default_device_changes_nothing(default, reduction, device):
    # The default is for new tensors of the user; it is a mode that sees every torch function.
    logits, target = matrices(device)
    expected = evaluate(fused, logits, target, reduction=reduction, target_grad=True)
    with torch.device(default):
        got = evaluate(fused, logits, target, reduction=reduction, target_grad=True)
        assert fused_bce.why_not_fused(logits, target) is None
        assert is_fused(fused(logits.clone().requires_grad_(), target, reduction=reduction))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_set_default_device(device):
    logits, target = matrices(device)
    expected = fused(logits, target)
    torch.set_default_device(device)
    try:
        assert fused_bce.why_not_fused(logits, target) is None
        assert torch.equal(fused(logits, target), expected)
    finally:
        torch.set_default_device(None)


def test_import_under_modes(device):
    # What counts as an ordinary tensor must not depend on where the first import happens.
    program = f"""
import torch
with torch.inference_mode(), torch.device("meta"):
    import fused_bce
ordinary, meta = torch.zeros(3, device={device!r}), torch.zeros(3, device="meta")
assert fused_bce.why_not_fused(ordinary, ordinary) is None, "ordinary tensors not fused"
assert fused_bce.why_not_fused(meta, meta) is not None, "meta tensors fused"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
