"""Replacing torch's and torchvision's functions by the fused ones, and the losses inside models."""

import functools
import importlib
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from fused_bce import _C, functional
from fused_bce.modules import BCEWithLogitsLoss

_torch_class = torch.nn.BCEWithLogitsLoss
# Where torchvision looks its focal loss up: its public name, and names of their own in the models
# that train with it.
_OF_FOCAL = (
    "torchvision.ops.focal_loss",
    "torchvision.ops",
    "torchvision.models.detection.retinanet",
    "torchvision.models.detection.fcos",
)
# By place, a module and a name: our function and the original that it replaced. The second
# dictionary is of places where something else stood when the original was to be put back: ours may
# reappear there. Both lie in the compiled module because this one may be reloaded.
_replaced: dict
_hidden: dict
_replaced, _hidden = vars(_C).setdefault("_patched_names", ({}, {}))
# Two threads that patch at the same time would else take ours for what stood there before.
_lock = threading.Lock()


def _copy(function: Callable, module: str) -> Callable:
    """The same function as another object, which pickles by the name that it replaces, while
    ``function`` pickles by its own."""
    copy = types.FunctionType(function.__code__, function.__globals__)
    functools.update_wrapper(copy, function)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    copy.__module__ = module
    return copy


_bce = _copy(functional.binary_cross_entropy_with_logits, F.__name__)
_focal = _copy(functional.sigmoid_focal_loss, _OF_FOCAL[0])


class patch:
    """Replaces ``torch.nn.functional.binary_cross_entropy_with_logits`` by the fused loss, and
    with it what ``torch.nn.BCEWithLogitsLoss`` computes.

    Called, it stays in force until :func:`unpatch`; as a context manager, until the end of the
    block. If the function is patched already, the context manager does not restore it. If another
    library replaces the function in between, that replacement stays, with a warning.

    It applies to the whole process, all threads included. The class ``torch.nn.BCEWithLogitsLoss``
    is not replaced: its ``forward`` looks the function up in each call, so every instance is fused,
    whenever it was created, and ``isinstance`` and ``pickle`` work as before. For keywords that
    torch's class does not have, use :class:`fused_bce.BCEWithLogitsLoss`. The function is pickled
    under torch's name, so a process without this package loads torch's function.

    Args:
        focal: whether to replace ``torchvision.ops.sigmoid_focal_loss`` as well, also in
            torchvision's RetinaNet and FCOS. Imports torchvision.

    Not replaced:
        - the function in modules that imported it by name before, ``from torch.nn.functional import
          binary_cross_entropy_with_logits``. Likewise, a module that imports it by name while
          patched keeps the fused function afterwards;
        - ``torch.binary_cross_entropy_with_logits``, the operator that the function calls;
        - code that was compiled, traced, scripted or exported before. Likewise, code that was
          compiled while patched keeps the fused loss;
        - focal losses that libraries implement themselves, such as transformers'
          ``sigmoid_focal_loss``; only the cross entropy inside of them is replaced.

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
    """Restores what :class:`patch` replaced; does nothing if nothing is patched.

    If another library has replaced or wrapped the function since, that stays, with a UserWarning.
    If the fused function is in place again when that library is done, call this once more.

    Example:
        >>> import fused_bce
        >>> patched = fused_bce.patch()
        >>> fused_bce.unpatch()
    """
    _put_back([*_replaced])
    with _lock:
        for place in [*_hidden]:
            if _restore(place, *_hidden[place]):
                del _hidden[place]


def _replace(focal: bool) -> list:
    """The places that were not replaced already."""
    places: list = [(F, _bce)]
    if focal:
        places += [(importlib.import_module(module), _focal) for module in _OF_FOCAL]
    with _lock:
        new = {
            (module, ours.__name__): ours
            for module, ours in places
            if (module, ours.__name__) not in _replaced
        }
        # All of them are looked up before one is replaced, for one may not be there.
        found = {place: getattr(*place) for place in new}
        for place, ours in new.items():
            if place in _hidden and found[place] is _hidden[place][0]:
                _replaced[place] = _hidden.pop(place)
                continue
            _replaced[place] = ours, found[place]
            setattr(*place, ours)
            _name(ours, found[place], *place)
    return [*new]


def _put_back(places: list) -> None:
    hidden = []
    with _lock:
        for place in places:
            if place in _replaced:
                pair = _replaced.pop(place)
                if not _restore(place, *pair):
                    _hidden.setdefault(place, pair)
                    hidden.append(place)
    for module, name in hidden:
        warnings.warn(
            f"{module.__name__}.{name} was replaced again after fused_bce.patch(), and stays as it "
            "is. If that replacement goes, fused_bce.unpatch() removes the fused loss below it",
            stacklevel=3,
        )


def _restore(place: tuple, ours: Callable, original: Any) -> bool:
    """Puts the original back in the place of ours; returns whether it is there now."""
    module, name = place
    found = getattr(module, name)
    if found is ours:
        setattr(module, name, original)
    elif found is not original:
        return False
    _name(original, ours, module, name)
    return True


def _name(present: Any, absent: Any, module: types.ModuleType, name: str) -> None:
    """Names our function and the original so that pickle finds both here, and in a process without
    this package the original for both. ``present`` is the one that ``module`` has at ``name``.

    For every function ``f``, ``f.__init__.__self__`` is ``f``. Here that of ``present`` becomes
    ``absent``.
    """
    # Other names need no change: of its four places torchvision's function is named after one, and
    # another library's replacement after none.
    for function in (present, absent):
        if not isinstance(function, types.FunctionType) or function.__module__ != module.__name__:
            return
    present.__qualname__ = name
    present.__init__ = _Self(absent, module, name)
    absent.__qualname__ = f"{name}.__init__.__self__"


class _Self:
    """Stands for ``__init__`` of the function at ``name``."""

    def __init__(self, function: Callable, module: types.ModuleType, name: str):
        self.__self__ = function
        self._place = module, name

    def __reduce__(self):
        # Pickle's protocols before 4 save what a dotted name passes through.
        return getattr, (getattr(*self._place), "__init__")


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
