"""What PyTorch must know of the operators beside what csrc/schemas.cpp tells it: how they are
sharded, and what compilers must not look into."""

import functools

import torch
from torch import Tensor

ops = torch.ops.fused_bce

_NONE = 0  # torch.nn._reduction's number


def constant_in_graphs(function):
    """What torch.compiler.assume_constant_result does, but that imports the compiler: seconds."""
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def ensure_sharding() -> None:
    """Tells DTensor how the operators are sharded: when the first one is seen, for importing it
    takes seconds."""
    _register_sharding()


@functools.cache
def _register_sharding() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placements_of_weight(weight, logits, dim):
        if weight is None:
            return None
        own = dim - (logits.ndim - weight.ndim)
        sharded = own >= 0 and weight.shape[own] == logits.shape[dim]
        return Shard(own) if sharded else Replicate()

    def shardings(logits, weight, pos_weight, label_smoothing, divisor, reduction):
        """The placements of (loss or grad_loss, logits, weight, pos_weight, and the numbers
        label_smoothing and divisor): all replicated, or logits and target sharded along one
        dimension."""
        whole = Replicate()
        numbers = label_smoothing and whole, divisor and whole
        yield whole, whole, weight and whole, pos_weight and whole, *numbers
        for dim in range(logits.ndim):
            yield (
                Shard(dim) if reduction == _NONE else Partial("sum"),
                Shard(dim),
                placements_of_weight(weight, logits, dim),
                placements_of_weight(pos_weight, logits, dim),
                *numbers,
            )

    # torch calls these rules with the arguments of the schema, so that its list stands here, too.
    def register_forward(op, outputs):
        @register_sharding(op)
        def _(
            logits,
            target,
            weight=None,
            pos_weight=None,
            reduction=1,
            dtype=None,
            label_smoothing=None,
            ignore_index=None,
            ignore_nan=False,
            divisor=None,
            recompute=False,
        ):
            return [
                ([loss, x][:outputs], [x, x, w, p, None, None, s, None, None, d, None])
                for loss, x, w, p, s, d in shardings(
                    logits, weight, pos_weight, label_smoothing, divisor, reduction
                )
            ]

    register_forward(ops.binary_cross_entropy_with_logits.default, outputs=1)
    register_forward(ops.forward_with_grad.default, outputs=2)

    @register_sharding(ops.backward.default)
    def _(
        grad_loss,
        logits,
        target,
        weight,
        pos_weight,
        reduction,
        label_smoothing=None,
        ignore_index=None,
        ignore_nan=False,
        divisor=None,
    ):
        return [
            (
                [x],
                [loss if reduction == _NONE else Replicate(), x, x, w, p, None, s, None, None, d],
            )
            for loss, x, w, p, s, d in shardings(
                logits, weight, pos_weight, label_smoothing, divisor, reduction
            )
        ]

    @register_sharding(ops.count_kept.default)
    def _(target, ignore_index, ignore_nan=False):
        return [
            ([Replicate()], [Replicate(), None, None]),
            *(([Partial("sum")], [Shard(dim), None, None]) for dim in range(target.ndim)),
        ]


def whole(number: Tensor) -> Tensor:
    """With all parts added up, if each process has its own."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(number, DTensor):
        return number
    return number.redistribute(placements=[Replicate()] * number.device_mesh.ndim)
