"""Binary cross entropy with logits as a pointwise loss, which torch's own function computes where
the kernels do not cover a call that torch knows."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_bce.coverage import has_integers
from fused_bce.pointwise import PointwiseLoss, compute_composite, find_loss
from fused_bce.scalars import changes_loss


def compute_in_torch(
    loss: PointwiseLoss,
    input,
    target,
    weight,
    pos_weight,
    numbers,
    reduction,
    extras,
    *,
    size_average=None,
    reduce=None,
) -> Tensor:
    """Torch's own function, or the composite formula for what this package takes beyond it."""
    integers = has_integers(target)
    if not (integers or reduction == "batchmean" or changes_loss(extras)):
        return _torch(input, target, weight, size_average, reduce, reduction, pos_weight)
    dtype = (input if integers else target).dtype
    return compute_composite(
        loss, input, target, weight, pos_weight, numbers, reduction, extras, dtype
    )


BINARY_CROSS_ENTROPY = find_loss("binary_cross_entropy_with_logits", compute_in_torch)


def _torch(input, target, weight, size_average, reduce, reduction, pos_weight):
    if not has_torch_function_variadic(input, target, weight, pos_weight):
        return torch_bce(input, target, weight, size_average, reduce, reduction, pos_weight)
    # Under patch() torch's function would present itself to the override as ours.
    return handle_torch_function(
        torch_bce,
        (input, target, weight, pos_weight),
        input,
        target,
        weight=weight,
        size_average=size_average,
        reduce=reduce,
        reduction=reduction,
        pos_weight=pos_weight,
    )
