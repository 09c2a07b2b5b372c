"""Train two small towers on pairs of images and captions, twice: with SigLIP's plain formula and
with fused_bce.SigLipLoss, and compare.

The images are scikit-learn's handwritten digits. A caption is made of them: the word of the digit,
and for each quarter of the image how dark it is, in four steps, so that few images share one. Both
runs start from the same weights and see the same batches, so their loss curves must lie on each
other. Exits with status 1 if they do not.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

import fused_bce

# The two losses round differently, by some 1e-7, and every step of training adds to it. A gradient
# that is wrong by a thousandth moves the curves by 1e-3.
CURVE_TOLERANCE = 1e-4  # relative, of an epoch's loss
FEATURES = 64
SHADES, BLOCKS = 4, 16  # of a caption: levels of darkness, of blocks of 2 x 2 pixels each


class PlainFormula(nn.Module):
    """Zhai et al., 2023, algorithm 1, on the whole matrix of logits."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor):
        logits = logit_scale * image @ text.T + logit_bias
        labels = 2 * torch.eye(len(image), device=image.device) - 1
        return -logsigmoid(labels * logits).sum() / len(image)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "plain formula": PlainFormula,
    "fused_bce": fused_bce.SigLipLoss,
}


@dataclass(frozen=True)
class Pairs:
    images: Tensor  # [N, 64], from 0 to 1
    captions: Tensor  # [N, 1 + BLOCKS], numbers of words

    def __len__(self) -> int:
        return len(self.images)


class Towers(nn.Module):
    """An image and a text encoder, and SigLIP's two numbers at its first values."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, FEATURES))
        words = nn.EmbeddingBag(10 + SHADES * BLOCKS, 256, mode="mean")
        self.text = nn.Sequential(words, nn.ReLU(), nn.Linear(256, FEATURES))
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, ...]:
        image, text = normalize(self.image(images)), normalize(self.text(captions))
        return image, text, self.logit_scale.exp(), self.logit_bias


@dataclass
class Run:
    model: Towers
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # one per epoch
    seconds: float = 0.0  # of all steps
    accuracy: float = 0.0
    peak_bytes: int = 0

    def step(self, images: Tensor, captions: Tensor) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.criterion(*self.model(images, captions))
        loss.backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        return loss.item()


def load_pairs(seed: int) -> tuple[Pairs, Pairs]:
    pixels, digit = load_digits(return_X_y=True)
    blocks = pixels.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, BLOCKS) / 16
    shades = np.minimum((blocks * SHADES).astype(int), SHADES - 1)
    words = 10 + SHADES * np.arange(BLOCKS) + shades
    captions = np.concatenate([digit[:, None], words], axis=1)
    parts = train_test_split(pixels / 16, captions, test_size=0.25, random_state=seed)
    images_train, images_test, captions_train, captions_test = map(torch.from_numpy, parts)
    return (
        Pairs(images_train.float(), captions_train),
        Pairs(images_test.float(), captions_test),
    )


def make_runs(seed: int) -> dict[str, Run]:
    runs = {}
    for name, criterion in LOSSES.items():
        torch.manual_seed(seed)
        model = Towers()
        runs[name] = Run(model, criterion(), torch.optim.Adam(model.parameters(), lr=2e-3))
    return runs


def train(runs: dict[str, Run], pairs: Pairs, arguments, advance: Callable[[], None]) -> None:
    """The runs take turns at every batch, so that a busy machine slows them alike."""
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.epochs):
        totals = dict.fromkeys(runs, 0.0)
        batches = torch.randperm(len(pairs), generator=generator).split(arguments.batch_size)
        for batch in batches:
            for name, run in runs.items():
                loss = run.step(pairs.images[batch], pairs.captions[batch])
                totals[name] += loss * len(batch)
        for name, run in runs.items():
            run.losses.append(totals[name] / len(pairs))
        advance()


@torch.no_grad()
def retrieval_accuracy(model: Towers, pairs: Pairs) -> float:
    """How often an image's own caption, or one of the same words, is the nearest of all."""
    image, text, *_ = model(pairs.images, pairs.captions)
    nearest = (image @ text.T).argmax(dim=1)
    return (pairs.captions[nearest] == pairs.captions).all(dim=1).float().mean().item()


def peak_bytes(run: Run, batch_size: int) -> int:
    """The most that loss and gradients hold at once beyond the features, by torch's record."""
    image, text = (normalize(torch.randn(batch_size, FEATURES)).requires_grad_() for _ in range(2))
    numbers = run.model.logit_scale.exp().detach(), run.model.logit_bias.detach()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line at start and stop
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run.criterion(image, text, *numbers).backward()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum([0, *changes]).max())


def curve_difference(runs: dict[str, Run]) -> float:
    """The largest relative difference between the epoch losses of the two runs."""
    expected, actual = (np.array(run.losses) for run in runs.values())
    return float(np.max(np.abs(actual - expected) / expected))


def result_table(runs: dict[str, Run], arguments) -> Table:
    table = Table(title="On pairs of the test data, and what training took")
    headings = ("loss", "last epoch's", "retrieval", "all steps, s", "peak of the loss, MiB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run.losses[-1]:.6f}",
            f"{run.accuracy:.1%}",
            f"{run.seconds:.2f}",
            f"{run.peak_bytes / 2**20:.1f}",
        )
    table.caption = f"The peak is that of a batch of {arguments.peak_batch_size:,}."
    return table


def plot_curves(runs: dict[str, Run], path: Path, command: str) -> None:
    # A Figure without pyplot draws with Agg and needs no display.
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    ax = figure.subplots()
    # Equal curves hide each other: a broad line below, a thin dashed one above.
    styles = [{"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.5, "linestyle": "--", "marker": "."}]
    for (name, run), style in zip(runs.items(), styles, strict=True):
        ax.plot(range(1, len(run.losses) + 1), run.losses, label=name, **style)
    ax.set_title(f"largest relative difference {curve_difference(runs):.2g}")
    ax.set_xlabel("epoch")
    ax.set_ylabel("average loss")
    ax.set_yscale("log")
    ax.grid(which="both", alpha=0.3)
    ax.legend()
    figure.supxlabel(command, fontsize="small", family="monospace", color="gray")
    figure.savefig(path, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of plots")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--peak-batch-size", type=int, default=4096, help="for the peak of memory")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    training, test = load_pairs(arguments.seed)
    runs = make_runs(arguments.seed)
    with Progress(console=console) as progress:
        bar = progress.add_task("digits and captions", total=arguments.epochs)
        train(runs, training, arguments, lambda: progress.advance(bar))
    for run in runs.values():
        run.accuracy = retrieval_accuracy(run.model, test)
        run.peak_bytes = peak_bytes(run, arguments.peak_batch_size)
    console.print(result_table(runs, arguments))

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "siglip_curves.png"
    plot_curves(runs, path, f"python examples/train_siglip.py --epochs {arguments.epochs}")
    console.print(f"Wrote {path}", soft_wrap=True)
    difference = curve_difference(runs)
    # not <=, so that a nan is a disagreement too
    if not difference <= CURVE_TOLERANCE:
        raise SystemExit(
            f"The loss curves differ by {difference:.2g}, more than {CURVE_TOLERANCE:g}."
        )
    console.print(f"Both losses agree: curves to {difference:.2g} ({CURVE_TOLERANCE:g} allowed).")


if __name__ == "__main__":
    main()
