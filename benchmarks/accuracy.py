"""Measures the errors of torch's float32 loss and of the fused one along the axis of the logits.

    python benchmarks/accuracy.py                  on the GPU, if there is one
    python benchmarks/accuracy.py --device cpu
    python benchmarks/accuracy.py --loss focal     of the focal loss, torch's being torchvision's
    python benchmarks/accuracy.py --loss pairwise  of the loss of a well-trained batch of pairs

Writes a CSV file, which benchmarks/plot.py draws; for pairs prints a table. The true values are
computed in float64, by a formula that is neither contender's.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch

import fused_bce
from cases import trained_pairs
from contenders.focal import eager_focal_loss
from harness import machine
from harness.rows import RESULTS, AccuracyRow, append_rows, csv_path, start_file
from harness.tables import make_console

# exp(-104) is 0 in float32, subnormal numbers included.
LIMIT = 104
WIDTH = 1.0  # of the range of logits that one row is for
POINTS = 4000  # logits in it

# Of each element; the focal loss has its defaults, of which alpha is a factor of both contenders.
LOSSES = {
    "bce": {
        "eager": torch.nn.BCEWithLogitsLoss(reduction="none"),
        "fused": fused_bce.BCEWithLogitsLoss(reduction="none"),
    },
    "focal": {
        "eager": eager_focal_loss(),
        "fused": fused_bce.functional.sigmoid_focal_loss,
    },
}
ALPHA, GAMMA = 0.25, 2
PAIRWISE = "pairwise"


def main() -> None:
    arguments = parse_arguments()
    if arguments.loss == PAIRWISE:
        make_console().print(trained_pairs.errors_table(arguments.device))
        return
    facts = machine.facts(arguments.device)
    content = "accuracy" if arguments.loss == "bce" else f"accuracy-{arguments.loss}"
    path = csv_path(arguments.output, facts, content)
    start_file(path, kind=AccuracyRow)
    for target, contender in itertools.product((0.0, 1.0), LOSSES[arguments.loss]):
        append_rows(path, measure(arguments.loss, contender, target, facts))
    print(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--loss", choices=[*LOSSES, PAIRWISE], default="bce")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a CSV file, or a folder")
    return parser.parse_args()


def measure(loss: str, contender: str, target: float, facts: dict) -> list[AccuracyRow]:
    """A row for the loss and one for the gradient, in each range."""
    logits, starts = draw_logits()
    results = evaluate(LOSSES[loss][contender], logits, target, facts["device"])
    rows = []
    true_of_loss = {"bce": true_values, "focal": true_focal_values}[loss]
    for quantity, true in true_of_loss(logits, target).items():
        largest = ulp_errors(results[quantity], true).max(axis=1)
        rows += [
            AccuracyRow(
                **facts,
                contender=contender,
                quantity=quantity,
                target=target,
                logits_from=start,
                logits_to=start + WIDTH,
                points=POINTS,
                max_ulp=error,
            )
            for start, error in zip(starts.tolist(), largest.tolist(), strict=True)
        ]
    return rows


def draw_logits() -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits, a line for each range, and where the ranges start; the same in each call."""
    starts = np.arange(-LIMIT, LIMIT, WIDTH)
    random = np.random.default_rng(0).random((len(starts), POINTS))
    return (starts[:, None] + WIDTH * random).astype(np.float32), starts


def evaluate(loss, logits: np.ndarray, target: float, device: str) -> dict[str, np.ndarray]:
    """Loss and gradient of each element, in float32."""
    x = torch.tensor(logits, device=device, requires_grad=True)
    losses = loss(x, torch.full_like(x, target))
    losses.sum().backward()
    return {"loss": losses.detach().cpu().numpy(), "gradient": x.grad.cpu().numpy()}


def true_values(logits: np.ndarray, target: float) -> dict[str, np.ndarray]:
    """For a target of 0 or 1, where no two terms cancel."""
    away = (1 - 2 * target) * logits.astype(np.float64)  # grows with the loss
    sign = 1 - 2 * target
    return {"loss": np.logaddexp(0, away), "gradient": sign * np.exp(-np.logaddexp(0, -away))}


def true_focal_values(logits: np.ndarray, target: float) -> dict[str, np.ndarray]:
    """The same by logarithms, of which the power of the focal loss is a product."""
    away = (1 - 2 * target) * logits.astype(np.float64)
    wrong, right = -np.logaddexp(0, -away), -np.logaddexp(0, away)  # log(1 - p_t), log(p_t)
    power = (ALPHA if target else 1 - ALPHA) * np.exp(GAMMA * wrong)
    slope = np.exp(wrong) - GAMMA * np.exp(right) * right
    return {"loss": -power * right, "gradient": (1 - 2 * target) * power * slope}


def ulp_errors(results: np.ndarray, true: np.ndarray) -> np.ndarray:
    """In units of the last place of the true value as a float32."""
    return np.abs(results - true) / np.spacing(np.abs(true).astype(np.float32))


if __name__ == "__main__":
    main()
