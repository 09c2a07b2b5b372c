"""A linear layer and the loss of its logits, which never exist as a whole: function and module."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fused_bce.checks import (
    check_chunk_bytes,
    check_label_smoothing,
    check_linear_operands,
    check_logits,
    check_options,
    check_parts,
    check_reduction_to_scalar,
    check_target_values,
)
from fused_bce.coverage import log_once
from fused_bce.cross_entropy import BINARY_CROSS_ENTROPY
from fused_bce.extras import Extras
from fused_bce.linear_call import LinearCall, flatten_weight
from fused_bce.linear_layers import (
    LinearInParts,
    LinearWithLoss,
    check_linear_layer,
    why_not_computed_by,
)
from fused_bce.linear_operator import compute_from_logits, evaluate_linear
from fused_bce.linear_topk import find_topk, topk_of_logits
from fused_bce.pointwise import evaluate
from fused_bce.registrations import record_call
from fused_bce.sparse import SparseTarget, as_sparse


def linear_binary_cross_entropy_with_logits(
    input: Tensor,
    linear_weight: Tensor | Sequence[Tensor],
    target: Tensor | SparseTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    validate_targets: bool = False,
    chunk_bytes: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """A linear layer and :func:`binary_cross_entropy_with_logits` of its logits, block of labels by
    block: neither the logits nor their gradient nor a matrix of targets are ever in memory.

    For N rows, F features and C labels. What it saves is memory, where C is large; in time it is
    the layer and the fused loss. The gradients are computed in forward, and scaled in backward;
    under saved-tensor hooks (activation checkpointing), and for a weight in float16, in backward.

    Args:
        input: (N, F), (F,) or (\\*, F), float16, bfloat16, float32 or float64.
        linear_weight: (C, F), of the same dtype but under autocast; or a list of parts of it,
            blocks of labels in order. Then backward computes the gradient of one part, has it
            accumulated and its hooks run, and goes on to the next.
        target: :class:`fused_bce.SparseTarget` of N rows, or a sparse tensor (N, C) (COO, CSR); or
            a dense one of the shape of the logits; in any dtype that
            :func:`binary_cross_entropy_with_logits` takes.
        linear_bias: (C,).
        weight: rescales each element's loss: one number, one for each label, (C,), or one for each
            row, of a shape that broadcasts to (\\*, 1).
        pos_weight: weight of positive targets, of such a shape.
        reduction: ``"mean"`` over N x C elements, ``"batchmean"``, the sum over the size of the
            first dimension, or ``"sum"``. Prefer ``"batchmean"`` where C is large: it does not
            shrink the gradients as labels are added.
        label_smoothing: in [0, 1); targets t become t (1 - label_smoothing) + label_smoothing / 2.
        ignore_index: of dense targets; or ``math.nan``, for values of a SparseTarget that are
            missing. See :func:`binary_cross_entropy_with_logits`.
        validate_targets: raises for targets outside [0, 1].
        chunk_bytes: most bytes of the blocks of logits that exist at a time; None: by device, on
            the CPU 4 MiB, or 1 MiB for each thread if that is more.
        recompute: computes the gradients in backward, for which it computes the logits once more.
            With parts they always are.

    Returns:
        One number, that of the loss of whole logits rounded to the dtype of the layer; float32, or
        float64 if an operand is.

    Raises:
        ValueError: for an unknown reduction and ``"none"``, a target of another size, a bad
            ``label_smoothing``, ``ignore_index`` or ``chunk_bytes``, offsets that do not ascend, an
            invalid target.
        IndexError: for a label out of range.
        RuntimeError: for operands that do not fit, and weights of another shape.
        TypeError: for operands that are no tensors, labels, offsets or values of another dtype; for
            a ``label_smoothing`` that is a tensor, an ``ignore_index`` or ``chunk_bytes`` that is
            no integer.

    What the operator does not cover, transforms of torch.func for example, is left to torch's
    linear layer and the loss of whole logits: see :func:`fused_bce.why_not_fused`. So is a backward
    with ``create_graph=True``.

    Example:
        >>> import torch
        >>> from fused_bce import SparseTarget
        >>> from fused_bce.functional import linear_binary_cross_entropy_with_logits
        >>> input, weight = torch.ones(3, 8), torch.zeros(1000, 8, requires_grad=True)
        >>> target = SparseTarget.from_padded(torch.tensor([[7, 12], [3, -1], [-1, -1]]), 1000)
        >>> loss = linear_binary_cross_entropy_with_logits(input, weight, target)
        >>> loss.backward()
        >>> loss
        tensor(0.6931, grad_fn=<...>)
    """
    if any(isinstance(t, Proxy) for t in (input, linear_weight, target)):
        return record_call(linear_binary_cross_entropy_with_logits, locals())
    check_reduction_to_scalar(reduction)
    check_label_smoothing(label_smoothing)
    call = LinearCall(
        input,
        linear_weight,
        linear_bias,
        as_sparse(target),
        weight,
        pos_weight,
        reduction,
        label_smoothing,
        chunk_bytes=check_chunk_bytes(chunk_bytes),
        recompute=recompute,
    )
    check_linear_operands(call)
    index = check_target_values(call.target, ignore_index, validate_targets)
    return evaluate_linear(call if index is None else call._replace(ignore_index=index))


def _loss_of_logits(
    logits,
    target,
    weight,
    pos_weight,
    reduction,
    label_smoothing,
    ignore_index,
    validate_targets,
) -> Tensor:
    """The loss of logits that some other layer has computed."""
    if isinstance(logits, Proxy):
        return record_call(_loss_of_logits, locals())
    check_reduction_to_scalar(reduction)
    target = as_sparse(target)
    check_logits(logits, target, weight, pos_weight)
    extras = Extras(label_smoothing, check_target_values(target, ignore_index, validate_targets))

    def compute(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        loss = BINARY_CROSS_ENTROPY
        return evaluate(loss, logits, target, weight, pos_weight, (), reduction, extras)

    rows = logits if logits.dim() > 1 else logits[None]
    weight, pos_weight = (flatten_weight(t, logits.shape[:-1]) for t in (weight, pos_weight))
    return compute_from_logits(compute, rows.flatten(0, -2), target, reduction, rows.size(0))


# Of the options that every loss takes
_DEFAULTS = {"label_smoothing": 0.0, "ignore_index": None, "validate_targets": False}


class LinearBCEWithLogitsLoss(torch.nn.Module):
    """A linear layer and the loss of its logits, which never exist as a whole: see
    :func:`fused_bce.functional.linear_binary_cross_entropy_with_logits`.

    Args:
        in_features: F.
        num_classes: C.
        bias: whether the layer has one.
        device, dtype: of the layer's parameters.
        weight, pos_weight: one number or (C,), as buffers, or None.
        reduction: ``"mean"``, ``"batchmean"`` or ``"sum"``.
        label_smoothing, ignore_index, validate_targets, chunk_bytes, recompute: see the function.
        parts: how many parameters the weight is, blocks of labels of nearly equal size. With an
            optimizer for each, that steps in ``register_post_accumulate_grad_hook``, the gradient
            of the whole weight never exists. Any head loads the state_dict of any other, whatever
            their parts.

    Attributes:
        linear: the layer; ``head.linear(input)`` are the logits, for prediction. Another module may
            take its place, or wrap it, as adapters (LoRA) do. Then the loss is that of the logits
            that it returns, whole, without the savings; so it is where the layer has hooks.

    Shape:
        - input: (\\*, F).
        - target: :class:`fused_bce.SparseTarget`, (N, C) sparse or (\\*, C) dense.
        - output: one number.

    Example:
        >>> import torch
        >>> from fused_bce import LinearBCEWithLogitsLoss, SparseTarget
        >>> head = LinearBCEWithLogitsLoss(8, 1000, reduction="batchmean")
        >>> target = SparseTarget.from_lists([[1, 2], [999]], num_labels=1000)
        >>> head(torch.randn(2, 8), target).backward()
        >>> head.linear.weight.grad.shape
        torch.Size([1000, 8])
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int | float | None = None,
        validate_targets: bool = False,
        chunk_bytes: int | None = None,
        recompute: bool = False,
        parts: int = 1,
    ):
        super().__init__()
        check_reduction_to_scalar(reduction)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = check_options(label_smoothing, ignore_index)
        self.validate_targets = validate_targets
        self.chunk_bytes = check_chunk_bytes(chunk_bytes)
        self.recompute = recompute
        size = in_features, num_classes
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.linear: Any
        if check_parts(parts, num_classes) == 1:
            self.linear = LinearWithLoss(*size, **like)
        else:
            self.linear = LinearInParts(*size, parts, **like)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    @classmethod
    def from_linear(cls, layer: torch.nn.Linear, **options: Any) -> "LinearBCEWithLogitsLoss":
        """A head that shares the weight and the bias of a layer.

        Args:
            layer: with F input and C output features.
            options: those of the constructor beyond ``dtype``.

        Raises:
            TypeError: for another layer, for a quantized one, and for one whose weight is no
                parameter (pruned, or with a parametrization): set ``head.linear`` to that.

        Example:
            >>> import torch
            >>> from fused_bce import LinearBCEWithLogitsLoss
            >>> layer = torch.nn.Linear(8, 1000)
            >>> head = LinearBCEWithLogitsLoss.from_linear(layer, reduction="batchmean")
            >>> head.linear.weight is layer.weight
            True
        """
        check_linear_layer(layer)
        bias = layer.bias is not None
        head = cls(layer.in_features, layer.out_features, bias=bias, device="meta", **options)
        head.linear.share(layer)
        return head

    def forward(self, input: Tensor, target: Tensor | SparseTarget) -> Tensor:
        reason = why_not_computed_by(self.linear)
        if reason is None:
            # By name: the hooks of tensor parallelism pass on the first argument and these.
            return self.linear(input, target=target, loss=self._loss)
        if not torch.compiler.is_compiling():
            log_once(reason)
        return _loss_of_logits(self.linear(input), target, **self._options())

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their labels, in descending order, without the
        logits as a whole: what ``torch.topk(head.linear(input), k)`` returns.

        It holds one block of logits, of ``chunk_bytes``. Of equal logits the lower label comes
        first; nan counts as the largest. Nothing of it is differentiable.

        Args:
            input: (\\*, F), as for forward.
            k: from 0 to C.

        Returns:
            Values in the dtype of the logits, and int64 labels, (\\*, k) each. For an input that is
            a DTensor they are DTensors, of which each process has all labels of its rows.

        Raises:
            RuntimeError: for a k out of range, and an input that does not fit the layer.
            TypeError: for a k that is no integer.

        Example:
            >>> import torch
            >>> from fused_bce import LinearBCEWithLogitsLoss
            >>> head = LinearBCEWithLogitsLoss(8, 1000)
            >>> values, labels = head.topk(torch.randn(2, 8), 5)
            >>> labels.shape
            torch.Size([2, 5])
        """
        reason = why_not_computed_by(self.linear)
        if reason is not None:
            if not torch.compiler.is_compiling():
                log_once(reason)
            with torch.no_grad():
                return topk_of_logits(self.linear(input), k)
        found: list[tuple[Tensor, Tensor]] = []

        def find(input, weight, _target, linear_bias) -> Tensor:
            found.append(find_topk(input, weight, linear_bias, k, self.chunk_bytes))
            return found[0][0]

        # Through the layer's forward, as hooks may bring its weight then. Those of tensor
        # parallelism expect one tensor from it.
        with torch.no_grad():
            self.linear(input, loss=find)
        values, labels = found[0][0], found[0][1]
        if not hasattr(input, "to_local"):
            values, labels = (
                t.to_local() if hasattr(t, "to_local") else t for t in (values, labels)
            )
        return values, labels

    def _loss(self, *operands, linear_bias: Tensor | None) -> Tensor:
        return linear_binary_cross_entropy_with_logits(
            *operands,
            linear_bias=linear_bias,
            chunk_bytes=self.chunk_bytes,
            recompute=self.recompute,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        names = ("weight", "pos_weight", "reduction", *_DEFAULTS)
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        defaults = _DEFAULTS | {"chunk_bytes": None, "recompute": False}
        given = [n for n, default in defaults.items() if getattr(self, n) != default]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in ["reduction", *given])
