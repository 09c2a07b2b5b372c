"""SigLipLoss over processes, against the formula of its authors on all pairs in float64."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from memory import bytes_of
from processes import run
from torch.nn.functional import logsigmoid, normalize

from fused_bce import SigLipLoss

WAYS = ("bidir", "shift", "reduce", "gather")
ROWS, FEATURES = 7, 16


def draw(dtype=torch.float64):
    """All images and texts, the same in every process, and the leaves of this one."""
    size = dist.get_world_size()
    both = [
        normalize(torch.randn(size, ROWS, FEATURES, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    ]
    numbers = [torch.tensor(5.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype)]
    rank = dist.get_rank()
    leaves = [t.clone().requires_grad_() for t in (*(b[rank] for b in both), *numbers)]
    return both, leaves


def exact(both, leaves, grad_loss):
    """This process's loss and what all losses together give for its leaves."""
    images, texts = (b.double().requires_grad_() for b in both)
    numbers = [t.detach().double().requires_grad_() for t in leaves[2:]]
    size, rank = dist.get_world_size(), dist.get_rank()
    losses = []
    for image, own in zip(images, range(size), strict=True):
        logits = numbers[0] * image @ texts.flatten(0, 1).t() + numbers[1]
        positive = torch.eye(size * ROWS, dtype=torch.bool)[own * ROWS : (own + 1) * ROWS]
        losses.append(-logsigmoid(torch.where(positive, logits, -logits)).sum() / ROWS)
    of_features = torch.autograd.grad(grad_loss * sum(losses), (images, texts), retain_graph=True)
    of_numbers = torch.autograd.grad(grad_loss * losses[rank], numbers)
    return losses[rank].detach(), [*(g[rank] for g in of_features), *of_numbers]


def check_against_all_pairs(way, dtype, tolerance, **autocast):
    both, leaves = draw(dtype)
    module = SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size(), dist_impl=way)
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        loss = module(*leaves)
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.3), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    want_loss, want_grads = exact(both, leaves, 0.3)
    for got, want in zip((loss, *grads), (want_loss, *want_grads), strict=True):
        error = (got.detach().double() - want).abs().max() / want.abs().max()
        assert error <= tolerance, (way, dtype, error)
    assert [g.dtype for g in grads] == [dtype] * 4


def check_frozen(way):
    """What is not wanted is not computed, and nothing is sent back for a frozen text tower."""
    both, leaves = draw()
    module = SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size(), dist_impl=way)
    want_loss, want_grads = exact(both, leaves, 1.0)
    leaves[1].requires_grad_(False)
    loss = module(*leaves)
    (grad,) = torch.autograd.grad(loss, leaves[0])
    torch.testing.assert_close(loss.detach(), want_loss)
    torch.testing.assert_close(grad, want_grads[0])
    with torch.no_grad():
        torch.testing.assert_close(module(*leaves), want_loss)


def check_refusals():
    _, leaves = draw()
    rank = dist.get_rank()
    module = SigLipLoss(rank=rank, world_size=dist.get_world_size())
    with pytest.raises(RuntimeError, match="must be the same in all processes"):
        (module(*leaves) * (1 + rank)).backward()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(module(*leaves), leaves[0], create_graph=True)


def check_memory():
    """The same for any number of processes but for the texts that pass through from the one
    neighbour to the other. A matrix of logits would be 16 times the features."""
    rows, features = 1024, 64
    size, rank = dist.get_world_size(), dist.get_rank()
    image, text = (normalize(torch.randn(rows, features)).requires_grad_() for _ in range(2))

    def step(module):
        module(image, text, 10.0, -10.0).backward()
        image.grad = text.grad = None

    for way in WAYS:
        module = SigLipLoss(rank=rank, world_size=size, dist_impl=way, chunk_size=32)
        peak = bytes_of(partial(step, module), "cpu").peak
        assert peak <= 9 * image.nbytes, (way, size, peak / image.nbytes)


def check_all():
    for way in WAYS:
        check_against_all_pairs(way, torch.float64, 1e-13, enabled=False)
        # A logit of 5 is rounded to the dtype by up to half a unit, its gradient with it.
        check_against_all_pairs(way, torch.bfloat16, 2**-5, enabled=False)
        check_against_all_pairs(way, torch.float32, 2**-5)
        check_against_all_pairs(way, torch.float64, 1e-13)
        check_frozen(way)
    check_refusals()
    check_memory()


@pytest.mark.parametrize(
    "world_size",
    [pytest.param(2, marks=pytest.mark.large), 3, pytest.param(4, marks=pytest.mark.large)],
    ids=str,
)
def test_siglip(world_size, tmp_path):
    run(check_all, world_size, tmp_path)
