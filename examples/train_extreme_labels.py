"""Train a classifier of 100,000 labels, with torch.nn on whole logits and with the linear head.

The data are made up: every label has a hidden prototype, and the features of a row are those of its
five labels, added up, and noise. A few labels are frequent and most are rare, by Zipf's law. The
classifier is an encoder and a linear layer with binary cross entropy over all labels.

Both runs start from the same weights and see the same batches, so their loss curves must lie on
each other and their precision must be the same: exits with status 1 if not. Each runs in a process
of its own, so that the high-water mark of its memory is that of the one loss. ``--large`` then
trains with the head alone, at a size for which torch.nn would need more than 30 GiB.
"""

import argparse
import functools
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fused_bce

# The losses round differently, by some 1e-7, and every step of training adds to it. A gradient that
# is wrong by a thousandth moves the curves by 1e-3.
CURVE_TOLERANCE = 1e-4  # relative, of a step's loss
PRECISION_TOLERANCE = 0.01

LABELS_PER_ROW = 5
TEST_ROWS = 1000
TOP = (1, 3, 5)  # precision@k
GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    labels: int
    features: int
    batch_size: int
    steps: int
    seed: int
    learning_rate: float = 10  # of the head


# As many labels as Amazon-670K has: 10 GiB of logits, of their gradient and of targets. In so few
# steps something is learned only at a higher rate, which larger batches allow.
LARGE = Setting(labels=670_091, features=32, batch_size=4096, steps=8, seed=0, learning_rate=100)


@dataclass(frozen=True)
class Result:
    losses: list[float]  # one per step
    step_seconds: float  # median
    peak_bytes: int  # what training took beyond the model and the data
    precision: dict[int, float]  # at k, on rows that were not trained on
    precision_of_most_frequent: float  # of always answering with that label, at 1


class Rows:
    """A made-up corpus without end."""

    def __init__(self, setting: Setting):
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.prototypes = torch.randn(setting.labels, setting.features, generator=self.generator)
        self.prototypes /= self.prototypes.norm(dim=1, keepdim=True)
        # Without the offset every other row would have the first label.
        ranks = torch.arange(1, setting.labels + 1) + setting.labels / 1000
        self.frequencies = 1 / ranks

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Features (count, F) of about unit variance, and label numbers (count, 5)."""
        labels = torch.multinomial(
            self.frequencies, count * LABELS_PER_ROW, replacement=True, generator=self.generator
        ).view(count, LABELS_PER_ROW)
        sums = self.prototypes[labels].sum(dim=1)
        noise = torch.randn(sums.shape, generator=self.generator)
        signal = nn.functional.normalize(sums) * math.sqrt(sums.shape[1])
        return signal + 0.3 * noise, labels


class WholeLogits(nn.Module):
    """What the head replaces."""

    def __init__(self, features: int, labels: int):
        super().__init__()
        self.linear = nn.Linear(features, labels)
        self.criterion = nn.BCEWithLogitsLoss(reduction="sum")

    def forward(self, x: Tensor, target: fused_bce.SparseTarget) -> Tensor:
        return self.criterion(self.linear(x), target.to_dense(torch.float32)) / len(x)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "torch.nn": WholeLogits,
    # mean would divide by the number of labels too, and make the gradients as small.
    "fused_bce": functools.partial(
        fused_bce.LinearBCEWithLogitsLoss, bias=True, reduction="batchmean"
    ),
}


class Model(nn.Module):
    def __init__(self, setting: Setting, name: str):
        super().__init__()
        torch.manual_seed(setting.seed)
        features = setting.features
        self.encoder = nn.Sequential(nn.Linear(features, features), nn.LayerNorm(features))
        self.head = HEADS[name](features, setting.labels)
        # As likely as a label is: from one half the first steps would only learn that most are 0.
        nn.init.constant_(self.head.linear.bias, -math.log(setting.labels / LABELS_PER_ROW))

    def forward(self, x: Tensor, target: fused_bce.SparseTarget) -> Tensor:
        return self.head(self.encoder(x), target)


def train(setting: Setting, name: str, connection: Connection) -> None:
    """Sends each step's loss, then the result."""
    rows, model = Rows(setting), Model(setting, name)
    # Without momentum: a state of the size of the layer would be as large as all else.
    optimizer = torch.optim.SGD(
        [
            {"params": model.head.parameters(), "lr": setting.learning_rate},
            {"params": model.encoder.parameters(), "lr": 0.01},
        ]
    )
    losses, seconds = [], []
    memory_before = resident_bytes("VmRSS")
    for _ in range(setting.steps):
        x, labels = rows.draw(setting.batch_size)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(x, fused_bce.SparseTarget.from_padded(labels, setting.labels))
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        connection.send(losses[-1])
    peak_bytes = resident_bytes("VmHWM") - memory_before
    x, labels = rows.draw(TEST_ROWS)
    connection.send(
        Result(
            losses=losses,
            step_seconds=statistics.median(seconds),
            peak_bytes=peak_bytes,
            precision=precision(model, x, labels),
            precision_of_most_frequent=(labels == 0).any(dim=1).float().mean().item(),
        )
    )


def resident_bytes(what: str) -> int:
    """Now (VmRSS), or at its highest (VmHWM). Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s*(\d+) kB", status)[1]) * 1024


@torch.no_grad()
def precision(model: Model, x: Tensor, labels: Tensor) -> dict[int, float]:
    """Of the k labels with the largest logits, the share that the row has."""
    hits = []
    rows_at_once = max(64 * MIB // (4 * model.head.linear.out_features), 1)
    for part, true in zip(x.split(rows_at_once), labels.split(rows_at_once), strict=True):
        best = model.head.linear(model.encoder(part)).topk(max(TOP)).indices
        hits.append((best[:, :, None] == true[:, None, :]).any(dim=2))
    share_of_rank = torch.cat(hits).float().mean(dim=0)
    return {k: share_of_rank[:k].mean().item() for k in TOP}


def run(setting: Setting, name: str, advance: Callable[[], None]) -> Result:
    """Trains in a process of its own; ``advance`` is called after each step."""
    # Forking is safe as long as this process has computed nothing, and needs no second import.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(setting, name, sender))
    process.start()
    sender.close()
    try:
        while not isinstance(message := receiver.recv(), Result):
            advance()
    except EOFError:
        raise SystemExit(f"the process that trains with {name} failed") from None
    finally:
        process.join()
    return message


def curve_difference(results: dict[str, Result]) -> float:
    """The largest relative difference between the losses of a step."""
    expected, actual = (np.array(result.losses) for result in results.values())
    return float(np.max(np.abs(actual - expected) / expected))


def precision_difference(results: dict[str, Result]) -> float:
    expected, actual = (result.precision for result in results.values())
    return max(abs(actual[k] - expected[k]) for k in TOP)


def result_table(setting: Setting, results: dict[str, Result]) -> Table:
    table = Table(
        "",
        title=f"{setting.batch_size} rows in a batch, {setting.labels:,} labels, "
        f"{setting.features} features, {setting.steps} steps",
        caption="P@k: precision. Answering with the most frequent label has\n"
        f"P@1 {next(iter(results.values())).precision_of_most_frequent:.4f}. "
        "Memory: what training takes beyond model and data.\n"
        "The runs do not take turns: compare seconds on a quiet machine only.",
    )
    columns = (
        "first\nloss",
        "last\nloss",
        *(f"P@{k}" for k in TOP),
        "memory,\nMiB",
        "seconds\na step",
    )
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name.partition(",")[0],
            f"{result.losses[0]:.4f}",
            f"{result.losses[-1]:.4f}",
            *(f"{result.precision[k]:.4f}" for k in TOP),
            f"{result.peak_bytes / MIB:,.0f}",
            f"{result.step_seconds:.3f}",
        )
    return table


def large_sentences(setting: Setting, result: Result, bytes_per_logit: float) -> str:
    logits = setting.batch_size * setting.labels
    return (
        f"Of {setting.batch_size:,} rows x {setting.labels:,} labels torch.nn would hold logits, "
        f"their gradient and the target, {3 * 4 * logits / GIB:.1f} GiB, and with the temporaries "
        f"that it had above {bytes_per_logit * logits / GIB:.1f} GiB. The head took "
        f"{result.peak_bytes / GIB:.2f} GiB."
    )


def plot(setting: Setting, results: dict[str, Result], path: Path) -> None:
    # A Figure without pyplot draws with Agg and needs no display.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    curves, memory = figure.subplots(1, 2)
    # Equal curves hide each other: a broad line below, a thin dashed one above.
    styles = [{"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.5, "linestyle": "--"}]
    for (name, result), style in zip(results.items(), styles, strict=True):
        curves.plot(range(1, setting.steps + 1), result.losses, label=name, **style)
        memory.bar(name, result.peak_bytes / MIB)
    curves.set_title(f"largest relative difference {curve_difference(results):.2g}")
    curves.set_xlabel("step")
    curves.set_ylabel("loss, sum over the labels of a row")
    curves.legend()
    curves.grid(alpha=0.3)
    memory.set_title(f"{setting.batch_size} x {setting.labels:,} logits")
    memory.set_ylabel("memory of training, MiB")
    figure.savefig(path, dpi=120)


def disagreements(results: dict[str, Result]) -> list[str]:
    """A sentence for each comparison that is out of tolerance."""
    comparisons = [
        ("loss curves", curve_difference(results), CURVE_TOLERANCE),
        ("precisions", precision_difference(results), PRECISION_TOLERANCE),
    ]
    return [
        f"The {what} of torch.nn and fused_bce differ by {difference:.2g}, more than {tolerance:g}."
        for what, difference, tolerance in comparisons
        # not <=, so that a nan is a disagreement too
        if not difference <= tolerance
    ]


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--labels", type=positive_int, default=100_000)
    parser.add_argument("--features", type=positive_int, default=64)
    parser.add_argument("--batch-size", type=positive_int, default=256)
    parser.add_argument("--steps", type=positive_int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer labels and features")
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of plots")
    if parser.parse_args().quick:
        parser.set_defaults(labels=20_000, features=32, batch_size=128, steps=30)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    setting = Setting(
        arguments.labels,
        arguments.features,
        arguments.batch_size,
        arguments.steps,
        arguments.seed,
    )
    console = Console()
    plan = dict.fromkeys(HEADS, setting)
    if arguments.large:
        plan["fused_bce, large"] = replace(LARGE, seed=arguments.seed)
    results = {}
    # A thread that refreshes the bars would be there while processes are forked.
    with Progress(console=console, auto_refresh=False) as progress:
        bars = {name: progress.add_task(name, total=of.steps) for name, of in plan.items()}
        for name, of in plan.items():
            advance = functools.partial(advance_bar, progress, bars[name])
            results[name] = run(of, name.partition(",")[0], advance)
    report(console, arguments.output, plan, results)


def advance_bar(progress: Progress, bar) -> None:
    progress.advance(bar)
    progress.refresh()


def report(console: Console, output: Path, plan, results) -> None:
    both = {name: results[name] for name in HEADS}
    setting = plan["torch.nn"]
    console.print(result_table(setting, both))
    if large := [name for name in plan if name not in HEADS]:
        (name,) = large
        console.print(result_table(plan[name], {name: results[name]}))
        bytes_per_logit = both["torch.nn"].peak_bytes / (setting.batch_size * setting.labels)
        console.print(large_sentences(plan[name], results[name], bytes_per_logit), soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "extreme_labels.png"
    plot(setting, both, path)
    console.print(f"Wrote {path}", soft_wrap=True)
    if complaints := disagreements(both):
        raise SystemExit("\n".join(complaints))
    console.print(
        f"Both agree: loss curves to {curve_difference(both):.2g} (tolerance {CURVE_TOLERANCE:g}), "
        f"precisions to {precision_difference(both):.2g} (tolerance {PRECISION_TOLERANCE:g}).",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
