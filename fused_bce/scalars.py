"""Numbers from Python as operands: what a compiled graph must not take for constants."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def may_differ_from_zero(number: float) -> bool:
    """In compiled code: any number but a constant 0, so that one graph serves them all."""
    return not statically_known_true(number == 0)


def scalar_operand(number: float, beside: Tensor) -> Tensor:
    """A float64 tensor of one number, for an operator that also takes ``beside``.

    Compilers may make a constant of a float that an operator takes, or that becomes a tensor by
    torch.full, and use it for the next call's (pytorch 197889); a product is safe. Compiled code
    for a GPU has it there, where a captured graph finds it; else the host reads it.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=beside.device) * number
    return torch.scalar_tensor(number, dtype=torch.float64, device="cpu")
