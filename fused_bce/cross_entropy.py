"""Binary cross entropy with logits as a pointwise loss, which torch's own function computes where
the kernels do not cover a call that torch knows."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_bce.coverage import has_integers
from fused_bce.pointwise import PointwiseLoss, compute_composite, find_loss


def compute_in_torch(
    loss: PointwiseLoss,
    input,
    target,
    weight,
    pos_weight,
    numbers,
    reduction,
    smoothing,
    ignore_index,
    *,
    size_average=None,
    reduce=None,
) -> Tensor:
    """Torch's own function, or the composite formula for what this package takes beyond it."""
    if (
        smoothing is None
        and ignore_index is None
        and reduction != "batchmean"
        and not has_integers(target)
    ):
        return _torch(input, target, weight, size_average, reduce, reduction, pos_weight)
    return compute_composite(
        loss,
        input,
        target,
        weight,
        pos_weight,
        numbers,
        reduction,
        smoothing,
        ignore_index,
        dtype=(input if has_integers(target) else target).dtype,
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
