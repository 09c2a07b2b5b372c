"""The sigmoid loss of pairs, of contrastive training (SigLIP), without its matrix of logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_bce import reference
from fused_bce.dispatch import log_once, why_not_linear
from fused_bce.head import check_numbers, linear_loss, operator_arguments
from fused_bce.registrations import ops
from fused_bce.sparse import SparseTarget


def pairwise_sigmoid_loss(
    input1: Tensor,
    input2: Tensor,
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    *,
    positives: str | SparseTarget | None = "diagonal",
    reduction: str = "batchmean",
    chunk_bytes: int | None = None,
) -> Tensor:
    """The sigmoid loss of all pairs (`Zhai et al., 2023 <https://arxiv.org/abs/2303.15343>`_):
    binary cross entropy with logits ``logit_scale * input1 @ input2.T + logit_bias``, which are
    never in memory as a whole, nor is their gradient.

    For N and M samples of F features, normalised by the caller if they are to be.

    Args:
        input1: (N, F), float16, bfloat16, float32 or float64.
        input2: (M, F), of the same dtype.
        logit_scale: a number or a tensor of one, as it multiplies: not its logarithm.
        logit_bias: a number, a tensor of one, or None.
        positives: ``"diagonal"``: sample i of the one and sample i of the other; None: there are
            none, as among the samples of another process; or a :class:`fused_bce.SparseTarget` of
            N rows and M labels, for several captions of an image for example.
        reduction: ``"batchmean"``, the sum over N, as SigLIP has it; ``"mean"`` or ``"sum"``.
        chunk_bytes: most bytes of a block of logits; None: by device.

    Returns:
        One number, float32, or float64 for inputs of float64. Inputs, scale and bias can be
        differentiated, twice.

    Raises:
        ValueError: for an unknown reduction or ``positives``, and ``chunk_bytes`` that is not
            positive.
        RuntimeError: for inputs that are no matrices, that differ in features, dtype or device, and
            for a scale or bias of several numbers.
        IndexError, TypeError: for a bad SparseTarget.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from fused_bce.functional import pairwise_sigmoid_loss
        >>> image, text = normalize(torch.eye(4)), normalize(torch.eye(4))
        >>> pairwise_sigmoid_loss(image, text, 10.0, -10.0)
        tensor(0.6933)
    """
    check_numbers(reduction, 0.0, chunk_bytes)
    check_pairs(input1, input2, logit_scale, logit_bias)
    target = _target(positives, input1, input2)
    pairs = PairwiseOperands.of(input1, input2, logit_scale, logit_bias, chunk_bytes, reduction)
    reason = why_not_linear(pairs.scaled, input2, pairs.bias, target, None, None)
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_once(reason)
        return _on_whole_logits(pairs.scaled, input2, pairs.bias, target, reduction)
    operands = {"linear_bias": pairs.bias}
    return linear_loss(pairs.scaled, input2, target, operands, pairs.arguments)


class PairwiseOperands(NamedTuple):
    """Pairs as a linear layer: one input, scaled, is its input, the other its weight."""

    # In float32 for half types, as the gradient of the scale is a sum over it; the operator rounds
    # it to their dtype.
    scaled: Tensor
    bias: Tensor | None  # (M,)
    arguments: dict[str, Any]

    @classmethod
    def of(
        cls,
        input1: Tensor,
        input2: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        chunk_bytes: int | None,
        reduction: str = "batchmean",
    ) -> "PairwiseOperands":
        scaled = input1.to(torch.promote_types(input1.dtype, torch.float32)) * logit_scale
        bias = None
        if logit_bias is not None:
            bias = torch.as_tensor(logit_bias, dtype=scaled.dtype, device=scaled.device)
            bias = bias.reshape(()).expand(input2.shape[0])
        arguments = operator_arguments(scaled, input2, reduction, chunk_bytes=chunk_bytes)
        arguments["dtype"] = input1.dtype if input1.dtype != scaled.dtype else None
        return cls(scaled, bias, arguments)

    def loss_and_grads(
        self, input2: Tensor, positives: str | None, wanted: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and its gradients in float32 or float64 for those that are wanted."""
        target = _target(positives, self.scaled, input2)
        dtype = self.arguments["dtype"]
        # What the operator's autocast does, which is below autograd: float64 stays what it is.
        device = input2.device.type
        if self.scaled.dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return ops.linear_binary_cross_entropy_with_grads(
            wanted,
            None,
            self.scaled,
            input2.to(self.scaled.dtype),
            self.bias,
            target.indices,
            target.offsets,
            **(self.arguments | {"dtype": dtype}),
        )


def check_pairs(
    input1: Tensor,
    input2: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
) -> None:
    if input1.dim() != 2 or input2.dim() != 2 or input1.shape[1] != input2.shape[1]:
        raise RuntimeError(
            f"inputs must be of shapes (N, F) and (M, F), not {tuple(input1.shape)} and "
            f"{tuple(input2.shape)}"
        )
    if input1.dtype != input2.dtype:
        raise RuntimeError(f"inputs have dtypes {input1.dtype} and {input2.dtype}")
    for name, number in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if isinstance(number, Tensor) and number.numel() != 1:
            raise RuntimeError(f"{name} must be one number, not of shape {tuple(number.shape)}")


def _target(positives, input1: Tensor, input2: Tensor) -> SparseTarget:
    rows, labels = input1.shape[0], input2.shape[0]
    if isinstance(positives, SparseTarget):
        if tuple(positives.shape) != (rows, labels):
            raise ValueError(
                f"positives of shape {tuple(positives.shape)} do not fit pairs of {rows} and "
                f"{labels} samples"
            )
        positives.check()
        return positives
    if positives is not None and positives != "diagonal":
        raise ValueError(f"positives must be 'diagonal', a SparseTarget or None, not {positives!r}")
    number = 0 if positives is None else min(rows, labels)
    offsets = torch.arange(rows + 1, device=input1.device).clamp(max=number)
    return SparseTarget(torch.arange(number, device=input1.device), offsets, labels)


def _on_whole_logits(scaled, input2, bias, target, reduction) -> Tensor:
    logits = torch.nn.functional.linear(
        scaled.to(input2.dtype), input2, None if bias is None else bias.to(input2.dtype)
    )
    dense = target.to_dense().to(scaled.dtype)
    return reference.binary_cross_entropy_with_logits(
        logits, dense, None, None, reduction, 0.0, None
    )
