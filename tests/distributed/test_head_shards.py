"""The linear head on DTensors and under data parallelism, in two and four processes (gloo)."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_double_close, by_torch
from processes import meshes, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fused_bce import LinearBCEWithLogitsLoss, SparseTarget
from fused_bce.functional import linear_binary_cross_entropy_with_logits as head
from fused_bce.linear_topk import find_topk

REDUCTIONS = ("mean", "sum", "batchmean")

# Even for no number of processes; and so few that the last of four has none.
SIZES = [(7, 13), (5, 5)]
FEATURES = 3


def layouts_of(mesh):
    """Placements of the input, of the weight, and those that the logits would have."""
    whole, sharded, rows, labels = Replicate(), Shard(0), Shard(0), Shard(1)
    if mesh.ndim == 1:
        return [
            ((whole,), (sharded,), (labels,)),
            ((sharded,), (whole,), (rows,)),
            ((whole,), (whole,), (whole,)),
            ((sharded,), (sharded,), (labels,)),
        ]
    return [
        ((sharded, whole), (whole, sharded), (rows, labels)),
        ((whole, sharded), (sharded, whole), (labels, rows)),
        ((sharded, sharded), (whole, whole), (rows, rows)),
        ((whole, whole), (sharded, sharded), (labels, labels)),
        ((whole, whole), (whole, sharded), (whole, labels)),
    ]


def by_layer_and_loss(x, w, b, target, *, reduction="mean", **options):
    """torch's layer and loss."""
    sums = "sum" if reduction == "batchmean" else reduction
    loss = by_torch(F.linear(x, w, b), target, reduction=sums, **options)
    return loss / len(x) if reduction == "batchmean" else loss


def draw_parameters(size):
    rows, labels = size
    shapes = (rows, FEATURES), (labels, FEATURES), (labels,)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def draw_targets(mesh, size, logits_placements):
    """As the head takes them, as torch does, and with which options."""
    hard = (torch.rand(size) < 0.3).double()
    soft = torch.rand(size, dtype=torch.float64) * hard
    integers = torch.randint(2, size)
    integers[torch.rand(size) < 0.3] = 255
    integers[:3] = 255  # all of the first process's rows
    whole = [Replicate()] * mesh.ndim
    places = hard.nonzero(as_tuple=True)
    yield SparseTarget.from_coo(*places, size), hard, {}
    yield SparseTarget.from_coo(*places, size, soft[places]), soft, {"label_smoothing": 0.2}
    # A pair named twice is one, as in the tensor of the same entries.
    missing = soft[places].where(torch.rand(len(places[0])) < 0.5, math.nan)
    again = [torch.cat([of, of]) for of in places]
    rows = SparseTarget.from_coo(*again, size, missing.repeat(2))
    dense = soft.index_put(places, missing)
    yield rows, dense, {"ignore_index": math.nan}
    yield distribute_tensor(soft, mesh, whole), soft, {}
    yield distribute_tensor(integers, mesh, logits_placements), integers, {"ignore_index": 255}


def draw_weights(mesh, size):
    """As the head takes them, distributed or not, and as torch does."""
    rows, labels = (torch.rand(n, dtype=torch.float64) + 0.5 for n in size)
    rows = rows[:, None]
    distributed = distribute_tensor(labels, mesh, [Replicate()] * mesh.ndim)
    return [
        ({}, {}),
        ({"weight": rows, "pos_weight": distributed}, {"weight": rows, "pos_weight": labels}),
        ({"weight": labels, "pos_weight": rows},) * 2,
        ({"weight": labels[None], "pos_weight": rows[0, 0]},) * 2,
        ({"pos_weight": labels},) * 2,
    ]


def check_shards():
    """Every layout with every target; in two processes with every reduction too. The weights take
    turns."""
    turns = len(REDUCTIONS) if dist.get_world_size() == 2 else 1
    for mesh, size in itertools.product(meshes(), SIZES):
        ways = itertools.cycle(itertools.product(draw_weights(mesh, size), REDUCTIONS))
        for layout, _ in itertools.product(layouts_of(mesh), range(turns)):
            for target, dense, options in draw_targets(mesh, size, layout[-1]):
                (ours, theirs), reduction = next(ways)
                options = options | {"reduction": reduction}
                check_shard(mesh, layout, size, (target, options | ours), (dense, options | theirs))


def check_shard(mesh, layout, size, call, exact_call):
    input_placements, weight_placements, logits_placements = layout
    exact_leaves = [t.requires_grad_() for t in draw_parameters(size)]
    leaves = [
        distribute_tensor(t.detach(), mesh, placements).requires_grad_()
        for t, placements in zip(
            exact_leaves, (input_placements, weight_placements, weight_placements), strict=True
        )
    ]
    target, options = call
    x, w, b = leaves
    with CommDebugMode() as communication:
        loss = head(x, w, target, linear_bias=b, **options)
        (3 * loss).backward()
    case = f"{layout} {size} {options}"
    assert loss.placements == tuple(
        Partial() if isinstance(p, Shard) else p for p in logits_placements
    ), case
    assert w.grad.placements == gradient_placements(logits_placements, Shard(1)), case
    counted = options.get("ignore_index") is not None and options["reduction"] == "mean"
    # Each process has all positives, so that it counts those that are nan by itself.
    counted = counted and not isinstance(target, SparseTarget)
    assert_little_is_sent(communication, layout, counted, case)

    dense, exact_options = exact_call
    exact = by_layer_and_loss(*exact_leaves, dense, **exact_options)
    (3 * exact).backward()
    assert_double_close(loss.full_tensor(), exact)
    for got, want in zip(leaves, exact_leaves, strict=True):
        assert_double_close(got.grad.full_tensor(), want.grad)


def gradient_placements(logits_placements, own):
    """Of the weight: a shard where labels are sharded, a sum where rows are."""
    return tuple(
        Shard(0) if p == own else Partial() if isinstance(p, Shard) else p
        for p in logits_placements
    )


def assert_little_is_sent(communication, layout, counted, case):
    """Nothing but the number of elements that count; and if each process has other rows and other
    labels, the input, and its gradient back."""
    input_placements, weight_placements, logits_placements = layout
    number = {"all_reduce": sum(isinstance(p, Shard) for p in logits_placements) * counted}
    both = input_placements == weight_placements == (Shard(0),)
    rows = {"all_gather_into_tensor": both, "reduce_scatter_tensor": both}
    sent = {str(name).split(".")[-1]: n for name, n in communication.get_comm_counts().items()}
    assert sent == {name: n for name, n in (number | rows).items() if n}, case


def check_backward_again():
    (mesh, *_) = meshes()
    x, w, _ = draw_parameters((7, 13))
    target = SparseTarget.from_lists([[i, 12] for i in range(7)], 13)
    leaf = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    exact_leaf = w.clone().requires_grad_()
    loss = head(distribute_tensor(x, mesh, [Replicate()]), leaf, target)
    exact = by_layer_and_loss(x, exact_leaf, None, target.to_dense(torch.float64))
    (want,) = torch.autograd.grad(exact, exact_leaf, create_graph=True)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (differentiable,) = torch.autograd.grad(loss, leaf, create_graph=True)
    for got in (first, differentiable):
        assert_double_close(got.full_tensor(), want)
    if torch.__version__ < "2.12":
        return  # there DTensor.to_local has no second derivative
    for gradient in (differentiable, want):
        gradient.square().sum().backward()
    assert_double_close(leaf.grad.full_tensor(), exact_leaf.grad)


def check_nothing():
    (mesh, *_) = meshes()
    w = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    x = distribute_tensor(torch.zeros(0, 3), mesh, [Replicate()])
    for reduction, want in (("mean", math.nan), ("batchmean", math.nan), ("sum", 0.0)):
        loss = head(x, w, SparseTarget.from_lists([], 5), reduction=reduction)
        torch.testing.assert_close(loss.full_tensor(), torch.tensor(want), equal_nan=True)


def check_refusals():
    (mesh, *_) = meshes()
    w = distribute_tensor(torch.zeros(14, 3), mesh, [Shard(0)])
    x = distribute_tensor(torch.zeros(2, 3), mesh, [Replicate()])
    target = SparseTarget.from_lists([[1], [13]], 14)
    # 28 labels would be as many as a shard's in one process, and not in the next; so would (2, 14).
    for shape in ((28,), (2, 14)):
        with pytest.raises(RuntimeError, match="pos_weight has shape"):
            head(x, w, target, pos_weight=torch.ones(shape))
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        head(x.to_local(), w, target)


def check_compiled():
    """Labels sharded, with dense targets, and rows, with sparse ones. The graph of the second size
    is one for sizes that change."""
    (mesh,) = meshes()
    for layout, chosen in zip(layouts_of(mesh)[:2], (-1, 0), strict=True):
        torch.compiler.reset()
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
        for size in SIZES:
            target, dense, options = list(draw_targets(mesh, size, layout[-1]))[chosen]
            x, w, _ = (t.requires_grad_() for t in draw_parameters(size))
            sharded = [
                distribute_tensor(t.detach(), mesh, placements).requires_grad_()
                for t, placements in zip((x, w), layout[:2], strict=True)
            ]
            loss = compiled(*sharded, target, **options)
            loss.backward()
            exact = by_layer_and_loss(x, w, None, dense, **options)
            exact.backward()
            assert_double_close(loss.full_tensor(), exact)
            for got, want in zip(sharded, (x, w), strict=True):
                assert_double_close(got.grad.full_tensor(), want.grad)


BATCH, LABELS, STEPS = 12, 11, 3


class Network(nn.Module):
    def __init__(self, parts=1):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh())
        options = {"bias": True, "reduction": "batchmean", "parts": parts}
        self.head = LinearBCEWithLogitsLoss(7, LABELS, **options)

    def forward(self, x, target):
        return self.head(self.encoder(x), target)


def network(parts=1):
    return Network(parts).double()


def train(model, loss_of_batch):
    """The losses."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)
        labels = torch.randint(LABELS, (BATCH, 2), generator=generator)
        optimizer.zero_grad()
        loss = loss_of_batch(x, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack([t.full_tensor() if isinstance(t, DTensor) else t for t in losses])


def check_trained_as_alone(model, loss_of_batch, parts=1):
    """Losses and parameters are those of one process with torch's loss of whole logits."""
    alone = network(parts)

    def loss_by_torch(x, labels):
        dense = torch.zeros(BATCH, LABELS, dtype=torch.float64).scatter(1, labels, 1)
        layer = alone.head.linear
        weight = layer.weight if parts == 1 else torch.cat([*layer.weight])
        return by_layer_and_loss(alone.encoder(x), weight, layer.bias, dense, reduction="batchmean")

    losses = train(model, loss_of_batch)
    exact = train(alone, loss_by_torch)
    dist.all_reduce(losses)
    assert_double_close(losses / dist.get_world_size(), exact)
    for got, want in zip(model.parameters(), alone.parameters(), strict=True):
        got = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def check_data_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def fsdp_of_head(model):
        fully_shard(model.head, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def fsdp_of_layer(model):
        # Its hooks bring the weight when the layer's own forward runs.
        fully_shard(model.head.linear, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    wrappers = (DistributedDataParallel, fsdp_of_head, fsdp_of_layer)
    for wrap, parts in itertools.product(wrappers, (1, 3)):
        model = wrap(network(parts))
        check_trained_as_alone(
            model, lambda x, labels, model=model: loss_of_share(model, x, labels), parts
        )


def loss_of_share(model, x, labels, share=None):
    share = share or slice(dist.get_rank(), None, dist.get_world_size())
    return model(x[share], SparseTarget.from_padded(labels[share], LABELS))


def with_sharded_labels(model, mesh):
    def shard(name, layer, mesh):
        for key, parameter in list(layer.named_parameters(recurse=False)):
            sharded = nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]))
            layer.register_parameter(key, sharded)

    def distribute(head, inputs, mesh):
        x, target = inputs
        return DTensor.from_local(x, mesh, [Replicate()]), target

    def add_up(head, loss, mesh):
        return loss.redistribute(placements=[Replicate()]).to_local()

    distribute_module(model.head, mesh, shard, distribute, add_up)
    return model


def check_tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = with_sharded_labels(network(), mesh)
    check_trained_as_alone(model, lambda x, labels: loss_of_share(model, x, labels, slice(None)))


def check_colwise_parallel():
    """torch's own style, but that the loss is not sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    style = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model.head, mesh, {"linear": style})
    check_trained_as_alone(model, lambda x, labels: loss_of_share(model, x, labels, slice(None)))


def check_parts():
    """Each process has labels of every part; or rows."""
    for mesh, size in itertools.product(meshes(), SIZES):
        for layout, reduction in zip(layouts_of(mesh), itertools.cycle(REDUCTIONS)):
            for target, dense, options in draw_targets(mesh, size, [Replicate()] * mesh.ndim):
                options = options | {"reduction": reduction}
                x, w, b = (t.requires_grad_() for t in draw_parameters(size))
                by_layer_and_loss(x, w, b, dense, **options).backward()
                sharded = [
                    distribute_tensor(t.detach(), mesh, placements).requires_grad_()
                    for t, placements in zip(
                        (x, *w.split([2, size[1] - 2])),
                        (layout[0], layout[1], layout[1]),
                        strict=True,
                    )
                ]
                bias = distribute_tensor(b.detach(), mesh, [Replicate()] * mesh.ndim)
                loss = head(sharded[0], sharded[1:], target, linear_bias=bias, **options)
                loss.backward()
                exact = by_layer_and_loss(x, w, b, dense, **options)
                assert_double_close(loss.full_tensor(), exact.detach())
                assert_double_close(sharded[0].grad.full_tensor(), x.grad)
                grads = torch.cat([part.grad.full_tensor() for part in sharded[1:]])
                assert_double_close(grads, w.grad)


def check_topk():
    """Whole numbers, so that labels tie; k is more than some shards have."""
    for mesh, size in itertools.product(meshes(), SIZES):
        operands = [t.round() for t in draw_parameters(size)]
        logits = F.linear(*operands)
        for input_placements, weight_placements, _ in layouts_of(mesh):
            placements = (input_placements, weight_placements, weight_placements)
            sharded = [
                distribute_tensor(t, mesh, p) for t, p in zip(operands, placements, strict=True)
            ]
            for k in (1, 4, size[1]):
                values, labels = find_topk(*sharded, k)
                assert_topk(values.full_tensor(), labels.full_tensor(), logits, k)
                if weight_placements == (Replicate(),):
                    continue
                # Each process has all labels of its rows.
                assert labels.to_local().shape[1] == k


def assert_topk(values, labels, logits, k):
    in_order = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, in_order.values[:, :k])
    assert torch.equal(labels, in_order.indices[:, :k])


def check_topk_of_modules():
    """Tensors of a process in, tensors of it out, where hooks make DTensors of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(BATCH, 7, dtype=torch.float64)
    logits = network().head.linear(x).detach()
    parallel, sharded, whole = (network() for _ in range(3))
    style = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(parallel.head, mesh, {"linear": style})
    fully_shard(sharded.head.linear, mesh=mesh)
    fully_shard(whole.head, mesh=mesh)
    register_fsdp_forward_method(whole.head, "topk")
    for model in (parallel, sharded, whole):
        values, labels = model.head.topk(x, 4)
        assert type(values) is type(labels) is torch.Tensor
        assert torch.equal(labels, logits.topk(4).indices)
        assert_double_close(values, logits.topk(4).values)


def check_rows_and_labels():
    """FSDP2 of a head whose labels are sharded."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "labels"))
    model = with_sharded_labels(network(), mesh["labels"])
    fully_shard(model.head, mesh=mesh["rows"])
    fully_shard(model, mesh=mesh["rows"])
    share = slice(mesh["rows"].get_local_rank(), None, 2)
    check_trained_as_alone(model, lambda x, labels: loss_of_share(model, x, labels, share))


def check_head():
    check_shards()
    check_backward_again()
    check_nothing()
    check_refusals()
    check_data_parallel()
    check_tensor_parallel()
    check_colwise_parallel()
    check_parts()
    check_topk()
    check_topk_of_modules()
    if dist.get_world_size() == 2:
        check_compiled()
    else:
        check_rows_and_labels()


# Four have a square mesh, too.
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.large)], ids=str)
def test_head(world_size, tmp_path):
    run(check_head, world_size, tmp_path)
