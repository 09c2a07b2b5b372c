"""Train a classifier of 670,091 labels, or of 3 million, with the weight of the head in parts.

    python examples/train_million_labels.py                  as many labels as Amazon-670K has
    python examples/train_million_labels.py --data amazon-3m

The data are made up by a seed, with as many labels a row as these have: each label has a prototype,
and the features of a row are the sum of those of its labels, and noise. The weight is trained in
float32 by torch's Adam, and in bfloat16 by torchao's, which rounds stochastically and, for three
million labels, keeps its state in 8 bits. An optimizer for each part steps in backward, so that the
gradient of the weight never exists. torch.nn makes a few steps, for its memory and time.

Each runs in a process of its own, which may be ended for want of memory. Exits with status 1 if the
precision at 5 in bfloat16 is more than a point below that in float32.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit, _AdamW
from tqdm import tqdm

from fused_bce import LinearBCEWithLogitsLoss, SparseTarget

PARTS = 16
TEST_ROWS = 1024
MIB = 2**20
MOST_LOST = 0.01  # of the precision at 5


@dataclass(frozen=True)
class Setting:
    labels: int
    features: int
    labels_a_row: float  # on average
    batch_size: int = 128
    steps: int = 40
    learning_rate: float = 0.02


DATA = {
    "amazon-670k": Setting(labels=670_091, features=128, labels_a_row=5.45),
    "amazon-3m": Setting(labels=3_000_000, features=64, labels_a_row=36, steps=12),
}


@dataclass(frozen=True)
class Result:
    seconds: float  # of a step, the median
    model_bytes: int  # parameters and states of the optimizers
    peak_bytes: int  # beyond those
    precision: float | None  # at 5, on rows that were not trained on


class Rows:
    """A made-up corpus without end."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.generator = torch.Generator().manual_seed(0)
        size = setting.labels, setting.features
        self.prototypes = torch.randn(size, generator=self.generator, dtype=torch.bfloat16)
        # Zipf's law, but that the first labels are not in every row
        self.sums = (1 / (torch.arange(setting.labels, dtype=torch.float64) + 20)).cumsum(0)

    def draw(self, count: int) -> tuple[Tensor, SparseTarget]:
        most = -int(-self.setting.labels_a_row // 1)
        shape = count, most
        places = torch.rand(shape, generator=self.generator, dtype=torch.float64) * self.sums[-1]
        labels = torch.searchsorted(self.sums, places)
        sums = self.prototypes[labels].float().sum(dim=1)
        features = sums + 0.3 * most**0.5 * torch.randn(sums.shape, generator=self.generator)
        # So many labels on average: the last one is not in all rows.
        there = self.setting.labels_a_row - (most - 1)
        labels[torch.rand(count, generator=self.generator) >= there, -1] = -1
        return features / most**0.5, SparseTarget.from_padded(labels, self.setting.labels)


class WholeLogits(nn.Module):
    """What the head replaces."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.linear = nn.Linear(setting.features, setting.labels, bias=False)

    def forward(self, x: Tensor, target: SparseTarget) -> Tensor:
        dense = target.to_dense(torch.float32)
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.linear(x), dense, reduction="sum"
        )
        return loss / len(x)


def make_head(setting: Setting, dtype: torch.dtype) -> LinearBCEWithLogitsLoss:
    return LinearBCEWithLogitsLoss(
        setting.features, setting.labels, parts=PARTS, dtype=dtype, reduction="batchmean"
    )


Optimizers = list[torch.optim.Optimizer]


def step_in_backward(parameters: Iterable[nn.Parameter], make: Callable) -> Optimizers:
    """One optimizer for each parameter, that steps as soon as its gradient is there."""

    def register(parameter: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = make([parameter])

        def step(parameter: nn.Parameter) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
        return optimizer

    return [register(parameter) for parameter in parameters]


def train(setting: Setting, way: str) -> Result:
    torch.manual_seed(0)
    rows = Rows(setting)
    encoder = nn.Sequential(
        nn.Linear(setting.features, setting.features), nn.LayerNorm(setting.features)
    )
    rate = setting.learning_rate
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    if way == "torch.nn":
        head: nn.Module = WholeLogits(setting)
        optimizers: Optimizers = [torch.optim.Adam(head.parameters(), lr=rate, fused=True)]
    else:
        head = make_head(setting, dtype)
        few_bits = AdamW8bit if setting.labels > 10**6 else _AdamW
        optimizers = step_in_backward(
            head.parameters(),
            (lambda p: few_bits(p, lr=rate, weight_decay=0, bf16_stochastic_round=True))
            if way == "bfloat16"
            else (lambda p: torch.optim.Adam(p, lr=rate, fused=True)),
        )
    of_encoder = torch.optim.Adam(encoder.parameters(), lr=1e-3)

    def step() -> None:
        features, target = rows.draw(setting.batch_size)
        head(encoder(features).to(dtype), target).backward()
        if way == "torch.nn":
            optimizers[0].step()
            optimizers[0].zero_grad()
        of_encoder.step()
        of_encoder.zero_grad()

    step()  # makes the states, and compiles what torchao compiles
    peak = peak_of(step)
    seconds = []
    for _ in tqdm(range(2, setting.steps), desc=way):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    precision = None if way == "torch.nn" else precision_at_5(head, encoder, rows, dtype)
    return Result(statistics.median(seconds), model_bytes(head, optimizers), peak, precision)


def model_bytes(head: nn.Module, optimizers: Optimizers) -> int:
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    tensors = [*head.parameters(), *(t for t in states if isinstance(t, Tensor))]
    return sum(storage_bytes(t) for t in tensors)


def storage_bytes(t: Tensor) -> int:
    """Of a tensor, or of those inside one of torchao's."""
    if hasattr(t, "__tensor_flatten__"):
        names, _ = t.__tensor_flatten__()
        return sum(storage_bytes(getattr(t, name)) for name in names)
    return t.numel() * t.element_size()


@torch.no_grad()
def precision_at_5(
    head: LinearBCEWithLogitsLoss, encoder: nn.Module, rows: Rows, dtype: torch.dtype
) -> float:
    features, target = rows.draw(TEST_ROWS)
    _, labels = head.topk(encoder(features).to(dtype), 5)
    hits = sum(
        int(torch.isin(labels[row], target.rows(row, row + 1).indices).sum())
        for row in range(TEST_ROWS)
    )
    return hits / labels.numel()


def peak_of(step: Callable[[], None]) -> int:
    """The most bytes of tensors that a step holds beyond those before it, by torch's own record."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def run(setting: Setting, way: str) -> Result | None:
    """In a process of its own; None if that was ended, for want of memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(train, setting, way).result()
        except (MemoryError, RuntimeError) as error:
            ended = isinstance(error, MemoryError | BrokenExecutor)
            if not ended and "allocate memory" not in str(error):
                raise
            tqdm.write(f"{way}: {type(error).__name__}: {error}")
            return None


def format_precision(precision: float | None) -> str:
    return "-    " if precision is None else f"{precision:.3f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, default="amazon-670k")
    for name in ("labels", "steps", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="another number of them")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    return parser.parse_args()


WAYS = ["float32", "bfloat16", "torch.nn"]


def main() -> None:
    arguments = parse_arguments()
    given = {name: getattr(arguments, name) for name in ("labels", "steps", "batch_size")}
    setting = replace(DATA[arguments.data], **{n: v for n, v in given.items() if v is not None})
    print(
        f"{setting.batch_size} rows x {setting.features} features x {setting.labels:,} labels, "
        f"{setting.steps} steps"
    )
    results = {}
    for way in arguments.ways:
        few = replace(setting, steps=min(setting.steps, 4)) if way == "torch.nn" else setting
        result = results[way] = run(few, way)
        if result is not None:
            print(
                f"{way:9}  precision at 5: {format_precision(result.precision)}   "
                f"{result.seconds:.2f} s a step   "
                f"{result.model_bytes / MIB:,.0f} MiB of weight and optimizer states, "
                f"and {result.peak_bytes / MIB:,.0f} MiB beyond"
            )
    exact, small = results.get("float32"), results.get("bfloat16")
    if exact and small and small.precision < exact.precision - MOST_LOST:
        raise SystemExit("bfloat16 is more than a point below float32.")


if __name__ == "__main__":
    main()
