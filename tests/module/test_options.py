"""Bad options: the same errors in functions and constructors, in every loss that has the option."""

import functools
import inspect
import re

import numpy as np
import pytest
import torch

import fused_bce
from fused_bce import SparseTarget, functional

LOGITS, TARGET = torch.zeros(3, 4), torch.zeros(3, 4)

# How each loss is called, with options
FUNCTIONS = {
    "bce": lambda **options: functional.binary_cross_entropy_with_logits(LOGITS, TARGET, **options),
    "focal": lambda **options: functional.sigmoid_focal_loss(LOGITS, TARGET, **options),
    **{
        name: functools.partial(getattr(functional, f"{name}_loss"), LOGITS, TARGET)
        for name in ("quality_focal", "varifocal", "asymmetric")
    },
    "head": lambda **options: functional.linear_binary_cross_entropy_with_logits(
        torch.zeros(3, 5), torch.zeros(4, 5), TARGET, **options
    ),
    "pairwise": lambda **options: functional.pairwise_sigmoid_loss(
        torch.zeros(3, 5), torch.zeros(3, 5), **options
    ),
}
CONSTRUCTORS = {
    "BCE": fused_bce.BCEWithLogitsLoss,
    "Focal": fused_bce.SigmoidFocalLoss,
    "QualityFocal": fused_bce.QualityFocalLoss,
    "Varifocal": fused_bce.VarifocalLoss,
    "Asymmetric": fused_bce.AsymmetricLoss,
    "Head": lambda **options: fused_bce.LinearBCEWithLogitsLoss(5, 4, **options),
    "SigLip": fused_bce.SigLipLoss,
}
SIGNATURES = {
    "bce": functional.binary_cross_entropy_with_logits,
    "focal": functional.sigmoid_focal_loss,
    "quality_focal": functional.quality_focal_loss,
    "varifocal": functional.varifocal_loss,
    "asymmetric": functional.asymmetric_loss,
    "head": functional.linear_binary_cross_entropy_with_logits,
    "pairwise": functional.pairwise_sigmoid_loss,
    **CONSTRUCTORS,
    "Head": fused_bce.LinearBCEWithLogitsLoss,
}

NO_REDUCTION = ValueError, " is not a valid value for reduction"
BAD = {
    "reduction": [("max", *NO_REDUCTION), (None, *NO_REDUCTION), ("Mean", *NO_REDUCTION)],
    "label_smoothing": [
        (value, ValueError, f"label_smoothing must lie in [0, 1), not be {value}")
        for value in (5, 1.0, -0.1, float("nan"), np.float64(2.0))
    ]
    + [(torch.tensor(0.1), TypeError, "label_smoothing must be a number, not a tensor")],
    "ignore_index": [
        ("a", TypeError, "ignore_index must be an integer, nan or None, not 'a'"),
        (1.5, TypeError, "ignore_index must be an integer, nan or None, not 1.5"),
        (True, TypeError, "ignore_index must be an integer, nan or None, not True"),
        (2**24, ValueError, "ignore_index must lie between -2**24 and 2**24, not be 16777216"),
    ],
    "chunk_bytes": [
        (1.5, TypeError, "chunk_bytes must be an integer, not 1.5"),
        (True, TypeError, "chunk_bytes must be an integer, not True"),
        ("1", TypeError, "chunk_bytes must be an integer, not '1'"),
        (0, ValueError, "chunk_bytes must be positive and less than 2**63, not 0"),
        (2**63, ValueError, "chunk_bytes must be positive and less than 2**63, not 92233"),
    ],
    "parts": [
        (1.5, TypeError, "parts must be an integer, not 1.5"),
        (0, ValueError, "parts must lie between 1 and the number of labels, 4, not be 0"),
        (5, ValueError, "parts must lie between 1 and the number of labels, 4, not be 5"),
    ],
    "alpha": [
        (1.5, ValueError, "alpha must lie in [0, 1] or be -1, not 1.5"),
        (float("nan"), ValueError, "alpha must lie in [0, 1] or be -1, not nan"),
    ],
    "gamma": [(-1.0, ValueError, "gamma must lie in [0, 1e6], not be -1.0")],
    "gamma_neg": [(1e7, ValueError, "gamma_neg must lie in [0, 1e6], not be 10000000.0")],
    "gamma_pos": [(-0.5, ValueError, "gamma_pos must lie in [0, 1e6], not be -0.5")],
    "beta": [
        (-1, ValueError, "beta must lie in [0, 1e6], not be -1"),
        (float("nan"), ValueError, "beta must lie in [0, 1e6], not be nan"),
    ],
    "clip": [(1.5, ValueError, "clip must lie in [0, 1], not be 1.5")],
    "entropy_smoothing": [(2, ValueError, "entropy_smoothing must lie in [0, 1], not be 2")],
    "chunk_size": [(2.5, TypeError, "chunk_size must be an integer, not 2.5")],
    "rank": [(None, TypeError, "rank must be an integer, not None")],
    "world_size": [("2", TypeError, "world_size must be an integer, not '2'")],
    "dist_impl": [("ring", ValueError, "dist_impl must be one of")],
}
EXCEPT = {
    # torch's constructor takes any reduction, and so does its drop-in; the call raises.
    ("BCE", "reduction"),
    # The function takes what torchvision's takes: what the kernels do not cover is composite.
    ("focal", "alpha"),
    ("focal", "gamma"),
    ("focal", "gamma_neg"),
    # Of which there is no other: alpha need not be a share.
    ("varifocal", "alpha"),
    ("Varifocal", "alpha"),
}
CASES = [
    pytest.param(name, {option: value}, kind, message, id=f"{name}-{option}-{value}")
    for option, values in BAD.items()
    for name, function in SIGNATURES.items()
    if option in inspect.signature(function).parameters and (name, option) not in EXCEPT
    for value, kind, message in values
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), CASES)
def test_bad_options(name, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        (FUNCTIONS | CONSTRUCTORS)[name](**options)


def test_every_option_is_in_the_table():
    """Of numbers and names; the others are operands and switches."""
    others = {"weight", "pos_weight", "linear_bias", "size_average", "reduce", "positives"}
    others |= {
        "validate_targets",
        "recompute",
        "cache_labels",
        "detach_weight",
        "bias",
        "device",
        "dtype",
    }
    others |= {"logit_scale", "logit_bias"}
    for function in SIGNATURES.values():
        for option, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                assert option in BAD or option in others, option


@pytest.mark.parametrize("reduction", ["max", None])
def test_reduction_of_the_drop_in(reduction):
    """At the same place as torch's, with the same error."""
    errors = []
    for loss in (torch.nn.BCEWithLogitsLoss, fused_bce.BCEWithLogitsLoss):
        module = loss(reduction=reduction)
        with pytest.raises(ValueError, match="is not a valid value for reduction") as error:
            module(LOGITS, TARGET)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["head", "pairwise"])
def test_matrices_are_refused(name):
    with pytest.raises(ValueError, match="as large as the logits"):
        FUNCTIONS[name](reduction="none")
    with pytest.raises(ValueError, match="as large as the logits"):
        CONSTRUCTORS["Head"](reduction="none")


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8])
def test_integers_of_numpy(kind):
    for name in ("head", "pairwise"):
        assert torch.equal(FUNCTIONS[name](chunk_bytes=kind(64)), FUNCTIONS[name](chunk_bytes=64))
    head = CONSTRUCTORS["Head"](chunk_bytes=kind(64), ignore_index=kind(7))
    for value in (head.chunk_bytes, head.ignore_index):
        assert type(value) is int
    for name in ("BCE", "Focal"):
        assert type(CONSTRUCTORS[name](ignore_index=kind(7)).ignore_index) is int
    siglip = fused_bce.SigLipLoss(rank=kind(0), world_size=kind(1), chunk_size=kind(2))
    assert repr(siglip) == repr(fused_bce.SigLipLoss(chunk_size=2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtypes_of_inputs(dtype):
    """As torch's own loss, whose kernel is not implemented for them."""
    one = torch.ones(3, 3, dtype=dtype)
    for function in (
        lambda: functional.linear_binary_cross_entropy_with_logits(one, one, torch.zeros(3, 3)),
        lambda: functional.pairwise_sigmoid_loss(one, one),
    ):
        message = f"must be float16, bfloat16, float32 or float64, not {dtype}"
        with pytest.raises(NotImplementedError, match=message):
            function()


def test_validated_values_of_pairs():
    """nan is for pairs that are left out."""
    features = torch.ones(2, 3)
    rows = SparseTarget.from_lists([[0, 1], [1]], 2)

    def loss(values):
        target = rows._replace(values=torch.tensor(values))
        return functional.pairwise_sigmoid_loss(
            features, features, positives=target, validate_targets=True
        )

    assert loss([1.0, float("nan"), 0.5]).isfinite()
    for bad in (7.0, -0.5, float("inf")):
        with pytest.raises(ValueError, match=re.escape(f"target[2] is {bad}, outside [0, 1]")):
            loss([1.0, float("nan"), bad])
    functional.pairwise_sigmoid_loss(features, features, validate_targets=True)
