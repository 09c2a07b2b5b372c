"""What the tests of the CUDA kernels share."""

import contextlib

import pytest
import torch
from helpers import EMULATES_CUDA, Result, assert_results_no_worse, evaluate, reference, torch_bce

DEVICE = "cpu" if EMULATES_CUDA else "cuda"
CHUNK = 8192  # elements that one block sums up; beyond, blocks have to agree on who is last

EXTRAS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "ignore_index": {"ignore_index": 1},
}
by_extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)


def expected_results(logits, target, **options) -> tuple[Result, Result]:
    """Of torch in the same dtype and in float64, without the gradient of the target."""
    theirs = evaluate(torch_bce, logits, target, **options)
    return theirs, reference(logits, target, **options)._replace(grad_target=None)


def check_result(got: Result, logits, target, **options) -> None:
    assert_results_no_worse(got, *expected_results(logits, target, **options))


def assert_same_bits(got: Result, expected: Result) -> None:
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.grad_logits, expected.grad_logits)


def make_grad_loss(logits, reduction):
    """Not 1, so that backward has something to do."""
    return torch.full(logits.shape if reduction == "none" else (), 2.5, device=logits.device)


def assert_close_to_torch(got: Result, logits, target, **options):
    """torch in float64, and what it does not take around it."""
    exact = reference(logits, target, **options)
    eps = torch.finfo(logits.dtype).eps
    for g, e in ((got.loss, exact.loss), (got.grad_logits, exact.grad_logits)):
        # Smoothed targets round in float32, and near 0 their gradients cancel.
        atol = 8 * eps * e.abs().max().item()
        torch.testing.assert_close(g.cpu().double(), e, rtol=8 * eps, atol=atol)


def capture(compute):
    """A CUDA graph of compute(), and its result, which every replay writes anew."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()
    return graph, result


@contextlib.contextmanager
def no_synchronisation():
    """Where the host waits for the device, an error is raised."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


sync_debug_mode = pytest.mark.filterwarnings(
    "ignore:Synchronization debug mode is a prototype feature:UserWarning"
)
