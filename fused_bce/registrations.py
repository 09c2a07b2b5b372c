"""What PyTorch must know of the operators beside what csrc/schemas.cpp tells it: how they are
sharded, and what compilers must not look into."""

import functools
import inspect

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from fused_bce import _C
from fused_bce.dtypes import NONE

ops = torch.ops.fused_bce

# What the operators take and return
_OPERANDS = ("logits", "target", "weight", "pos_weight", "label_smoothing", "divisor", "grad_loss")
_RESULTS = ("loss", "grad_logits")


def constant_in_graphs(function):
    """What torch.compiler.assume_constant_result does, but that imports the compiler: seconds."""
    function._dynamo_marked_constant = True
    return function


def outside_graphs(function):
    """What torch.compiler.disable does, for the same reason."""
    # Dynamo takes this flag for a call that it leaves out of a graph. But then the call runs, and
    # Dynamo would make graphs of this frame and of those below it.
    function._torchdynamo_disable = True
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    strategy = frames._FrameExecStrategy(skip, skip)  # of this frame, of those below
    frames.set_code_exec_strategy(function.__code__, strategy)
    return function


def call_composite(op: torch._ops.OpOverload, *operands, **named):
    """Computes an operator that is made of ATen operations by these.

    Past the dispatcher, since torch.export keeps such operators, and past its mode.
    """
    with torch._C.DisableTorchFunction():
        return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *operands, **named)


def record_call(function, variables: dict):
    """Makes the call a node of the graph that torch.fx traces.

    Args:
        variables: the function's, its arguments among them.
    """
    arguments = {name: variables[name] for name in inspect.signature(function).parameters}
    proxies = [value for value in arguments.values() if isinstance(value, Proxy)]
    return handle_torch_function(function, proxies, **arguments)


@constant_in_graphs
def ensure_sharding() -> None:
    """Tells DTensor how the operators are sharded: when the first one is seen, for importing it
    takes seconds."""
    _register_sharding()


@functools.cache
def _register_sharding() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placement_of_weight(weight, logits, dim):
        own = dim - (logits.ndim - weight.ndim)
        sharded = own >= 0 and weight.shape[own] == logits.shape[dim]
        return Shard(own) if sharded else Replicate()

    def placements(operands):
        """Of every tensor, by its name: all replicated, or logits and target sharded along one
        dimension."""
        logits = operands["logits"]
        none = operands["reduction"] == NONE
        replicated = dict.fromkeys((*_OPERANDS, *_RESULTS), Replicate())
        yield replicated
        for dim in range(logits.ndim):
            weights = {
                name: placement_of_weight(operands[name], logits, dim)
                for name in ("weight", "pos_weight")
                if operands.get(name) is not None
            }
            alike = ("logits", "target", "grad_logits", *(("loss", "grad_loss") if none else ()))
            sharded = dict.fromkeys(alike, Shard(dim))
            yield replicated | weights | {"loss": Partial("sum")} | sharded

    def register(op, *results):
        arguments = op._schema.arguments
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

        # torch calls a rule with the arguments of the schema.
        @register_sharding(op)
        def _(*positional, **named):
            in_order = zip((a.name for a in arguments), positional, strict=False)
            operands = defaults | dict(in_order) | named
            absent = {name: None for name, value in operands.items() if value is None}
            return [
                (
                    [of[name] for name in results],
                    [(of | absent).get(argument.name) for argument in arguments],
                )
                for of in placements(operands)
            ]

    for name, _takes_pos_weight, _parameters in _C.losses():
        register(getattr(ops, name).default, "loss")
        register(getattr(ops, f"_{name}_with_grad").default, "loss", "grad_logits")
        register(getattr(ops, f"_{name}_backward").default, "grad_logits")

    @register_sharding(ops._count_unignored.default)
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
