"""The linear head on the shards of DTensors: neither the weight nor logits nor labels travel."""

from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fused_bce.head import linear_loss
from fused_bce.registrations import ops, whole
from fused_bce.scalars import scalar_operand
from fused_bce.sparse import SparseTarget


def loss_of_shards(input, linear_weight, target, operands, arguments) -> Tensor:
    """The loss as a partial sum. Along each dimension of the mesh labels are sharded if the weight
    is, else rows if the input is; gradients are sharded likewise, or partial sums."""
    mesh = next(t.device_mesh for t in (linear_weight, input) if isinstance(t, DTensor))
    input, linear_weight = _distributed(input, mesh), _distributed(linear_weight, mesh)
    by_label = [p == Shard(0) for p in linear_weight.placements]
    by_row = [
        p == Shard(0) and not labels for p, labels in zip(input.placements, by_label, strict=True)
    ]

    def placed(rows, labels, elsewhere):
        """What is of rows or labels along the dimensions of the mesh that shard them."""
        return [
            labels if is_label else rows if is_row else elsewhere
            for is_label, is_row in zip(by_label, by_row, strict=True)
        ]

    replicated = Replicate()
    of_rows = placed(Shard(0), replicated, replicated)
    of_labels = placed(replicated, Shard(0), replicated)
    shape = (input.shape[0], linear_weight.shape[0])
    arguments = dict(arguments)
    if arguments["divisor"] is None and arguments["reduction"] == 1:
        arguments["divisor"] = _count(target, shape, arguments, mesh)
    bias = operands["linear_bias"]
    local_operands = {
        "linear_bias": bias
        if bias is None
        else _local(bias, mesh, of_labels, placed(Partial(), Shard(0), replicated))
    }
    for name in ("weight", "pos_weight"):
        local_operands[name] = _local_weight(operands[name], mesh, by_row, by_label)
    loss = linear_loss(
        _local(input, mesh, of_rows, placed(Shard(0), Partial(), replicated)),
        _local(linear_weight, mesh, of_labels, placed(Partial(), Shard(0), replicated)),
        _local_target(target, shape, mesh, placed(Shard(0), Shard(1), replicated)),
        local_operands,
        arguments,
    )
    return DTensor.from_local(loss, mesh, placed(Partial(), Partial(), replicated))


def _distributed(t: Tensor, mesh) -> DTensor:
    """A tensor that is none counts as replicated."""
    if isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _local(t: Tensor, mesh, placements, grad_placements=None) -> Tensor:
    t = _distributed(t, mesh).redistribute(placements=placements)
    return t.to_local(grad_placements=grad_placements)


def _local_weight(weight, mesh, by_row, by_label) -> Tensor | None:
    if weight is None or weight.dim() == 0:
        return weight if weight is None else _local(weight, mesh, [Replicate()] * mesh.ndim)
    last, first = weight.dim() - 1, weight.dim() - 2
    placements = [
        Shard(last)
        if label and weight.shape[last] != 1
        else Shard(first)
        if row and first >= 0 and weight.shape[first] != 1
        else Replicate()
        for row, label in zip(by_row, by_label, strict=True)
    ]
    return _local(weight, mesh, placements)


def _local_target(target, shape, mesh, placements):
    if not isinstance(target, SparseTarget):
        return _local(target, mesh, placements)
    (rows, labels), (row, label) = compute_local_shape_and_global_offset(shape, mesh, placements)
    # Labels outside the shard are passed over, as are those of other rows.
    return SparseTarget(
        target.indices - label, target.offsets[row : row + rows + 1], labels, target.values
    )


def _count(target, shape, arguments, mesh) -> Tensor:
    index = arguments["ignore_index"], arguments["ignore_nan"]
    if isinstance(target, SparseTarget) or index == (None, False):
        return scalar_operand(
            shape[0] * shape[1], target.indices if isinstance(target, SparseTarget) else target
        )
    count = whole(ops.count_kept(_distributed(target, mesh).detach(), *index))
    return cast(DTensor, count).to_local()
