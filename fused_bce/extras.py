"""What every pointwise loss takes beyond torch's: of a call, and as attributes of a module."""

from typing import Any, ClassVar, NamedTuple

from fused_bce.checks import check_options


class Extras(NamedTuple):
    """See :func:`fused_bce.functional.binary_cross_entropy_with_logits`."""

    label_smoothing: float = 0.0
    ignore_index: int | float | None = None
    validate_targets: bool = False
    recompute: bool = False


class HasExtras:
    """A module that has them as attributes."""

    __constants__: ClassVar = [*Extras._fields, "reduction"]

    # Of instances that this constructor has not made: converted, or pickled by an older version.
    label_smoothing: float = 0.0
    ignore_index: int | float | None = None
    validate_targets: bool = False
    recompute: bool = False

    def _set_extras(self, extras: Extras) -> None:
        """Checks them."""
        index = check_options(extras.label_smoothing, extras.ignore_index)
        for name, value in extras._replace(ignore_index=index)._asdict().items():
            default = getattr(HasExtras, name)
            # Not an integer where a float is expected: torch.jit.script goes by types.
            setattr(self, name, value if default is None else type(default)(value))

    def _describe(self, always: tuple[str, ...] = (), **defaults: Any) -> str:
        """For extra_repr: these attributes, and others that are not at their defaults."""
        names = [*always]
        for name, default in (defaults | Extras()._asdict()).items():
            if getattr(self, name) != default:
                names.append(name)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
