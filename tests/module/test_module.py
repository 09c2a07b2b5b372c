"""The module as a stand-in for torch.nn's, and which calls take the fused path."""

import contextlib
import copy
import functools
import inspect
import io
import logging
import math
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    HANGS,
    assert_double_close,
    by_dtype,
    by_reduction,
    by_weights,
    eager_loss,
    fused,
    is_fused,
    make_weights,
    torch_bce,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fused_bce
from fused_bce import BCEWithLogitsLoss, SparseTarget, coverage, why_not_fused

DOUBLE = torch.float64
CLASSES = (BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss)
both_ways = pytest.mark.parametrize(
    ("source", "destination"), [CLASSES, CLASSES[::-1]], ids=["from_ours", "from_torch"]
)


def batch(device, dtype=DOUBLE):
    """Logits that require a gradient, and targets."""
    logits = torch.randn(3, 4, device=device, dtype=dtype, requires_grad=True)
    return logits, torch.rand(3, 4, device=device, dtype=dtype)


def criteria(device, dtype=DOUBLE, **options):
    """Our module and torch's, with the same weights."""
    weights = make_weights(("weight", "pos_weight"), 4, device, dtype)
    return [cls(**weights, **options) for cls in CLASSES]


EXTRAS = {
    "label_smoothing": 0.0,
    "ignore_index": None,
    "validate_targets": False,
    "recompute": False,
}


FX_OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 1},
    "ignored nan": {"ignore_index": math.nan},
    "validated": {"validate_targets": True},
    "recompute": {"recompute": True},
}


def assert_extends(ours, theirs) -> None:
    """Torch's parameters with their defaults, and after them what only we have, by keyword."""
    ours, theirs = ([*inspect.signature(f).parameters.values()] for f in (ours, theirs))
    common = [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == common
    assert {p.name: p.default for p in ours[len(theirs) :]} == EXTRAS
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_is_a_torch_loss(device):
    ours, theirs = (cls().to(device) for cls in CLASSES)
    assert isinstance(ours, torch.nn.BCEWithLogitsLoss)
    assert isinstance(ours, torch.nn.modules.loss._Loss)
    assert repr(ours) == repr(theirs) == "BCEWithLogitsLoss()"
    assert_extends(BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss)
    assert (
        inspect.signature(ours.forward).parameters == inspect.signature(theirs.forward).parameters
    )
    assert set(vars(ours)) - set(vars(theirs)) == set(EXTRAS)
    logits, target = batch(device)
    assert torch.equal(ours(logits, target), fused(logits, target))


def test_function_has_the_signature_of_torch(device):
    del device
    assert_extends(fused, torch_bce)


@by_reduction
@by_weights
def test_attributes_and_value(weights, reduction, device):
    weights = make_weights(weights, 4, device, DOUBLE)
    ours, theirs = (cls(**weights, reduction=reduction) for cls in CLASSES)
    assert ours.reduction == reduction
    for name in ("weight", "pos_weight"):
        # The very tensor, not a copy: a user may go on editing it.
        assert getattr(ours, name) is weights.get(name)
    logits, target = batch(device)
    loss = ours(logits, target)
    assert is_fused(loss)
    assert_double_close(loss, theirs(logits, target))
    for tensor in weights.values():
        tensor.mul_(2)
    assert_double_close(ours(logits, target), theirs(logits, target))


def test_positional_arguments(device):
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)
    call = (weights["weight"], None, None, "sum", weights["pos_weight"])
    logits, target = batch(device)
    assert_double_close(
        BCEWithLogitsLoss(*call)(logits, target),
        torch.nn.BCEWithLogitsLoss(*call)(input=logits, target=target),
    )
    weight, size_average, reduce, reduction, pos_weight = call
    flat = (logits, target, weight, size_average, reduce, reduction, pos_weight)
    assert_double_close(fused(*flat), torch_bce(*flat))


def test_attributes_may_change_after_construction(device):
    ours = BCEWithLogitsLoss().to(device)
    logits, target = batch(device)
    ours.reduction = "sum"
    ours.pos_weight = torch.full((4,), 3.0, dtype=DOUBLE, device=device)
    expected = torch_bce(logits, target, reduction="sum", pos_weight=ours.pos_weight)
    assert_double_close(ours(logits, target), expected)


def test_parametrized_buffer(device):
    # No longer a buffer, but computed at every access.
    class Doubled(torch.nn.Module):
        def forward(self, pos_weight):
            return 2 * pos_weight

    losses = []
    for cls in (BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss):
        loss = cls(pos_weight=torch.linspace(1, 2, 4, dtype=DOUBLE)).to(device)
        torch.nn.utils.parametrize.register_parametrization(loss, "pos_weight", Doubled())
        losses.append(loss)
    data = batch(device)
    assert_double_close(losses[0](*data), losses[1](*data))
    assert is_fused(losses[0](*data))


@by_weights
@both_ways
def test_state_dict_passes_between_the_classes(source, destination, weights, device):
    saved = source(**make_weights(weights, 4, device, DOUBLE))
    state = saved.state_dict()
    assert set(state) == set(weights)

    loaded = destination(**{name: torch.zeros(4, dtype=DOUBLE, device=device) for name in weights})
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
    logits, target = batch(device)
    assert_double_close(loaded(logits, target), saved(logits, target))


@both_ways
def test_state_dict_is_loaded_strictly(source, destination, device):
    state = source(pos_weight=torch.ones(4, device=device)).state_dict()
    plain = destination().to(device)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"pos_weight"'):
        plain.load_state_dict(state)
    weighted = destination(weight=torch.ones(4, device=device))
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        weighted.load_state_dict({})
    assert weighted.load_state_dict(state, strict=False).missing_keys == ["weight"]
    assert torch.equal(weighted.weight, torch.ones(4, device=device))


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@by_reduction
def test_copies(reduction, copy_of, device):
    ours, _ = criteria(device, reduction=reduction)
    copied = copy_of(ours)
    assert type(copied) is BCEWithLogitsLoss
    assert copied.pos_weight is not ours.pos_weight
    logits, target = batch(device)
    assert torch.equal(copied(logits, target), ours(logits, target))
    copied.pos_weight.mul_(2)
    assert not torch.equal(copied(logits, target), ours(logits, target))


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to_float64": lambda m: m.to(torch.float64),
    "double": lambda m: m.double(),
    "to_cpu": lambda m: m.cpu(),
    "eval": lambda m: m.eval(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions(convert, device):
    ours, theirs = (convert(m) for m in criteria(device, torch.float32))
    assert ours.pos_weight.dtype == theirs.pos_weight.dtype
    assert ours.pos_weight.device == theirs.pos_weight.device
    assert ours.training == theirs.training
    # The dtype of the weights does not matter for that of the loss.
    logits, target = batch(ours.weight.device, torch.float32)
    loss, expected = ours(logits, target), theirs(logits, target)
    assert is_fused(loss)
    torch.testing.assert_close(loss, expected)


def test_buffers_follow_the_device(device):
    ours = BCEWithLogitsLoss(pos_weight=torch.ones(4)).to(device)
    assert ours.pos_weight.device.type == device
    assert [name for name, _ in ours.named_buffers()] == ["pos_weight"]
    assert list(ours.parameters()) == []


class Classifier(torch.nn.Module):
    """A model that holds its loss, as detection and segmentation models do."""

    def __init__(self, criterion):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )
        self.criterion = criterion

    def forward(self, samples, target):
        return self.criterion(self.layers(samples), target)


def classifiers(device, **options):
    """Two models that differ in the class of their loss only."""
    ours, theirs = (Classifier(c) for c in criteria(device, **options))
    theirs.layers = copy.deepcopy(ours.layers)
    data = torch.randn(5, 6, dtype=DOUBLE), torch.randint(2, (5, 4)).to(DOUBLE)
    return (m.to(device, DOUBLE) for m in (ours, theirs)), [t.to(device) for t in data]


def parameter_gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def check_values(got_loss, model, torch_model, data):
    """The loss and the gradients of all parameters are those of torch's module."""
    expected = torch_model(*data)
    assert_double_close(got_loss, expected)
    assert_double_close(
        parameter_gradients(model, got_loss.sum()),
        parameter_gradients(torch_model, expected.sum()),
    )


def test_training(device):
    models, data = classifiers(device)
    losses = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        first = model(*data).detach()
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(*data)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert_double_close(*losses)
    # It has learned something.
    assert losses[0] < 0.5 * first


jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")
# torch's function compares the sizes, which a trace cannot follow.
sizes_are_traced = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@jit_is_deprecated
@by_reduction
def test_jit_script(reduction, device):
    (ours, theirs), data = classifiers(device, reduction=reduction)
    scripted = torch.jit.script(ours)
    check_values(scripted(*data), scripted, theirs, data)
    with pytest.raises(Exception, match="must be the same as input size"):
        scripted(data[0], data[1][:2])


def call_plainly(input: torch.Tensor, target: torch.Tensor):
    return fused(input, target)


def call_with_everything(input: torch.Tensor, target: torch.Tensor):
    return fused(
        input, target, reduction="sum", label_smoothing=0.1, ignore_index=1, recompute=True
    )


@jit_is_deprecated
@pytest.mark.parametrize("function", [call_plainly, call_with_everything])
def test_jit_script_of_a_call(function, device):
    logits, target = batch(device)
    target[0] = 1
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(function), file)
    file.seek(0)
    assert_double_close(torch.jit.load(file)(logits, target), function(logits, target))


@jit_is_deprecated
def test_jit_script_of_the_function(device):
    logits, target = batch(device)
    scripted = torch.jit.script(fused)
    assert_double_close(scripted(logits, target), fused(logits, target))
    options = {"reduction": "none", "label_smoothing": 0.2}
    assert_double_close(scripted(logits, target, **options), fused(logits, target, **options))


@jit_is_deprecated
@sizes_are_traced
@by_reduction
def test_jit_trace(reduction, device):
    (ours, theirs), data = classifiers(device, reduction=reduction)
    traced = torch.jit.trace(ours, tuple(data))
    check_values(traced(*data), traced, theirs, data)
    # Nothing of the first call is frozen into the trace.
    fresh = [torch.randn_like(data[0]), torch.rand_like(data[1])]
    check_values(traced(*fresh), traced, theirs, fresh)


@by_reduction
def test_fx_symbolic_trace(reduction, device):
    (ours, theirs), data = classifiers(device, reduction=reduction)
    graph_module = torch.fx.symbolic_trace(ours)
    # A leaf, as torch's class is.
    calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    assert calls[-1].target == "criterion"
    check_values(graph_module(*data), graph_module, theirs, data)


class Calls(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, input, target):
        return self.loss(input, target)


@pytest.mark.parametrize(
    ("options", "target_dtype"),
    [
        pytest.param(options, target_dtype, id=f"{name}-{target_dtype}")
        for name, options in FX_OPTIONS.items()
        for target_dtype in (DOUBLE, torch.bool, torch.int64)
        if target_dtype is DOUBLE or options.get("ignore_index") is not math.nan
    ],
)
def test_fx_with_what_torch_does_not_take(options, target_dtype, device):
    # In a model, alone, and as a function; each is the very call that eager makes.
    logits, target = batch(device)
    target = target.round().to(target_dtype)
    for module in (
        Calls(BCEWithLogitsLoss(**options)),
        BCEWithLogitsLoss(**options),
        Calls(functools.partial(fused, **options)),
    ):
        expected = fused(logits, target, **options)
        traced = torch.fx.symbolic_trace(module)
        for graph_module in (traced, pickle.loads(pickle.dumps(traced))):
            loss = graph_module(logits, target)
            assert torch.equal(loss, expected)
            assert is_fused(loss)


class Recording(torch.Tensor):
    """A subclass that changes nothing and notes the functions that it passes through."""

    calls: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@by_reduction
@pytest.mark.parametrize("role", ["input", "target", "weight", "pos_weight"])
def test_subclass_sees_one_call(role, reduction, device):
    logits, target = (t.detach() for t in batch(device))
    weights = make_weights(("weight", "pos_weight"), 4, device, DOUBLE)
    arguments = {"input": logits, "target": target, **weights}
    expected = torch_bce(**arguments, reduction=reduction)
    arguments[role] = arguments[role].as_subclass(Recording)
    seen = {}
    for function in (fused, torch_bce):
        Recording.calls = []
        loss = function(**arguments, reduction=reduction)
        seen[function] = list(Recording.calls)
        assert type(loss) is Recording
        assert_double_close(loss.as_subclass(torch.Tensor), expected)
    assert seen[fused] == seen[torch_bce]
    assert seen[fused].count(torch_bce) == 1


def test_function_mode_sees_one_call(device):
    class Mode(torch.overrides.TorchFunctionMode):
        def __init__(self):
            self.calls = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.calls.append(function)
            return function(*args, **(kwargs or {}))

    logits, target = batch(device)
    for function in (fused, torch_bce):
        with Mode() as mode:
            loss = function(logits, target)
        assert mode.calls == [torch_bce]
        assert_double_close(loss, torch_bce(logits, target))


def test_parameters_and_buffers_are_fused(device):
    logits, target = batch(device)
    weight = torch.nn.Parameter(torch.rand(4, device=device), requires_grad=False)
    pos_weight = torch.nn.Buffer(torch.rand(4, device=device))
    options = {"weight": weight, "pos_weight": pos_weight}
    loss = fused(torch.nn.Parameter(logits.detach()), target, **options)
    assert is_fused(loss)
    assert_double_close(loss, torch_bce(logits, target, **options))


@by_dtype
@by_reduction
@by_weights
def test_ordinary_calls_are_fused(weights, reduction, dtype, device):
    logits, target = batch(device, dtype)
    weights = make_weights(weights, 4, device, dtype)
    assert why_not_fused(logits, target, **weights) is None
    loss = BCEWithLogitsLoss(**weights, reduction=reduction)(logits, target)
    assert is_fused(loss)
    expected = torch_bce(logits, target, **weights, reduction=reduction)
    # Half types are rounded to the nearest here and after each operation there.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    quick = eager_loss(logits, target, **weights, reduction=reduction)
    assert torch.equal(quick, loss)
    assert is_fused(quick)


def zeros(device, dtype=torch.float32, shape=(3, 4)):
    return torch.zeros(shape, device=device, dtype=dtype)


FUSED_CALLS = {
    "target_requires_grad": lambda d: (zeros(d), zeros(d).requires_grad_()),
    "no_gradient": lambda d: (zeros(d), zeros(d)),
    "dtypes_differ": lambda d: (zeros(d), zeros(d, DOUBLE)),
    "empty": lambda d: (zeros(d, shape=0), zeros(d, shape=0)),
    "number": lambda d: (zeros(d, shape=()), zeros(d, shape=())),
    "expanded": lambda d: (zeros(d, shape=1).expand(3, 4), zeros(d)),
    "transposed": lambda d: (zeros(d).t(), zeros(d).t()),
    "bool_weight": lambda d: (zeros(d), zeros(d), zeros(d, torch.bool, 4)),
    "int64_weights": lambda d: (zeros(d), zeros(d), *[zeros(d, torch.int64, 4)] * 2),
    "parameter": lambda d: (torch.nn.Parameter(zeros(d)), zeros(d)),
}


@pytest.mark.parametrize("make", FUSED_CALLS.values(), ids=FUSED_CALLS)
def test_why_not_fused_is_none(make, device):
    call = named(make(device)) | {"reduction": "sum"}
    assert why_not_fused(**call) is None
    torch.testing.assert_close(fused(**call), torch_bce(**call))


def named(call) -> dict:
    return dict(zip(("input", "target", "weight", "pos_weight"), call, strict=False))


UNFUSED_CALLS = {  # arguments, and the reason
    "int_logits": (lambda d: (zeros(d, torch.int64), zeros(d)), "input has dtype torch.int64"),
    "complex_target": (
        lambda d: (zeros(d), zeros(d, torch.complex64)),
        "target has dtype torch.complex64",
    ),
    "sizes": (lambda d: (zeros(d), zeros(d, shape=4)), "input and target differ in size"),
    "meta": (lambda d: (zeros("meta"), zeros("meta")), "input is not an ordinary tensor"),
    "meta_target": (lambda d: (zeros(d), zeros("meta")), "target is not an ordinary tensor"),
    "sparse": (lambda d: (zeros(d).to_sparse(), zeros(d)), "input is not an ordinary tensor"),
    "negated_view": (
        lambda d: (torch._neg_view(zeros(d)), zeros(d)),
        "input is not an ordinary tensor",
    ),
    "not_a_tensor": (lambda d: (1.0, zeros(d)), "input or target is not a tensor"),
    "no_target": (lambda d: (zeros(d), None), "input or target is not a tensor"),
    "list_as_weight": (lambda d: (zeros(d), zeros(d), [1.0]), "weight is not a tensor"),
    "number_as_pos_weight": (
        lambda d: (zeros(d), zeros(d), None, 2.0),
        "pos_weight is not a tensor",
    ),
    "complex_weight": (
        lambda d: (zeros(d), zeros(d), zeros(d, torch.complex64)),
        "weight has dtype torch.complex64",
    ),
    "bool_pos_weight": (
        lambda d: (zeros(d), zeros(d), None, zeros(d, torch.bool)),
        "pos_weight has dtype torch.bool",
    ),
    "sparse_weight": (
        lambda d: (zeros(d), zeros(d), zeros(d).to_sparse()),
        "weight is not an ordinary tensor",
    ),
    "weight_requires_grad": (
        lambda d: (zeros(d), zeros(d), zeros(d).requires_grad_()),
        "weight requires a gradient",
    ),
    "pos_weight_requires_grad": (
        lambda d: (zeros(d), zeros(d), None, zeros(d).requires_grad_()),
        "pos_weight requires a gradient",
    ),
    "subclass": (
        lambda d: (zeros(d).as_subclass(Recording), zeros(d)),
        "a tensor subclass or mode overrides torch functions",
    ),
}


@pytest.mark.parametrize(("make", "reason"), UNFUSED_CALLS.values(), ids=UNFUSED_CALLS)
def test_why_not_fused_of_arguments(make, reason, device):
    Recording.calls = []
    assert why_not_fused(**named(make(device))).startswith(reason)
    assert eager_loss(*make(device)) is None
    assert not Recording.calls


def test_why_not_fused_takes_what_the_loss_takes(device):
    of_loss = list(inspect.signature(fused).parameters.values())
    assert list(inspect.signature(why_not_fused).parameters.values())[: len(of_loss)] == of_loss
    logits, target = batch(device)
    weight = torch.rand(4, device=device)
    for call in [
        ((logits, target, weight, None, None, "none", weight), {}),
        ((logits, target, None, False, True), {"reduction": "not read"}),
        ((logits, target), {"reduction": "batchmean", "label_smoothing": 0.1, "recompute": True}),
        ((logits, target > 0.5), {"ignore_index": 1, "validate_targets": True}),
        ((logits, target), {"ignore_index": math.nan}),
    ]:
        assert why_not_fused(*call[0], **call[1]) is None
    # What the head does not take
    for option in ({"size_average": True}, {"reduce": False}):
        reason = why_not_fused(logits, target[:, :2], linear_weight=target[:2], **option)
        assert reason.startswith("with linear_weight go no")


ROWS = SparseTarget.from_lists([[0], [1, 3], []], num_labels=4)
BAD_VALUES = {
    "reduction": {"reduction": "max"},
    "no_reduction": {"reduction": None},
    "smoothing": {"label_smoothing": 1.0},
    "smoothing_tensor": {"label_smoothing": torch.tensor(0.1)},
    "smoothing_nan": {"label_smoothing": math.nan},
    "index": {"ignore_index": "a"},
    "index_too_large": {"ignore_index": 2**24},
    "index_of_bool": {"target": torch.zeros(3, 4, dtype=torch.bool), "ignore_index": 255},
    "target": {"target": torch.full((3, 4), 1.5), "validate_targets": True},
    "nan_target": {"target": torch.full((3, 4), math.nan), "validate_targets": True},
    "index_of_rows": {"target": ROWS, "ignore_index": 1},
    "label": {"target": ROWS._replace(indices=ROWS.indices + 1)},
    "offsets": {"target": ROWS._replace(offsets=ROWS.offsets + 1)},
    "values": {"target": ROWS._replace(values=torch.full((3,), 2.0)), "validate_targets": True},
}


@pytest.mark.parametrize("mode", [contextlib.nullcontext, forward_ad.dual_level])
@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
def test_why_not_fused_of_bad_values(bad, mode):
    """The loss's error, fused or not."""
    call = {"input": torch.zeros(3, 4), "target": torch.zeros(3, 4)} | bad
    with mode():
        with pytest.raises((TypeError, ValueError, IndexError)) as raised:
            fused(**call)
        assert why_not_fused(**call) == str(raised.value)


@pytest.mark.parametrize(
    "extras", [*FX_OPTIONS.values(), {"reduction": "batchmean"}, {"reduction": None}], ids=str
)
def test_the_quick_way_leaves_extras_to_python(extras, device):
    logits, target = batch(device)
    assert (eager_loss(logits, target, **extras) is None) == bool(extras)


def test_the_quick_way_takes_what_it_says():
    with pytest.raises(TypeError, match="eager_loss takes 9 arguments"):
        fused_bce._C.eager_loss(torch.zeros(3), torch.zeros(3))


def test_why_not_fused_names_what_is_unusual(device):
    reason = why_not_fused(zeros(device).to_sparse(), zeros(device))
    assert "Sparse" in reason


@pytest.mark.skipif(
    not torch.cuda.is_available() or fused_bce.build_info()["cuda_archs"] is not None,
    reason="for a GPU and a build without CUDA kernels",
)
def test_a_build_without_cuda_kernels_leaves_the_gpu_to_torch():
    logits, target = batch("cuda")
    assert why_not_fused(logits, target) == "input is on a GPU, and this build has no CUDA kernels"
    loss = fused(logits, target)
    assert not is_fused(loss)
    assert_double_close(loss, torch_bce(logits, target))


class Passing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


MODES = {
    "forward_mode": (forward_ad.dual_level, "inside forward-mode differentiation"),
    "function_mode": (FunctionMode, "a tensor subclass or mode overrides torch functions"),
}


@pytest.mark.parametrize(("mode", "reason"), MODES.values(), ids=MODES)
def test_why_not_fused_inside_a_mode(mode, reason, device):
    logits, target = batch(device)
    expected = torch_bce(logits, target)
    with mode():
        assert why_not_fused(logits, target) == reason
        assert eager_loss(logits, target) is None
        loss = fused(logits, target)
    assert not is_fused(loss)
    assert_double_close(loss, expected)
    # And the mode leaves nothing behind.
    assert is_fused(fused(logits, target))


def test_why_not_fused_inside_torch_func(device):
    logits, target = (t.detach() for t in batch(device))
    reasons = []

    def loss(x):
        reasons.append(why_not_fused(x, target))
        # Not even of tensors that the transform does not follow.
        reasons.append(why_not_fused(logits, target))
        assert eager_loss(x, target) is eager_loss(logits, target) is None
        return fused(x, target)

    assert_double_close(
        torch.func.grad(loss)(logits), torch.func.grad(lambda x: torch_bce(x, target))(logits)
    )
    assert reasons == ["inside a torch.func transform"] * 2


@jit_is_deprecated
@sizes_are_traced
def test_why_not_fused_inside_a_trace(device):
    logits, target = (t.detach() for t in batch(device))
    reasons = []

    def loss(x):
        reasons.append(why_not_fused(x, target))
        assert eager_loss(x, target) is None
        return fused(x, target)

    torch.jit.trace(loss, logits, check_trace=False)
    assert reasons == ["inside torch.jit.trace"]


def test_a_dispatch_mode_sees_the_operator(device):
    logits, target = batch(device)
    with Passing() as mode:
        assert why_not_fused(logits, target) is None
        loss = fused(logits, target)
    assert is_fused(loss)
    assert torch.ops.fused_bce._binary_cross_entropy_with_logits_with_grad.default in mode.seen
    assert_double_close(loss, torch_bce(logits, target))


def test_why_not_fused_forgives_weights_where_no_gradient_is_taken(device):
    logits, target = batch(device)
    weight = torch.ones(4, dtype=DOUBLE, device=device, requires_grad=True)
    with torch.no_grad():
        assert why_not_fused(logits, target, weight, pos_weight=weight) is None
        assert eager_loss(logits, target, weight, weight) is not None
        assert_double_close(fused(logits, target, weight), torch_bce(logits, target, weight))


def test_reason_is_logged_once(caplog, device):
    coverage._logged.clear()
    logits, target = batch(device)
    negated = torch._neg_view(logits)
    with caplog.at_level(logging.INFO, logger="fused_bce"):
        fused(logits, target)
        assert caplog.records == []
        for _ in range(3):
            loss = fused(negated, target)
        with forward_ad.dual_level():
            fused(logits, target)
            fused(logits, target)
    assert_double_close(loss, torch_bce(-logits, target))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0] == f"not fused: {why_not_fused(negated, target)}"
    assert messages[1] == "not fused: inside forward-mode differentiation"
    assert {record.name for record in caplog.records} == {"fused_bce"}
    coverage._logged.clear()


def test_reason_is_logged_once_by_all_threads(caplog):
    coverage._logged.clear()
    negated = torch._neg_view(zeros("cpu"))
    together = threading.Barrier(8, timeout=HANGS)

    def work():
        together.wait()
        fused(negated, zeros("cpu"))

    with caplog.at_level(logging.INFO, logger="fused_bce"), ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work) for _ in range(8)]
        assert all(future.result() is None for future in futures)
    assert len(caplog.records) == 1
    coverage._logged.clear()


def test_nothing_is_logged_by_default(caplog, device):
    coverage._logged.clear()
    loss = fused(torch._neg_view(zeros(device)), zeros(device))
    assert caplog.records == []
    torch.testing.assert_close(loss, torch_bce(zeros(device), zeros(device)))


LIGHT_IMPORT = """
import sys, torch
before = set(sys.modules)
import fused_bce
from fused_bce.functional import binary_cross_entropy_with_logits, sigmoid_focal_loss
x, t = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4)
options = {"label_smoothing": 0.1, "ignore_index": 1, "validate_targets": True}
for loss in binary_cross_entropy_with_logits, sigmoid_focal_loss:
    loss(x, t, reduction="batchmean", **options).backward()
fused_bce.LinearBCEWithLogitsLoss(4, 3)(x, fused_bce.SparseTarget.identity(3)).backward()
fused_bce.SigLipLoss()(x, x, 1.0, 0.0).backward()
print(*set(sys.modules) - before)
"""
# Of torch, what takes less than a millisecond. Others are sympy by torch.fx.experimental's
# symbolic_shapes, torch._dynamo, torch._inductor, torch.distributed.tensor, torch.onnx: up to
# seconds, which only compiling or shards need.
LIGHT = {"torch.utils._device", "torch._subclasses.schema_check_mode"}


def test_import_is_light():
    """It adds nothing to what torch has imported, nor do the first calls."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_IMPORT], check=True, capture_output=True, text=True
    )
    added = set(done.stdout.split())
    assert "fused_bce.functional" in added
    assert {name for name in added if not name.startswith("fused_bce")} <= LIGHT
    assert "fused_bce.sharded" not in added


def test_build_info(device):
    info = fused_bce.build_info()
    assert info["version"] == fused_bce.__version__
    minor = info["torch"].split(".")[:2]  # a build runs with every patch release
    assert torch.__version__.split(".")[:2] == minor
    assert info["cpu_instruction_set"] in info["cpu_instruction_sets"]
    assert (info["cuda_archs"] is not None) or device == "cpu"


def test_an_attribute_before_the_buffer_of_its_name(device):
    """As nn.Module finds them"""
    logits, target = torch.randn(4, device=device), torch.ones(4, device=device)
    losses = []
    for kind in (BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss):
        module = kind(pos_weight=torch.tensor(2.0)).to(device)
        module.__dict__["pos_weight"] = torch.tensor(5.0, device=device)
        losses.append(module(logits, target))
    torch.testing.assert_close(*losses)
