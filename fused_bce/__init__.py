"""Binary cross entropy with logits, loss and gradient in one pass: a drop-in for
:class:`torch.nn.BCEWithLogitsLoss`, and for the focal loss of torchvision."""

import os

import torch

try:
    import fused_bce._C as _C
except ModuleNotFoundError as error:
    if not os.path.exists(__file__):
        raise ImportError(
            f"fused_bce cannot be imported from a zip file, as {__file__} is in one: Python loads "
            "no compiled module from there. Install the wheel with pip, or unpack the file."
        ) from error
    raise ImportError(
        "fused_bce is not built here, or not for this Python. Build it in its source folder: "
        "pip install --no-build-isolation ."
    ) from error
except ImportError as error:
    if "was built for torch" in str(error):
        raise
    raise ImportError(
        f"fused_bce was built for another torch than {torch.__version__}, or for another system. "
        "Rebuild it in its source folder: "
        "pip install --no-build-isolation --no-deps --force-reinstall ."
    ) from error

from fused_bce import functional
from fused_bce.asymmetric import AsymmetricLoss
from fused_bce.autograd import BCEWithLogitsFunction
from fused_bce.coverage import why_not_fused
from fused_bce.decompositions import decomposition_table
from fused_bce.focal import SigmoidFocalLoss
from fused_bce.head import LinearBCEWithLogitsLoss
from fused_bce.modules import BCEWithLogitsLoss
from fused_bce.patching import convert, patch, unpatch
from fused_bce.quality_focal import QualityFocalLoss
from fused_bce.siglip import SigLipLoss
from fused_bce.sparse import SparseTarget
from fused_bce.varifocal import VarifocalLoss

__version__ = "0.1.0"
__all__ = [
    "AsymmetricLoss",
    "BCEWithLogitsFunction",
    "BCEWithLogitsLoss",
    "LinearBCEWithLogitsLoss",
    "QualityFocalLoss",
    "SigLipLoss",
    "SigmoidFocalLoss",
    "SparseTarget",
    "VarifocalLoss",
    "build_info",
    "convert",
    "decomposition_table",
    "functional",
    "patch",
    "unpatch",
    "why_not_fused",
]


def build_info() -> dict:
    """How this package was built and what of it runs here.

    Returns:
        ``version``; ``torch``, the release that it was built for; ``compiler``; ``cuda_archs``,
        the GPU architectures in it, or None for a CPU build; ``cpu_instruction_sets``, those that
        this processor can run, best first; ``cpu_instruction_set``, the one in use.

    Example:
        >>> import fused_bce
        >>> build = fused_bce.build_info()
        >>> build["cpu_instruction_set"] in build["cpu_instruction_sets"]
        True
    """
    return {
        "version": __version__,
        **_C.build_info(),
        "cpu_instruction_sets": _C.instruction_sets(),
        "cpu_instruction_set": _C.current_instruction_set(),
    }
