"""What arguments are, and whether their values can be read now."""

import operator
import sys

import torch
from torch import Tensor


def in_graph() -> bool:
    return torch.compiler.is_compiling() or is_traced_by_proxies()


# Nothing is fake, or traced by proxies, before torch has imported the module for it: not all
# releases do so at once.
def is_fake(t: Tensor) -> bool:
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(t, module.FakeTensor)


def is_traced_by_proxies() -> bool:
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def is_readable(t: Tensor) -> bool:
    """Whether the host has its numbers at hand, and no graph is made."""
    if in_graph() or torch.jit.is_tracing():
        return False
    return t.is_cpu and not is_fake(t)


def is_assertable(t: Tensor) -> bool:
    """Whether it has numbers later: on its device, or in the graph that is made."""
    if in_graph():
        return True
    return not (torch.jit.is_tracing() or t.is_meta or is_fake(t))


def is_int(n: object) -> bool:
    if isinstance(n, Tensor):  # as a size is in a trace
        return torch.jit.is_tracing() and n.dim() == 0 and n.dtype == torch.int64
    return isinstance(n, int | torch.SymInt) and not isinstance(n, bool)


def as_integer(name: str, n: int) -> int:
    if is_int(n):
        return n
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an integer, not {n!r}")
    return operator.index(n)


def as_count(name: str, n: int) -> int:
    n = as_integer(name, n)
    if not torch.jit.is_tracing() and n < 0:
        raise ValueError(f"{name} must not be negative, as {n}")
    return n


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, not {describe(t)}")


def check_integers(name: str, t: Tensor) -> None:
    check_tensor(name, t)
    if t.is_floating_point() or t.is_complex() or t.dtype is torch.bool:
        raise TypeError(f"{name} must be of integers, not {t.dtype}")


def check_range(name: str, lowest: int, highest: int, size: int) -> None:
    for number in (lowest, highest):
        if not 0 <= number < size:
            raise IndexError(f"{name} {number} is out of range for {size} {name}s")


def describe(t: object) -> str:
    return f"of {t.dtype} and shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__


def autocast_casts(*operands: Tensor) -> bool:
    device = operands[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return all(t.is_floating_point() and t.dtype is not torch.float64 for t in operands)


def logits_dtype(input: Tensor, linear_weight: Tensor) -> torch.dtype:
    """That of the operands, or autocast's, as a layer's: float64 stays what it is."""
    if autocast_casts(input, linear_weight):
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype
