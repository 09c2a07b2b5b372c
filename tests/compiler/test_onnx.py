"""A model with its loss, exported to ONNX and run there. Needs onnxscript and onnxruntime, of the
extra ``clients``."""

import math

import pytest
import torch

from fused_bce import BCEWithLogitsLoss, decomposition_table

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights": {"weight": torch.tensor([[0.5], [2.0], [1.0]]), "pos_weight": torch.rand(4) + 0.5},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 1},
    "ignored nan": {"ignore_index": math.nan, "label_smoothing": 0.2},
    "recompute": {"recompute": True},
}


class WithLoss(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = torch.nn.Linear(5, 4)
        self.loss = BCEWithLogitsLoss(**options)

    def forward(self, inputs, target):
        return self.loss(self.linear(inputs), target)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# What torch's exporter warns of is its own.
@pytest.mark.filterwarnings("ignore")
def test_export(options, target_dtype, tmp_path):
    inputs, target = torch.randn(3, 5), torch.rand(3, 4).round().to(target_dtype)
    if options.get("ignore_index") is math.nan:
        if not target_dtype.is_floating_point:
            pytest.skip("no integer is nan")
        target[0, :2] = math.nan
    model = WithLoss(**options)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (inputs, target), path, dynamo=True, verbose=False)
    check_session(path, inputs, target, model(inputs, target))


@pytest.mark.filterwarnings("ignore")
def test_exported_program(tmp_path):
    inputs, target = torch.randn(3, 5), torch.rand(3, 4)
    model = WithLoss(label_smoothing=0.1)
    table = torch.export.default_decompositions()
    table.update(decomposition_table())
    program = torch.export.export(model, (inputs, target)).run_decompositions(table)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    check_session(path, inputs, target, model(inputs, target))


def check_session(path, inputs, target, expected):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (inputs.numpy(), target.numpy()), strict=True)))
    # Both are float32, and torch's formula, which is what is exported, loses digits of its own.
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)
