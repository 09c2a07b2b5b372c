"""Every loss's kernels on an interpreter of their PTX, against torch in float64.

    python tests/ptx/losses_with_outside_interpreter.py INTERPRETER

For the losses of tests/loss_cases.py, with the interpreter's own checks of races and accesses.
Exits with 1 if results are wrong.
"""

import ctypes
import functools
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

# One of them is called like the folder of a build, if there is one.
# isort: skip_file
sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

import build
from project import Device, Problem, decode, encode

ROOT = Path(__file__).resolve().parents[2]
NUMEL = 9000  # more than the chunk of one block
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Units of the largest value, as in the tests on other devices; in float64 there are those of the
# definition, too
ROUNDINGS = {"float64": 64}


@functools.cache
def device() -> Device:
    return Device(build.build(ROOT, "compute_90"))


def run(name: str, numbers: list[float], problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient. In a process without this package's own module, whose symbols are the
    same."""
    if not device().lib.face_choose_formula(name.encode(), (ctypes.c_double * 4)(*numbers)):
        raise LookupError(name)
    result = device().launch(problem)
    return decode(result.loss, problem.loss_dtype), decode(result.grad, problem.logits_dtype)


def draw(dtype: str, reduction: str) -> Problem:
    rng = np.random.default_rng(0)
    target = np.where(rng.random(NUMEL) < 0.5, rng.random(NUMEL).round(), rng.random(NUMEL))
    logits, target = encode(rng.normal(0, 4, NUMEL), dtype), encode(target, dtype)
    return Problem(logits, dtype, target, dtype, reduction=reduction, loss_dtype=dtype)


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from loss_cases import LOSSES

    def exact(case, options, problem):
        logits, target = (
            torch.from_numpy(decode(stored, problem.logits_dtype).astype(np.float64))
            for stored in (problem.logits, problem.target)
        )
        loss = case.reference(logits.requires_grad_(), target, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        return (loss if problem.reduction == "none" else loss.sum()).detach(), grad

    cases = [
        (case, options, draw(dtype, reduction))
        for case in LOSSES
        for options in case.options.values()
        if options.keys() <= case.numbers.keys()  # check.py has the operands, of cross entropy
        for dtype, reduction in itertools.product(DTYPES, ("sum", "none"))
    ]
    build.build(ROOT, "compute_90")
    wrong = 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = []
        for case, options, problem in cases:
            numbers = [number for number in case.own_operands(options) if number is not None]
            runs.append(pool.submit(run, case.name, numbers, problem))
        for (case, options, problem), future in zip(cases, runs, strict=True):
            epsilon = torch.finfo(getattr(torch, problem.logits_dtype)).eps
            for got, want in zip(future.result(), exact(case, options, problem), strict=True):
                units = np.abs(got - want.numpy()).max() / (epsilon * want.abs().max().item())
                if not units <= ROUNDINGS.get(problem.logits_dtype, 16):
                    wrong += 1
                    print(case.name, options, problem.logits_dtype, problem.reduction, units)
    print(f"{len(cases)} runs, {wrong} results wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
