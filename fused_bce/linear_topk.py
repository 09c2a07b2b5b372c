"""The largest logits of a linear layer and their labels, without the logits as a whole."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import Proxy

from fused_bce.arguments import logits_dtype
from fused_bce.checks import check_k, check_layer
from fused_bce.coverage import are_shards, log_once, why_not_linear
from fused_bce.linear_call import LinearCall
from fused_bce.linear_operator import compute_logits
from fused_bce.registrations import ops, record_call


def find_topk(
    input: Tensor,
    linear_weight: Tensor | Sequence[Tensor],
    linear_bias: Tensor | None,
    k: int,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See :meth:`fused_bce.LinearBCEWithLogitsLoss.topk`."""
    if isinstance(input, Proxy):
        return record_call(find_topk, locals())
    call = LinearCall(input, linear_weight, linear_bias, None, chunk_bytes=chunk_bytes)
    check_layer(call)
    k = check_k(k, call.num_labels)
    with torch.no_grad():
        reason = why_not_linear(call)
        if reason is not None:
            if not torch.compiler.is_compiling():
                log_once(reason)
            return topk_of_logits(compute_logits(call), k)
        calls = [call.flattened()] if len(call.parts) == 1 else call.in_parts()
        found = [_topk_of_part(part, min(k, part.num_labels)) for part in calls]
        values, labels = found[0] if len(found) == 1 else _merge(found, call.parts, k)
        shape = (*input.shape[:-1], k)
        return values.reshape(shape), labels.reshape(shape)


def _topk_of_part(call: LinearCall, k: int) -> tuple[Tensor, Tensor]:
    (linear_weight,) = call.parts
    layer = call.input, linear_weight, call.linear_bias, k
    options = call.dtype or logits_dtype(call.input, linear_weight), call.chunk_bytes or 0
    if are_shards(call.input, linear_weight):
        from fused_bce.sharded import topk_of_shards

        return topk_of_shards(*layer, *options)
    return ops._linear_topk(*layer, *options)


def _merge(found, parts: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Of lists in order, of parts in the order of their labels."""
    starts = accumulate((part.shape[0] for part in parts[:-1]), initial=0)
    values = torch.cat([values for values, _ in found], dim=1)
    labels = torch.cat(
        [labels + start for (_, labels), start in zip(found, starts, strict=True)], 1
    )
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], labels.gather(1, order[:, :k])


def topk_of_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of equal logits the lower label first, of which torch.topk says nothing."""
    k = check_k(k, logits.shape[-1])
    values, labels = logits.detach().sort(dim=-1, descending=True, stable=True)
    return values[..., :k], labels[..., :k]
