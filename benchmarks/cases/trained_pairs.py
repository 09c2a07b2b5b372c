"""The errors of pairwise losses in a well-trained batch, where they lose digits: the loss of a
positive is log(1 + exp(-12)), its gradient 1 - sigmoid(12)."""

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from contenders.pairwise import PairwiseInputs, PairwiseLoss, chunked_loss, exp_loss, plain_loss
from fused_bce.functional import pairwise_sigmoid_loss

BATCH, FEATURES = 1024, 512
POSITIVE, NEGATIVE = 12.0, -15.0  # logits

LOSSES: dict[str, PairwiseLoss] = {
    "eager": plain_loss,
    "chunked": chunked_loss,
    "log(1 + exp)": exp_loss,
    "fused": pairwise_sigmoid_loss,
}
QUANTITIES = ("loss", "gradient of images", "of texts", "of the scale", "of the bias")


def errors_table(device: str) -> Table:
    title = f"Relative errors in float32: positives at {POSITIVE:g}, negatives around {NEGATIVE:g}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for quantity in QUANTITIES:
        table.add_column(quantity, justify="right")
    for name, each in measure(device).items():
        table.add_row(name, *(f"{error:.1e}" for error in each))
    return table


def measure(device: str) -> dict[str, list[float]]:
    """By contender, a number for each of the quantities."""
    inputs = make_trained_inputs(device)
    true = evaluate(plain_loss, tuple(t.double() for t in inputs))
    return {
        name: [relative_error(*pair) for pair in zip(evaluate(loss, inputs), true, strict=True)]
        for name, loss in LOSSES.items()
    }


def make_trained_inputs(device: str) -> PairwiseInputs:
    """Both towers agree, and different samples are as good as orthogonal."""
    torch.manual_seed(0)
    features = normalize(torch.randn(BATCH, FEATURES, device=device))
    numbers = torch.tensor([POSITIVE - NEGATIVE, NEGATIVE], device=device)
    return features, features.clone(), *numbers


def evaluate(loss: PairwiseLoss, inputs: PairwiseInputs) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def relative_error(got: Tensor, true: Tensor) -> float:
    return ((got.double() - true).norm() / true.norm()).item()
