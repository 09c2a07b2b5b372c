"""The contenders of a case compute the same."""

import copy
import dataclasses
import sys
import types

import pytest
import torch
from helpers import torch_bce
from scripts import by_compile, shrink_presets

import fused_bce
from cases import extras, head, heads, pairwise, trained_pairs, training
from cases.base import Case
from cases.preset import Selection
from cases.registry import PRESETS
from contenders import losses
from contenders import pairwise as pairwise_contenders
from contenders.inputs import make_inputs
from contenders.pairwise import why_not_siglip_kernel
from contenders.peers import make_peers, missing_peers, why_not_flag_gems


@pytest.fixture
def small(monkeypatch):
    shrink_presets(monkeypatch)


@pytest.mark.parametrize("accepted", [True, False])
def test_bool_targets(monkeypatch, accepted):
    """Taken as they are if the kernels can, else cast, as they are for torch."""
    case = Case(64, "cpu", dtype="bfloat16", target_dtype="bool")
    monkeypatch.setattr(losses, "takes_bool_targets", lambda device: accepted)
    monkeypatch.setattr(losses.fused_bce, "why_not_fused", lambda *_, **__: None)
    made = losses.make_losses(case, make_inputs(case), with_compile=False)
    assert isinstance(made["eager"], losses.CastsTarget)
    assert isinstance(made["fused"], losses.CastsTarget) == (not accepted)


@pytest.mark.usefixtures("small")
# The weights' gradients are rounded once or twice in the dtype of the logits.
@pytest.mark.parametrize(
    ("workload", "rounding"),
    [("64 features", 1e-6), ("512 features, bfloat16", 2**-7), ("512 features, float16", 2**-10)],
)
def test_training_steps_agree(monkeypatch, device, workload, rounding):
    """torch's loss and ours, in one batch and in four parts: the same gradients, which are used."""
    spec = training.WORKLOADS[workload]
    network = training.make_network(spec).to(device)
    inputs = torch.randn(16, spec.features, device=device)
    target = torch.rand(16, 40, device=device).round()

    def gradients(loss, parts):
        monkeypatch.setitem(training.WORKLOADS, workload, dataclasses.replace(spec, parts=parts))
        case = training.make_case(workload, device)
        model = losses.WithLoss(copy.deepcopy(network), loss)
        batches = list(zip(inputs.chunk(parts), target.chunk(parts), strict=True))
        backward = training.through_loss(case, model)
        training.training_contender(case, model, backward, batches).step()
        for before, after in zip(network.parameters(), model.network.parameters(), strict=True):
            torch.testing.assert_close(after, before - 0.01 * after.grad)
        return torch.cat([parameter.grad.view(-1) for parameter in model.parameters()])

    expected = gradients(torch.nn.BCEWithLogitsLoss(), 1)
    largest = expected.abs().max().item()
    assert largest > 0
    for loss in (torch.nn.BCEWithLogitsLoss(), fused_bce.BCEWithLogitsLoss()):
        for parts in (1, 4):
            torch.testing.assert_close(
                gradients(loss, parts), expected, rtol=0, atol=4 * rounding * largest
            )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("preset", ["workloads", "extras"])
@by_compile
def test_losses_compute_the_same(device, preset, with_compile):
    """The contenders of a case, and what the definition says of it."""
    preset = PRESETS[preset]
    for case in preset.cases(Selection(device, sizes=[2**12])):
        inputs = logits, target, _ = preset.inputs(case)
        assert str(logits.dtype) == f"torch.{case.dtype}"
        assert str(target.dtype) == f"torch.{case.target_dtype}"
        channels_last = logits.is_contiguous(memory_format=torch.channels_last)
        assert (logits.dim() == 4 and channels_last) == (case.workload == "segmentation")
        assert 0 < (target == 1).float().mean() < 1
        share = (target == extras.IGNORED).float().mean().item()
        assert share == pytest.approx(0.2 if case.workload == "ignore_index" else 0, abs=0.05)
        made = preset.losses(case, inputs, with_compile)
        assert len(made) == 2 + with_compile
        calls = {name: (loss, target) for name, loss in made.items()}
        if preset is PRESETS["extras"]:
            assert (case.plain is not None) == ("targets" in case.workload)
            if case.plain is not None:
                plain = extras.plain_inputs(inputs)[1]
                assert plain.dtype is logits.dtype
                calls["fused plain"] = fused_bce.BCEWithLogitsLoss(), plain
        wide, t = logits.double().requires_grad_(), target.double()
        if case.workload == "label_smoothing":
            t = t * 0.9 + 0.05
        weights = {name: getattr(made["fused"], name) for name in case.weight_shapes}
        each = torch_bce(wide, t, **weights, reduction="none")
        assert each.shape == case.shape
        expected = each[target != extras.IGNORED].mean()
        (expected_grad,) = torch.autograd.grad(expected, wide)
        rounding = 4 * torch.finfo(logits.dtype).eps
        for loss, given in calls.values():
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, given)
            value.backward()
            assert value.dtype is logits.dtype
            assert value.item() == pytest.approx(expected.item(), rel=rounding)
            largest = expected_grad.abs().max().item()
            torch.testing.assert_close(
                leaf.grad.double(), expected_grad, rtol=rounding, atol=rounding * largest
            )


@by_compile
def test_heads_compute_the_same(device, with_compile):
    for name in heads.WORKLOADS:
        case = heads.make_case(name, device, 2**12)
        features, targets = heads.make_batch(case)
        models = heads.make_models(case, with_compile)
        assert len(models) == 3 + with_compile
        # From the definition
        wide = copy.deepcopy(models["eager"].network).double()
        logits = wide(features.double())
        expected = sum(torch_bce(logits[i], targets[i].double()) for i in range(6))
        expected.backward()
        for model in models.values():
            heads.heads_contender(model, features, targets).step()
            assert model(features, targets).item() == pytest.approx(expected.item(), rel=1e-6)
            for got, true in zip(model.parameters(), wide.parameters(), strict=True):
                # The Linear layers add up some 100 terms in float32.
                largest = true.grad.abs().max().item()
                torch.testing.assert_close(
                    got.grad.double(), true.grad, rtol=0, atol=1e-5 * largest
                )


@pytest.mark.usefixtures("small")
@by_compile
def test_head_computes_the_same(device, with_compile):
    for case in PRESETS["head"].cases(Selection(device)):
        inputs = input, weight, target = head.make_inputs(case)
        rounding = 4 * torch.finfo(input.dtype).eps
        wide = [t.double().requires_grad_() for t in (input, weight)]
        logits = wide[0] @ wide[1].T
        assert logits.shape == case.shape
        assert logits.std().item() == pytest.approx(3, rel=0.5)
        dense = target.to_dense(torch.float64)
        assert ((dense.sum(1) >= 1) & (dense.sum(1) <= head.POSITIVES)).all()
        expected = torch_bce(logits, dense)
        expected.backward()
        made = head.make_losses(case, inputs, with_compile)
        assert len(made) == (4 if case.spec.chunk_bytes else 3 + with_compile)
        for loss in made.values():
            leaves = [t.clone().requires_grad_() for t in (input, weight)]
            value = loss(*leaves)
            value.backward()
            assert value.item() == pytest.approx(expected.item(), rel=rounding)
            for got, true in zip(leaves, wide, strict=True):
                # Logits of up to 12 are rounded in the dtype of the layer, then added up.
                largest = true.grad.abs().max().item()
                torch.testing.assert_close(
                    got.grad.double(), true.grad, rtol=0, atol=4 * rounding * largest
                )


@pytest.mark.usefixtures("small")
@by_compile
# Logits of -10 and their sigmoids lose three digits in 1 + exp(-10) and the like; in bfloat16 the
# logits have less than three, and open_clip's losses are sums of so many.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_pairwise_computes_the_same(monkeypatch, device, with_compile, dtype, tolerance):
    monkeypatch.setitem(pairwise.DTYPE, device, dtype)
    for case in PRESETS["pairwise"].cases(Selection(device)):
        inputs = pairwise.make_inputs(case)
        wide = [t.double().requires_grad_() for t in inputs]
        logits = wide[2] * wide[0] @ wide[1].T + wide[3]
        assert logits.shape == case.shape
        pairs = torch.eye(case.batch, dtype=torch.float64, device=device)
        expected = torch_bce(logits, pairs, reduction="sum") / case.batch
        true = [expected, *torch.autograd.grad(expected, wide)]
        made = pairwise_contenders.make_pairwise_losses(inputs, with_compile)
        assert len(made) == 3 + with_compile
        for loss in (*made.values(), pairwise_contenders.exp_loss):
            for got, of_wide in zip(trained_pairs.evaluate(loss, inputs), true, strict=True):
                largest = of_wide.abs().max().item()
                torch.testing.assert_close(got.double(), of_wide, rtol=0, atol=tolerance * largest)


def test_peers_compute_the_same(device):
    logits, target = torch.randn(1000, device=device), torch.rand(1000, device=device).round()
    made = make_peers(Case(1000, device))
    assert len(made) >= 2
    for loss in made.values():
        torch.testing.assert_close(loss(logits, target), torch_bce(logits, target))


def test_flag_gems(monkeypatch, device):
    """Whatever it does, the run goes on, and says why it is left out."""
    forward, backward = Case(64, "cuda", mode="fwd"), Case(64, "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_peers(forward) == {"flag_gems": "not installed"}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there it is")
    package = types.ModuleType("flag_gems")
    monkeypatch.setitem(sys.modules, "flag_gems", package)
    assert why_not_flag_gems(Case(64, "cpu")) == "its kernels need a GPU"
    assert why_not_flag_gems(backward) == "it has no backward pass of its own"
    # Releases up to 5.0 do not have the function; a machine without a GPU has no device.
    assert why_not_flag_gems(forward).startswith("it does not run here: ")
    if device == "cuda":
        package.binary_cross_entropy_with_logits = torch.binary_cross_entropy_with_logits
        assert "flag_gems" in make_peers(forward)
        package.binary_cross_entropy_with_logits = lambda logits, *_: logits.mean()
        assert "not close" in why_not_flag_gems(forward)


def test_siglip_kernel(monkeypatch, device):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_siglip_kernel(device) == "not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there it is")
    package = types.ModuleType("siglip_kernel")
    monkeypatch.setitem(sys.modules, "siglip_kernel", package)
    assert why_not_siglip_kernel("cpu") == "its kernels need a GPU"
    if device == "cuda":
        assert why_not_siglip_kernel(device).startswith("it does not run here: ")
        # Its argument is the logarithm of the scale.
        package.fused_siglip_loss = lambda image, text, log_scale, bias: (
            pairwise_contenders.plain_loss(image, text, log_scale.exp(), bias)
        )
        assert why_not_siglip_kernel(device) is None
