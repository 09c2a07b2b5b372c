"""The fused losses for code that nobody edits."""

import importlib
import threading
from typing import cast

import torch
import torch.nn.functional as F

from fused_bce import functional
from fused_bce.modules import BCEWithLogitsLoss

_torch_class = torch.nn.BCEWithLogitsLoss
# Where torchvision looks its focal loss up: its public name, and names of their own in the models
# that train with it.
_OF_FOCAL = (
    "torchvision.ops",
    "torchvision.ops.focal_loss",
    "torchvision.models.detection.retinanet",
    "torchvision.models.detection.fcos",
)
# By module and name, what stood in the place of ours; empty while nothing is patched.
_originals: dict = {}
# Two threads that patch at the same time would else take ours for what stood there before.
_lock = threading.Lock()


class patch:
    """Replaces ``torch.nn.functional.binary_cross_entropy_with_logits`` by the fused loss, and
    with it what ``torch.nn.BCEWithLogitsLoss`` computes.

    As a call, until :func:`unpatch`; as a context manager, until its end, also if that is an
    exception, unless it was replaced already when it began.

    It holds for the whole process, all threads included. The class itself stays torch's: its
    ``forward`` looks the function up in each call, so that every instance takes the fused path,
    whenever it was made, and is still what ``isinstance`` and ``pickle`` expect. For the arguments
    that torch's class does not have, use :class:`fused_bce.BCEWithLogitsLoss`.

    Args:
        focal: whether also ``torchvision.ops.sigmoid_focal_loss`` is replaced, and with it the
            classification loss of torchvision's RetinaNet and FCOS, which have that name in modules
            of their own. Imports torchvision.

    Out of reach:
        - the function imported by name before, ``from torch.nn.functional import
          binary_cross_entropy_with_logits``, in the module that did so; and one that was imported
          by name meanwhile stays ours there;
        - ``torch.binary_cross_entropy_with_logits``, the operator below the function;
        - what was compiled, traced, scripted or exported before; and what was meanwhile keeps the
          fused loss.

    Example:
        >>> import torch
        >>> import fused_bce
        >>> logits = torch.ones(3, requires_grad=True)
        >>> with fused_bce.patch():
        ...     loss = torch.nn.BCEWithLogitsLoss()(logits, torch.ones(3))
        >>> "BCEWithLogitsFunction" in loss.grad_fn.name()
        True
    """

    def __init__(self, *, focal: bool = False):
        self._focal = focal
        self._replaced = _replace(focal)
        self._entered: list = []

    def __enter__(self):
        self._entered.append(self._replaced + _replace(self._focal))
        self._replaced = []
        return self

    def __exit__(self, *exception):
        _put_back(self._entered.pop())


def unpatch() -> None:
    """Puts back what :class:`patch` replaced; does nothing if nothing is replaced.

    Example:
        >>> import fused_bce
        >>> patched = fused_bce.patch()
        >>> fused_bce.unpatch()
    """
    _put_back(list(_originals))


def _replace(focal: bool) -> list:
    """The places, modules and names, that were not replaced already."""
    places: list = [(F, functional.binary_cross_entropy_with_logits)]
    if focal:
        modules = [importlib.import_module(name) for name in _OF_FOCAL]
        places += [(module, functional.sigmoid_focal_loss) for module in modules]
    with _lock:
        new = [
            (module, ours) for module, ours in places if (module, ours.__name__) not in _originals
        ]
        # All of them are looked up before one is replaced, for one may not be there.
        originals = {
            (module, ours.__name__): getattr(module, ours.__name__) for module, ours in new
        }
        _originals.update(originals)
        for module, ours in new:
            setattr(module, ours.__name__, ours)
    return [*originals]


def _put_back(places: list) -> None:
    with _lock:
        for place in places:
            if place in _originals:
                module, name = place
                setattr(module, name, _originals.pop(place))


def convert(model: torch.nn.Module, *, recompute: bool = False) -> torch.nn.Module:
    """Makes every :class:`torch.nn.BCEWithLogitsLoss` inside ``model``, or ``model`` itself, a
    :class:`fused_bce.BCEWithLogitsLoss`.

    In place: it stays the same object, with its buffers, hooks and training flag, wherever else it
    is referred to. Subclasses other than torch's own class are left alone, since they may compute
    something else.

    Args:
        model: any module.
        recompute: of those losses, see
            :func:`fused_bce.functional.binary_cross_entropy_with_logits`.

    Returns:
        ``model``.

    Example:
        >>> import torch
        >>> import fused_bce
        >>> fused_bce.convert(torch.nn.ModuleDict({"loss": torch.nn.BCEWithLogitsLoss()}))["loss"]
        BCEWithLogitsLoss()
    """
    for module in model.modules():
        if type(module) is _torch_class:
            module.__class__ = BCEWithLogitsLoss
            cast(BCEWithLogitsLoss, module).recompute = recompute
    return model
