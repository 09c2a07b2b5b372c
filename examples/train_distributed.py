"""Train on the digits data in several processes, and compare with one.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel labels
    torchrun --nproc-per-node 4 examples/train_distributed.py --parallel labels head

``batch``: every process takes its share of a batch; DistributedDataParallel averages gradients.
``labels``: the classification head and with it the logits are sharded over the labels, as DTensors.
Each process computes the loss of its own labels, and the logits are never gathered.
``head``: the same for many labels, of which nearly all are 0. The layer is part of the loss, and a
process does not even hold the logits of its own labels; targets are label numbers.

Those that are asked for come one after the other. Process 0 also trains alone, with torch's loss.
The loss curves must lie on that one: exits with status 1 if they do not.
"""

import argparse
import gc
import math

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.preprocessing import LabelBinarizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_bce

# Shares of a batch are added up in another order: some 1e-7, to which every step of training adds.
CURVE_TOLERANCE = 1e-4  # relative, of an epoch's loss

BATCH_SIZE = 96


def digits() -> tuple[Tensor, Tensor]:
    """Images [N, 64] in [0, 1], and ten yes/no labels for each [N, 10]."""
    images, digit = load_digits(return_X_y=True)
    labels = LabelBinarizer().fit_transform(digit)
    whole_batches = len(images) // BATCH_SIZE * BATCH_SIZE
    return (
        torch.from_numpy(images / 16).float()[:whole_batches],
        torch.from_numpy(labels).float()[:whole_batches],
    )


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class ByBatch:
    """Every process has the whole network and sees its share of each batch."""

    def __init__(self, model: nn.Module):
        self.model = DistributedDataParallel(model)
        self.criterion = fused_bce.BCEWithLogitsLoss()

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        share = slice(dist.get_rank(), None, dist.get_world_size())
        return self.criterion(self.model(x[share]), target[share])

    def value(self, loss: Tensor) -> float:
        """The mean over the whole batch."""
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


class ByLabels:
    """Every process has its share of the labels, and sees the whole of each batch."""

    def __init__(self, model: nn.Module):
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        self.model = parallelize_module(model, self.mesh, {"2": head})
        self.criterion = fused_bce.BCEWithLogitsLoss()

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        sharded = distribute_tensor(target, self.mesh, [Shard(1)], src_data_rank=None)
        return self.criterion(self.model(x), sharded)

    def value(self, loss: DTensor) -> float:
        """The loss is a partial sum until somebody asks for it."""
        return loss.redistribute(placements=[Replicate()]).to_local().item()


class ByHead(ByLabels):
    """As by labels, with the layer inside the loss."""

    def __init__(self, model: nn.Sequential):
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        *encoder, layer = model
        head = fused_bce.LinearBCEWithLogitsLoss(layer.in_features, layer.out_features, bias=True)
        head.linear.load_state_dict(layer.state_dict())
        distribute_module(head, self.mesh, self.shard_labels)
        self.model = nn.ModuleList([nn.Sequential(*encoder), head])

    @staticmethod
    def shard_labels(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(shard))

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        encoder, head = self.model
        features = DTensor.from_local(encoder(x), self.mesh, [Replicate()])
        rows, labels = target.nonzero(as_tuple=True)
        return head(features, fused_bce.SparseTarget.from_coo(rows, labels, target.shape))


class Alone:
    """One process, torch's loss."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.criterion = nn.BCEWithLogitsLoss()

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.model(x), target)

    def value(self, loss: Tensor) -> float:
        return loss.item()


def train(way, epochs: int, seed: int) -> list[float]:
    """The mean loss of each epoch."""
    x, target = digits()
    # foreach would put the head's DTensors and the other layers' tensors into one operation.
    optimizer = torch.optim.SGD(way.model.parameters(), lr=0.2, momentum=0.9, foreach=False)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(epochs):
        batches = torch.randperm(len(x), generator=generator).split(BATCH_SIZE)
        values = []
        for batch in batches:
            optimizer.zero_grad()
            loss = way.loss(x[batch], target[batch])
            loss.backward()
            optimizer.step()
            values.append(way.value(loss))
        curve.append(math.fsum(values) / len(values))
    return curve


WAYS = {"batch": ByBatch, "labels": ByLabels, "head": ByHead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=WAYS, nargs="+", default=["batch"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    curves = {
        parallel: train(WAYS[parallel](network(arguments.seed)), arguments.epochs, arguments.seed)
        for parallel in arguments.parallel
    }
    # DistributedDataParallel lies in a reference cycle; threads of its group that outlive Python
    # would end the process with an error.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        alone = train(Alone(network(arguments.seed)), arguments.epochs, arguments.seed)
        for parallel, curve in curves.items():
            compare(curve, alone, f"{processes} processes, by {parallel}, fused_bce")


def compare(curve: list[float], alone: list[float], name: str) -> None:
    print(f"epoch   {name:>40}   one process, torch.nn")
    for epoch, (ours, theirs) in enumerate(zip(curve, alone, strict=True), start=1):
        print(f"{epoch:5}   {ours:40.7f}   {theirs:21.7f}")
    largest = max(abs(a - b) / b for a, b in zip(curve, alone, strict=True))
    print(f"largest relative difference {largest:.1e}")
    if not largest <= CURVE_TOLERANCE:
        raise SystemExit("the loss curves differ")


if __name__ == "__main__":
    main()
