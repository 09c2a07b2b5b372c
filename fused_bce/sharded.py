"""The linear head on the shards of DTensors: neither the weight nor logits nor labels travel."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn.functional import pad

from fused_bce.linear_call import LinearCall
from fused_bce.linear_operator import compute_loss, count_elements, operator_arguments
from fused_bce.registrations import ops
from fused_bce.sparse import SparseTarget


def loss_of_shards(call: LinearCall, divisor: Tensor | None) -> DTensor:
    """The loss, a partial sum in each process, as its gradients are that are not sharded.

    Along each dimension of the mesh the labels are sharded if the weight is, else the rows if the
    input is, else nothing.
    """
    if divisor is None and call.reduction == "mean":
        divisor = count_elements(call)
    call = call.flattened()
    input, (linear_weight,), target = call.input, call.parts, call.target
    shards = _Shards(input, linear_weight)
    bias = call.linear_bias
    of_this_process = call._replace(
        input=shards.of(input, rows=0),
        linear_weight=shards.of(linear_weight, labels=0),
        linear_bias=None if bias is None else shards.of(bias, labels=0),
        target=shards.of_target(target),
        weight=shards.of_weight(call.weight),
        pos_weight=shards.of_weight(call.pos_weight),
    )
    loss = compute_loss(*operator_arguments(of_this_process, divisor))
    return DTensor.from_local(loss, shards.mesh, shards.placements(None, None, Partial()))


def topk_of_shards(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    *options: Any,
) -> tuple[DTensor, DTensor]:
    """Of the rows of this process and all labels: k from each shard of the labels are sent."""
    shards = _Shards(input, linear_weight)
    num_labels = linear_weight.shape[0]
    begin, own = shards.share(num_labels, shards.by_label)
    found = ops._linear_topk(
        shards.of(input, rows=0),
        shards.of(linear_weight, labels=0),
        None if linear_bias is None else shards.of(linear_bias, labels=0),
        min(k, own),
        *options,
    )
    # As many from each, those that it does not have behind all others.
    missing = (0, k - min(k, own))
    values, labels = (
        shards.gather_labels(pad(t, missing, value=value), k)
        for t, value in ((found[0], -math.inf), (found[1] + begin, num_labels))
    )
    labels, order = labels.sort(dim=1)
    values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return (
        shards.matrix(values[:, :k].contiguous(), k, labels=None),
        shards.matrix(labels.gather(1, best[:, :k]), k, labels=None),
    )


class _Shards:
    """How the matrix of logits is sharded, and what belongs to the shard of this process."""

    def __init__(self, input: Tensor, linear_weight: Tensor):
        self.mesh: DeviceMesh = next(
            t.device_mesh for t in (linear_weight, input) if isinstance(t, DTensor)
        )
        self.shape = (input.shape[0], linear_weight.shape[0])
        self.by_label = [p == Shard(0) for p in self.distributed(linear_weight).placements]
        by_row = [p == Shard(0) for p in self.distributed(input).placements]
        self.by_row = [r and not c for r, c in zip(by_row, self.by_label, strict=True)]

    def placements(self, rows: int | None, labels: int | None, without: Placement) -> list:
        """Of a tensor that has rows and labels along these of its dimensions: its shards, and
        ``without`` where what is sharded is none of its dimensions."""
        by_row, by_label = (without if dim is None else Shard(dim) for dim in (rows, labels))
        return [
            by_label if of_labels else by_row if of_rows else Replicate()
            for of_rows, of_labels in zip(self.by_row, self.by_label, strict=True)
        ]

    def distributed(self, t: Tensor) -> DTensor:
        """A tensor that is not distributed counts as replicated."""
        if isinstance(t, DTensor):
            return t
        replicated = [Replicate()] * self.mesh.ndim
        return DTensor.from_local(t, self.mesh, replicated, run_check=False)

    def of(self, t: Tensor, *, rows: int | None = None, labels: int | None = None) -> Tensor:
        """The shard of a tensor, whose gradient is a partial sum along what it has not."""
        t, wanted = self.distributed(t), self.placements(rows, labels, Replicate())
        # Backward through redistribute would add up the partial sums of a replicated tensor, which
        # torch's layers leave to whoever needs the sum.
        if list(t.placements) != wanted:
            t = t.redistribute(placements=wanted)
        return t.to_local(grad_placements=self.placements(rows, labels, Partial()))

    def of_weight(self, weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        has_rows = weight.dim() == 2 and weight.shape[0] != 1
        has_labels = weight.dim() > 0 and weight.shape[-1] != 1
        return self.of(
            weight,
            rows=0 if has_rows else None,
            labels=weight.dim() - 1 if has_labels else None,
        )

    def of_target(self, target: Tensor | SparseTarget) -> Tensor | SparseTarget:
        if not isinstance(target, SparseTarget):
            return self.of(target, rows=0, labels=1)
        (row, rows), (label, labels) = map(self.share, self.shape, (self.by_row, self.by_label))
        # The operator passes over labels out of range, and over what is outside the offsets.
        offsets = target.offsets.narrow(0, row, rows + 1)
        return SparseTarget(target.indices - label, offsets, labels, target.values)

    def share(self, size: int, sharded: list[bool]) -> tuple[int, int]:
        """Where the part of this process begins, and its size: DTensor's chunks."""
        begin = 0
        for dim in (dim for dim, is_sharded in enumerate(sharded) if is_sharded):
            chunk = -(-size // self.mesh.size(dim))
            before = min(chunk * self.mesh.get_local_rank(dim), size)
            begin, size = begin + before, min(chunk, size - before)
        return begin, size

    def gather_labels(self, t: Tensor, k: int) -> Tensor:
        """The k columns of every shard of the labels, of the rows of this process."""
        parts = math.prod(
            self.mesh.size(dim) for dim, is_sharded in enumerate(self.by_label) if is_sharded
        )
        whole = self.matrix(t, k * parts, labels=1)
        return whole.redistribute(placements=self.placements(0, None, Replicate())).to_local()

    def matrix(self, t: Tensor, columns: int, labels: int | None) -> DTensor:
        """Of all rows, from those of this process."""
        placements = self.placements(0, labels, Replicate())
        shape, stride = torch.Size((self.shape[0], columns)), (columns, 1)
        return DTensor.from_local(
            t, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )
