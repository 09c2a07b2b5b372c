"""Checks that run in several processes on the CPU (gloo)."""

import gc
import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import HANGS
from torch.distributed.device_mesh import init_device_mesh

# Imported once, by the server that forks the processes.
multiprocessing.set_forkserver_preload(
    [
        "fused_bce",
        "pytest",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ]
)


def run(check, world_size: int, tmp_path) -> None:
    """Runs ``check()`` in that many processes; raises what one of them raised."""
    address = f"file://{tmp_path}/rendezvous"
    context = mp.start_processes(
        _process, (world_size, address, check), world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + HANGS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes did not finish within {HANGS} s")


def _process(rank, world_size, address, check):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", address, rank=rank, world_size=world_size)
    torch.manual_seed(0)  # all processes draw the same
    check()
    # Threads of a group in a reference cycle would outlive Python, and end the process with an
    # error.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def meshes():
    """One row of processes, and with four also a square of them."""
    processes = dist.get_world_size()
    yield init_device_mesh("cpu", (processes,))
    if processes == 4:
        yield init_device_mesh("cpu", (2, 2))
