"""Train on real data twice, with torch's loss and with the fused one, and compare.

Two tasks, both from scikit-learn: the handwritten digits as ten yes/no labels per image, and the
breast cancer data as one yes/no question. Both runs of a task start from the same weights and see
the same batches, so their loss curves must lie on each other. Exits with status 1 if they do not.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import accuracy_score, average_precision_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelBinarizer, StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_bce

LOSSES = {"torch.nn": nn.BCEWithLogitsLoss, "fused_bce": fused_bce.BCEWithLogitsLoss}

# The two losses round differently, by some 1e-7, and every step of training adds to it: up to 1e-5
# after 20 epochs. A gradient that is wrong by a thousandth moves the curves by 1e-3.
CURVE_TOLERANCE = 1e-4  # relative, of an epoch's loss
ACCURACY_TOLERANCE = 0.01  # of the share of right answers on the test data

BATCH_SIZE = 64


@dataclass(frozen=True)
class Task:
    """Data of a task. Features are standardised; labels are 0 or 1."""

    name: str
    x_train: Tensor  # [N, features]
    y_train: Tensor  # [N, labels]
    x_test: Tensor
    y_test: Tensor


class Run:
    """A small network that learns a task with one of the losses."""

    def __init__(self, task: Task, loss_class: type, seed: int):
        torch.manual_seed(seed)
        features, labels = task.x_train.shape[1], task.y_train.shape[1]
        self.model = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, labels))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        positives = task.y_train.sum(dim=0)
        self.criterion = loss_class(pos_weight=(len(task.y_train) - positives) / positives)
        self.losses: list[float] = []  # one per epoch
        self.step_seconds: list[float] = []  # in the loss, one per batch

    def step(self, x: Tensor, target: Tensor) -> float:
        """Learn from one batch; returns its loss."""
        self.optimizer.zero_grad()
        logits = self.model(x)
        loss, grad_logits, seconds = loss_and_grad(self.criterion, logits, target)
        logits.backward(grad_logits)
        self.optimizer.step()
        self.step_seconds.append(seconds)
        return loss.item()

    @torch.no_grad()
    def evaluate(self, task: Task) -> None:
        """Score the network on the test data."""
        logits = self.model(task.x_test).numpy()
        target = task.y_test.numpy()
        # A logit above 0 is a probability above one half.
        self.accuracy = accuracy_score(target.ravel(), logits.ravel() > 0)
        self.average_precision = average_precision_score(target, logits, average="macro")


def digits_task(seed: int) -> Task:
    x, digit = load_digits(return_X_y=True)
    return split("digits (multi-label)", x, LabelBinarizer().fit_transform(digit), seed)


def breast_cancer_task(seed: int) -> Task:
    x, benign = load_breast_cancer(return_X_y=True)
    return split("breast cancer", x, benign[:, np.newaxis], seed)


def split(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> Task:
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.25, random_state=seed, stratify=y
    )
    scaler = StandardScaler().fit(x_train)
    arrays = scaler.transform(x_train), y_train, scaler.transform(x_test), y_test
    return Task(name, *(torch.from_numpy(array).float() for array in arrays))


def train(task: Task, epochs: int, seed: int, advance: Callable[[], None]) -> dict[str, Run]:
    """A run with each loss; ``advance`` is called after each epoch.

    The runs take turns at every batch, so that a busy machine slows them alike.
    """
    runs = {name: Run(task, loss_class, seed) for name, loss_class in LOSSES.items()}
    data = TensorDataset(task.x_train, task.y_train)
    generator = torch.Generator().manual_seed(seed)
    batches = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, generator=generator)
    for run in runs.values():
        warm_up(run.criterion, task.y_train[:BATCH_SIZE])
    for _ in range(epochs):
        totals = dict.fromkeys(runs, 0.0)
        for x, target in batches:
            for name, run in runs.items():
                # The last batch is smaller: weighted by its size, the average is the data set's.
                totals[name] += run.step(x, target) * len(x)
        for name, run in runs.items():
            run.losses.append(totals[name] / len(data))
        advance()
    for run in runs.values():
        run.evaluate(task)
    return runs


def warm_up(criterion: nn.Module, target: Tensor) -> None:
    # The first calls also load code, which is not the time of the loss.
    for _ in range(10):
        loss_and_grad(criterion, torch.zeros_like(target), target)


def loss_and_grad(criterion, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    """The loss, its gradient with respect to the logits, and the seconds that both took.

    Inside one loss.backward() the time of the loss cannot be told from that of the network, which
    is the same in both runs. On detached logits the graph ends at the loss, so the clock sees the
    loss forward and backward and nothing else; the network then goes on from this gradient, as it
    would have by itself.
    """
    logits = logits.detach().requires_grad_()
    start = time.perf_counter()
    loss = criterion(logits, target)
    (grad_logits,) = torch.autograd.grad(loss, logits)
    seconds = time.perf_counter() - start
    return loss.detach(), grad_logits, seconds


def curve_difference(runs: dict[str, Run]) -> float:
    """The largest relative difference between the epoch losses of the two runs."""
    expected, actual = (np.array(run.losses) for run in runs.values())
    return float(np.max(np.abs(actual - expected) / expected))


def accuracy_difference(runs: dict[str, Run]) -> float:
    expected, actual = (run.accuracy for run in runs.values())
    return abs(actual - expected)


def disagreements(name: str, runs: dict[str, Run]) -> list[str]:
    """A sentence for each comparison that is out of tolerance."""
    comparisons = [
        ("loss curves", curve_difference(runs), CURVE_TOLERANCE),
        ("test accuracies", accuracy_difference(runs), ACCURACY_TOLERANCE),
    ]
    return [
        f"On {name} the {what} of torch.nn and fused_bce differ by {difference:.2g}, "
        f"more than {tolerance:g}."
        for what, difference, tolerance in comparisons
        # not <=, so that a nan is a disagreement too
        if not difference <= tolerance
    ]


def loss_table(results: dict[str, dict[str, Run]]) -> Table:
    table = Table("epoch", title="Average loss of each epoch")
    for name in results:
        for loss_name in LOSSES:
            table.add_column(f"{name}\n{loss_name}", justify="right")
    curves = [run.losses for runs in results.values() for run in runs.values()]
    for epoch, losses in enumerate(zip(*curves, strict=True), start=1):
        table.add_row(str(epoch), *(f"{loss:.6f}" for loss in losses))
    return table


def score_table(results: dict[str, dict[str, Run]]) -> Table:
    table = Table(
        "task",
        "loss",
        title="On the test data, and time in the loss while training",
        # Else a reader takes these times for the speed of the kernels.
        caption=f"With {BATCH_SIZE} rows in a batch most of the time is the fixed cost of a call.\n"
        "The sum also holds whatever interrupted a step.",
    )
    for heading in (
        "accuracy",
        "average\nprecision",
        "median of\na step, us",
        "sum of all\nsteps, ms",
    ):
        table.add_column(heading, justify="right")
    for name, runs in results.items():
        for loss_name, run in runs.items():
            table.add_row(
                name,
                loss_name,
                f"{run.accuracy:.4f}",
                f"{run.average_precision:.4f}",
                f"{statistics.median(run.step_seconds) * 1e6:.1f}",
                f"{sum(run.step_seconds) * 1e3:.1f}",
            )
    return table


def plot_curves(results: dict[str, dict[str, Run]], path: Path, command: str) -> None:
    # A Figure without pyplot draws with Agg and needs no display.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, len(results))
    # Equal curves hide each other: a broad line below, a thin dashed one above.
    styles = [{"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.5, "linestyle": "--", "marker": "."}]
    for ax, (name, runs) in zip(axes, results.items(), strict=True):
        for (loss_name, run), style in zip(runs.items(), styles, strict=True):
            epochs = range(1, len(run.losses) + 1)
            ax.plot(epochs, run.losses, label=f"{loss_name}.BCEWithLogitsLoss", **style)
        ax.set_title(f"{name}\nlargest relative difference {curve_difference(runs):.2g}")
        ax.set_xlabel("epoch")
        ax.set_ylabel("average loss")
        ax.set_yscale("log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(which="both", alpha=0.3)
        ax.legend()
    figure.supxlabel(command, fontsize="small", family="monospace", color="gray")
    figure.savefig(path, dpi=120)


def train_all(epochs: int, seed: int, console: Console) -> dict[str, dict[str, Run]]:
    """Runs by task, then by loss."""
    results = {}
    with Progress(console=console) as progress:
        for task in (digits_task(seed), breast_cancer_task(seed)):
            bar = progress.add_task(task.name, total=epochs)
            results[task.name] = train(task, epochs, seed, lambda bar=bar: progress.advance(bar))
    return results


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of plots")
    parser.add_argument("--epochs", type=positive_int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Matrices of 64 x 64 are not worth a second thread, and the order of sums is then fixed.
    torch.set_num_threads(1)
    console = Console()
    results = train_all(arguments.epochs, arguments.seed, console)
    console.print(loss_table(results), score_table(results))

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "loss_curves.png"
    command = f"python examples/train_digits.py --epochs {arguments.epochs} --seed {arguments.seed}"
    plot_curves(results, path, command)
    console.print(f"Wrote {path}", soft_wrap=True)

    complaints = [text for name, runs in results.items() for text in disagreements(name, runs)]
    if complaints:
        raise SystemExit("\n".join(complaints))
    console.print(
        "Both losses agree: loss curves to "
        f"{max(map(curve_difference, results.values())):.2g} (tolerance {CURVE_TOLERANCE:g}), "
        f"test accuracies to {max(map(accuracy_difference, results.values())):.2g} "
        f"(tolerance {ACCURACY_TOLERANCE:g}).",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
