"""Calls of every loss, as functions of its operands: for what must hold of any, in every_loss."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import head_cases
import pytest
import torch
from helpers import FLOATS, as_rows_with_nan_again, draw, dtype_name
from loss_cases import BCE, LOSSES
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize
from torch.utils import _pytree as pytree

import fused_bce
from fused_bce.functional import pairwise_sigmoid_loss


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A loss with options, and the same by its definition or in torch's operations."""

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    # Operands in float64: first those that are trained, then the target, which may have a gradient
    draw: Callable[[], list]
    options: dict[str, Any]
    trained: int
    reductions: tuple[str, ...] = ("none", "mean", "sum", "batchmean")
    target_has_gradient: bool = False

    def __call__(self, *operands, reduction) -> Tensor:
        options = move(self.options, operands[0].device)
        return self.function(*operands, reduction=reduction, **options)

    def operands(self, device, dtype=torch.float64, target_grad=False) -> tuple[list, list]:
        """Leaves, and what goes behind them."""
        operands = self.draw()
        leaves = self.trained + target_grad
        return (
            [t.to(device, dtype).requires_grad_() for t in operands[:leaves]],
            move(operands[leaves:], device),
        )

    def exact(self, *operands, reduction) -> Tensor:
        """In float64, on the CPU; differentiable."""
        options = move(self.options, "cpu", torch.float64)
        return self.reference(*operands, reduction=reduction, **options)

    @property
    def detaches(self) -> bool:
        """Numerical differences do not see what is detached."""
        return "detach_weight" in self.options


def move(tree, *to):
    return pytree.tree_map_only(Tensor, lambda t: t.to(*to), tree)


def widen(tree):
    return pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().double(), tree)


# Of logits and a target of that shape

EXTRAS = {
    "weight": {"weight": torch.linspace(0.5, 2, 6)[:, None]},
    "smoothed": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 1},
    "ignored nan": {"ignore_index": math.nan, "label_smoothing": 0.3},
    "recompute": {"recompute": True},
    "validated": {"validate_targets": True},
}


def draw_pointwise(options):
    logits, target = draw((6, 5), "cpu", torch.float64, torch.float64)
    if options.get("ignore_index") is math.nan:
        target[0, :3] = math.nan
    return [logits, target]


def pointwise(case, name, options):
    return Call(
        f"{case.name}-{name}",
        case.function,
        case.reference,
        functools.partial(draw_pointwise, options),
        options,
        trained=1,
        target_has_gradient=True,
    )


def mixed_options(case):
    """What all losses take, with the loss's own options in turns."""
    own = list(case.options.items())
    for i, (name, extras) in enumerate(EXTRAS.items()):
        own_name, options = own[i % len(own)]
        yield f"{name} {own_name}", options | extras


OWN = [pointwise(case, *item) for case in (BCE, *LOSSES) for item in case.options.items()]
MIXED = [pointwise(case, *item) for case in (BCE, *LOSSES) for item in mixed_options(case)]


# Of the linear layer before them, in blocks of some logits or all

ROWS, FEATURES, LABELS = 6, 4, 9


def draw_head(form):
    leaves = torch.randn(ROWS, FEATURES), torch.randn(LABELS, FEATURES), torch.randn(LABELS)
    return [*(t.double() for t in leaves), form(head_cases.draw_target(ROWS, LABELS, 0.2))]


def with_nan(dense):
    dense = dense.double()
    dense[2, ::3] = math.nan
    return as_rows_with_nan_again(dense)


def head(input, linear_weight, linear_bias, target, **options):
    return head_cases.head(input, linear_weight, target, linear_bias=linear_bias, **options)


def head_in_parts(input, linear_weight, linear_bias, target, **options):
    return head(input, [*linear_weight.split([1, 5, 3])], linear_bias, target, **options)


def layer_and_loss(input, linear_weight, linear_bias, target, **options):
    dense = head_cases.matrix_of(target).double()
    return head_cases.on_whole_logits(
        input, linear_weight, dense, linear_bias=linear_bias, **options
    )


WEIGHTS = {"weight": torch.rand(ROWS, 1) + 0.5, "pos_weight": torch.rand(LABELS) + 0.5}
HEADS = {
    "rows": (head_cases.as_rows, {}),
    "values": (
        lambda dense: head_cases.as_rows(dense, dense.double() * 0.75),
        {"label_smoothing": 0.1, "chunk_bytes": 100},
    ),
    "dense": (Tensor.double, WEIGHTS | {"chunk_bytes": 1}),
    "int64": (Tensor.long, {"ignore_index": 1, "chunk_bytes": 8 * ROWS * 4}),
    "nan": (with_nan, {"ignore_index": math.nan, "chunk_bytes": 100}),
    "dense nan": (
        lambda dense: head_cases.matrix_of(with_nan(dense)),
        {"ignore_index": math.nan, "chunk_bytes": 1},
    ),
    "parts": (head_cases.as_rows, WEIGHTS),
    "nan in parts": (with_nan, {"ignore_index": math.nan}),
    "recompute": (head_cases.as_rows, {"recompute": True, "chunk_bytes": 100}),
}
SUMMED = ("mean", "sum", "batchmean")


def head_calls():
    for name, (form, options) in HEADS.items():
        yield Call(
            f"linear-{name}",
            head_in_parts if "parts" in name else head,
            lambda *operands, recompute=False, **options: layer_and_loss(*operands, **options),
            functools.partial(draw_head, form),
            options,
            trained=3,
            reductions=SUMMED,
        )


# Of pairs

PAIRS = 7, 5


def draw_pairs(positives):
    inputs = [normalize(torch.randn(n, FEATURES)).double() for n in PAIRS]
    numbers = [torch.tensor(n, dtype=torch.float64) for n in (10.0, -3.0)]
    return [*inputs, *numbers, positives()]


def pairs(*operands, **options):
    *leaves, positives = operands
    return pairwise_sigmoid_loss(*leaves, positives=positives, **options)


def loss_of_pairs(input1, input2, scale, bias, positives, reduction, chunk_bytes=None):
    """Zhai et al., algorithm 1; a pair whose value is nan is left out."""
    logits = scale * input1 @ input2.t() + bias
    matrix = torch.eye(*logits.shape).double()
    if positives != "diagonal":
        matrix = torch.zeros_like(matrix) if positives is None else head_cases.matrix_of(positives)
    losses = -logsigmoid(torch.where(matrix == 1, logits, -logits))[~matrix.isnan()]
    return losses.sum() / {"batchmean": PAIRS[0], "mean": len(losses), "sum": 1}[reduction]


def some_left_out():
    values = torch.eye(*PAIRS, dtype=torch.float64)
    values[torch.rand(PAIRS) < 0.2] = math.nan
    return as_rows_with_nan_again(values)


POSITIVES = {
    "diagonal": lambda: "diagonal",
    "none": lambda: None,
    "rows": lambda: fused_bce.SparseTarget.from_coo(
        *(torch.rand(PAIRS) < 0.3).nonzero().t(), PAIRS
    ),
    "left out": some_left_out,
}


def pairwise_calls():
    for name, positives in POSITIVES.items():
        yield Call(
            f"pairs-{name}",
            pairs,
            loss_of_pairs,
            functools.partial(draw_pairs, positives),
            {"chunk_bytes": 100} if name in ("none", "left out") else {},
            trained=4,
            reductions=SUMMED,
        )


OTHERS = [*head_calls(), *pairwise_calls()]
# Their graphs hold what others of them do.
LIKE_OTHERS = ("linear-int64", "linear-nan", "linear-dense nan", "pairs-none")
CALLS = [*OWN, *MIXED, *OTHERS]
by_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def path_of(call):
    """What a graph of it consists of: numbers, whichever they are, are its operands."""
    options = call.options.items()
    return call.function, *(name for name, o in options if isinstance(o, Tensor | bool))


# For graphs, which take seconds: each path with one reduction and one dtype, in turns; what all
# losses take, with one of them (there are 6 of it, so that a step of 5 meets each once); and each
# kind of operand that the head and the pairs take.
GRAPHS = [
    *{path_of(call): call for call in reversed(OWN)}.values(),
    *MIXED[::5],
    *(call for call in OTHERS if call.name not in LIKE_OTHERS),
]
by_graph = pytest.mark.parametrize(
    ("call", "reduction", "dtype"),
    [
        pytest.param(call, reduction, dtype, id=f"{call.name}-{reduction}-{dtype_name(dtype)}")
        for i, call in enumerate(GRAPHS)
        for reduction in [call.reductions[i % len(call.reductions)]]
        for dtype in [FLOATS[i // 3 % 4]]
    ],
)


def loss_and_grads(function, leaves, rest, reduction, grad_loss=None) -> tuple[Tensor, ...]:
    """And the gradients of all leaves, by ``grad_loss`` in every element."""
    loss = function(*leaves, *rest, reduction=reduction)
    ones = torch.full_like(loss, 1.0 if grad_loss is None else grad_loss)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, ones))


def exactly(call, leaves, rest, reduction, grad_loss=None) -> tuple[Tensor, ...]:
    wide = [widen(t).requires_grad_() for t in leaves]
    return loss_and_grads(call.exact, wide, move(rest, "cpu"), reduction, grad_loss)
