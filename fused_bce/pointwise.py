"""A call of any pointwise loss: its checks, whether the kernels cover it, what computes it."""

import functools
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from fused_bce import _C
from fused_bce.checks import (
    check_ignore_index_of_rows,
    check_reduction,
    check_target_values,
)
from fused_bce.coverage import log_once, why_not_dense
from fused_bce.dtypes import REDUCTIONS, number_of_reduction
from fused_bce.extras import Extras, HasExtras
from fused_bce.registrations import call_composite, ops
from fused_bce.scalars import (
    batch_size_operand,
    divisor_operand,
    index_or_nan,
    is_constant,
    scalar_operand,
    smoothing_operand,
)
from fused_bce.sparse import SparseTarget, as_sparse


class Parameter(NamedTuple):
    """A number that a loss has of its own: csrc/problem.h."""

    name: str
    least: float
    most: float
    other: float

    def why_not(self, number: float | Tensor) -> str | None:
        """Why the kernels do not take it."""
        if isinstance(number, Tensor):
            return f"{self.name} is a tensor"
        if not is_constant(number):
            return f"{self.name} varies in compiled code"
        if not isinstance(number, Real):
            raise TypeError(f"{self.name} must be a number or a tensor, not {number!r}")
        if not self.least <= number <= self.most and number != self.other:
            return f"{self.name} is out of the range of the kernels"
        return None

    def check_of_call(self, number: float | Tensor) -> None:
        """A call may have a tensor in its place, and a number that varies in compiled code."""
        if not isinstance(number, Tensor) and is_constant(number):
            self.check(number)

    def check(self, number: float) -> None:
        """For the constructors of modules."""
        if not isinstance(number, Real):
            what = "a tensor" if isinstance(number, Tensor) else repr(number)
            raise TypeError(f"{self.name} must be a number, not {what}")
        if not self.least <= number <= self.most and number != self.other:
            has_other = self.other != self.least
            not_be = f" or be {self.other:g}, not" if has_other else ", not be"
            most = f"{self.most:g}".replace("e+0", "e")
            raise ValueError(f"{self.name} must lie in [{self.least:g}, {most}]{not_be} {number}")


class PointwiseLoss(NamedTuple):
    """A loss of single elements: what computes it, and what it takes of its own.

    Its operators take the logits, the target, the weight, its own arguments, which are a pos_weight
    or none and its parameters, and what all losses take.
    """

    operator: Callable[..., Tensor]
    composite: torch._ops.OpOverload
    takes_pos_weight: bool
    parameters: tuple[Parameter, ...]
    # Computes calls that the kernels do not cover: see compute_composite.
    fallback: Callable[..., Tensor]

    @property
    def constants(self) -> list[str]:
        """What torch.jit.script takes for constants of the module."""
        return [*HasExtras.__constants__, *(parameter.name for parameter in self.parameters)]

    @property
    def own_names(self) -> list[str]:
        """Of what its operators take between the weight and what all losses take."""
        pos_weight = ["pos_weight"] if self.takes_pos_weight else []
        return pos_weight + [parameter.name for parameter in self.parameters]

    def own(self, pos_weight: Tensor | None, numbers: tuple) -> tuple:
        return (pos_weight, *numbers) if self.takes_pos_weight else numbers

    def check_numbers(self, numbers: tuple) -> None:
        """Of a call."""
        for parameter, number in zip(self.parameters, numbers, strict=True):
            parameter.check_of_call(number)


def find_loss(name: str, fallback: Callable[..., Tensor] | None = None) -> PointwiseLoss:
    """The loss of csrc/formulas that is called so."""
    for found, takes_pos_weight, parameters in _C.losses():
        if found == name:
            return PointwiseLoss(
                getattr(ops, name).default,
                getattr(ops, f"_{name}_composite").default,
                takes_pos_weight,
                tuple(Parameter(*p) for p in parameters),
                fallback or compute_composite,
            )
    raise LookupError(name)


def evaluate(
    loss: PointwiseLoss,
    input: Tensor,
    target: Tensor | SparseTarget,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    numbers: tuple,
    reduction: str,
    extras: Extras,
    *,
    why_not: str | None = None,
) -> Tensor:
    """The loss of a call, whose arguments are checked here.

    Args:
        numbers: for the loss's parameters, in their order.
        why_not: a reason of the loss's own why the kernels do not cover the call.
    """
    if isinstance(target, SparseTarget):
        target = _make_dense(target, extras)
    reason = why_not_dense(input, target, weight, pos_weight)
    if reason is not None and isinstance(sparse := as_sparse(target), SparseTarget):
        target = _make_dense(sparse, extras)
        reason = why_not_dense(input, target, weight, pos_weight)
    index = check_target_values(target, extras.ignore_index, extras.validate_targets)
    smoothing = smoothing_operand(extras.label_smoothing, input)
    reason = reason or why_not or _why_not_numbers(loss, numbers)
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_once(reason)
        extras = extras._replace(ignore_index=index)
        return loss.fallback(loss, input, target, weight, pos_weight, numbers, reduction, extras)
    number = number_of_reduction(reduction)
    if reduction == "batchmean":
        divisor: Tensor | None = batch_size_operand(input)
    else:
        divisor = divisor_operand(input, target, weight, pos_weight, number, index)
    options: tuple = (None, smoothing, *index_or_nan(index), divisor, extras.recompute)
    if all(option is None or option is False for option in options):
        options = ()  # What a call leaves out need not be parsed.
    own = loss.own(pos_weight, numbers)
    return loss.operator(input, target, weight, *own, number, *options)


def _why_not_numbers(loss: PointwiseLoss, numbers: tuple) -> str | None:
    for parameter, number in zip(loss.parameters, numbers, strict=True):
        if (reason := parameter.why_not(number)) is not None:
            return reason
    return None


def _make_dense(target: SparseTarget, extras: Extras) -> Tensor:
    check_ignore_index_of_rows(extras.ignore_index, target)
    return target.to_dense()


def compute_composite(
    loss: PointwiseLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    numbers: tuple,
    reduction: str,
    extras: Extras,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss as ATen operations.

    Args:
        dtype: of the loss, but for autocast; None: the widest of logits, target and whatever tensor
            of several elements stands for a number.
    """
    given = {"input": input, "target": target, "weight": weight, "pos_weight": pos_weight}
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("input", "target")):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if dtype is None:
        dtype = torch.promote_types(input.dtype, target.dtype)
    dtype = _with_autocast(dtype, input)
    tensors: list[Tensor | None] = [None] * 4
    constants = []
    for i, number in enumerate(numbers):
        is_plain = not isinstance(number, Tensor) and is_constant(number)
        constants.append(number if is_plain else 0.0)
        if not is_plain:
            tensors[i] = number if isinstance(number, Tensor) else scalar_operand(number, input)
            if isinstance(number, Tensor) and number.dim() > 0:
                dtype = torch.promote_types(dtype, number.dtype)
    compute: Callable[..., Tensor] = loss.composite
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        compute = functools.partial(call_composite, loss.composite)
    return compute(
        *tensors,
        input,
        target,
        weight,
        *loss.own(pos_weight, tuple(constants)),
        number_of_reduction(reduction),
        dtype,
        smoothing_operand(extras.label_smoothing, input),
        *index_or_nan(extras.ignore_index),
        batch_size_operand(input) if reduction == "batchmean" else None,
    )


def _with_autocast(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    # The meta device has no autocast to ask for.
    widened = not input.is_meta and torch.is_autocast_enabled(input.device.type)
    return torch.promote_types(dtype, torch.float32) if widened else dtype


class PointwiseModule(HasExtras, _WeightedLoss):
    """The module of a pointwise loss, which has the loss's own arguments as attributes."""

    def __init__(
        self,
        loss: PointwiseLoss,
        numbers: tuple,
        reduction: str,
        extras: Extras,
        weight: Tensor | None,
        pos_weight: Tensor | None = None,
    ):
        super().__init__(weight, reduction=reduction)
        check_reduction(reduction, tuple(REDUCTIONS))
        if loss.takes_pos_weight:
            self.register_buffer("pos_weight", pos_weight)
        for parameter, number in zip(loss.parameters, numbers, strict=True):
            if number is not None:
                # Before a parameter of a model, that was to be trained, would become a number
                parameter.check(number)
                # As torch.jit.script has it
                number = number if isinstance(number, bool) else float(number)
            setattr(self, parameter.name, number)
        self._set_extras(extras)

    def extra_repr(self) -> str:
        names = [name for name in self.__constants__ if name not in HasExtras.__constants__]
        return self._describe((*names, "reduction"))
