"""SigLIP's loss as a module with open_clip's interface, over the processes of a training run."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Proxy

from fused_bce.arguments import as_integer, logits_dtype
from fused_bce.coverage import are_shards
from fused_bce.linear_operator import divisor_of, operator_arguments
from fused_bce.pairwise import (
    as_linear_call,
    check_pairs,
    make_target,
    pairwise_sigmoid_loss,
)
from fused_bce.registrations import ops, outside_graphs, record_call


class _Turn(NamedTuple):
    """One exchange of texts."""

    features: Tensor | None  # those of another process; None where it is the turn of this one's
    # Sends the gradient of these features to the process that owns them, and returns what comes in
    # return: another process's part of the gradient of this one's texts.
    give_back: Callable[[Tensor], Tensor]


class SigLipLoss(torch.nn.Module):
    """The sigmoid loss of image and text features, a drop-in for open_clip's class of that name:
    :func:`fused_bce.functional.pairwise_sigmoid_loss`, in several processes of each one's images
    with all texts.

    The texts of the others come one process at a time, and their gradients go back as they are
    computed, in forward: memory grows by the features and the gradient of one neighbour, whatever
    the number of processes. Batches must be of the same size and dtype in all of them, and so must
    be the gradient of the loss; none or all of them have a frozen text tower, or torch.no_grad. A
    second derivative there is in one process only.

    Args:
        cache_labels: accepted, as nothing of the size of the labels exists.
        rank, world_size: of this process, in the default group of torch.distributed.
        dist_impl: how the texts travel: ``"bidir"`` (None), to both neighbours; ``"shift"``, to
            the right; ``"reduce"``, in a sum in which all others are 0; ``"gather"``, broadcast
            from one process after the other, as all at once would be in memory.
        chunk_size: a block has at most ``chunk_size`` x N logits, as open_clip's of that many
            images, in whatever shape; 0: by its size in bytes, see ``chunk_bytes`` of the function.

    Shape:
        - image_features, text_features: (N, F), normalised.
        - logit_scale: one number, as it multiplies (``model.logit_scale.exp()``).
        - logit_bias: one number or None.
        - output: one number, or with ``output_dict`` ``{"contrastive_loss": ...}``.

    Raises:
        ValueError: for an unknown ``dist_impl``, and in several processes for a ``rank`` or
            ``world_size`` that is not torch.distributed's.
        TypeError: for ``rank``, ``world_size`` or ``chunk_size`` that is no integer.
        RuntimeError: in several processes, without an initialised group, for DTensors, for
            gradients of the loss that differ, and for a second derivative.

    What the function raises, besides.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from fused_bce import SigLipLoss
        >>> image, text = normalize(torch.eye(4)), normalize(torch.eye(4))
        >>> SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
        tensor(0.6933)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        if dist_impl is not None and dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl must be one of {[*_EXCHANGES]}, not {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = as_integer("rank", rank)
        self.world_size = as_integer("world_size", world_size)
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = as_integer("chunk_size", chunk_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        operands = image_features, text_features, logit_scale, logit_bias
        loss = _loss(*operands, self.rank, self.world_size, self.dist_impl, self.chunk_size)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        names = ("rank", "world_size", "dist_impl", "chunk_size")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _loss(image, text, logit_scale, logit_bias, rank, world_size, dist_impl, chunk_size) -> Tensor:
    if any(isinstance(t, Proxy) for t in (image, text, logit_scale, logit_bias)):
        return record_call(_loss, locals())
    operands = image, text, logit_scale, logit_bias
    check_pairs(*operands)
    chunk_bytes = None
    if chunk_size > 0:
        # On a CPU without products of a half type a block is widened, and has fewer logits.
        chunk_bytes = max(chunk_size * text.shape[0] * logits_dtype(image, text).itemsize, 1)
    if world_size > 1:
        return _over_processes(*operands, rank, world_size, dist_impl, chunk_bytes)
    return pairwise_sigmoid_loss(*operands, chunk_bytes=chunk_bytes)


@outside_graphs
def _over_processes(
    image, text, logit_scale, logit_bias, rank, world_size, dist_impl, chunk_bytes
) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"SigLipLoss over {world_size} processes needs torch.distributed.init_process_group"
        )
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"SigLipLoss was made for rank {rank} of {world_size} processes, but this is rank "
            f"{dist.get_rank()} of {dist.get_world_size()}"
        )
    if are_shards(image) or are_shards(text):
        raise RuntimeError("SigLipLoss over processes takes the features of this one, no DTensors")
    exchange = partial(_EXCHANGES[dist_impl], rank=rank, world_size=world_size)
    # Collectives pass on memory, whatever the strides; and the gradient has those of the features.
    text = text.contiguous()
    operands = image, text, logit_scale, logit_bias, make_target("diagonal", image, text)
    call = as_linear_call(*operands, reduction="batchmean", chunk_bytes=chunk_bytes)
    differentiates = torch.is_grad_enabled()  # forward of a torch.autograd.Function would not see
    differentiable = call.input, text, call.linear_bias
    return _LossOverProcesses.apply(*differentiable, call, exchange, differentiates)


class _LossOverProcesses(torch.autograd.Function):
    """Loss and gradients, all in forward, so that no features have to wait for backward."""

    @staticmethod
    def forward(ctx, scaled, text, bias, call, exchange, differentiates):
        wanted = [needed and differentiates for needed in ctx.needs_input_grad[:3]]
        loss, grad_scaled, grad_text, grad_bias = _loss_and_grads(call, text, call.target, wanted)

        def grad_of(features):
            """Adds up all but the gradient of the features."""
            no_pair = make_target(None, call.input, features)
            part, of_scaled, grad, of_bias = _loss_and_grads(call, features, no_pair, wanted)
            loss.add_(part)
            grad_scaled.add_(of_scaled)
            grad_bias.add_(of_bias)
            return grad

        for features, give_back in exchange(text):
            grad = torch.zeros_like(grad_text) if features is None else grad_of(features)
            if wanted[1]:
                grad_text += give_back(grad)
            del grad  # or it would be there beside the next
        ctx.text_dtype = text.dtype
        # Saved-tensor hooks see them, and after backward they are gone.
        ctx.save_for_backward(grad_scaled, grad_text, grad_bias)
        return loss

    @staticmethod
    @outside_graphs
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            # torch's once_differentiable would not notice: grad_loss is a constant.
            raise RuntimeError("SigLipLoss in several processes has no second derivative")
        wanted = ctx.needs_input_grad
        if wanted[1]:
            _check_equal_everywhere(grad_loss)
        # Not in place: with retain_graph there is another backward.
        scaled, text, bias = (
            grad * grad_loss.to(grad.dtype) if is_wanted else None
            for grad, is_wanted in zip(ctx.saved_tensors, wanted, strict=False)
        )
        return scaled, None if text is None else text.to(ctx.text_dtype), bias, None, None, None


def _loss_and_grads(call, text, target, wanted) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For these texts. The gradients that are wanted are in float32 or float64."""
    call = call._replace(linear_weight=text.to(call.input.dtype), target=target)
    arguments = operator_arguments(call, divisor_of(call))
    return ops._linear_binary_cross_entropy_with_grads(wanted, None, *arguments)


def _check_equal_everywhere(grad_loss: Tensor) -> None:
    """The gradients of the texts were added up over the processes before it was known."""
    bounds = torch.stack([grad_loss, -grad_loss])
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    equal = (bounds[0] == -bounds[1]) | bounds.isnan().any()
    message = "the gradient of SigLipLoss must be the same in all processes"
    if not equal.is_cpu:
        torch._assert_async(equal, message)
    elif not equal:
        raise RuntimeError(message)


def _swap(t: Tensor, to: int, source: int) -> Tensor:
    received = torch.empty_like(t)
    ops = [dist.P2POp(dist.isend, t, to), dist.P2POp(dist.irecv, received, source)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return received


def _around(text: Tensor, rank: int, world_size: int, step: int, turns: int) -> Iterator[_Turn]:
    """From neighbour to neighbour; gradients go straight to the owner."""
    for turn in range(1, turns + 1):
        text = _swap(text, (rank + step) % world_size, (rank - step) % world_size)
        owner, borrower = (rank - step * turn) % world_size, (rank + step * turn) % world_size
        yield _Turn(text, partial(_swap, to=owner, source=borrower))


def _shift(text: Tensor, rank: int, world_size: int) -> Iterator[_Turn]:
    return _around(text, rank, world_size, 1, world_size - 1)


def _bidir(text: Tensor, rank: int, world_size: int) -> Iterator[_Turn]:
    yield from _around(text, rank, world_size, 1, world_size // 2)
    yield from _around(text, rank, world_size, -1, (world_size - 1) // 2)


def _reduce(text: Tensor, rank: int, world_size: int) -> Iterator[_Turn]:
    for owner in range(world_size):
        features = text.clone() if owner == rank else torch.zeros_like(text)
        dist.all_reduce(features)
        give_back = partial(_sum_to, owner=owner, rank=rank)
        yield _Turn(None if owner == rank else features, give_back)


def _gather(text: Tensor, rank: int, world_size: int) -> Iterator[_Turn]:
    for owner in range(world_size):
        features = text if owner == rank else torch.empty_like(text)
        dist.broadcast(features, owner)
        give_back = partial(_sum_to, owner=owner, rank=rank)
        yield _Turn(None if owner == rank else features, give_back)


def _sum_to(grad: Tensor, owner: int, rank: int) -> Tensor:
    dist.reduce(grad, owner)
    return grad if owner == rank else torch.zeros_like(grad)


_EXCHANGES: dict[str, Callable[..., Iterator[_Turn]]] = {
    "bidir": _bidir,
    "shift": _shift,
    "reduce": _reduce,
    "gather": _gather,
}
