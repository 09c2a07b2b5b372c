"""The sigmoid loss of pairs: of whole logits, of rows of them, and without them."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

from contenders.losses import compiled, exit_unless_fused
from contenders.peers import why_not_package
from fused_bce import SparseTarget
from fused_bce.functional import pairwise_sigmoid_loss

# Of the features of images and texts, scale and bias
PairwiseLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PairwiseInputs = tuple[Tensor, Tensor, Tensor, Tensor]

CHUNK_ROWS = 1024


def make_pairwise_losses(inputs: PairwiseInputs, with_compile: bool) -> dict[str, PairwiseLoss]:
    """By the name of their contender."""
    image, text, *_ = inputs
    diagonal = SparseTarget.from_padded(
        torch.arange(len(image), device=image.device)[:, None], len(text)
    )
    exit_unless_fused(image, diagonal, linear_weight=text)
    losses = {"eager": plain_loss, "chunked": chunked_loss}
    if with_compile:
        losses["compile"] = compiled(plain_loss)
    if why_not_siglip_kernel(image.device.type) is None:
        losses["siglip_kernel"] = siglip_kernel_loss()
    return losses | {"fused": pairwise_sigmoid_loss}


def why_not_siglip_kernel(device: str) -> str | None:
    """The package has Triton kernels for this loss, which do not keep the logits either."""

    def check() -> None:
        features = normalize(torch.randn(2, 256, 64, device=device), dim=-1)
        inputs = [*features, *torch.tensor([10.0, -10.0], device=device)]
        theirs = siglip_kernel_loss()(*(t.bfloat16() for t in inputs))
        # Logits of -10, whose exp counts, are rounded to 8 bits.
        torch.testing.assert_close(theirs.float(), plain_loss(*inputs), rtol=0.05, atol=0)

    return why_not_package("siglip_kernel", device, check)


def siglip_kernel_loss() -> PairwiseLoss:
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(image, text, scale.log(), bias)


def plain_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: bool = True
) -> Tensor:
    """The formula of the paper, as open_clip has it."""
    logits = make_logits(image, text, scale, bias)
    return -logsigmoid(make_labels(logits, positives) * logits).sum() / len(image)


def chunked_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: bool = True
) -> Tensor:
    """As open_clip has it with chunk_size: all pairs as negatives, then less the logits of the
    positives, which is the difference of the two. Autograd keeps the logits of every chunk."""
    total = image.new_zeros(())
    for first in range(0, len(image), CHUNK_ROWS):
        logits = make_logits(image[first : first + CHUNK_ROWS], text, scale, bias)
        total = total + softplus(logits).sum()
        if positives:
            total = total - logits.diagonal(first).sum()
    return total / len(image)


def make_logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.t()
    logits += bias
    return logits


def make_labels(logits: Tensor, positives: bool) -> Tensor:
    """1 on the diagonal, if positives are there, and -1 elsewhere."""
    if not positives:
        return -torch.ones_like(logits)
    return 2 * torch.eye(*logits.shape, device=logits.device, dtype=logits.dtype) - 1


def exp_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """In the arithmetic of a kernel that has exp and log but no log1p, as Triton's language."""
    logits = make_logits(image, text, scale, bias)
    return _LogOfOnePlusExp.apply(logits, make_labels(logits, True)) / len(image)


class _LogOfOnePlusExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return (1 + (-labels * logits).exp()).log().sum()

    @staticmethod
    def backward(ctx, grad_loss):
        logits, labels = ctx.saved_tensors
        return grad_loss * (1 / (1 + (-logits).exp()) - (labels > 0).to(logits.dtype)), None
