"""The same loss from elsewhere: by hand, and from other packages where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cases.base import Case
from contenders.losses import Loss


def sigmoid_then_bce(logits: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy(logits.sigmoid(), target)


def softplus_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    return (functional.softplus(logits) - logits * target).mean()


def make_peers(case: Case) -> dict[str, Loss]:
    """Those that run here, by the name of their contender; they take no weights."""
    peers = {"sigmoid + BCELoss": sigmoid_then_bce, "softplus - x*t": softplus_by_hand}
    if why_not_flag_gems(case) is None:
        peers["flag_gems"] = flag_gems_loss()
    return peers


def missing_peers(case: Case) -> dict[str, str]:
    """Why the others do not."""
    reason = why_not_flag_gems(case)
    return {} if reason is None else {"flag_gems": reason}


def why_not_flag_gems(case: Case) -> str | None:
    """FlagGems has Triton kernels in the place of torch's operators; that of this loss is for the
    forward pass, its gradient stays torch's."""

    def check() -> None:
        if case.mode != "fwd":
            return
        logits, target = torch.randn(2, 1000, device=case.device)
        theirs, torchs = flag_gems_loss()(logits, target), softplus_by_hand(logits, target)
        torch.testing.assert_close(theirs, torchs)

    reason = why_not_package("flag_gems", case.device, check)
    return reason or (None if case.mode == "fwd" else "it has no backward pass of its own")


def why_not_package(name: str, device: str, check: Callable[[], None]) -> str | None:
    """Why a package of kernels for the GPU is left out; the check calls it."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    if device == "cpu":
        return "its kernels need a GPU"
    try:
        check()
    # Whatever stops another package must not stop this run.
    except Exception as error:
        return f"it does not run here: {error}"
    return None


def flag_gems_loss() -> Loss:
    loss = importlib.import_module("flag_gems").binary_cross_entropy_with_logits
    return lambda logits, target: loss(logits, target, None, None, 1)
