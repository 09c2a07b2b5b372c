"""DTensor, DistributedDataParallel and FSDP2, in two and four processes on the CPU (gloo)."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from helpers import REDUCTIONS, by_torch, evaluate, fused, is_fused, torch_bce
from loss_cases import LOSSES
from processes import meshes, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    zeros,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_bce


def placements_of(mesh):
    """Sharded over the batch, the labels or both, and not at all."""
    rows, labels, whole = Shard(0), Shard(1), Replicate()
    if mesh.ndim == 1:
        return [(rows,), (labels,), (whole,)]
    return [(rows, labels), (labels, rows), (rows, rows), (whole, labels), (rows, whole)]


def draw_distributed(mesh, placements, shape, dtype=torch.float32, target_dtype=None):
    logits = (torch.randn(shape, dtype=torch.float64) * 4).to(dtype)
    target = torch.rand(shape, dtype=torch.float64).to(target_dtype or dtype)
    weights = {
        "weight": torch.rand(shape[0], 1) + 0.5,
        "pos_weight": torch.rand(shape[1]) + 0.5,
    }
    whole = [Replicate()] * mesh.ndim
    return (
        (logits, target, weights),
        (
            distribute_tensor(logits, mesh, placements),
            distribute_tensor(target, mesh, placements),
            {name: distribute_tensor(w, mesh, whole) for name, w in weights.items()},
        ),
    )


def expected_placements(placements, reduction):
    if reduction == "none":
        return placements
    return tuple(Partial("sum") if isinstance(p, Shard) else p for p in placements)


def widened(logits, target, weights):
    return logits.double(), target.double(), {name: w.double() for name, w in weights.items()}


def check_shards():
    # 13 rows and 9 labels are even for no number of processes.
    for mesh in meshes():
        for placements in placements_of(mesh):
            for shape in ((8, 12), (13, 9)):
                for reduction in REDUCTIONS:
                    check_shard(mesh, placements, shape, reduction)


def check_shard(mesh, placements, shape, reduction):
    whole, (logits, target, weights) = draw_distributed(mesh, placements, shape)
    logits.requires_grad_()
    with CommDebugMode() as communication:
        loss = fused(logits, target, **weights, reduction=reduction)
        (loss.sum() if reduction == "none" else loss).backward()
    case = f"{placements} {shape} {reduction}"
    assert is_fused(loss), case
    assert loss.placements == expected_placements(placements, reduction), case
    assert logits.grad.placements == placements, case
    # Nothing is gathered or reduced until somebody asks for the value of the loss.
    assert communication.get_total_counts() == 0, case

    exact_logits, exact_target, exact_weights = widened(*whole)
    exact = evaluate(torch_bce, exact_logits, exact_target, **exact_weights, reduction=reduction)
    torch.testing.assert_close(
        loss.full_tensor().double(), exact.loss, rtol=1e-6, atol=1e-6, msg=lambda m: case + m
    )
    torch.testing.assert_close(
        logits.grad.full_tensor().double(), exact.grad_logits, rtol=1e-5, atol=1e-7
    )


def check_dtypes():
    # float16 computes its gradient in backward, the others in forward.
    (mesh, *_) = meshes()
    for dtype, target_dtype in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ):
        for reduction in REDUCTIONS:
            whole, (logits, target, weights) = draw_distributed(
                mesh, (Shard(0),), (13, 9), dtype, target_dtype
            )
            logits.requires_grad_()
            loss = fused(logits, target, **weights, reduction=reduction)
            assert loss.dtype is target_dtype
            # One number for each element, or one for all.
            grad_loss = torch.rand(loss.shape, dtype=torch.float64).to(target_dtype)
            loss.backward(distribute_tensor(grad_loss, mesh, [Replicate()]))
            assert logits.grad.dtype is dtype
            exact_logits, exact_target, exact_weights = widened(*whole)
            exact = evaluate(
                torch_bce,
                exact_logits,
                exact_target,
                **exact_weights,
                reduction=reduction,
                grad_loss=grad_loss.double(),
            )
            # The shards' parts of the loss are rounded, and so is their sum.
            rtol = 4 * max(torch.finfo(dtype).eps, torch.finfo(target_dtype).eps)
            for got, want in ((loss, exact.loss), (logits.grad, exact.grad_logits)):
                torch.testing.assert_close(
                    got.full_tensor().double(), want, rtol=rtol, atol=rtol * want.abs().max().item()
                )


def check_backward_again():
    (mesh, *_) = meshes()
    _, (logits, target, weights) = draw_distributed(mesh, (Shard(0),), (13, 9), torch.float64)
    logits.requires_grad_()
    loss = fused(logits, target, **weights)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (differentiable,) = torch.autograd.grad(loss, logits, create_graph=True)
    for other in (second, differentiable):
        torch.testing.assert_close(other.full_tensor(), first.full_tensor())


def check_empty():
    (mesh, *_) = meshes()
    empty = zeros((0, 3), device_mesh=mesh, placements=[Replicate()])
    assert math.isnan(fused(empty, empty).full_tensor().item())


def check_deprecated_name_of_mean():
    (mesh, *_) = meshes()
    whole, (logits, target, _) = draw_distributed(mesh, (Shard(0),), (13, 9))
    loss = fused(logits, target, reduction="elementwise_mean")
    torch.testing.assert_close(loss.full_tensor(), torch_bce(*whole[:2]))


def check_mixed():
    # As torch's own function does with a tensor that nobody distributed.
    (mesh, *_) = meshes()
    logits = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
    for function in (fused, torch_bce):
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            function(logits, torch.rand(4, 4))


def check_implicit_replication():
    # What is not distributed counts as replicated: 7 rows are 4 and 3 in two processes, so that a
    # mean of the shards' means would be wrong.
    (mesh, *_) = meshes()
    whole, sharded = draw_distributed(mesh, (Shard(0),), (7, 3))
    plain = (whole[0].clone(), whole[1], whole[2])
    for chosen in itertools.product((True, False), repeat=4):
        if not any(chosen):
            continue
        logits, target, weight, pos_weight = (
            (*a[:2], *a[2].values())[i]
            for i, a in enumerate(sharded if s else plain for s in chosen)
        )
        logits = logits.detach().requires_grad_()
        for extras in ({}, {"ignore_index": math.nan}, {"label_smoothing": 0.2}):
            case = f"{chosen} {extras}"
            with implicit_replication():
                loss = fused(logits, target, weight, pos_weight=pos_weight, **extras)
                assert is_fused(loss), case
                (grad,) = torch.autograd.grad(loss, logits)
            exact = evaluate(by_torch, *widened(*whole)[:2], **widened(*whole)[2], **extras)
            for got, want in ((loss, exact.loss), (grad, exact.grad_logits)):
                got = got.full_tensor() if hasattr(got, "full_tensor") else got
                torch.testing.assert_close(
                    got.double(), want, rtol=1e-5, atol=1e-7, msg=lambda m, c=case: c + m
                )


def check_compiled():
    (mesh, *_) = meshes()
    for reduction in REDUCTIONS:
        torch.compiler.reset()
        whole, (logits, target, _) = draw_distributed(mesh, (Shard(0),), (13, 9))
        logits.requires_grad_()
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        loss = compiled(logits, target, reduction=reduction)
        assert loss.placements == expected_placements((Shard(0),), reduction)
        (loss.sum() if reduction == "none" else loss).backward()
        exact = evaluate(torch_bce, *widened(*whole)[:2], reduction=reduction)
        torch.testing.assert_close(loss.full_tensor().double(), exact.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            logits.grad.full_tensor().double(), exact.grad_logits, rtol=1e-5, atol=1e-7
        )


def check_extras():
    # The processes ignore different shares of their shards, one of them all of it.
    for mesh in meshes():
        for placements in placements_of(mesh):
            for reduction in REDUCTIONS:
                target = torch.randint(2, (13, 9), dtype=torch.uint8)
                target[torch.rand(13, 9) < 0.3] = 255
                target[:7] = 255
                logits = torch.randn(13, 9, dtype=torch.float64)
                keep = target != 255
                logits[~keep] = math.nan
                shards = distribute_tensor(logits, mesh, placements).requires_grad_()
                targets = distribute_tensor(target, mesh, placements)
                extras = {"ignore_index": 255, "label_smoothing": 0.2, "reduction": reduction}
                loss = fused(shards, targets, **extras)
                assert loss.placements == expected_placements(placements, reduction)
                (loss.sum() if reduction == "none" else loss).backward()
                leaf = logits.clone().requires_grad_()
                kept = torch_bce(leaf[keep], target[keep].double() * 0.8 + 0.1, reduction="none")
                by_hand = kept.mean() if reduction == "mean" else kept.sum()
                by_hand.backward()
                got = loss.full_tensor()
                torch.testing.assert_close(got.sum() if reduction == "none" else got, by_hand)
                torch.testing.assert_close(shards.grad.full_tensor(), leaf.grad)
                with torch.no_grad():
                    torch.testing.assert_close(fused(shards, targets, **extras).full_tensor(), got)
                assert_invalid_is_noticed(shards, targets)


def assert_invalid_is_noticed(logits, target):
    # Each process checks its own shard.
    fused(logits, target, ignore_index=255, validate_targets=True)
    if (target.to_local() == 255).any():
        with pytest.raises(ValueError, match="is 255, outside"):
            fused(logits, target, validate_targets=True)


def check_dtensor():
    check_extras()
    check_shards()
    check_dtypes()
    check_backward_again()
    check_empty()
    check_mixed()
    check_implicit_replication()
    check_deprecated_name_of_mean()
    if dist.get_world_size() == 2:
        check_compiled()


BATCH, FEATURES, LABELS, STEPS = 12, 5, 8, 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, LABELS)).double()


def batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        yield (
            torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64),
            torch.rand(BATCH, LABELS, generator=generator, dtype=torch.float64),
        )


def train(model, loss_of_batch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    for x, target in batches():
        optimizer.zero_grad()
        loss_of_batch(x, target).backward()
        optimizer.step()


def check_trained_as_alone(model, criterion_options, loss_of_batch) -> None:
    """The parameters after training are those of one process with torch's loss."""
    train(model, loss_of_batch)
    alone = network()
    criterion = nn.BCEWithLogitsLoss(**criterion_options)
    train(alone, lambda x, target: criterion(alone(x), target))
    for got, want in zip(model.parameters(), alone.parameters(), strict=True):
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def check_data_parallel():
    share = slice(dist.get_rank(), None, dist.get_world_size())
    options = {"pos_weight": torch.linspace(0.5, 3, LABELS, dtype=torch.float64)}
    criterion = fused_bce.BCEWithLogitsLoss(**options)

    def wrapped_in_fsdp(model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for wrap in (DistributedDataParallel, wrapped_in_fsdp):
        model = wrap(network())

        def loss_of_share(x, target, model=model):
            loss = criterion(model(x[share]), target[share])
            assert is_fused(loss)
            return loss

        check_trained_as_alone(model, options, loss_of_share)


def check_tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    model = parallelize_module(network(), mesh, {"2": head})

    def loss_of_batch(x, target):
        logits = model(x)
        assert logits.placements == (Shard(1),)
        sharded = distribute_tensor(target, mesh, [Shard(1)], src_data_rank=None)
        with CommDebugMode() as communication:
            loss = fused(logits, sharded)
        assert is_fused(loss)
        assert communication.get_total_counts() == 0
        return loss

    check_trained_as_alone(model, {}, loss_of_batch)


def check_pointwise():
    """Their numbers are no tensors, and must not come from an earlier call."""
    (mesh,) = meshes()
    for placements, reduction in itertools.product(placements_of(mesh), ("none", "mean")):
        for case, value in itertools.product(LOSSES, (0.8, 0.3)):
            check_pointwise_shard(mesh, placements, case, value, reduction)


def check_pointwise_shard(mesh, placements, case, value, reduction):
    whole, (logits, target, weights) = draw_distributed(mesh, placements, (13, 9))
    if not case.takes_pos_weight:
        for some_weights in (whole[2], weights):
            del some_weights["pos_weight"]
    options = dict.fromkeys(case.floats, value) | {"reduction": reduction}
    # Laid out otherwise than the logits: it has to be moved first.
    elsewhere = [Replicate()] * mesh.ndim
    for moved in (target, target.redistribute(placements=elsewhere)):
        leaf = logits.detach().requires_grad_()
        loss = case.function(leaf, moved, **weights, **options)
        (loss.sum() if reduction == "none" else loss).backward()
        assert case.is_fused(loss), f"{case.name} {placements} {value} {reduction}"

        x, t, w = widened(*whole)
        exact = evaluate(case.reference, x, t, **w, **options)
        # A sum of a hundred elements in float32
        for got, want in ((loss, exact.loss), (leaf.grad, exact.grad_logits)):
            torch.testing.assert_close(got.full_tensor().double(), want, rtol=1e-5, atol=1e-6)
    check_second_derivative(case, logits, target, whole, options)


def check_second_derivative(case, logits, target, whole, options):
    def second(function, x, t):
        x = x.detach().requires_grad_()
        loss = function(x, t, **options)
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        return torch.autograd.grad((grad * grad).sum(), x)[0]

    x, t, _ = widened(*whole)
    got = second(case.function, logits, target).full_tensor().double()
    want = second(case.reference, x, t)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)  # of products of six


def check_training():
    check_data_parallel()
    check_tensor_parallel()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.large)], ids=str)
def test_dtensor(world_size, tmp_path):
    run(check_dtensor, world_size, tmp_path)


def test_pointwise(tmp_path):
    run(check_pointwise, 2, tmp_path)


@pytest.mark.parametrize("world_size", [2, 4], ids=str)
def test_training(world_size, tmp_path):
    run(check_training, world_size, tmp_path)
