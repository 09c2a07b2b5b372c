"""The losses as functions."""

import functools

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import _reduction
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce

from fused_bce import _C
from fused_bce.asymmetric import asymmetric_loss
from fused_bce.cross_entropy import BINARY_CROSS_ENTROPY, compute_in_torch
from fused_bce.extras import Extras
from fused_bce.focal import sigmoid_focal_loss
from fused_bce.head import linear_binary_cross_entropy_with_logits
from fused_bce.pairwise import pairwise_sigmoid_loss
from fused_bce.pointwise import PointwiseLoss, evaluate
from fused_bce.quality_focal import quality_focal_loss
from fused_bce.registrations import record_call
from fused_bce.scripting import scripted_options
from fused_bce.sparse import SparseTarget
from fused_bce.varifocal import varifocal_loss

__all__ = [
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "linear_binary_cross_entropy_with_logits",
    "pairwise_sigmoid_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "varifocal_loss",
]

_NO_EXTRAS = Extras()


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor | SparseTarget,
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
) -> Tensor:
    """Binary cross entropy between logits and targets: a drop-in for
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`, computed with its gradient in one
    pass over memory.

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the same shape, any of these dtypes, bool, uint8, int8, int16, int32 or int64,
            usually in [0, 1] (not checked). Targets of integers are read as they are. Or a
            :class:`fused_bce.SparseTarget` or a sparse tensor (COO, CSR), for logits (N, C): of
            these a matrix of bool is made, or of the dtype of their values.
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        size_average, reduce: deprecated, see ``reduction``.
        reduction: ``"mean"``, ``"sum"``, ``"none"``, or ``"batchmean"``, the sum over the size of
            the first dimension.
        pos_weight: weight of positive targets; broadcasts into the shape of the logits.
        label_smoothing: in [0, 1); targets t become t (1 - label_smoothing) + label_smoothing / 2.
        ignore_index: elements with this target have neither loss nor gradient, whatever the logit
            and the gradient of the loss are, and ``"mean"`` does not count them; where none is left
            it is 0. An integer between -2**24 and 2**24 that the dtype of the targets holds
            exactly, or ``math.nan``.
        validate_targets: raises for targets outside [0, 1]. Reads them once more, and on a GPU
            waits for it.
        recompute: computes the gradient in backward, not in forward: no memory of its size is held
            in between, at the price of reading the operands once more. The gradient has the same
            bits.

    Returns:
        One number, or the shape of the logits for ``"none"``; in the dtype of the target, or of the
        logits if the target is of integers; under autocast float32, unless that is float64.

    Raises:
        ValueError: as torch's function, for an unknown reduction and for different sizes; for a bad
            ``label_smoothing`` or ``ignore_index``; for an invalid target, with its value and
            place.
        RuntimeError: as torch's function, for weights that do not broadcast or that require a
            gradient.
        TypeError: for a ``label_smoothing`` that is a tensor and an ``ignore_index`` that is no
            integer.

    What the kernel does not cover is left to torch's function: see
    :func:`fused_bce.why_not_fused`.

    Example:
        >>> import torch
        >>> from fused_bce.functional import binary_cross_entropy_with_logits
        >>> input = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        >>> target = torch.tensor([True, False, True])
        >>> loss = binary_cross_entropy_with_logits(input, target)
        >>> loss.backward()
        >>> loss, input.grad
        (tensor(0.3048, grad_fn=<...>), tensor([-0.1258,  0.0896, -0.0397]))
    """
    extras = label_smoothing, ignore_index, validate_targets, recompute
    if not torch.compiler.is_compiling():
        loss = _C.eager_loss(
            input,
            target,
            weight,
            size_average,
            reduce,
            reduction,
            pos_weight,
            extras,
            _NO_EXTRAS,
        )
        if loss is not None:
            return loss
    if isinstance(input, Proxy) or isinstance(target, Proxy):
        return record_call(binary_cross_entropy_with_logits, locals())
    pointwise_loss, why_not = BINARY_CROSS_ENTROPY, None
    if size_average is not None or reduce is not None:
        pointwise_loss, reduction, why_not = _legacy(size_average, reduce, reduction)
    return evaluate(
        pointwise_loss,
        input,
        target,
        weight,
        pos_weight,
        (),
        reduction,
        Extras(*extras),
        why_not=why_not,
    )


def _legacy(
    size_average: bool | None, reduce: bool | None, reduction: str
) -> tuple[PointwiseLoss, str, str | None]:
    """The loss, its reduction, and why it is not fused, for torch's deprecated arguments."""

    def operator(*arguments) -> Tensor:
        _reduction.legacy_get_string(size_average, reduce)  # for its warning
        return BINARY_CROSS_ENTROPY.operator(*arguments)

    fallback = functools.partial(compute_in_torch, size_average=size_average, reduce=reduce)
    loss = BINARY_CROSS_ENTROPY._replace(operator=operator, fallback=fallback)
    if torch.compiler.is_compiling():
        return loss, reduction, "size_average and reduce are not fused in compiled code"
    return loss, _reduction.legacy_get_string(size_average, reduce, emit_warning=False), None


def _scripted(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    recompute: bool = False,
) -> Tensor:
    """What torch.jit.script compiles in its place, without keyword-only arguments, which it cannot
    compile."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = scripted_options(
        input, target, reduction, label_smoothing, ignore_index, validate_targets
    )
    number, dtype, smoothing, index, ignores_nan, divisor = options
    has_floats = target.is_floating_point()
    if has_floats and smoothing is None and ignore_index is None and divisor is None:
        return torch_bce(input, target, weight, None, None, reduction, pos_weight)
    dtype = target.dtype if has_floats else input.dtype
    return torch.ops.fused_bce._binary_cross_entropy_with_logits_composite(
        *(None, None, None, None, input, target, weight, pos_weight, number, dtype),
        *(smoothing, index, ignores_nan, divisor),
    )


binary_cross_entropy_with_logits.__prepare_scriptable__ = lambda: _scripted  # type: ignore[attr-defined]
