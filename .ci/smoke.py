"""Loss and gradient of an installed wheel, against torch in float64: python .ci/smoke.py [SET]

SET is the instruction set that must have been chosen. Quick enough for an emulated processor.
"""

import sys

import torch

import fused_bce

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def main() -> None:
    info = fused_bce.build_info()
    print(fused_bce.__file__, info, sep="\n")
    if not fused_bce.__file__.startswith(sys.prefix):
        sys.exit("this is not what was installed")
    if sys.argv[1:] not in ([], [info["cpu_instruction_set"]]):
        sys.exit(f"expected {sys.argv[1]}")
    for dtype in FLOATS:
        check(dtype, dtype)
        check(dtype, torch.bool)


def check(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(100, 13) * 6).to(dtype).requires_grad_()
    target = (torch.rand(100, 13) < 0.5).to(target_dtype)
    pos_weight = torch.rand(13, dtype=torch.float64).to(dtype) + 0.5
    loss = fused_bce.BCEWithLogitsLoss(pos_weight=pos_weight)(logits, target)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    theirs = torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight.double())(exact, target.double())
    theirs.backward()
    # As a part of the largest gradient: torch loses the digits of small ones, in float64, too.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), theirs, rtol=4 * eps, atol=0)
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=4 * eps * largest)


if __name__ == "__main__":
    main()
