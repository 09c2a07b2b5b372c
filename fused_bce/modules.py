"""The loss as a module."""

import torch
from torch import Tensor

from fused_bce.functional import binary_cross_entropy_with_logits


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    r"""Binary cross entropy between logits and targets: a drop-in for
    :class:`torch.nn.BCEWithLogitsLoss`, computed with its gradient in one pass.

    The constructor, buffers, ``state_dict`` and ``repr`` are those of the base class.

    .. math::
        \ell(x, t) = w \,\bigl[p\,t \cdot \mathrm{softplus}(-x)
                     + (1 - t) \cdot \mathrm{softplus}(x)\bigr]

    with logit :math:`x`, target :math:`t`, ``weight`` :math:`w` and ``pos_weight`` :math:`p`.

    Args:
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        size_average, reduce: deprecated, see ``reduction``.
        reduction: ``"mean"`` (over all elements, the default), ``"sum"`` or ``"none"``.
        pos_weight: weight of positive targets; broadcasts into the shape of the logits, for
            example ``(C,)`` for logits ``(N, C)`` and ``(C, 1, 1)`` for ``(N, C, H, W)``.

    Shape:
        - input: logits, any shape, float16, bfloat16, float32 or float64.
        - target: the same shape, any of these dtypes, usually in [0, 1] (not checked).
        - output: one number, or the shape of the logits for ``"none"``; the dtype of the target,
          float32 under autocast (float64 for a float64 target).

    Example:
        >>> loss = BCEWithLogitsLoss(pos_weight=torch.ones(64))
        >>> loss(torch.full((10, 64), 1.5), torch.ones(10, 64))
        tensor(0.2014)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return binary_cross_entropy_with_logits(
                input,
                target,
                _buffer(self, "weight"),
                pos_weight=_buffer(self, "pos_weight"),
                reduction=self.reduction,
            )
        return binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
        )


def _buffer(module, name):
    # nn.Module.__getattr__ finds it as well, but takes a sixth of a small loss's time.
    buffers = module._buffers
    return buffers[name] if name in buffers else getattr(module, name)
