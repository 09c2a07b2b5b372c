"""SigLIP's loss in several processes on the CPU (gloo): open_clip's way and fused_bce.SigLipLoss.

    python benchmarks/pairwise_processes.py        1, 2 and 4 processes, a batch of 2,048 in each

Time and peak memory of the first process, which has one thread, as all have; a CSV file, which
benchmarks/plot.py draws, and a table. With more processes than cores the times are longer for all
contenders, the peaks are not.
"""

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table
from torch import Tensor

import fused_bce
from cases.base import Case
from cases.pairwise import draw_inputs
from cases.trained_pairs import evaluate
from contenders.pairwise import PairwiseInputs, PairwiseLoss, chunked_loss, plain_loss
from contenders.steps import leaves_contender
from harness import machine
from harness.rows import RESULTS, Row, append_rows, csv_path, read_rows, start_file
from harness.tables import make_console, time_text
from harness.timing import peak_bytes, time_alternating

FEATURES = 512
MIB = 2**20


def main() -> None:
    arguments = parse_arguments()
    path = csv_path(arguments.output, machine.facts("cpu"), "pairwise-processes")
    start_file(path)
    with tempfile.TemporaryDirectory() as folder:
        job = folder, path, arguments
        mp.spawn(run_process, job, nprocs=max(arguments.processes))
    rows = sorted(read_rows(path), key=lambda row: row.numel)
    start_file(path)
    append_rows(path, rows)
    make_console().print(table(rows), f"Written to {path}", sep="\n", soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", nargs="+", type=int, default=[1, 2, 4], metavar="P", help="default: 1 2 4")
    add("--batch", type=int, default=2048, help="of each process (2048)")
    add("--repeats", type=int, default=7, help="rounds (7)")
    add("--output", type=Path, default=RESULTS, help="a CSV file, or a folder (benchmarks/results)")
    return parser.parse_args()


def run_process(rank: int, folder: str, path: Path, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    # The largest number first: those that are not in the next one have ended by then.
    for processes in sorted(arguments.processes, reverse=True):
        if rank < processes:
            address = f"file://{folder}/{processes}"
            dist.init_process_group("gloo", address, rank=rank, world_size=processes)
            rows = measure(arguments.batch, arguments.repeats)
            if rank == 0:
                append_rows(path, rows)
            dist.barrier()  # None leaves while another still reads from it.
            dist.destroy_process_group()


def measure(batch: int, repeats: int) -> list[Row]:
    """One row for each contender, of this process."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    inputs = draw_inputs(batch, FEATURES)
    losses = make_losses(rank, processes)
    check_that_they_agree(losses, inputs)
    contenders = {name: leaves_contender(loss, inputs) for name, loss in losses.items()}
    # As many rounds in each process: they wait for each other.
    calls = dict.fromkeys(contenders, 1)
    steps = {name: contender.step for name, contender in contenders.items()}
    timings = time_alternating(steps, calls, "cpu", repeats, seconds=0)
    case = Case(
        batch * batch * processes,
        "cpu",
        "pairwise fwd+bwd",
        reduction="batchmean",
        workload="1 process" if processes == 1 else f"{processes} processes",
    )
    # The features' own gradients, which every contender leaves behind
    gradients = 2 * inputs[0].nbytes
    return [
        Row(
            **machine.facts("cpu") | dataclasses.asdict(case),
            shape=f"{batch}x{batch * processes}",
            contender=name,
            bytes_per_element=case.bytes_per_element,
            median_seconds=timings[name].median,
            iqr_seconds=timings[name].iqr,
            wall_seconds=timings[name].wall_median,
            peak_bytes=peak_bytes(contender.renew(), "cpu") - gradients,
            other_load=None,  # The other processes would be part of it.
        )
        for name, contender in contenders.items()
    ]


def make_losses(rank: int, processes: int) -> dict[str, PairwiseLoss]:
    """By the name of their contender; the texts go the same way in all."""
    return {
        "eager": partial(over_processes, plain_loss),
        "chunked": partial(over_processes, chunked_loss),
        "fused": fused_bce.SigLipLoss(rank=rank, world_size=processes, dist_impl="shift"),
    }


def check_that_they_agree(losses: dict[str, PairwiseLoss], inputs: PairwiseInputs) -> None:
    """On the loss and on all gradients: the exchanges are written twice. It warms up, too."""
    expected = evaluate(losses["eager"], inputs)
    for name in ("chunked", "fused"):
        for got, true in zip(evaluate(losses[name], inputs), expected, strict=True):
            # Sums of some thousand terms in float32
            torch.testing.assert_close(got, true, rtol=0, atol=1e-4 * true.abs().max().item())


def over_processes(loss, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As open_clip: from neighbour to neighbour, and in backward the same way back. Until then
    autograd keeps what the losses of all neighbours have left."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    total = loss(image, text, scale, bias)
    for _ in range(processes - 1):
        text = Exchange.apply(text, (rank + 1) % processes, (rank - 1) % processes)
        total = total + loss(image, text, scale, bias, positives=False)
    return total


class Exchange(torch.autograd.Function):
    """To one neighbour, from the other; the gradients the other way round."""

    @staticmethod
    def forward(ctx, sent, to, source):
        ctx.neighbours = to, source
        received = torch.empty_like(sent)
        ops = [
            dist.P2POp(dist.isend, sent.contiguous(), to),
            dist.P2POp(dist.irecv, received, source),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return received

    @staticmethod
    def backward(ctx, grad):
        to, source = ctx.neighbours
        return Exchange.apply(grad, source, to), None, None


def table(rows: list[Row]) -> Table:
    title = f"{rows[0].mode}, {rows[0].dtype}, {FEATURES} features, the first process"
    made = Table(title=title, title_justify="left")
    for heading in ("", "contender", "time", "against fused", "peak, MiB"):
        made.add_column(heading, justify="left" if heading in ("", "contender") else "right")
    seconds = {row.numel: row.median_seconds for row in rows if row.contender == "fused"}
    for row in rows:
        made.add_row(
            f"{row.workload}, {row.shape.replace('x', ' x ')}",
            row.contender,
            time_text(row.median_seconds),
            f"{row.median_seconds / seconds[row.numel]:.2f}",
            f"{row.peak_bytes / MIB:.1f}",
        )
    return made


if __name__ == "__main__":
    main()
