"""The autograd function."""

import torch


class BCEWithLogitsFunction(torch.autograd.Function):
    """Fused binary cross entropy with logits, as an autograd function.

    ``BCEWithLogitsFunction.apply(logits, target, weight, pos_weight, reduction, dtype)``

    Forward and backward are C++ (csrc/autograd.cpp): called from Python they would cost a small
    loss a third more time. For transforms (torch.func, forward AD) call
    :func:`fused_bce.functional.binary_cross_entropy_with_logits`, which leaves them to torch.
    Call it under torch.compile, too, which cannot trace this ``apply``.

    Args:
        logits: any shape, strided, float16, bfloat16, float32 or float64.
        target: the shape of the logits, any of these dtypes, bool or integers.
        weight, pos_weight: None, or a tensor that broadcasts into that shape.
        reduction: 0 for none, 1 for mean, 2 for sum.
        dtype: of the loss; None for that of the target, or of the logits if that is of integers.
        label_smoothing: as for the function above, a number in a tensor, or None.
        ignore_index, ignore_nan: targets that are ignored: those of this integer or None, and
            whether also those that are nan.
        divisor: what mean divides by, a number in a tensor; None for the number of elements that
            are not ignored.
        recompute: as for the function above.

    Logits and target can be differentiated, twice. Raises RuntimeError if weight or pos_weight
    requires a gradient or does not broadcast, ValueError if the sizes of logits and target differ,
    NotImplementedError for other dtypes.

    Example:
        >>> import torch
        >>> from fused_bce import BCEWithLogitsFunction
        >>> logits = torch.full((10, 64), 1.5, requires_grad=True)
        >>> BCEWithLogitsFunction.apply(logits, torch.ones(10, 64), None, None, 1, None)
        tensor(0.2014, grad_fn=<...>)
    """

    apply = staticmethod(torch.ops.fused_bce.binary_cross_entropy_with_logits.default)
