"""Errors for what the losses take beyond torch's."""

import contextlib
import math
import operator
import sys
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from fused_bce.arguments import (
    as_integer,
    autocast_casts,
    check_tensor,
    describe,
    is_fake,
    is_traced_by_proxies,
)
from fused_bce.dtypes import FLOATS
from fused_bce.linear_call import LinearCall
from fused_bce.registrations import constant_in_graphs
from fused_bce.sparse import SparseTarget

_MOST_IGNORED = 2**24  # float32 holds all integers up to there
_OPTIONAL = ("linear_bias", "weight", "pos_weight")
_SMOOTHING = "label_smoothing must lie in [0, 1)"


def check_label_smoothing(label_smoothing: float) -> None:
    if isinstance(label_smoothing, Tensor):
        raise TypeError("label_smoothing must be a number, not a tensor")
    if not torch.jit.is_scripting():  # noqa: SIM102, it compiles what is not below this test alone
        if torch.compiler.is_compiling():
            return _check_label_smoothing_in_graph(label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), not be {label_smoothing}")


def check_reduction(reduction: str, allowed: tuple[str, ...]) -> None:
    if reduction not in allowed:
        raise ValueError(f"{reduction} is not a valid value for reduction")  # torch's words


def check_reduction_to_scalar(reduction: str) -> None:
    if reduction == "none":
        raise ValueError(
            "reduction 'none' would return a matrix as large as the logits, which this loss is "
            "there to avoid; for it call binary_cross_entropy_with_logits"
        )
    check_reduction(reduction, ("mean", "sum", "batchmean"))


def check_chunk_bytes(chunk_bytes: int | None) -> int | None:
    """The same as an int of Python, or None."""
    if chunk_bytes is None:
        return None
    chunk_bytes = as_integer("chunk_bytes", chunk_bytes)
    if not 1 <= chunk_bytes < 2**63:
        raise ValueError(f"chunk_bytes must be positive and less than 2**63, not {chunk_bytes}")
    return chunk_bytes


def check_parts(parts: int, num_labels: int) -> int:
    """The same as an int of Python."""
    parts = as_integer("parts", parts)
    if not 1 <= parts <= max(num_labels, 1):
        raise ValueError(
            f"parts must lie between 1 and the number of labels, {num_labels}, not be {parts}"
        )
    return parts


def check_options(label_smoothing: float, ignore_index: object) -> int | float | None:
    """What the constructors of all losses check. Returns ``ignore_index`` as an int or nan."""
    check_label_smoothing(label_smoothing)
    return None if ignore_index is None else check_ignore_index(ignore_index, None)


def _check_label_smoothing_in_graph(label_smoothing: float) -> None:
    """A number that the graph itself computes is checked when it runs."""
    torch._check_value(label_smoothing >= 0.0, lambda: _SMOOTHING)
    torch._check_value(label_smoothing < 1.0, lambda: _SMOOTHING)


def check_ignore_index(ignore_index: object, target: Tensor | None) -> int | float:
    """The same as an int, or as a float if it is nan."""
    if isinstance(ignore_index, Real) and ignore_index != ignore_index:
        if isinstance(target, Tensor) and not target.is_floating_point():
            raise ValueError(f"ignore_index nan is no value that {target.dtype} can hold")
        return math.nan
    index = _as_index(ignore_index)
    if not -_MOST_IGNORED < index < _MOST_IGNORED:
        raise ValueError(f"ignore_index must lie between -2**24 and 2**24, not be {index}")
    if isinstance(target, Tensor) and not _holds(target.dtype, index):
        raise ValueError(f"ignore_index {index} is no value that {target.dtype} can hold")
    return index


def check_ignore_index_of_rows(ignore_index: object, target: SparseTarget) -> float | None:
    """Of a SparseTarget only values that are nan can be ignored: any other may be left out."""
    if ignore_index is None:
        return None
    index = check_ignore_index(ignore_index, target.values)
    if target.values is None or not isinstance(index, float):
        raise ValueError(
            "ignore_index goes with dense targets, and nan with the values of a SparseTarget: "
            "leave a label out instead"
        )
    return index


def check_target_values(
    target: Tensor | SparseTarget, ignore_index: object, validate_targets: bool
) -> int | float | None:
    """Raises what the losses raise for the values of a target. Returns ``ignore_index`` as an int,
    or as a float if it is nan."""
    values: Tensor | None
    if isinstance(target, SparseTarget):
        target.check()
        index = check_ignore_index_of_rows(ignore_index, target)
        values = target.read_values() if validate_targets else None
    else:
        index = None if ignore_index is None else check_ignore_index(ignore_index, target)
        values = target if validate_targets else None
    if values is not None:
        check_targets(values, index)
    return index


def _as_index(value: object) -> int:
    if not isinstance(value, bool | Tensor):
        with contextlib.suppress(TypeError):
            return operator.index(value)  # type: ignore[arg-type]
    raise TypeError(f"ignore_index must be an integer, nan or None, not {value!r}")


def _holds(dtype: torch.dtype, value: int) -> bool:
    if dtype is torch.bool:
        return value in (0, 1)
    if dtype.is_floating_point or dtype.is_complex:
        info = torch.finfo(dtype)
        odd_part = value // (value & -value) if value else 0
        return abs(odd_part) < 2 / info.eps and abs(value) <= info.max
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def check_linear_operands(call: LinearCall) -> None:
    """Raises what a linear layer and the loss of its logits raise, by whatever they are computed,
    except for the values of a target."""
    weights = {"weight": call.weight, "pos_weight": call.pos_weight}
    check_layer(call)
    _check_types(call.target, **weights)
    if not torch.jit.is_tracing():
        _check_sizes(call.input.shape[:-1], call.num_labels, call.target, weights)


def check_layer(call: LinearCall) -> None:
    """The same for the input and the layer alone."""
    check_tensor("input", call.input)
    weight = call.linear_weight
    in_parts = isinstance(weight, list | tuple) and len(weight) > 0
    if not all(isinstance(part, Tensor) for part in (weight if in_parts else [weight])):
        raise TypeError(f"linear_weight must be a tensor, not {describe(weight)}")
    if call.linear_bias is not None:
        check_tensor("linear_bias", call.linear_bias)
    if not torch.jit.is_tracing():  # which would make constants of the answers, and warn
        _check_layer(call.input, call.parts, call.linear_bias)


def _check_layer(input: Tensor, parts: Sequence[Tensor], linear_bias: Tensor | None) -> None:
    for part in parts:
        if part.dim() != 2 or part.shape[1] != parts[0].shape[1]:
            raise RuntimeError(
                f"linear_weight must be of shape (C, F), in parts or whole, not {_size(part)}"
            )
    num_labels, features = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if input.dim() == 0 or input.shape[-1] != features:
        raise RuntimeError(
            f"input must be of shape (*, {features}), as linear_weight has it, not {_size(input)}"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != (num_labels,):
        raise RuntimeError(
            f"linear_bias must be of shape ({num_labels},), not {_size(linear_bias)}"
        )
    check_floats("input", input)
    for name, t in (*(("linear_weight", part) for part in parts), ("linear_bias", linear_bias)):
        if t is not None and t.dtype is not input.dtype and not autocast_casts(input, t):
            raise RuntimeError(f"input has dtype {input.dtype} but {name} {t.dtype}")


def check_logits(
    logits: Tensor,
    target: Tensor | SparseTarget,
    weight: Tensor | None,
    pos_weight: Tensor | None,
) -> None:
    """The same for logits that some layer has computed."""
    weights = {"weight": weight, "pos_weight": pos_weight}
    _check_types(target, logits=logits, **weights)
    if torch.jit.is_tracing():
        return
    if logits.dim() == 0:
        raise RuntimeError("logits must be of shape (*, C), not one number")
    _check_sizes(logits.shape[:-1], logits.shape[-1], target, weights)
    check_floats("logits", logits)


def _check_types(target: Tensor | SparseTarget, **tensors: Tensor | None) -> None:
    if isinstance(target, SparseTarget):
        target.check_structure()
    elif not isinstance(target, Tensor):
        raise TypeError(f"target must be a SparseTarget or a tensor, not {type(target).__name__}")
    for name, t in tensors.items():
        if t is not None or name not in _OPTIONAL:
            check_tensor(name, t)


def _check_sizes(
    leading: tuple[int, ...],
    num_labels: int,
    target: Tensor | SparseTarget,
    weights: dict[str, Tensor | None],
) -> None:
    rows = 1
    for size in leading:  # not numel, which fixes the sizes in a graph
        rows = rows * size
    _check_target_size(leading, num_labels, rows, target)
    for name, t in weights.items():
        if t is not None:
            _check_weight_size(name, t, leading, rows, num_labels)


def _check_target_size(
    leading: tuple[int, ...], num_labels: int, rows: int, target: Tensor | SparseTarget
) -> None:
    if isinstance(target, SparseTarget):
        if target.offsets.shape[0] - 1 != rows or target.num_labels != num_labels:
            raise ValueError(
                f"Target size ({tuple(target.shape)}) must be that of the logits "
                f"({(rows, num_labels)})"
            )
        return
    logits_size = (*leading, num_labels)
    if tuple(target.shape) != logits_size:
        hint = ""
        if not target.is_floating_point() and target.shape[:-1] == leading:
            hint = "; label numbers become a target by SparseTarget.from_padded"
        raise ValueError(
            f"Target size ({_size(target)}) must be that of the logits ({logits_size}){hint}"
        )


def _check_weight_size(
    name: str, weight: Tensor, leading: tuple[int, ...], rows: int, num_labels: int
) -> None:
    *others, last = _size(weight) if weight.dim() > 0 else (1,)
    dims = max(len(leading), 1)  # a row alone may have a weight (1, 1)
    if len(others) <= dims:
        if all(size == 1 for size in others) and (last == 1 or last == num_labels):
            return
        own = leading[len(leading) - len(others) :]
        if last == 1 and all(n == 1 or n == of for n, of in zip(others, own, strict=False)):
            return
    if last == 1 and others == [rows]:
        return
    shape = ", ".join(map(str, (*leading, 1)))
    raise RuntimeError(
        f"{name} has shape {list(weight.shape)}, but must be one number, one for each of "
        f"{num_labels} labels, or of shape ({shape}), one for each row: there is no matrix of "
        "logits that it could weight"
    )


def check_floats(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise NotImplementedError(
            f"{name} must be float16, bfloat16, float32 or float64, not {t.dtype}"
        )


def check_k(k: int, num_labels: int) -> int:
    """The same as an int of Python."""
    k = as_integer("k", k)
    if not torch.jit.is_tracing() and not 0 <= k <= num_labels:
        raise RuntimeError(
            f"k must lie between 0 and the number of labels, {num_labels}, not be {k}"
        )
    return k


def _size(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def check_targets(target: Tensor, ignore_index: int | float | None) -> None:
    """Raises ValueError for the first target outside [0, 1], nan included. Waits for a GPU.

    When compiled or traced it raises RuntimeError, without the value, from an assertion in the
    graph. Where a tensor has no numbers, and in a compiled vmap, for which torch has no assertion,
    nothing is checked.
    """
    if torch.compiler.is_compiling():
        if not _in_vmap():
            torch._assert_async(_all_valid(target, ignore_index), _OUTSIDE)
        return
    target = _numbers_of(target)
    if is_traced_by_proxies():
        torch._assert_async(_all_valid(target, ignore_index), _OUTSIDE)
        return
    if target.is_meta or is_fake(target):
        return
    invalid = is_invalid(target, ignore_index)
    if invalid.any():
        place = invalid.nonzero()[0].tolist() or ""
        raise ValueError(f"target{place} is {target[invalid][0].item()}, outside [0, 1]")


@constant_in_graphs
def _in_vmap() -> bool:
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Vmap for level in stack)


_OUTSIDE = "a target lies outside [0, 1]"


def _all_valid(target: Tensor, ignore_index: int | float | None) -> Tensor:
    return ~is_invalid(target, ignore_index).any()


def is_invalid(target: Tensor, ignore_index: int | float | None) -> Tensor:
    invalid = ~((target >= 0) & (target <= 1))
    return invalid if ignore_index is None else invalid & ~is_ignored(target, ignore_index)


def is_ignored(target: Tensor, ignore_index: int | float) -> Tensor:
    return target.isnan() if isinstance(ignore_index, float) else target == ignore_index


def _numbers_of(target: Tensor) -> Tensor:
    """The tensor below the wrappers of torch.func, or this process's shard."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(target):
        target = functorch.get_unwrapped(target)
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(target, distributed.DTensor):
        target = target.to_local()
    return target.detach()
