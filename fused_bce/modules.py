"""The loss as a module."""

import torch
from torch import Tensor
from torch.fx import Proxy

from fused_bce.extras import Extras, HasExtras
from fused_bce.functional import binary_cross_entropy_with_logits


class BCEWithLogitsLoss(HasExtras, torch.nn.BCEWithLogitsLoss):
    """Binary cross entropy between logits and targets: a drop-in for
    :class:`torch.nn.BCEWithLogitsLoss`, computed with its gradient in one pass.

    Buffers, ``state_dict`` and ``repr`` are those of the base class, and so is the constructor but
    for the keywords that the base class does not have.

    The loss of an element with logit x and target t, where softplus(x) = log(1 + exp(x)), is ::

        weight * (pos_weight * t * softplus(-x) + (1 - t) * softplus(x))

    Args:
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        size_average, reduce: deprecated, see ``reduction``.
        reduction: ``"mean"`` (over all elements, the default), ``"batchmean"`` (the sum over the
            size of the first dimension), ``"sum"`` or ``"none"``.
        pos_weight: weight of positive targets; broadcasts into the shape of the logits, for
            example ``(C,)`` for logits ``(N, C)`` and ``(C, 1, 1)`` for ``(N, C, H, W)``.
        label_smoothing, ignore_index, validate_targets, recompute: see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.

    Shape:
        - input: logits, any shape, float16, bfloat16, float32 or float64.
        - target: the same shape, any of these dtypes, bool or integers, usually in [0, 1] (not
          checked).
        - output: one number, or the shape of the logits for ``"none"``; the dtype of the target, or
          of the logits if the target is of integers; float32 under autocast, unless that is
          float64.

    Example:
        >>> import torch
        >>> from fused_bce import BCEWithLogitsLoss
        >>> loss = BCEWithLogitsLoss(pos_weight=torch.ones(64))
        >>> loss(torch.full((10, 64), 1.5), torch.ones(10, 64))
        tensor(0.2014)
    """

    def __init__(
        self,
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
    ):
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self._set_extras(Extras(label_smoothing, ignore_index, validate_targets, recompute))

    def extra_repr(self) -> str:
        return self._describe()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            weight, pos_weight = self.weight, self.pos_weight
        else:
            if isinstance(input, Proxy) and input.tracer.root is not self:
                # A leaf for torch.fx, as torch's class is, which goes by the name of its module.
                path = input.tracer.path_of_module(self)
                return input.tracer.create_proxy("call_module", path, (input, target), {})
            weight, pos_weight = _buffer(self, "weight"), _buffer(self, "pos_weight")
        return binary_cross_entropy_with_logits(
            input,
            target,
            weight,
            None,
            None,
            self.reduction,
            pos_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            validate_targets=self.validate_targets,
            recompute=self.recompute,
        )


def _buffer(module, name):
    # getattr finds it as well, but takes a sixth of a small loss's time: nn.Module looks last here.
    buffers = module._buffers
    direct = name in buffers and name not in module.__dict__
    return buffers[name] if direct else getattr(module, name)
