"""The interpreter's run of every loss's kernels, against torch in float64.

    python tests/ptx/losses.py INTERPRETER

Of the table in tests/loss_cases.py, with the interpreter's own checks of races and
accesses. Exits with 1 if results are wrong.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

from loss_cases import LOSSES
from project import Device, Problem, decode, encode

import build

ROOT = Path(__file__).resolve().parents[2]
# Each larger than a chunk of one block; float16 computes its gradient in another pass.
NUMEL = 9000
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Units in the last place of the largest value, as in the tests on other devices
ROUNDINGS = 16


def exact(case, options, logits, target, reduction):
    x = torch.from_numpy(logits).requires_grad_()
    loss = case.reference(x, torch.from_numpy(target), reduction=reduction, **options)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach().numpy(), grad.numpy()


def largest_error(got, want, dtype):
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    return np.abs(got - want).max() / (epsilon * np.abs(want).max())


def wrong(device, case, options, dtype, reduction):
    """What is wrong, if anything."""
    rng = np.random.default_rng(0)
    stored = encode(rng.normal(0, 4, NUMEL), dtype)
    target = encode(np.where(rng.random(NUMEL) < 0.5, rng.random(NUMEL).round(), 0.3), dtype)
    problem = Problem(stored, dtype, target, dtype, reduction=reduction, loss_dtype=dtype)
    own = (number for number in case.own_operands(options) if number is not None)
    numbers = (ctypes.c_double * 4)(*own)
    if not device.lib.face_choose_formula(case.name.encode(), numbers):
        return "no such formula"
    result = device.launch(problem)
    logits, targets = (decode(t, dtype).astype(np.float64) for t in (stored, target))
    loss, grad = exact(case, options, logits, targets, reduction)
    for name, got, want in (("loss", result.loss, loss), ("grad", result.grad, grad)):
        error = largest_error(decode(got, dtype), want, dtype)
        if not error <= ROUNDINGS:
            return f"{name} is off by {error:.1f} units of the last place of the largest"
    return None


def main() -> int:
    device = Device(build.build(ROOT, "compute_90"))
    found = 0
    for case in LOSSES:
        for options in case.options.values():
            if not case.numbers.keys() >= options.keys():
                continue  # operands, which check.py has of cross entropy
            for dtype in DTYPES:
                for reduction in ("sum", "none"):
                    what = wrong(device, case, options, dtype, reduction)
                    found += what is not None
                    if what:
                        print(case.name, options, dtype, reduction, what)
    print(f"{found} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
