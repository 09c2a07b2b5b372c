"""The listings that tutorials of this loss use, with fused_bce's loss in place of torch's.

Each listing prints what it computed beside torch's own value and the number to expect, and stops
the program with a sentence if one is off.
"""

import inspect
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_bce import BCEWithLogitsLoss
from fused_bce.functional import binary_cross_entropy_with_logits

EXPECTED_TOLERANCE = 5e-5  # expected numbers are written to four digits after the point
TORCH_TOLERANCE = 1e-6  # torch's own float32 values are a few roundings away


def check(what: str, fused, torchs, expected) -> None:
    """Print three values, each a number or a small tensor; the first must equal the others."""
    print(f"  {what}: {show(fused)}   torch {show(torchs)}   expected {show(expected)}")
    require(
        close(fused, torchs, TORCH_TOLERANCE),
        f"{what}: fused_bce gives {show(fused)}, torch {show(torchs)}.",
    )
    require(
        close(fused, expected, EXPECTED_TOLERANCE),
        f"{what}: fused_bce gives {show(fused)}, but {show(expected)} was expected.",
    )


def close(actual, expected, tolerance: float) -> bool:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    return torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise SystemExit(sentence)


def show(values) -> str:
    return " ".join(f"{value:.4f}" for value in torch.as_tensor(values).flatten().tolist())


def sigmoid_then_bce() -> None:
    """Sigmoid and BCELoss in two steps equal BCEWithLogitsLoss on the logits."""
    logits = torch.tensor([0.5, -1.0, 2.0])
    target = torch.tensor([1.0, 0.0, 1.0])
    two_steps = nn.BCELoss()(torch.sigmoid(logits), target)
    check("against Sigmoid + BCELoss", BCEWithLogitsLoss()(logits, target), two_steps, 0.3048)
    check(
        "against BCEWithLogitsLoss",
        BCEWithLogitsLoss()(logits, target),
        nn.BCEWithLogitsLoss()(logits, target),
        0.3048,
    )


def pos_weight_of_ones() -> None:
    """pos_weight has one number per class; ones change nothing."""
    target = torch.ones(10, 64)
    logits = torch.full((10, 64), 1.5)
    pos_weight = torch.ones(64)
    check(
        "64 classes, 10 rows",
        BCEWithLogitsLoss(pos_weight=pos_weight)(logits, target),
        nn.BCEWithLogitsLoss(pos_weight=pos_weight)(logits, target),
        0.2014,
    )


def threshold_at_zero() -> None:
    """Logits above 0 are probabilities above 0.5, where a right answer costs under log 2."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    target = torch.arange(1000.0) % 2
    from_logits = logits > 0
    from_probabilities = torch.sigmoid(logits) > 0.5
    require(
        torch.equal(from_logits, from_probabilities),
        "Logits above 0 and probabilities above 0.5 are not the same.",
    )
    log2 = torch.tensor(2.0).log()
    check(
        "share of right answers",
        (BCEWithLogitsLoss(reduction="none")(logits, target) < log2).float().mean(),
        (nn.BCEWithLogitsLoss(reduction="none")(logits, target) < log2).float().mean(),
        (from_probabilities == target.bool()).float().mean(),
    )


def probability_of_a_logit() -> None:
    """The sigmoid of a logit is its probability; the loss of a positive is -log of it."""
    logits = torch.tensor([-2.34, 3.45])
    target = torch.ones(2)
    percent = 100 * torch.exp(-BCEWithLogitsLoss(reduction="none")(logits, target))
    torchs = 100 * torch.sigmoid(logits)
    for logit, fused, sigmoid, expected in zip(
        logits.tolist(), percent, torchs, ("8.79 %", "96.9 %"), strict=True
    ):
        print(f"  logit {logit:.2f}: {fused:.3g} %   torch {sigmoid:.3g} %   expected {expected}")
        require(
            f"{fused:.3g} %" == f"{sigmoid:.3g} %" == expected,
            f"The probability of logit {logit:.2f} is {fused:.3g} %, not {expected}.",
        )


def softmax_over_two_logits() -> None:
    """Softmax cross entropy over two logits is our loss on their difference."""
    logits = torch.tensor([[1.0, 2.5], [0.3, -0.7]])
    label = torch.tensor([1, 0])
    difference = logits[:, 1] - logits[:, 0]
    loss = BCEWithLogitsLoss()(difference, label.float())
    check("against CrossEntropyLoss", loss, nn.CrossEntropyLoss()(logits, label), 0.2573)
    torchs = nn.BCEWithLogitsLoss()(difference, label.float())
    check("against BCEWithLogitsLoss", loss, torchs, 0.2573)


def functional_form() -> None:
    """The loss as a function; the gradient of the mean is (sigmoid(logits) - target) / N."""
    logits = torch.tensor([[0.5, -1.0], [2.0, -2.34], [3.45, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    loss = binary_cross_entropy_with_logits(logits, target)
    loss.backward()
    torch_logits = logits.detach().clone().requires_grad_()
    torch_loss = F.binary_cross_entropy_with_logits(torch_logits, target)
    torch_loss.backward()
    check("loss", loss, torch_loss, 0.6218)
    expected = [-0.0629, 0.0448, 0.1468, 0.0146, -0.0051, -0.0833]
    check("gradient", logits.grad, torch_logits.grad, torch.tensor(expected).view(3, 2))


LOGITS = torch.tensor([1.5, -0.5, 2.0])
TARGET = torch.tensor([1.0, 0.0, 1.0])


def check_arguments(expected, **arguments) -> None:
    """Both modules, made with these arguments, on the same three logits."""
    check(
        ", ".join(f"{name}={value}" for name, value in arguments.items()) or "no arguments",
        BCEWithLogitsLoss(**arguments)(LOGITS, TARGET),
        nn.BCEWithLogitsLoss(**arguments)(LOGITS, TARGET),
        expected,
    )


def weight_of_elements() -> None:
    """weight multiplies each loss; the mean still divides by the number of elements."""
    weight = torch.tensor([1.0, 2.0, 3.0])
    check_arguments(torch.tensor([0.2014, 0.9482, 0.3808]), weight=weight, reduction="none")
    check_arguments(0.5101, weight=weight)


def reductions() -> None:
    """reduction="mean" is the default; "sum" and "none" are the others."""
    check_arguments(0.2675)
    check_arguments(0.2675, reduction="mean")
    check_arguments(0.8024, reduction="sum")
    check_arguments(torch.tensor([0.2014, 0.4741, 0.1269]), reduction="none")


def deprecated_size_average() -> None:
    """size_average=False is the old name of reduction="sum", True of "mean"; both warn."""
    check_deprecated(0.8024, "sum", size_average=False)
    check_deprecated(0.2675, "mean", size_average=True)


def deprecated_reduce() -> None:
    """reduce=False is the old name of reduction="none", True of "mean"; both warn."""
    check_deprecated(torch.tensor([0.2014, 0.4741, 0.1269]), "none", reduce=False)
    check_deprecated(0.2675, "mean", reduce=True)


def check_deprecated(expected, reduction: str, **arguments) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_arguments(expected, **arguments)
    messages = [str(warning.message) for warning in caught]
    print(f"    warns: {messages[0] if messages else 'no'}")
    require(
        len(messages) == 2 and messages[0] == messages[1],
        f"{arguments} does not warn as torch does: {messages}",
    )
    require(f"reduction='{reduction}'" in messages[0], f"{arguments} warns: {messages[0]}")


def mini_batches() -> None:
    """A training loop of a small network in mini-batches; only the loss is exchanged."""
    losses, accuracy = train(BCEWithLogitsLoss())
    torch_losses, torch_accuracy = train(nn.BCEWithLogitsLoss())
    print(f"  loss by epoch: {show(losses)}")
    print(f"  with torch:    {show(torch_losses)}")
    print(f"  accuracy on new images: {accuracy:.3f}   torch {torch_accuracy:.3f}")
    print("  expected: the loss falls to less than a tenth, accuracy is above 0.95")
    require(losses[-1] < losses[0] / 10, f"The loss only fell from {losses[0]} to {losses[-1]}.")
    require(accuracy > 0.95, f"The accuracy on new images is only {accuracy:.3f}.")
    # The losses round differently, by some 1e-7, and every step of training adds to it.
    require(
        torch.allclose(torch.tensor(losses), torch.tensor(torch_losses), rtol=1e-4, atol=0),
        "The losses differ from those with torch's loss.",
    )
    require(abs(accuracy - torch_accuracy) < 0.01, "The accuracy differs from that with torch.")


def train(criterion: nn.Module, epochs: int = 8, batch_size: int = 32) -> tuple[list, float]:
    """Average loss of each epoch, and accuracy on images that were not trained on."""
    torch.manual_seed(0)
    images, labels = make_images(512, seed=1)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28 * 3, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 1),  # a logit: no sigmoid here
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss = criterion(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(images))
    images, labels = make_images(256, seed=2)
    with torch.no_grad():
        right = (model(images) > 0) == labels.bool()
    return losses, right.float().mean().item()


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise [count, 3, 28, 28] with a square somewhere, red (label 0) or blue (label 1).

    The labels are [count, 1], the shape of the network's logits: the loss does not broadcast them.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 28, 28, generator=generator)
    labels = torch.randint(2, (count, 1), generator=generator)
    corners = torch.randint(28 - 10, (count, 2), generator=generator)
    for image, label, (top, left) in zip(images, labels, corners, strict=True):
        image[2 * label.item(), top : top + 10, left : left + 10] += 1.5
    return images, labels.float()


LISTINGS = (
    sigmoid_then_bce,
    pos_weight_of_ones,
    threshold_at_zero,
    probability_of_a_logit,
    softmax_over_two_logits,
    functional_form,
    weight_of_elements,
    reductions,
    deprecated_size_average,
    deprecated_reduce,
    mini_batches,
)


def main() -> None:
    for listing in LISTINGS:
        print(f"{listing.__name__}: {inspect.getdoc(listing)}")
        listing()
    print(f"All {len(LISTINGS)} listings give the expected numbers.")


if __name__ == "__main__":
    main()
