"""Numbers as operands: none from Python that a compiled graph takes for a constant."""

import math

import torch
from torch import Tensor

from fused_bce.arguments import is_fake
from fused_bce.checks import check_label_smoothing
from fused_bce.coverage import are_shards
from fused_bce.dtypes import MEAN
from fused_bce.extras import Extras
from fused_bce.registrations import ops, whole

_UNSHARDED = (Tensor, torch.nn.Parameter)


def may_differ_from_zero(number: float) -> bool:
    """In compiled code: any number but a constant 0, so that one graph serves them all."""
    # Imported here: with SymPy it takes most of a second, and only compiling needs it.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(number == 0)


def is_constant(number: float) -> bool:
    """Whether an operator may take it: compiled code must be guarded by it."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def scalar_operand(number: float, beside: Tensor) -> Tensor:
    """A float64 tensor of one number, for an operator that also takes ``beside``.

    Compilers may make a constant of a float that an operator takes, or that becomes a tensor by
    torch.full, and use it for the next call's (pytorch 197889); a product is safe. Compiled code
    for a GPU has it there, where a captured graph finds it; else the host reads it.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=beside.device) * number
    if is_fake(beside):
        return beside.new_full((), number, dtype=torch.float64, device="cpu")
    return torch.scalar_tensor(number, dtype=torch.float64, device="cpu")


def changes_loss(extras: Extras) -> bool:
    """Whether the loss may not be that of the targets as they are."""
    return extras.ignore_index is not None or _smooths(extras.label_smoothing)


def _smooths(label_smoothing: float) -> bool:
    compiling = torch.compiler.is_compiling()
    return may_differ_from_zero(label_smoothing) if compiling else label_smoothing != 0


def smoothing_operand(label_smoothing: float, beside: Tensor) -> Tensor | None:
    """None where nothing is smoothed."""
    if not _smooths(label_smoothing):
        return None
    check_label_smoothing(label_smoothing)
    return scalar_operand(label_smoothing, beside)


def batch_size_operand(input: Tensor) -> Tensor:
    """What batchmean divides by. Of nothing it is nan, as a divisor of 0 would count as 1."""
    size = scalar_operand(input.size(0), input)
    return size.masked_fill(size == 0, math.nan)


def index_or_nan(ignore_index: int | float | None) -> tuple[int | None, bool]:
    """As the operators take it: an integer or None, and whether it is nan."""
    return (None, True) if isinstance(ignore_index, float) else (ignore_index, False)


def divisor_operand(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
    ignore_index: int | float | None,
) -> Tensor | None:
    """What mean divides by where that is not the number of elements at hand, as for a shard."""
    if type(input) in _UNSHARDED and type(target) in _UNSHARDED and weight is pos_weight is None:
        return None
    if reduction != MEAN or not are_shards(input, target, weight, pos_weight):
        return None
    if input.numel() == 0:
        return None
    if ignore_index is None:
        return torch.full((), input.numel(), dtype=torch.float64, device=input.device)
    return whole(ops._count_unignored(target.detach(), *index_or_nan(ignore_index)))
