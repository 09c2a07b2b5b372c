"""Times what the CUDA kernels could do in two ways, so that a GPU decides which one stays.

    python benchmarks/choices.py [--module PATH] [--output FILE]
    python benchmarks/choices.py --device cpu --sizes 65536     a rehearsal: the choices do nothing

Forward with the gradient, for the sums in the last block and in a second kernel, and for several
numbers of blocks: bytes that must move a second, as a share of what a copy moves in the same run.
--module is a compiled module, _C*.so, in the place of the package's own: .ci/gpu-module makes one
whose targets of bool are loaded the other way.
"""

import argparse
import csv
import importlib.util
import itertools
import sys
from pathlib import Path

import torch

from contenders.limits import COPIED_BYTES
from harness.timing import calls_per_sample, time_alternating

# Of a Hopper GPU's 132 multiprocessors 2 to 16 blocks each; and a block for each chunk.
BLOCKS = (264, 528, 1056, 2112, 2**31 - 1)
FINISHES = {"last block": True, "second kernel": False}
PAIRS = (
    ("float32", "float32"),
    ("float32", "bool"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bool"),
)
SIZES = (2**20, 2**26)
COPIED = {"cuda": COPIED_BYTES, "cpu": 2**24}
COLUMNS = ("module", "dtype", "target_dtype", "numel", "finish", "blocks", "seconds", "copy_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=Path, help="default: that of the package")
    parser.add_argument("--output", type=Path, help="a CSV file, to which rows are added")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.3, help="of rounds, for each case (0.3)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device")
    if arguments.module:
        load_module(arguments.module)
    import fused_bce

    if fused_bce.build_info()["cuda_archs"] is None:
        sys.exit("this build has no CUDA kernels")
    name = arguments.module.parent.name if arguments.module else "own"
    rows = []
    for numel, (dtype, target_dtype) in itertools.product(arguments.sizes, PAIRS):
        case = {"module": name, "dtype": dtype, "target_dtype": target_dtype, "numel": numel}
        measured = measure(numel, dtype, target_dtype, arguments.device, arguments.seconds)
        rows += [case | row for row in measured]
        show(rows[-len(measured) :])
    if arguments.output:
        write(arguments.output, rows)


def load_module(path: Path) -> None:
    """As fused_bce._C, before the package looks for its own."""
    spec = importlib.util.spec_from_file_location("fused_bce._C", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fused_bce._C"] = module
    spec.loader.exec_module(module)


def measure(numel: int, dtype: str, target_dtype: str, device: str, seconds: float) -> list[dict]:
    from fused_bce import _C
    from fused_bce.functional import binary_cross_entropy_with_logits as loss

    logits = torch.randn(numel, device=device).to(getattr(torch, dtype)).requires_grad_()
    target = (torch.rand(numel, device=device) > 0.5).to(getattr(torch, target_dtype))

    def step(finish: str, blocks: int):
        def run():
            _C.limit_cuda_blocks(blocks)
            _C.add_up_in_last_block(FINISHES[finish])
            return loss(logits, target)

        return run

    ways = list(itertools.product(FINISHES, BLOCKS))
    steps = {f"{finish}, {blocks}": step(finish, blocks) for finish, blocks in ways}
    source = torch.rand(COPIED[device] // 4, device=device)
    out = torch.empty_like(source)
    steps["copy"] = lambda: out.copy_(source)
    timings = time_alternating(steps, calls_per_sample(steps, device), device, 5, seconds)
    of_copy = 2 * COPIED[device] / timings["copy"].median
    moved = (2 * logits.element_size() + target.element_size()) * numel
    return [
        {
            "finish": finish,
            "blocks": blocks,
            "seconds": timings[f"{finish}, {blocks}"].median,
            "copy_share": moved / timings[f"{finish}, {blocks}"].median / of_copy,
        }
        for finish, blocks in ways
    ]


def show(rows: list[dict]) -> None:
    first = rows[0]
    print("{module}: {dtype} logits, {target_dtype} targets, {numel} elements".format(**first))
    for finish, of_finish in itertools.groupby(rows, key=lambda row: row["finish"]):
        shares = "  ".join(
            f"{'all' if row['blocks'] == BLOCKS[-1] else row['blocks']}: "
            f"{row['seconds'] * 1e6:.1f} us, {row['copy_share']:.1%}"
            for row in of_finish
        )
        print(f"  {finish:<14} {shares}", flush=True)


def write(path: Path, rows: list[dict]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
