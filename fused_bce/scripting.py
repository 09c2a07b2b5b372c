"""TorchScript of the pointwise losses.

torch.jit.script compiles no function that has keyword-only arguments with defaults. What it
compiles in the place of one, and the call of one by its module, follow from its signature: both are
made of that here, as source text, which torch.jit.script wants to see.
"""

import inspect
import linecache
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_bce.checks import check_label_smoothing, is_invalid
from fused_bce.pointwise import PointwiseLoss
from fused_bce.sparse import SparseTarget

# What TorchScript takes where Python takes these
_ANNOTATIONS: dict[Any, Any] = {
    Tensor | SparseTarget: Tensor,
    float | Tensor: int | float,
    float | Tensor | None: int | float | None,
}


def make_scriptable(function: Callable[..., Tensor], loss: PointwiseLoss) -> None:
    """Has torch.jit.script compile a loss's composite operator in the place of its function, which
    has the operator's name."""
    signature = inspect.signature(function)
    parameters = {
        name: parameter.replace(
            kind=inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_ANNOTATIONS.get(parameter.annotation, parameter.annotation),
        )
        for name, parameter in signature.parameters.items()
    }
    input, target, *_ = parameters
    operands = ", ".join([input, target, "weight", *_pass_on(parameters, loss.own_names)])
    name = function.__name__
    scripted = _define(
        f"{name} in TorchScript",
        name,
        f"{signature.replace(parameters=[*parameters.values()])}:\n"
        f"    options = scripted_options({input}, {target}, reduction, label_smoothing,"
        " ignore_index, validate_targets)\n"
        f"    return torch.ops.fused_bce._{name}_composite("
        f"None, None, None, None, {operands}, *options)\n",
        {"scripted_options": scripted_options, "as_float": as_float},
    )
    function.__prepare_scriptable__ = lambda: scripted  # type: ignore[attr-defined]


def _pass_on(parameters: dict[str, inspect.Parameter], names: list[str]) -> Iterator[str]:
    """As the operator takes them. A number that may be None is then the one before it."""
    for i, name in enumerate(names):
        annotation = parameters[name].annotation
        if annotation == int | float | None:
            yield f"as_float({names[i - 1]} if {name} is None else {name})"
        elif annotation == int | float:
            yield f"as_float({name})"
        else:
            yield f"float({name})" if annotation is bool else name


def make_forward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method of a module that calls the function of its loss with the module's attributes."""
    _, _, *names = inspect.signature(function).parameters
    arguments = ", ".join(f"{name}=self.{name}" for name in names)
    return _define(
        f"{function.__name__} of a module",
        "forward",
        "(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:\n"
        f"    return {function.__name__}(input, target, {arguments})\n",
        {function.__name__: function},
    )


def _define(title: str, name: str, rest: str, variables: dict[str, Any]) -> Callable[..., Tensor]:
    """A function whose source torch.jit.script, debuggers and tracebacks find by its title."""
    source = f"def {name}{rest}"
    file = f"<fused_bce: {title}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    variables = variables | {"__name__": __name__, "torch": torch}
    exec(compile(source, file, "exec"), variables)
    return variables[name]


def scripted_options(
    input: Tensor,
    target: Tensor,
    reduction: str,
    label_smoothing: float,
    ignore_index: int | float | None,
    validate_targets: bool,
) -> tuple[int, torch.dtype, Tensor | None, int | None, bool, Tensor | None]:
    """What a composite operator takes last, of a call in TorchScript: the number of the reduction,
    the dtype of the loss, the smoothing, the ignored index, whether nan is ignored, the divisor."""
    check_label_smoothing(label_smoothing)
    if validate_targets and bool(is_invalid(target, ignore_index).any()):
        raise ValueError("a target lies outside [0, 1]")
    if reduction not in ["none", "mean", "sum", "batchmean"]:
        raise ValueError(reduction + " is not a valid value for reduction")
    smoothing: Tensor | None = None
    if label_smoothing != 0.0:
        smoothing = torch.scalar_tensor(label_smoothing, dtype=torch.float64)
    ignores_nan = isinstance(ignore_index, float)  # first: saved code has a new type after the next
    index: int | None = None
    if isinstance(ignore_index, int):
        index = ignore_index
    divisor: Tensor | None = None
    if reduction == "batchmean":
        size = float(input.size(0))
        divisor = torch.scalar_tensor(math.nan if size == 0.0 else size, dtype=torch.float64)
    number = 1 if reduction == "batchmean" else ["none", "mean", "sum"].index(reduction)
    dtype = torch.promote_types(input.dtype, target.dtype)
    return number, dtype, smoothing, index, ignores_nan, divisor


def as_float(number: int | float) -> float:
    """In TorchScript."""
    return float(number) if isinstance(number, int) else number
