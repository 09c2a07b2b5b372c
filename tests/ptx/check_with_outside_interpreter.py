"""The interpreter's checks of the PTX, with this project's rule for the gradient of the loss.

    python tests/ptx/check_with_outside_interpreter.py INTERPRETER [arguments of its check.py]

Its reference rounds a gradient once. Here, but for float16, the gradient for a grad_loss of 1 is
rounded, multiplied by grad_loss, and rounded again; and where targets are ignored a 0 stays 0,
whatever grad_loss is. Both ways of adding up are run, in turns. Exits with 1 if results are wrong,
2 if nothing can be said.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

import check
import checks
import far_end
import reference
from project import SMALLEST_EXPONENT, Device, decode, encode, round_to, ulp

import cases

truth, wrong_grads = reference.truth, reference.wrong_grads


def truth_in_two_steps(p, elements=None):
    """With the gradient for a grad_loss of 1 beside it, and what that is multiplied by."""
    true = truth(p, elements)
    if p.grad_loss is not None:
        true.first = truth(dataclasses.replace(p, grad_loss=None), elements)
        true.factor = p.grad_loss.values(elements or range(p.numel))
    return true


def is_rounded_twice(stored, p, true, ulps):
    """Where what is stored is what the rule gives, as far as the first rounding can be foretold."""
    computed, dtype = reference.arithmetic(p), p.logits_dtype
    first = true.first
    # As in the interpreter's own comparison: tiny exponentials may be flushed to 0.
    flushed = 2 * reference.finite(first.grad_scale) * 2.0 ** SMALLEST_EXPONENT[computed]
    slack = ulps * ulp(reference.finite(first.grad_terms), computed) + flushed
    low, high = (first.grad - slack).astype(np.float64), (first.grad + slack).astype(np.float64)
    factor = round_to(true.factor, computed)
    ends = [round_to(round_to(round_to(x, dtype) * factor, computed), dtype) for x in (low, high)]
    got = decode(stored, dtype)
    stays = ~np.isnan(p.ignore_index) & (got == 0) & (low <= 0) & (high >= 0)
    nan = np.isnan(got) & np.isnan(ends[0]) & np.isnan(ends[1])
    return stays | nan | ((np.minimum(*ends) <= got) & (got <= np.maximum(*ends)))


def wrong_grads_in_two_steps(stored, p, true, ulps):
    if p.grad_loss is not None and p.logits_dtype != "float16":
        with np.errstate(all="ignore"):
            right = is_rounded_twice(stored, p, true, ulps)
        expected = encode(true.grad.astype(np.float64), p.logits_dtype)
        stored = np.where(right, expected, stored)
    return wrong_grads(stored, p, true, ulps)


launch = Device.launch


def launch_in_turns(self, p, offsets=None, finished=None):
    """The last block adds up the sums of chunks, or a second kernel: not the same as in the launch
    before. Blocks that count as having run before have taken a ticket."""
    self.in_last_block = finished is not None or not getattr(self, "in_last_block", False)
    self.lib.face_add_up_in_last_block(self.in_last_block)
    return launch(self, p, offsets, finished)


fail_next = Device.fail_next


def fail_next_in_last_block(self, function, error):
    """Which alone has a memset that may fail."""
    self.in_last_block = False  # as the launch before
    fail_next(self, function, error)


Device.launch, Device.fail_next = launch_in_turns, fail_next_in_last_block

for module in (reference, cases, checks, far_end):
    module.truth = truth_in_two_steps
    module.wrong_grads = wrong_grads_in_two_steps

if __name__ == "__main__":
    sys.argv[1] = str(Path(__file__).resolve().parents[2])
    sys.exit(check.main())
