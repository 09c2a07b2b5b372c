"""Random calls, held against torch's function in float64: shapes, strides, dtypes, weights, values,
backward passes, errors.

A run takes two hundred examples for each test, always the same. Two thousand, new ones each time:

    HYPOTHESIS_PROFILE=thorough python -m pytest tests/loss/test_properties.py

A failure is printed as the call that failed, made as small as possible: kept as an ``@example``
above its test, it is tried in every run. ``--hypothesis-seed=N`` repeats a thorough run.
"""

import contextlib
import math
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import (
    FLOATS,
    REDUCTIONS,
    Result,
    assert_double_close,
    by_torch,
    eager_loss,
    evaluate,
    fused,
    is_fused,
    is_ignored,
    outcome,
    reference,
    torch_bce,
)
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_bce import _C, why_not_fused

COMMON = {
    "deadline": None,
    "database": None,
    # The fixture `device` is a constant, and every example sets the seed itself.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
PROFILES = {
    "quick": settings(max_examples=200, derandomize=True, **COMMON),
    "thorough": settings(max_examples=2000, print_blob=True, **COMMON),
}
random_examples = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "quick")]

INF, NAN = math.inf, math.nan
# Of torch's function in float64, as a part of the largest term
REFERENCE_ERROR = 8 * torch.finfo(torch.float64).eps
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TARGET_DTYPES = (*FLOATS, *INTEGERS, torch.bool)
WEIGHT_DTYPES = (*FLOATS, *INTEGERS, torch.bool)
# torch subtracts 1 from it, which it refuses to do with a bool.
POS_WEIGHT_DTYPES = (*FLOATS, *INTEGERS)

# Most dimensions are short, some of them 0 or 1; one may reach beyond a tile of the kernel (512
# floats), a chunk of a thread (16,384), or several, with a rest.
SHORT = (2, 1, 3, 4, 5, 7, 2, 1, 3, 4, 8, 2, 1, 3, 16, 0)
LONG = (33, 511, 512, 1030, 2049, 16_385, 33_000)
MOST_ELEMENTS = 40_000
MOST_STORAGE = 200_000


@dataclass(frozen=True)
class Operand:
    """A tensor but for its numbers: a view into a flat storage no longer than it needs."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    offset: int = 0
    negated: bool = False  # a view with the negative bit, whose memory holds the opposite

    @property
    def storage_size(self) -> int:
        if 0 in self.shape:
            return self.offset
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + 1 + sum((n - 1) * stride for n, stride in steps)

    def make(self, numbers, device) -> Tensor:
        storage = numbers(self.storage_size).to(device, self.dtype)
        if self.negated:
            storage = torch._neg_view(-storage)
        return storage.as_strided(self.shape, self.strides, self.offset)


def like_logits(n):
    return torch.randn(n) * 4


def like_targets(n):
    # 0 and 1, as integers
    return torch.where(torch.rand(n) < 0.5, torch.rand(n), torch.rand(n).round())


def some_ignored(ignore_index):
    return lambda n: torch.where(torch.rand(n) < 0.3, ignore_index, like_targets(n))


def like_weights(n):
    # 0 to 3, as integers
    return torch.rand(n) * 3.5 + 0.1


def like_grad_loss(n):
    # Numbers that every dtype holds: it gets that of the loss, in float64 that of the reference.
    return torch.randint(-16, 17, (n,)) / 8


@dataclass(frozen=True)
class Call:
    logits: Operand
    target: Operand
    reduction: str = "mean"
    weight: Operand | None = None
    pos_weight: Operand | None = None
    label_smoothing: float = 0.0
    ignore_index: float | None = None
    grad_loss: Operand | None = None  # None: ones
    autocast: torch.dtype | None = None
    threads: int = 1
    instruction_set: str | None = None  # None: the best one

    def make(self, device):
        """Logits, target, grad_loss, and the other arguments by their names."""
        torch.manual_seed(0)
        options = {
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
        }
        for name in ("weight", "pos_weight"):
            if operand := getattr(self, name):
                options[name] = operand.make(like_weights, device)
        targets = like_targets if self.ignore_index is None else some_ignored(self.ignore_index)
        return (
            self.logits.make(like_logits, device),
            self.target.make(targets, device),
            self.grad_loss and self.grad_loss.make(like_grad_loss, device),
            options,
        )

    @property
    def has_negative_bit(self) -> bool:
        """Of an argument of the loss: then it is left to torch's function."""
        operands = (self.logits, self.target, self.weight, self.pos_weight)
        return any(operand.negated for operand in operands if operand)

    @property
    def is_plain(self) -> bool:
        """Without weights and what torch's function does not take."""
        return (
            self.target.dtype.is_floating_point
            and not (self.weight or self.pos_weight or self.label_smoothing)
            and self.ignore_index is None
        )

    def surroundings(self, device):
        return surroundings(device, self.threads, self.instruction_set, self.autocast)


@contextlib.contextmanager
def surroundings(device, threads=1, instruction_set=None, autocast=None):
    before = torch.get_num_threads(), _C.current_instruction_set()
    torch.set_num_threads(threads)
    _C.use_instruction_set(instruction_set or before[1])
    try:
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        torch.set_num_threads(before[0])
        _C.use_instruction_set(before[1])


@st.composite
def shapes(draw):
    shape = draw(st.lists(st.sampled_from(SHORT), max_size=5))
    if shape and draw(st.integers(0, 3)) == 3:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(LONG))
    assume(math.prod(shape) <= MOST_ELEMENTS)
    return tuple(shape)


@st.composite
def strides(draw, shape):
    """Dense in any order, or with gaps, or expanded, or any at all, which mostly overlap."""
    kind = draw(st.sampled_from(("contiguous", "dense", "gaps", "expanded", "any")))
    found = [0] * len(shape)
    inwards = range(len(shape) - 1, -1, -1)
    step = 1
    for d in inwards if kind == "contiguous" else draw(st.permutations(inwards)):
        if kind == "any":
            found[d] = draw(st.integers(0, 4))
        elif kind != "expanded" or draw(st.booleans()):
            found[d] = step * draw(st.integers(1, 3)) if kind == "gaps" else step
            step = found[d] * max(shape[d], 1)
    # A step along a dimension of one leads nowhere; views and transpositions leave odd ones there.
    if draw(st.booleans()):
        found = [
            draw(st.integers(0, 100)) if n == 1 else s for n, s in zip(shape, found, strict=True)
        ]
    return tuple(found)


@st.composite
def operands(draw, shape, dtypes):
    dtype = draw(st.sampled_from(dtypes))
    operand = Operand(shape, draw(strides(shape)), dtype, draw(st.sampled_from((0, 0, 1, 3, 8))))
    assume(operand.storage_size <= MOST_STORAGE)
    return replace(operand, negated=dtype.is_floating_point and draw(st.integers(0, 19)) == 19)


@st.composite
def weights(draw, shape, dtypes):
    """None, or what broadcasts into the shape."""
    if draw(st.booleans()):
        return None
    kept = shape[draw(st.integers(0, len(shape))) :]
    return draw(operands(tuple(n if draw(st.booleans()) else 1 for n in kept), dtypes))


@st.composite
def calls(draw):
    shape = draw(shapes())
    logits = draw(operands(shape, FLOATS))
    # Half of them in the layout of the logits, so that neither is copied.
    target = replace(logits, dtype=draw(st.sampled_from(TARGET_DTYPES)), negated=False)
    if draw(st.booleans()):
        target = draw(operands(shape, TARGET_DTYPES))
    reduction = draw(st.sampled_from(REDUCTIONS))
    return Call(
        logits,
        target,
        reduction,
        draw(weights(shape, WEIGHT_DTYPES)),
        draw(weights(shape, POS_WEIGHT_DTYPES)),
        draw(st.sampled_from((0.0, 0.0, 0.1, 0.6))),
        draw(
            st.none()
            | st.sampled_from([i for i in (-100, 255, 0, 1, NAN) if holds(target.dtype, i)])
        ),
        draw(st.none() | operands(shape if reduction == "none" else (), FLOATS)),
        draw(st.sampled_from((None, None, None, torch.bfloat16, torch.float16))),
        draw(st.sampled_from((1, 2, 3))),
        draw(st.sampled_from(_C.instruction_sets())),
    )


def holds(dtype: torch.dtype, number: float) -> bool:
    if math.isnan(number):
        return dtype.is_floating_point
    if dtype is torch.bool:
        return number in (0, 1)
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return info.min <= number <= info.max


def term_sizes(logits, target, grad_loss, options, wrong_side=False) -> Result:
    """How large the terms are that the results are made of.

    Loss and gradient are linear in the target, and for a soft one the gradient is a difference; the
    target's own gradient is that of the losses of 1 and 0. An error is no part of what they happen
    to leave, which matters where there are few elements.

    On the wrong side of the logits no term is in its tail, where torch's float64 loses digits.
    """
    smoothing, ignore_index = options["label_smoothing"], options["ignore_index"]
    t = target.detach().cpu().double()
    kept = torch.ones_like(t) if ignore_index is None else (~is_ignored(t, ignore_index)).double()
    t = t.masked_fill(kept == 0, 0) * (1 - smoothing) + smoothing / 2
    part = kept / kept.sum().clamp(min=1) if options["reduction"] == "mean" else kept
    share = part if grad_loss is None else part * grad_loss.detach().cpu().double()
    x = logits.detach().cpu().double().masked_fill(kept == 0, 0)
    of_zeros, of_ones = (x.abs(), -x.abs()) if wrong_side else (x, x)
    weights = {name: options[name] for name in ("weight", "pos_weight") if name in options}
    negative, positive = (
        reference(x, torch.full_like(t, hard), grad_loss=share, reduction="none", **weights)
        for x, hard in ((of_zeros, 0), (of_ones, 1))
    )
    # Smoothing rounds the target, and that error is none of 1 - t, which may be next to nothing.
    of_negative, of_positive = (1 + t.abs(),) * 2 if smoothing else ((1 - t).abs(), t.abs())
    losses = part * (of_negative * negative.loss.abs() + of_positive * positive.loss.abs())
    return Result(
        losses if options["reduction"] == "none" else losses.sum(),
        of_negative * negative.grad_logits.abs() + of_positive * positive.grad_logits.abs(),
        (negative.loss.abs() + positive.loss.abs()) * share.abs(),
    )


def assert_as_good(got: Tensor, theirs: Tensor, exact: Tensor, terms: Tensor, tails: Tensor):
    """Like helpers.assert_no_worse, but for the size that errors are a part of."""
    assert (got.shape, got.dtype, got.device) == (theirs.shape, theirs.dtype, theirs.device)
    if exact.numel() == 0 or exact.isnan().any():  # no elements, or their mean
        assert torch.equal(got.isnan(), theirs.isnan())
        return
    error, allowed = ((t.cpu().double() - exact).abs().max() for t in (got, theirs))
    slack = 4 * torch.finfo(got.dtype).eps * terms.max() + REFERENCE_ERROR * tails.max()
    assert error <= 2 * allowed + slack


def assert_same_strides(got: Tensor, expected: Tensor) -> None:
    """Where they lead somewhere."""
    if got.numel():
        for n, *steps in zip(got.shape, got.stride(), expected.stride(), strict=True):
            assert n == 1 or steps[0] == steps[1]


WANTED = (("logits",), ("target",), ("logits", "target"), ())


@random_examples
@given(call=calls(), wanted=st.sampled_from(WANTED))
def test_any_call(device, call, wanted):
    logits, target, grad_loss, options = call.make(device)
    exact = reference(logits, target, grad_loss=grad_loss, **options)
    sizes = [term_sizes(logits, target, grad_loss, options, wrong_side) for wrong_side in (0, 1)]
    if not target.is_floating_point():
        wanted = [name for name in wanted if name != "target"]
    with call.surroundings(device):
        theirs = evaluate(
            by_torch,
            logits,
            target,
            grad_loss=grad_loss,
            target_grad=target.is_floating_point(),
            **options,
        )
        without_grad = fused(logits, target, **options)
        operands = {"logits": logits, "target": target}
        leaves = [operands[name].requires_grad_() for name in wanted]
        loss = fused(logits, target, **options)
        assert loss.requires_grad == bool(leaves)
        if leaves:
            assert is_fused(loss) != call.has_negative_bit
        grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype)
        # The second time the gradient is computed anew, and always if that is asked for.
        losses = (loss, loss, fused(logits, target, recompute=True, **options))
        grads = [
            torch.autograd.grad(loss, leaves, grad_loss, retain_graph=True) if leaves else ()
            for loss in losses
        ]
    torch.testing.assert_close(loss.detach(), without_grad, rtol=0, atol=0, equal_nan=True)
    assert_as_good(loss.detach(), theirs.loss, exact.loss, *(s.loss for s in sizes))
    # Strides of a weight may decide in torch's function; here they never do.
    layouts = theirs if call.is_plain else Result(*map(torch.empty_like, (target, logits, logits)))
    if call.reduction == "none" and not call.has_negative_bit:
        assert_same_strides(loss, layouts.loss)
    for name, *of_operand in zip(wanted, *grads, strict=True):
        their_grad, exact_grad, *sizes_of_grad = (
            getattr(result, f"grad_{name}") for result in (theirs, exact, *sizes)
        )
        for grad in of_operand:
            if not call.has_negative_bit:
                torch.testing.assert_close(grad, of_operand[0], rtol=0, atol=0, equal_nan=True)
            assert_as_good(grad, their_grad, exact_grad, *sizes_of_grad)
            if not call.has_negative_bit and (call.is_plain or name == "logits"):
                assert_same_strides(grad, getattr(layouts, f"grad_{name}"))


def second_order(function, logits, target, grad_loss, options):
    """The gradients of a gradient penalty."""
    leaves = [t.detach().requires_grad_() for t in (logits, target)]
    loss = function(*leaves, **options)
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype)
    grads = torch.autograd.grad(loss, leaves, grad_loss, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def in_double(call: Call) -> Call:
    changes = {
        name: replace(getattr(call, name), dtype=torch.float64)
        for name in ("logits", "target", "grad_loss")
        if getattr(call, name)
    }
    return replace(call, autocast=None, **changes)


@random_examples
@given(call=calls().map(in_double))
def test_second_order(device, call):
    arguments = call.make(device)
    with call.surroundings(device):
        got, expected = (second_order(function, *arguments) for function in (fused, by_torch))
    assert_double_close(got, expected)


@random_examples
@given(
    call=calls(),
    wanted=st.sampled_from(WANTED[:-1]),
    edited=st.sampled_from(("logits", "target", "weight", "pos_weight")),
)
def test_edit_between_forward_and_backward(device, call, wanted, edited):
    logits, target, _, options = call.make(device)
    operands = {"logits": logits, "target": target, **options}
    assume(edited in operands and not call.has_negative_bit)
    if not target.is_floating_point():
        wanted = ["logits"]
    leaves = [operands[name].requires_grad_() for name in wanted]
    loss = fused(logits, target, **options).sum()
    # The memory that it is a view of, since a tensor that overlaps itself cannot be edited.
    with torch.no_grad():
        operands[edited]._base.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


SPECIAL_LOGITS = (
    *(0.0, -0.0, 1.0, -1.0, 17.5, -17.5, 87.3, -88.03, 104.0, -746.0, 65504.0, -65504.0),
    *(6e-8, -6e-8, 1e-38, -1e-40, 1e-45, 1e-310, 5e-324, 3e38, -3e38, 1e300, -1e300),
    *(INF, -INF, NAN),
)
values_of_logits = st.sampled_from(SPECIAL_LOGITS) | st.floats(-120, 120) | st.floats(-1e300, 1e300)
values_of_targets = (
    st.sampled_from((0.0, 1.0, -0.0, 0.5, NAN)) | st.floats(0, 1) | st.floats(-1000, 1000)
)


@random_examples
@given(
    pairs=st.lists(st.tuples(values_of_logits, values_of_targets), min_size=1, max_size=70),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    p=st.sampled_from((None, 0.5, 3.0)),
    label_smoothing=st.sampled_from((0.0, 0.0, 0.1)),
    ignore_index=st.sampled_from((None, None, 0, 1, NAN)),
    instruction_set=st.sampled_from(_C.instruction_sets()),
)
def test_any_values(device, pairs, dtypes, p, label_smoothing, ignore_index, instruction_set):
    """Each element for itself, whatever its neighbours are."""
    logits, target = (
        torch.tensor(numbers, dtype=torch.float64).to(device, dtype)
        for numbers, dtype in zip(zip(*pairs, strict=True), dtypes, strict=True)
    )
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    if p is not None:
        options["pos_weight"] = torch.tensor(p, device=device)
    with surroundings(device, instruction_set=instruction_set):
        got = evaluate(fused, logits, target, reduction="none", **options)
        summed = evaluate(fused, logits, target, reduction="sum", **options)
    x, given_t = logits.cpu().double(), target.cpu().double()
    ignored = torch.zeros_like(x).bool()
    if ignore_index is not None:
        ignored = is_ignored(given_t, ignore_index)
    t = given_t * (1 - label_smoothing) + label_smoothing / 2
    has_nan = (x.isnan() | t.isnan()) & ~ignored
    assert torch.equal(got.loss.isnan().cpu(), has_nan)
    assert torch.equal(got.grad_logits.isnan().cpu(), has_nan)
    assert summed.loss.isnan() >= has_nan.any()
    assert torch.equal(summed.grad_logits.nan_to_num(7), got.grad_logits.nan_to_num(7))
    assert not got.loss.cpu()[ignored].any()
    assert not got.grad_logits.cpu()[ignored].any()

    # Not the targets whose product with pos_weight is too small for a float
    in_domain = x.isinf() & ~ignored & ((t == 0) | (t > 1e-30)) & (t <= 1)
    towards_target = torch.where(x > 0, t == 1, t == 0)
    limits = {
        "loss": torch.where(towards_target, 0.0, INF).double(),
        "grad_logits": torch.where(x > 0, 1 - t, -t * (p or 1)),
    }
    finite = x.isfinite() & ~has_nan & ~ignored
    known = torch.where(finite, x, 0), torch.where(finite, given_t, 0.5)
    options["reduction"] = "none"
    exact = reference(*known, **options)
    terms, tails = (term_sizes(*known, None, options, wrong_side) for wrong_side in (0, 1))
    # Half types are the float32 result, rounded once.
    arithmetic = torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32)
    # Where exp(-|x|) is below the smallest normal number it is 0.
    flushed = 16 * arithmetic.tiny * (1 + known[1].abs())
    for result, limit in limits.items():
        stored = torch.finfo(getattr(got, result).dtype)
        slack = 8 * arithmetic.eps * getattr(terms, result) + flushed
        slack += REFERENCE_ERROR * getattr(tails, result)
        slack += stored.eps * getattr(exact, result).abs() + stored.tiny * stored.eps
        # What is too large for the dtype is infinite in it.
        value, true, limit = (
            v.double().cpu().clamp(-stored.max, stored.max)
            for v in (getattr(got, result), getattr(exact, result), limit)
        )
        assert ((value - true).abs() <= slack)[finite].all()
        assert ((value - limit).abs() <= 4 * stored.eps)[in_domain].all()


def empty_tensors(*shapes, dtypes=(torch.float32,), **options):
    """By a name that says what is in it; on the device of the test, unless there is another."""
    return {
        f"{dtype}{list(shape)}{options or ''}": lambda device, s=shape, d=dtype: torch.zeros(
            s, **{"device": device, "dtype": d, **options}
        )
        for shape in shapes
        for dtype in dtypes
    }


OTHER_DTYPES = (torch.complex64, torch.float8_e4m3fn)
NO_TENSORS = {
    "None": lambda device: None,
    "number": lambda device: 1.0,
    "list": lambda device: [0.0] * 4,
    "array": lambda device: np.zeros((3, 4), np.float32),
    "string": lambda device: "mean",
}
GOOD = empty_tensors((3, 4), dtypes=FLOATS)
ODD = {
    **empty_tensors((3, 4), dtypes=OTHER_DTYPES),
    **empty_tensors((), (1,), (4,), (3,), (3, 1), (4, 3), (1, 3, 4), (2, 3, 4), (0,), (0, 4)),
    **empty_tensors((3, 4), (4,), (3, 4, 1), device="meta"),
    **empty_tensors((3, 4), (4,), (5,), requires_grad=True),
    "sparse": lambda device: torch.zeros(3, 4, device=device).to_sparse(),
    "parameter": lambda device: torch.nn.Parameter(torch.zeros(3, 4, device=device)),
    **NO_TENSORS,
}


# As targets these are errors of torch's alone.
INTEGER_LOGITS = empty_tensors((3, 4), dtypes=(torch.int64, torch.bool))
EVERY_ARGUMENT = GOOD | ODD | INTEGER_LOGITS


def arguments_like(usual):
    return st.sampled_from(sorted(usual)) | st.sampled_from(sorted(ODD))


@random_examples
@given(
    logits=arguments_like(GOOD) | st.sampled_from(sorted(INTEGER_LOGITS)),
    target=arguments_like(GOOD),
    weight=arguments_like({"None": None}),
    pos_weight=arguments_like({"None": None}),
    reduction=st.sampled_from((*REDUCTIONS, "Mean", "elementwise_mean", None, 1, b"sum", ["sum"])),
    legacy=st.tuples(*[st.sampled_from((None, None, None, True, False, "no"))] * 2),
)
@example("torch.bfloat16[3, 4]", "sparse", "None", "None", "none", (None, None))
@example(
    "torch.bfloat16[3, 4]",
    "torch.float32[3, 4]",
    "None",
    "torch.float32[0, 4]",
    "none",
    (None, None),
)
def test_any_arguments(device, logits, target, weight, pos_weight, reduction, legacy):
    """The same error, or none, and the same warnings; mostly several things are wrong at once."""

    def call(function, dense=False):
        made = (EVERY_ARGUMENT[name](device) for name in (logits, target, weight, pos_weight))
        input, label, w, p = made
        return outcome(
            function, input, label.to_dense() if dense else label, w, *legacy, reduction, p
        )

    named = {"input": logits, "target": target, "weight": weight, "pos_weight": pos_weight}
    operands = {argument: EVERY_ARGUMENT[name](device) for argument, name in named.items()}
    quick = outcome(eager_loss, **operands, reduction=reduction)
    if quick.error:
        assert quick.error == outcome(torch_bce, **operands, reduction=reduction).error
    elif quick.value is not None:
        assert why_not_fused(**operands) is None
    # More than torch takes: a sparse target counts as the dense one that it stands for.
    ours, theirs = call(fused), call(torch_bce, dense=target == "sparse")
    assert (ours.error and ours.error[0]) == (theirs.error and theirs.error[0])
    assert ours.warnings == theirs.warnings
    if ours.error is None:
        assert type(ours.value) is type(theirs.value)
        assert (ours.value.device, ours.value.dtype) == (theirs.value.device, theirs.value.dtype)
        if not ours.value.is_meta:
            torch.testing.assert_close(ours.value, theirs.value, rtol=0.02, atol=0, equal_nan=True)
