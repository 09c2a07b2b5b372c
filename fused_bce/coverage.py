"""Which calls the kernels cover. Everything else goes to torch's own function."""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.overrides import has_torch_function_variadic
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from fused_bce import _C
from fused_bce.checks import (
    check_chunk_bytes,
    check_ignore_index_of_rows,
    check_label_smoothing,
    check_linear_operands,
    check_reduction_to_scalar,
    check_target_values,
)
from fused_bce.dtypes import FLOATS, INTEGERS, TARGETS
from fused_bce.linear_call import LinearCall
from fused_bce.registrations import constant_in_graphs, ensure_sharding
from fused_bce.sparse import SparseTarget, as_sparse

logger = logging.getLogger("fused_bce")

# What the kernels take of each operand of a pointwise loss. The fast path in csrc/eager_loss.cpp
# takes no more.
_COVERED = {
    "input": FLOATS,
    "target": TARGETS,
    "weight": TARGETS,
    "pos_weight": FLOATS | INTEGERS,
}

_keys = torch._C._dispatch_keys
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


# Whatever makes a tensor more than numbers in memory (sparse, nested, quantised, a lazy conjugate
# or negation, a wrapper of torch.func, a subclass with __torch_dispatch__) adds a dispatch key to
# those of an ordinary tensor.
def _plain_keys() -> int:
    with _disable_current_modes(), torch.inference_mode(False):
        return _keys(torch.empty(0, device="cpu")).raw_repr()


def _key_set(*keys: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in keys)
    return functools.reduce(lambda a, b: a | b, sets).raw_repr()


_CUDA_ARCHS = _C.build_info()["cuda_archs"]
_DEVICE_TYPES = ("cpu", "cuda") if _CUDA_ARCHS else ("cpu",)
_CUDA_KEYS = _key_set("CUDA", "AutogradCUDA", "AutocastCUDA")
_NOT_PLAIN = ~(_plain_keys() | (_CUDA_KEYS if _CUDA_ARCHS else 0))


def why_not_fused(
    input: Tensor,
    target: Tensor | SparseTarget,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
    linear_weight: Tensor | Sequence[Tensor] | None = None,
    linear_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> str | None:
    """The reason why this call would be left to torch's own function; None if it is fused.

    Takes the arguments of :func:`fused_bce.functional.binary_cross_entropy_with_logits`, in the
    same order, so that a call is passed on as it is; or with ``linear_weight`` those of
    :func:`fused_bce.functional.linear_binary_cross_entropy_with_logits`, by name. For a focal loss
    pass on ``inputs``, ``targets`` and ``weight``. Shapes and dtypes are as in these functions.

    Bad arguments are a reason, too; for a bad value it is the text of the loss's error. Labels of a
    :class:`fused_bce.SparseTarget` are read for that, and with ``validate_targets`` the targets.

    The first call that is not fused for some reason also logs it, once, to the logger
    ``fused_bce`` at level INFO.

    Example:
        >>> import torch
        >>> from fused_bce import why_not_fused
        >>> why_not_fused(torch.zeros(3), torch.zeros(3, dtype=torch.complex64), reduction="sum")
        'target has dtype torch.complex64'
    """
    legacy = size_average is not None or reduce is not None
    try:
        target = as_sparse(target)
        if linear_weight is not None:
            if legacy:
                raise TypeError("with linear_weight go no size_average and reduce")
            check_reduction_to_scalar(reduction)
            check_chunk_bytes(chunk_bytes)
            call = LinearCall(input, linear_weight, linear_bias, target, weight, pos_weight)
            check_linear_operands(call)
        else:
            if isinstance(target, SparseTarget):
                check_ignore_index_of_rows(ignore_index, target)
                target.check()
                target = target.to_dense() if validate_targets else target.like_dense()
            if not legacy and reduction != "batchmean":
                _reduction.get_enum(reduction)
        if label_smoothing != 0:
            check_label_smoothing(label_smoothing)
        check_target_values(target, ignore_index, validate_targets)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return str(error)
    if linear_weight is not None:
        return why_not_linear(call)
    reason = why_not_dense(input, cast(Tensor, target), weight, pos_weight)
    if reason is None and legacy and torch.compiler.is_compiling():
        return "size_average and reduce are not fused in compiled code"
    return reason


def why_not_dense(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> str | None:
    """The same for the loss of logits and a dense target."""
    reason = _why_not_here(input, target, weight, pos_weight)
    if reason is not None:
        return reason
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return "input or target is not a tensor"
    weights = ("weight", weight), ("pos_weight", pos_weight)
    operands = ("input", input), ("target", target), *weights
    compiling = torch.compiler.is_compiling()
    for name, tensor in operands:
        if tensor is None:
            continue
        reason = _why_not_ordinary(name, tensor, input, operands, compiling)
        if reason is not None:
            return reason
        if tensor.dtype not in _COVERED[name]:
            return f"{name} has dtype {tensor.dtype}"
    if input.shape != target.shape:
        return "input and target differ in size"
    return None if weight is pos_weight is None else _why_not_constant(weights)


def _why_not_ordinary(
    name: str, tensor: Tensor, input: Tensor, operands, compiling: bool
) -> str | None:
    """Why the kernels do not find the values of an operand."""
    if not isinstance(tensor, Tensor):
        return f"{name} is not a tensor"
    if compiling:
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"{name} is not an ordinary tensor"
        if tensor.device.type not in _DEVICE_TYPES:
            return f"{name} is on a device without a fused kernel"
    elif _keys(tensor).raw_repr() & _NOT_PLAIN and not are_shards(*(t for _, t in operands)):
        return _describe_unordinary(name, tensor)
    if tensor is not input and tensor.device != input.device and not _goes_anywhere(name, tensor):
        return f"{name} is on another device"
    if tensor.is_cuda and not compiling and not _C.has_kernels_for_gpu(tensor.get_device()):
        return f"this build has no kernels for the GPU, only for {_CUDA_ARCHS}"
    return None


def _goes_anywhere(name: str, tensor: Tensor) -> bool:
    """Whether it is a weight that is a scalar on the CPU."""
    return name in ("weight", "pos_weight") and tensor.is_cpu and tensor.dim() == 0


def _why_not_constant(operands) -> str | None:
    if torch.is_grad_enabled():
        for name, tensor in operands:
            if tensor is not None and tensor.requires_grad:
                return f"{name} requires a gradient"
    return None


def _why_not_here(*operands: Tensor | None) -> str | None:
    """What of the surroundings of a call the kernels do not cover."""
    if torch.compiler.is_compiling():
        return _why_not_in_graph(*operands)
    if has_torch_function_variadic(*operands) and not _only_default_device(*operands):
        return "a tensor subclass or mode overrides torch functions"
    if _functorch_level() is not None:
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if _tracing_state() is not None:
        return "inside torch.jit.trace"
    return None


def _why_not_in_graph(*operands: Tensor | None) -> str | None:
    # torch.export itself is such a mode.
    if torch.compiler.is_dynamo_compiling() and has_torch_function_variadic(*operands):
        return "a tensor subclass or mode overrides torch functions"
    if torch.onnx.is_in_onnx_export():
        return "inside torch.onnx.export"
    if _transformed():
        return "inside a torch.func transform or forward-mode differentiation"
    return None


@constant_in_graphs
def _transformed() -> bool:
    # Compiled code is guarded by the transforms that it was traced in.
    return _functorch_level() is not None or forward_ad._current_level >= 0


def why_not_linear(call: LinearCall) -> str | None:
    """The same for a linear layer and the loss of its logits."""
    target = call.target
    of_target: list[tuple[str, Tensor | None]]
    if isinstance(target, SparseTarget):
        of_target = [(name, getattr(target, name)) for name in ("indices", "offsets", "values")]
    else:
        of_target = [("target", target)]
    constants = [*of_target, ("weight", call.weight), ("pos_weight", call.pos_weight)]
    bias = ("linear_bias", call.linear_bias)
    for part in call.parts:
        layer = [("input", call.input), ("linear_weight", part)]
        reason = _why_not_operands([*layer, bias, *constants], layer)
        if reason is not None:
            return reason
    return _why_not_constant(constants)


def _why_not_operands(operands, layer) -> str | None:
    reason = _why_not_here(*(tensor for _, tensor in operands))
    if reason is not None:
        return reason
    compiling = torch.compiler.is_compiling()
    for name, tensor in operands:
        if tensor is not None:
            reason = _why_not_ordinary(name, tensor, layer[0][1], layer, compiling)
            if reason is not None:
                return reason
    return None


def _only_default_device(*arguments: Tensor | None) -> bool:
    """Whether the only override in force is torch.set_default_device, which changes no loss."""
    ordinary = (Tensor, torch.nn.Parameter, type(None))
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(a) in ordinary for a in arguments) and all(
        type(mode) is DeviceContext for mode in modes
    )


def has_integers(target: Any) -> bool:
    """Whether this is a target that the kernels take and torch's function does not."""
    if torch.compiler.is_compiling():
        return target.dtype in TARGETS - FLOATS
    with torch._C.DisableTorchFunction():  # a subclass would see its dtype being asked for
        return isinstance(target, Tensor) and target.dtype in TARGETS - FLOATS


def are_shards(*tensors: Tensor | None) -> bool:
    """Whether these are DTensors, whose shards the kernels compute on. Where DTensor takes other
    tensors for replicated ones, one of them is enough."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    of_dtensors = [isinstance(t, module.DTensor) for t in tensors if t is not None]
    if not (any(of_dtensors) if _replicates_implicitly() else all(of_dtensors)):
        return False
    ensure_sharding()
    return True


@constant_in_graphs
def _replicates_implicitly() -> bool:
    dispatcher = sys.modules["torch.distributed.tensor"].DTensor._op_dispatcher
    return dispatcher._allow_implicit_replication


def _describe_unordinary(name: str, tensor: Tensor) -> str:
    if tensor.is_cuda and not _CUDA_ARCHS:
        return f"{name} is on a GPU, and this build has no CUDA kernels"
    return f"{name} is not an ordinary tensor on a device with a fused kernel: {_keys(tensor)}"


# By reason, who logs it.
_logged: dict = {}


def log_once(reason: str | None) -> None:
    # Of threads that come at the same time, the one whose object is in the dictionary.
    if reason not in _logged and _logged.setdefault(reason, own := object()) is own:
        logger.info("not fused: %s", reason)
