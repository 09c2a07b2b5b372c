"""The sigmoid loss of pairs, of contrastive training (SigLIP), without its matrix of logits."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fused_bce.arguments import autocast_casts, check_tensor, logits_dtype
from fused_bce.checks import (
    check_chunk_bytes,
    check_floats,
    check_reduction_to_scalar,
    check_targets,
)
from fused_bce.linear_call import LinearCall
from fused_bce.linear_operator import evaluate_linear
from fused_bce.registrations import record_call
from fused_bce.sparse import SparseTarget

_NUMBERS = (Real, torch.SymInt, torch.SymFloat)


def pairwise_sigmoid_loss(
    input1: Tensor,
    input2: Tensor,
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    *,
    positives: str | SparseTarget | None = "diagonal",
    reduction: str = "batchmean",
    chunk_bytes: int | None = None,
    validate_targets: bool = False,
) -> Tensor:
    """The sigmoid loss of all pairs (`Zhai et al., 2023 <https://arxiv.org/abs/2303.15343>`_):
    binary cross entropy with logits ``logit_scale * input1 @ input2.T + logit_bias``, which are
    never in memory as a whole, nor is their gradient.

    For N and M samples of F features, normalised by the caller if they are to be.

    Args:
        input1: (N, F), float16, bfloat16, float32 or float64.
        input2: (M, F), of the same dtype but under autocast.
        logit_scale: a number or a tensor of one, as it multiplies: not its logarithm.
        logit_bias: a number, a tensor of one, or None.
        positives: ``"diagonal"``: sample i of the one and sample i of the other; None: there are
            none, as among the samples of another process; or a :class:`fused_bce.SparseTarget` of
            N rows and M labels, for several captions of an image for example. Of its ``values`` one
            between 0 and 1 is for a pair that may be positive, and nan for one that is left out.
        reduction: ``"batchmean"``, the sum over N, as SigLIP has it; ``"mean"`` or ``"sum"``.
        chunk_bytes: most bytes of the blocks of logits that exist at a time; None: by device.
        validate_targets: raises for ``values`` outside [0, 1] that are not nan.

    Returns:
        One number, float32, or float64 for inputs of float64. Inputs, scale and bias can be
        differentiated, twice.

    Raises:
        ValueError: for an unknown reduction or ``positives``, ``chunk_bytes`` that is not positive,
            and an invalid target.
        NotImplementedError: for inputs that are no floats.
        RuntimeError: for inputs that are no matrices, or differ in features, dtype or device, and
            for a scale or bias of several numbers or on another device.
        TypeError: for inputs that are no tensors, a scale or bias that is neither a real number nor
            a tensor, other ``positives``, and ``chunk_bytes`` that is no integer.
        IndexError, TypeError: for a bad SparseTarget.

    On a GPU nothing waits for the host, also with numbers, and a scale or bias on the CPU but for
    its gradient. DTensors are taken as the linear head takes them.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from fused_bce.functional import pairwise_sigmoid_loss
        >>> image, text = normalize(torch.eye(4)), normalize(torch.eye(4))
        >>> pairwise_sigmoid_loss(image, text, 10.0, -10.0)
        tensor(0.6933)
    """
    if any(isinstance(t, Proxy) for t in (input1, input2, logit_scale, logit_bias, positives)):
        return record_call(pairwise_sigmoid_loss, locals())
    operands = input1, input2, logit_scale, logit_bias
    check_reduction_to_scalar(reduction)
    chunk_bytes = check_chunk_bytes(chunk_bytes)
    check_pairs(*operands)
    target = make_target(positives, input1, input2)
    # A pair whose value is nan is left out.
    ignored = math.nan if target.has_floats() else None
    values = target.read_values() if validate_targets else None
    if values is not None:
        check_targets(values, ignored)
    call = as_linear_call(
        *operands, target, reduction=reduction, ignore_index=ignored, chunk_bytes=chunk_bytes
    )
    return evaluate_linear(call)


def as_linear_call(
    input1: Tensor,
    input2: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    target: SparseTarget,
    **options: Any,
) -> LinearCall:
    """Pairs as a linear layer: one input, scaled, is its input, the other its weight."""
    # In float32 for half types, as the gradient of the scale is a sum over it; the operator rounds
    # it to their dtype.
    wide = torch.float64 if input1.dtype == torch.float64 else torch.float32
    scaled = input1.to(wide) * _of_dtype(logit_scale, wide)
    bias = None
    if logit_bias is not None:
        # A product: a copy to a GPU would wait, and of torch.full a compiler may make a
        # constant (see scalars.py).
        ones = torch.ones((), dtype=wide, device=input2.device)
        bias = (ones * _of_dtype(logit_bias, wide)).expand(input2.shape[0])
    dtype: torch.dtype | None = logits_dtype(input1, input2)
    if (dtype, input2.dtype) == (wide, wide):
        dtype = None
    # A float that is left to its default would be an input of a compiled graph.
    return LinearCall(scaled, input2, bias, target, label_smoothing=0.0, dtype=dtype, **options)


def _of_dtype(number: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return number.reshape(()).to(dtype) if isinstance(number, Tensor) else number


def check_pairs(
    input1: Tensor,
    input2: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
) -> None:
    for name, features in (("input1", input1), ("input2", input2)):
        check_tensor(name, features)
        check_floats(name, features)
    if input1.dim() != 2 or input2.dim() != 2 or input1.shape[1] != input2.shape[1]:
        raise RuntimeError(
            f"inputs must be of shapes (N, F) and (M, F), not {tuple(input1.shape)} and "
            f"{tuple(input2.shape)}"
        )
    if input1.device != input2.device:
        raise RuntimeError(f"inputs are on {input1.device} and {input2.device}")
    if input1.dtype != input2.dtype and not autocast_casts(input1, input2):
        raise RuntimeError(f"inputs have dtypes {input1.dtype} and {input2.dtype}")
    _check_number("logit_scale", logit_scale, input1)
    if logit_bias is not None:
        _check_number("logit_bias", logit_bias, input1)


def _check_number(name: str, number: float | Tensor, beside: Tensor) -> None:
    if not isinstance(number, Tensor):
        if not isinstance(number, _NUMBERS):
            raise TypeError(
                f"{name} must be a number or a tensor of one, not {type(number).__name__}"
            )
        return
    if number.numel() != 1:
        raise RuntimeError(f"{name} must be one number, not of shape {tuple(number.shape)}")
    if number.is_complex():
        raise TypeError(f"{name} must be real, not {number.dtype}")
    if number.device != beside.device and not number.is_cpu:
        raise RuntimeError(f"{name} is on {number.device}, the inputs on {beside.device}")


def make_target(positives, input1: Tensor, input2: Tensor) -> SparseTarget:
    rows, labels = input1.shape[0], input2.shape[0]
    if isinstance(positives, SparseTarget):
        if tuple(positives.shape) != (rows, labels):
            raise ValueError(
                f"positives of shape {tuple(positives.shape)} do not fit pairs of {rows} and "
                f"{labels} samples"
            )
        positives.check()
        return positives
    if positives is not None and not isinstance(positives, str):
        raise TypeError(
            f"positives must be 'diagonal', a SparseTarget or None, not {type(positives).__name__}"
        )
    if positives is not None and positives != "diagonal":
        raise ValueError(f"positives must be 'diagonal', a SparseTarget or None, not {positives!r}")
    number = 0 if positives is None else min(rows, labels)
    offsets = torch.arange(rows + 1, device=input1.device).clamp(max=number)
    return SparseTarget(torch.arange(number, device=input1.device), offsets, labels)
