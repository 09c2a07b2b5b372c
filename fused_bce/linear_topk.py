"""The largest logits of a linear layer and their labels, without the logits as a whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from fused_bce.checks import check_k, check_layer, logits_dtype
from fused_bce.coverage import are_shards, log_once, why_not_layer
from fused_bce.registrations import ops, record_call


def find_topk(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See :meth:`fused_bce.LinearBCEWithLogitsLoss.topk`."""
    if isinstance(input, Proxy):
        return record_call(find_topk, locals())
    check_layer(input, linear_weight, linear_bias)
    k = check_k(k, linear_weight.shape[0])
    with torch.no_grad():
        reason = why_not_layer(input, linear_weight, linear_bias)
        if reason is not None:
            if not torch.compiler.is_compiling():
                log_once(reason)
            return topk_of_logits(F.linear(input, linear_weight, linear_bias), k)
        rows = (input if input.dim() > 1 else input[None]).flatten(0, -2)
        layer = rows, linear_weight, linear_bias, k
        options = logits_dtype(input, linear_weight), chunk_bytes or 0
        if are_shards(input, linear_weight):
            from fused_bce.sharded import topk_of_shards

            found = topk_of_shards(*layer, *options)
        else:
            found = ops._linear_topk(*layer, *options)
        values, labels = (t.reshape(*input.shape[:-1], k) for t in found)
        return values, labels


def topk_of_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of equal logits the lower label first, of which torch.topk says nothing."""
    k = check_k(k, logits.shape[-1])
    values, labels = logits.detach().sort(dim=-1, descending=True, stable=True)
    return values[..., :k], labels[..., :k]
