"""SigLipLoss over processes, against the formula of its authors on all pairs in float64."""

import contextlib
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import rounded
from memory import bytes_of
from processes import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import logsigmoid, normalize

from fused_bce import SigLipLoss, siglip
from fused_bce.functional import pairwise_sigmoid_loss

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


def loss_of_this_process(**options):
    return SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size(), **options)


def exact(both, leaves, grad_loss=1.0, dtype=torch.float64):
    """This process's loss and what all losses together give for its leaves. Operands and logits are
    rounded to the dtype, as a layer rounds them."""
    images, texts = (b.double().requires_grad_() for b in both)
    numbers = [t.detach().double().requires_grad_() for t in leaves[2:]]
    size, rank = dist.get_world_size(), dist.get_rank()
    losses = []
    for image, own in zip(images, range(size), strict=True):
        scaled, others, bias = (
            rounded(t, dtype) for t in (numbers[0] * image, texts.flatten(0, 1), numbers[1])
        )
        logits = rounded(scaled @ others.t() + bias, dtype)
        positive = torch.eye(size * ROWS, dtype=torch.bool)[own * ROWS : (own + 1) * ROWS]
        losses.append(-logsigmoid(torch.where(positive, logits, -logits)).sum() / ROWS)
    of_features = torch.autograd.grad(grad_loss * sum(losses), (images, texts), retain_graph=True)
    of_numbers = torch.autograd.grad(grad_loss * losses[rank], numbers)
    return losses[rank].detach(), [*(g[rank] for g in of_features), *of_numbers]


def check(results, expected, tolerance):
    """Against the largest value of each."""
    for got, want in zip(results, expected, strict=True):
        error = (got.detach().double() - want).abs().max() / want.abs().max()
        assert error <= tolerance, error


def check_against_all_pairs(way, dtype, tolerance, logits_dtype=None, mixed=False):
    """Under autocast if the dtype of the logits is given."""
    both, leaves = draw(dtype)
    if mixed:
        both[1] = both[1].bfloat16()
        leaves[1] = leaves[1].detach().bfloat16().requires_grad_()
    module = loss_of_this_process(dist_impl=way)
    with torch.autocast("cpu", torch.bfloat16, enabled=logits_dtype is not None):
        loss = module(*leaves)
    grad_loss = torch.full_like(loss, 0.3)
    grads = torch.autograd.grad(loss, leaves, grad_loss, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, grad_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    want_loss, want_grads = exact(both, leaves, 0.3, logits_dtype or dtype)
    check((loss, *grads), (want_loss, *want_grads), tolerance)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]


def check_layouts(way):
    """Collectives send memory as it lies: column-major texts, of all processes or of one."""
    both, leaves = draw()
    want_loss, want_grads = exact(both, leaves)
    for column_major in ([0], [*range(dist.get_world_size())]):
        ours = [t.detach() for t in leaves]
        if dist.get_rank() in column_major:
            ours[:2] = (t.t().contiguous().t() for t in ours[:2])
        ours = [t.requires_grad_() for t in ours]
        loss = loss_of_this_process(dist_impl=way)(*ours)
        check((loss, *torch.autograd.grad(loss, ours)), (want_loss, *want_grads), 1e-13)


def check_frozen(way):
    """What is not wanted is not computed, and nothing is sent back for a frozen text tower."""
    both, leaves = draw()
    module = loss_of_this_process(dist_impl=way)
    want_loss, want_grads = exact(both, leaves)
    with count_exchanges() as there_and_back:
        module(*leaves)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), count_exchanges() as there:
            check([module(*leaves)], [want_loss], 1e-13)
        assert 2 * len(there) == len(there_and_back)
    leaves[1].requires_grad_(False)
    with count_exchanges() as there:
        loss = module(*leaves)
    assert 2 * len(there) == len(there_and_back)
    (grad,) = torch.autograd.grad(loss, leaves[0])
    check([loss, grad], [want_loss, want_grads[0]], 1e-13)


@contextlib.contextmanager
def count_exchanges():
    calls = []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("batch_isend_irecv", "broadcast", "all_reduce", "reduce"):
            patch.setattr(dist, name, counted(getattr(dist, name)))
        yield calls


def check_saved():
    """Gradients are all that is kept for backward: seen by hooks, and gone after it."""
    _, leaves = draw(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = loss_of_this_process()(*leaves)
    gradients = [t for t in kept if t.shape == (ROWS, FEATURES)]
    # The images too, for the scale, of which autograd computes the product
    assert [torch.equal(t, leaves[0]) for t in gradients] == [True, False, False]
    kept.clear(), gradients.clear()
    loss.backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        _ = next_of_kind(loss.grad_fn, "_LossOverProcesses").saved_tensors
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def next_of_kind(node, name):
    while name not in node.name():
        ((node, _), *_) = node.next_functions
    return node


def check_edits():
    """The gradients are those of forward: an edit of the features in between changes nothing."""
    both, leaves = draw()
    want = exact(both, leaves)[1]
    loss = loss_of_this_process()(*leaves)
    with torch.no_grad():
        leaves[1].zero_()
    check(torch.autograd.grad(loss, leaves), want, 1e-13)


def check_dtensors():
    """The function takes them on their shards; the module is for local features."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    both, leaves = draw()
    image, text = (t.flatten(0, 1)[:-2] for t in both)  # uneven shards
    numbers = [t.detach() for t in leaves[2:]]
    whole = [t.clone().requires_grad_() for t in (image, text, *numbers)]
    want = pairwise_sigmoid_loss(*whole)
    want_grads = torch.autograd.grad(want, whole)
    for placements in ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0))):
        features = [
            distribute_tensor(t, mesh, [placement])
            for t, placement in zip((image, text), placements, strict=True)
        ]
        distributed = [distribute_tensor(t, mesh, [Replicate()]) for t in numbers]
        for others in (numbers, distributed):
            ours = [t.clone().requires_grad_() for t in (*features, *others)]
            loss = pairwise_sigmoid_loss(*ours)
            grads = torch.autograd.grad(loss, ours)
            results = [t.full_tensor() if isinstance(t, DTensor) else t for t in (loss, *grads)]
            check(results, (want.detach(), *want_grads), 1e-13)
    with pytest.raises(RuntimeError, match="no DTensors"):
        loss_of_this_process()(*features, *numbers)


def check_refusals():
    _, leaves = draw()
    rank, size = dist.get_rank(), dist.get_world_size()
    module = loss_of_this_process()
    for other in ({"rank": rank + 1, "world_size": size}, {"rank": rank, "world_size": size + 1}):
        with pytest.raises(ValueError, match=f"but this is rank {rank} of {size}"):
            SigLipLoss(**other)(*leaves)
    with pytest.raises(RuntimeError, match="must be the same in all processes"):
        (module(*leaves) * (1 + rank)).backward()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(module(*leaves), leaves[0], create_graph=True)


def check_memory():
    """The same for any number of processes: gradients of images and texts and a neighbour's part of
    both, its features, and the scaled images; and where the loss adds up, a block and targets. A
    matrix of logits would be 16 times the features."""
    rows, features = 1024, 64
    image, text = (normalize(torch.randn(rows, features)).requires_grad_() for _ in range(2))

    def step(module):
        module(image, text, 10.0, -10.0).backward()
        image.grad = text.grad = None

    for way in WAYS:
        module = loss_of_this_process(dist_impl=way, chunk_size=32)
        # The smallest: a thread of gloo may let go of what it has sent only later.
        peak = min(bytes_of(partial(step, module), "cpu").peak for _ in range(5))
        assert peak <= 6.75 * image.nbytes, (way, peak / image.nbytes)


def check_compiled():
    """As many graphs as around a function under torch.compiler.disable, and no warnings of frames
    that Dynamo tries in vain."""
    ours = count_graphs()
    with pytest.MonkeyPatch.context() as patch:
        disabled = torch.compiler.disable(siglip._over_processes)
        patch.setattr(siglip, "_over_processes", disabled)
        backward = torch.compiler.disable(siglip._LossOverProcesses.backward)
        patch.setattr(siglip._LossOverProcesses, "backward", staticmethod(backward))
        assert ours == count_graphs()


def count_graphs():
    """Of a training step over batches of several sizes, whose values are those without it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    module = loss_of_this_process()

    def step(image, text):
        loss = module(2 * image, text, 10.0, -10.0) * 3
        loss.backward()
        return loss

    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own, in its compiler
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        for rows in (3, 3, 4, 5):
            features = [normalize(torch.randn(rows, FEATURES)) for _ in range(2)]
            results = []
            for function in (compiled, step):
                leaves = [t.clone().requires_grad_() for t in features]
                results.append([function(*leaves).detach(), *(t.grad for t in leaves)])
            assert all(map(torch.equal, *results))
    return len(graphs)


def check_all():
    # Gradients of logits and of features are rounded once each in bfloat16, by half of that.
    half = torch.finfo(torch.bfloat16).eps
    for way in WAYS:
        check_against_all_pairs(way, torch.float64, 1e-13)
        check_against_all_pairs(way, torch.bfloat16, half)
        check_against_all_pairs(way, torch.float32, half, torch.bfloat16)
        check_against_all_pairs(way, torch.float32, half, torch.bfloat16, mixed=True)
        check_against_all_pairs(way, torch.float64, 1e-13, torch.float64)
        check_layouts(way)
        check_frozen(way)
    check_saved()
    check_edits()
    check_dtensors()
    check_refusals()
    check_memory()
    check_compiled()


# Of two, each has one neighbour.
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.large)], ids=str)
def test_siglip(world_size, tmp_path):
    run(check_all, world_size, tmp_path)
