"""The layers of the linear head, with the weight whole or in parts."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter, ParameterList
from torch.nn.modules.module import _global_forward_hooks

from fused_bce.dtypes import FLOATS


class LinearWithLoss(torch.nn.Linear):
    """A linear layer whose forward is also the loss of its logits: what hooks the forward of the
    module that owns a weight, to bring it from elsewhere for example, then sees it."""

    def forward(self, input: Tensor, target: Any = None, loss: Callable | None = None) -> Tensor:
        if loss is None:
            return super().forward(input)
        return loss(input, self.weight, target, linear_bias=self.bias)

    def share(self, layer: torch.nn.Linear) -> None:
        self.weight, self.bias = layer.weight, layer.bias

    def _load_from_state_dict(self, state_dict, prefix, *others):
        _convert_weight(state_dict, prefix, {"weight": self.weight}, others[-1])
        super()._load_from_state_dict(state_dict, prefix, *others)


class LinearInParts(torch.nn.Module):
    """The same with blocks of labels as parameters of their own, each with its own gradient.

    Attributes:
        weight: a ParameterList of (C_i, F), in the order of the labels.
        bias: (C,), or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: int,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        sizes = sizes_of_parts(out_features, parts)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = ParameterList(
            Parameter(torch.empty(size, in_features, **like)) for size in sizes
        )
        self.bias = Parameter(torch.empty(out_features, **like)) if bias else None
        self._versions: list[int] = []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Linear."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, target: Any = None, loss: Callable | None = None) -> Tensor:
        if loss is None:
            # Not of the joined weight, which is larger than the logits of a few rows.
            logits = torch.cat([F.linear(input, part) for part in self.weight], dim=-1)
            return logits if self.bias is None else logits + self.bias
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._versions = self._read_versions()
        return loss(input, list(self.weight), target, linear_bias=self.bias)

    def share(self, layer: torch.nn.Linear) -> None:
        """The parts are parameters of their own, in the memory of the layer's weight."""
        # Each with a version counter of its own, which views of one tensor would share: autograd
        # would take a step of one part for an edit of the others.
        self.weight = ParameterList(
            Parameter(layer.weight.data[begin:end], requires_grad=layer.weight.requires_grad)
            for begin, end in ranges_of([*self.weight])
        )
        self.bias = layer.bias

    def updated_parts(self) -> list[int]:
        """The numbers of the parts that were written to since the last loss was computed.

        Where an optimizer steps for each part in backward, and backward fails halfway, these have
        made the step and the others have not. Parts are stepped from the last to the first.
        """
        changes = zip(self._versions, self._read_versions(), strict=False)
        return [i for i, (before, now) in enumerate(changes) if before != now]

    def _read_versions(self) -> list[int]:
        return [part._version for part in self.weight]

    def _load_from_state_dict(self, state_dict, prefix, *others):
        own = {f"weight.{i}": part for i, part in enumerate(self.weight)}
        _convert_weight(state_dict, prefix, own, others[-1])
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"parts={len(self.weight)}, bias={self.bias is not None}"
        )


def check_linear_layer(layer: object) -> None:
    """Raises for what has no weight that a head could share."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if not isinstance(layer, torch.nn.Linear):
        raise TypeError(
            f"layer must be a torch.nn.Linear, not {kind}; set head.linear to it instead"
        )
    weight = layer.weight
    if type(layer).forward not in (torch.nn.Linear.forward, LinearWithLoss.forward):
        reason = f"{kind} computes its logits in its own way"
    elif type(weight) not in (Tensor, Parameter) and not hasattr(weight, "to_local"):
        reason = f"its weight is a {type(weight).__name__}"
    elif weight.dtype not in FLOATS:
        reason = f"its weight is of {weight.dtype}"
    else:
        return
    raise TypeError(
        f"{reason}, as that of a quantized layer, so a head cannot share it: set head.linear to "
        "the layer instead, and the loss is that of the logits which it returns"
    )


def sizes_of_parts(size: int, parts: int) -> list[int]:
    """Differing by at most 1, the larger ones in front."""
    small, larger = divmod(size, parts)
    return [small + (part < larger) for part in range(parts)]


def ranges_of(parts: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where the rows of each part begin and end in the whole."""
    return list(pairwise(accumulate((part.shape[0] for part in parts), initial=0)))


def _convert_weight(state_dict, prefix: str, own: dict[str, Tensor], errors: list[str]) -> None:
    """Gives a state_dict the weight as this layer has it: whole, or in other parts."""
    names = ["weight"] if f"{prefix}weight" in state_dict else []
    while f"{prefix}weight.{len(names)}" in state_dict:
        names.append(f"weight.{len(names)}")
    if not names or (names == list(own) and len(own) == 1):
        return
    given = [state_dict.pop(prefix + name) for name in names]
    sizes = [
        (sum(len(part) for part in parts), parts[0].shape[1:]) for parts in (given, [*own.values()])
    ]
    if sizes[0] != sizes[1] or len({part.shape[1:] for part in given}) > 1:
        shapes = [tuple(part.shape) for part in given]
        errors.append(
            f"size mismatch for {prefix}weight: parts of shapes {shapes} in the checkpoint are no "
            f"weight of shape {(sizes[1][0], *sizes[1][1])}"
        )
        state_dict.update({prefix + name: part.detach() for name, part in own.items()})
        return
    for (name, _), bounds in zip(own.items(), ranges_of([*own.values()]), strict=True):
        state_dict[prefix + name] = _take_rows(given, *bounds)


def _take_rows(parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
    pieces = [
        part[max(begin - first, 0) : end - first]
        for part, (first, last) in zip(parts, ranges_of(parts), strict=True)
        if first < end and begin < last
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


# Whose wrappers pass on calls, and whose hooks move tensors or look at them, but compute nothing
_WRAPPERS = ("torch.distributed.", "torch.nn.parallel.distributed.", "torch._dynamo.")
_HOOKS = ("torch.distributed.", "torch.utils.", "accelerate.", "deepspeed.")
_FORWARDS = (LinearWithLoss.forward, LinearInParts.forward)


def why_not_computed_by(layer: torch.nn.Module) -> str | None:
    """Why the forward of this layer must return the logits, instead of their loss; None if it need
    not."""
    while not isinstance(layer, LinearWithLoss) and _is_from(_WRAPPERS, type(layer)):
        (layer,) = layer.children()
    if getattr(type(layer), "forward", None) not in _FORWARDS:
        return f"the layer of the head is a {type(layer).__name__}"
    # They expect logits, or the gradient of logits.
    hooks = [
        *layer._forward_hooks.values(),
        *layer._backward_hooks.values(),
        *layer._backward_pre_hooks.values(),
        *_global_forward_hooks.values(),
    ]
    if not all(_is_from(_HOOKS, hook) for hook in hooks):
        return "the layer of the head has hooks"
    if "forward" in layer.__dict__ and not _is_from(_HOOKS, layer.forward):
        return "the forward of the head's layer was replaced"
    return None


def _is_from(packages: tuple[str, ...], function: Any) -> bool:
    module = getattr(getattr(function, "func", function), "__module__", None)  # of a partial
    return f"{module}.".startswith(packages)
