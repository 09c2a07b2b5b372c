"""The fused loss for code that nobody edits."""

import torch

from fused_bce import functional
from fused_bce.modules import BCEWithLogitsLoss

_torch_class = torch.nn.BCEWithLogitsLoss

# torch.nn.modules.loss.BCEWithLogitsLoss stays torch's: pickle looks its instances up there. They
# call the function below.
_REPLACEMENTS = (
    (torch.nn, "BCEWithLogitsLoss", BCEWithLogitsLoss),
    (torch.nn.modules, "BCEWithLogitsLoss", BCEWithLogitsLoss),
    (
        torch.nn.functional,
        "binary_cross_entropy_with_logits",
        functional.binary_cross_entropy_with_logits,
    ),
)
_originals: list = []  # what stood in their place; empty while nothing is patched


class patch:
    """Replaces ``torch.nn.BCEWithLogitsLoss`` and
    ``torch.nn.functional.binary_cross_entropy_with_logits`` by the fused ones.

    As a call, until :func:`unpatch`; as a context manager, until its end, also if that is an
    exception, unless they were replaced already when it began::

        fused_bce.patch()

        with fused_bce.patch():
            train()

    It holds for the whole process, all threads included. Instances of torch's class take the fused
    path too, whenever they were made, for they call the function.

    Out of reach:
        - a function imported by name before, ``from torch.nn.functional import
          binary_cross_entropy_with_logits``, in the module that did so;
        - a class imported by name before stays torch's, as does
          ``torch.nn.modules.loss.BCEWithLogitsLoss``: what is made of it is fused, but fails
          ``isinstance(..., torch.nn.BCEWithLogitsLoss)`` while that is ours;
        - ``torch.binary_cross_entropy_with_logits``, the operator below the function;
        - what was compiled, traced, scripted or exported before, and what was while patched keeps
          the fused loss.
    """

    def __init__(self):
        self._outermost = not _originals
        _replace()

    def __enter__(self):
        _replace()
        return self

    def __exit__(self, *exception):
        if self._outermost:
            unpatch()


def unpatch() -> None:
    """Puts back what :class:`patch` replaced; does nothing if nothing is replaced."""
    while _originals:
        setattr(*_originals.pop())


def _replace() -> None:
    if not _originals:
        _originals.extend((owner, name, getattr(owner, name)) for owner, name, _ in _REPLACEMENTS)
        for replacement in _REPLACEMENTS:
            setattr(*replacement)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every :class:`torch.nn.BCEWithLogitsLoss` inside ``model``, or ``model`` itself, a
    :class:`fused_bce.BCEWithLogitsLoss`.

    In place: it stays the same object, with its buffers, hooks and training flag, wherever else it
    is referred to. Subclasses other than torch's own class are left alone, since they may compute
    something else.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if type(module) is _torch_class:
            module.__class__ = BCEWithLogitsLoss
    return model
