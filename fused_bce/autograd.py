"""The gradient wiring: what runs in forward, what in backward."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_bce.dispatch import is_plain

forward_op = torch.ops.fused_bce.forward.default
forward_with_grad_op = torch.ops.fused_bce.forward_with_grad.default
backward_op = torch.ops.fused_bce.backward.default
scale_op = torch.ops.fused_bce.scale_.default

# The numbers of at::Reduction
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NONE, MEAN, SUM = REDUCTIONS.values()


class BCEWithLogitsFunction(torch.autograd.Function):
    """Fused binary cross entropy with logits, as a :class:`torch.autograd.Function`.

    ``BCEWithLogitsFunction.apply(logits, target, weight, pos_weight, reduction, dtype)``

    Args:
        logits: any shape, strided, float16, bfloat16, float32 or float64.
        target: the shape of the logits, any of these dtypes.
        weight, pos_weight: None, or a tensor that broadcasts into that shape.
        reduction: 0 for none, 1 for mean, 2 for sum.
        dtype: of the loss; None for that of the target.

    The gradient of logits and of target can be taken, twice. Raises RuntimeError if weight or
    pos_weight requires one, as torch does. For transforms (torch.func, forward AD, compile) call
    :func:`fused_bce.functional.binary_cross_entropy_with_logits`, which knows what to do.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, pos_weight, reduction, dtype):
        needs_grad = ctx.needs_input_grad
        for name, needed in zip(("weight", "pos_weight"), needs_grad[2:4], strict=True):
            if needed:
                raise RuntimeError(
                    "The function 'binary_cross_entropy_with_logits' is not differentiable with "
                    f"respect to argument '{name}'. This input cannot have requires_grad True."
                )
        # Divided by N, a float16 gradient would underflow before the loss scale arrives in
        # backward: it is computed there.
        if needs_grad[0] and reduction != NONE and logits.dtype is not torch.float16:
            loss, ctx.grad_logits = forward_with_grad_op(
                logits, target, weight, pos_weight, reduction, dtype
            )
        else:
            loss = forward_op(logits, target, weight, pos_weight, reduction, dtype)
        # Unpacked in every backward, so that in-place edits are noticed.
        ctx.save_for_backward(logits, target, weight, pos_weight)
        ctx.reduction = reduction
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        operands = ctx.saved_tensors
        # Taken out, for a second backward must not find it scaled, and whoever gets it then is its
        # only owner and need not copy it.
        grad_logits = vars(ctx).pop("grad_logits", None)
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        grad_target = None
        if needs_target:
            grad_target = target_gradient(grad_loss, *operands, ctx.reduction)
        if not needs_logits:
            grad_logits = None
        elif torch.is_grad_enabled() or not is_plain(grad_loss):
            # create_graph, or a batch of gradients
            grad_logits = logits_gradient(grad_loss, *operands, ctx.reduction)
        elif grad_logits is None:
            grad_logits = backward_op(grad_loss, *operands, ctx.reduction)
        else:
            scale_op(grad_logits, grad_loss)
        return grad_logits, grad_target, None, None, None, None


def logits_gradient(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
) -> Tensor:
    """The gradient of the logits in torch's own operations, differentiable and batchable.

    Written as (1 - t) sigmoid(x) - p t sigmoid(-x), in which hard targets cancel nothing.
    """
    x, t = _computed(logits, target)
    positive = t if pos_weight is None else pos_weight * t
    slope = (1 - t) * torch.sigmoid(x) - positive * torch.sigmoid(-x)
    return (slope * _factor(grad_loss, logits, weight, reduction)).to(logits.dtype)


def target_gradient(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
) -> Tensor:
    """The gradient of the target, p softplus(-x) - softplus(x), in torch's own operations."""
    x, _ = _computed(logits, target)
    slope = -x if pos_weight is None else logsigmoid(-x) - pos_weight * logsigmoid(x)
    return (slope * _factor(grad_loss, logits, weight, reduction)).to(target.dtype)


def _computed(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, target.dtype), torch.float32)
    return logits.to(dtype), target.to(dtype)


def _factor(grad_loss: Tensor, logits: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    # Widened before the division, under which a half would underflow.
    factor = grad_loss.to(torch.promote_types(grad_loss.dtype, torch.float32))
    if reduction == MEAN:
        factor = factor / logits.numel()
    return factor if weight is None else factor * weight
