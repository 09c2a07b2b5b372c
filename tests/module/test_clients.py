"""The fused losses inside libraries that train with torch's: patched, converted or passed in.

Most tests train three steps twice, with torch's loss and with ours, from the same seed and on the
same data; where a library has a loss of its own, ours is called with the same logits. The libraries
are the extra ``clients``; without one of them its tests are skipped.
"""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fused_bce

STEPS = 3
BATCH = 4

# The two losses differ by their rounding, a few ULP, and from the second step on so do the
# parameters, but by the learning rate less.
LOSS = 16 * torch.finfo(torch.float32).eps
# As a part of a parameter's largest gradient. The gradient of the logits differs by a few ULP, too.
# Sums over batch and pixels in some twenty layers of backward, and above all what cancels in batch
# normalisation, make up to 70 ULP of that on a CPU; the rest is for the order of a GPU's sums.
GRADIENT = 256 * torch.finfo(torch.float32).eps
# A last digit of float32 is lost in bfloat16's 8 bits, or tips the rounding to them: 2^-8. The loss
# sees that of the logits; between it and the parameters of two layers the gradient is rounded up to
# four times.
BF16_LOSS = 2**-8
BF16_GRADIENT = 2**-6


# torchvision takes 1 - p_t from a p_t near 1: at its first bias p is 0.01, of which 6 units in 10^6
# are rounding, twice as much in its square, and in the gradient a third time as much.
FOCAL_LOSS = 1.2e-5
FOCAL_GRADIENT = 4e-5


@pytest.fixture(autouse=True)
def _float32_on_the_gpu():
    # Left alone, cuDNN takes TensorFloat-32, which has 11 bits, and adds in an order that varies.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


class Step(NamedTuple):
    loss: Tensor
    whose: set[str]
    gradients: dict[str, Tensor]


def whose(loss: Tensor) -> set[str]:
    """Whose cross entropy is in the graph of ``loss``, also below a mask or a mean of the library:
    "ours", "torch's"."""
    found, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "BCEWithLogitsFunction" in node.name() or "SigmoidFocalFunction" in node.name():
            found.add("ours")
        elif "BinaryCrossEntropy" in node.name():
            found.add("torch's")
        nodes.extend(input_node for input_node, _ in node.next_functions)
    return found


def record(loss: Tensor, model: torch.nn.Module) -> Step:
    """What there is to compare, after backward."""
    # Copies: the library may add to the same memory in its next step.
    gradients = {
        name: torch.clone(parameter.grad).cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Step(loss.detach().cpu(), whose(loss), gradients)


def train(make_model, loss_of, batches, device) -> list[Step]:
    # The seed is for dropout, too: our loss draws no random numbers.
    torch.manual_seed(0)
    model = make_model().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, *(tensor.to(device) for tensor in batch))
        loss.backward()
        steps.append(record(loss, model))
        optimizer.step()
    return steps


def train_patched(*arguments, focal=False) -> tuple[list[Step], list[Step]]:
    # Unpatched first: so the library has read all of its modules before the patch.
    theirs = train(*arguments)
    with fused_bce.patch(focal=focal):
        ours = train(*arguments)
    return ours, theirs


def assert_same_training(
    ours: list[Step], theirs: list[Step], loss_tolerance=LOSS, gradient_tolerance=GRADIENT
) -> None:
    assert [step.whose for step in ours] == [{"ours"}] * STEPS
    assert [step.whose for step in theirs] == [{"torch's"}] * STEPS
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.loss, expected.loss, rtol=loss_tolerance, atol=0)
        assert got.gradients.keys() == expected.gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in expected.gradients.values())
        assert largest > 0
        # Of some gradients (the bias of attention's keys) there is nothing but rounding.
        noise = torch.finfo(torch.float32).eps * largest
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(
                got.gradients[name],
                gradient,
                rtol=0,
                atol=gradient_tolerance * gradient.abs().max().item() + noise,
                msg=lambda message, name=name: f"{name}: {message}",
            )


# Bert makes the loss in its own module, Llama in transformers.loss.
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_transformers(family, device):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=5,
        problem_type="multi_label_classification",
    )
    make = getattr(transformers, f"{family}ForSequenceClassification")
    batches = [
        (torch.randint(1, 64, (BATCH, 8)), torch.rand(BATCH, 5).round()) for _ in range(STEPS)
    ]
    ours, theirs = train_patched(
        lambda: make(config),
        lambda model, ids, labels: model(input_ids=ids, labels=labels).loss,
        batches,
        device,
    )
    assert_same_training(ours, theirs)


@pytest.mark.parametrize(
    ("options", "soft"),
    [
        ({"smoothing": 0.1}, False),
        ({"smoothing": 0.0, "target_threshold": 0.3}, True),
        ({"weight": torch.arange(1.0, 6.0), "pos_weight": 3.0, "sum_classes": True}, False),
    ],
    ids=["smoothing", "threshold", "weights"],
)
def test_timm(options, soft, device):
    timm = pytest.importorskip("timm")
    loss = pytest.importorskip("timm.loss").BinaryCrossEntropy(**options).to(device)
    images = [torch.randn(BATCH, 3, 32, 32) for _ in range(STEPS)]
    targets = [torch.rand(BATCH, 5) if soft else torch.randint(5, (BATCH,)) for _ in images]
    ours, theirs = train_patched(
        lambda: timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
        ),
        lambda model, image, target: loss(model(image), target),
        list(zip(images, targets, strict=True)),
        device,
    )
    assert_same_training(ours, theirs)


def unet(classes: int) -> torch.nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet(
        "mobilenet_v2",
        encoder_weights=None,
        encoder_depth=3,
        decoder_channels=(16, 8, 8),
        classes=classes,
    )
    # At a kink a last digit decides about a whole gradient.
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (torch.nn.ReLU, torch.nn.ReLU6)):
                setattr(parent, name, torch.nn.GELU())
    return model


def masks(classes: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(BATCH, 3, 32, 32), torch.rand(BATCH, classes, 32, 32).round())
        for _ in range(STEPS)
    ]


def test_segmentation_models_loss(device):
    smp = pytest.importorskip("segmentation_models_pytorch")
    pos_weight = torch.tensor([1.0, 3.0]).view(2, 1, 1)
    loss = smp.losses.SoftBCEWithLogitsLoss(smooth_factor=0.1, pos_weight=pos_weight).to(device)
    batches = masks(2)
    for _, mask in batches:
        mask[:, :, :4] = loss.ignore_index  # multiplied by 0, in place, after the loss
    ours, theirs = train_patched(
        lambda: unet(2), lambda model, image, mask: loss(model(image), mask), batches, device
    )
    assert_same_training(ours, theirs)


def test_segmentation_models_unet(device):
    batches = masks(1)

    def run(make_loss):
        loss = make_loss(pos_weight=torch.tensor(3.0)).to(device)
        return train(
            lambda: unet(1), lambda model, image, mask: loss(model(image), mask), batches, device
        )

    assert_same_training(run(fused_bce.BCEWithLogitsLoss), run(torch.nn.BCEWithLogitsLoss))


@pytest.mark.filterwarnings(
    # Lightning's use of torch.utils._pytree, and its advice.
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:GPU available but not used",
)
@pytest.mark.parametrize("way", ["passed", "converted"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, way, device, tmp_path):
    lightning = pytest.importorskip("lightning")
    mixed = precision == "bf16-mixed"

    class Classifier(lightning.LightningModule):
        def __init__(self, loss):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 5)
            )
            self.loss = loss
            self.steps = []

        def training_step(self, batch, batch_index):
            images, target = batch
            logits = self.layers(images)
            assert logits.dtype is (torch.bfloat16 if mixed else torch.float32)
            return self.loss(logits, target)

        def on_before_backward(self, loss):
            self.current = loss

        def on_after_backward(self):
            self.steps.append(record(self.current, self))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    rows = STEPS * BATCH
    data = torch.utils.data.TensorDataset(torch.randn(rows, 16), torch.rand(rows, 5).round())

    def run(make_loss, change=lambda model: model):
        torch.manual_seed(0)
        model = change(Classifier(make_loss(pos_weight=torch.arange(1.0, 6.0))))
        trainer = lightning.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=BATCH))
        return model.steps

    theirs = run(torch.nn.BCEWithLogitsLoss)
    if way == "passed":
        ours = run(fused_bce.BCEWithLogitsLoss)
    else:
        ours = run(torch.nn.BCEWithLogitsLoss, fused_bce.convert)
    assert_same_training(ours, theirs, *((BF16_LOSS, BF16_GRADIENT) if mixed else ()))


@pytest.mark.parametrize("way", ["passed", "patched"])
def test_skorch(way, device):
    skorch = pytest.importorskip("skorch")

    class Recorder(skorch.callbacks.Callback):
        def initialize(self):
            self.steps = []
            return self

        def on_batch_end(self, net, loss, **_):
            self.steps.append(record(loss, net.module_))

    rows = STEPS * BATCH
    data = torch.randn(rows, 16), torch.rand(rows).round()

    def run(**options):
        torch.manual_seed(0)
        recorder = Recorder()
        net = skorch.NeuralNetBinaryClassifier(
            torch.nn.Linear,
            module__in_features=16,
            module__out_features=1,
            criterion__pos_weight=torch.tensor(3.0),
            max_epochs=1,
            batch_size=BATCH,
            train_split=None,
            callbacks=[recorder],
            verbose=0,
            device=device,
            **options,
        )
        net.fit(*data)
        # skorch takes the sigmoid if the criterion is an instance of the class that was
        # torch.nn.BCEWithLogitsLoss when skorch was imported.
        return recorder.steps, torch.from_numpy(net.predict_proba(data[0]))

    theirs, expected = run()
    if way == "passed":
        ours, got = run(criterion=fused_bce.BCEWithLogitsLoss)
    else:
        with fused_bce.patch():
            ours, got = run()
    assert_same_training(ours, theirs)
    assert got.shape == (rows, 2)
    torch.testing.assert_close(got, expected)


IMPORTED_AFTER_PATCH = """
import fused_bce
fused_bce.patch()
import torch, skorch
net = skorch.NeuralNetBinaryClassifier(
    torch.nn.Linear, module__in_features=3, module__out_features=1,
    max_epochs=1, train_split=None, verbose=0,
)
data = torch.randn(8, 3), torch.rand(8).round()
net.fit(*data)
loss = net.get_loss(net.infer(data[0]), data[1])
assert "BCEWithLogitsFunction" in loss.grad_fn.name()
assert net.predict_proba(data[0]).shape == (8, 2)
"""


def test_skorch_imported_after_patch(tmp_path):
    # A script that patches in its first lines. In a process of its own, whose skorch keeps ours.
    pytest.importorskip("skorch")
    subprocess.run([sys.executable, "-c", IMPORTED_AFTER_PATCH], check=True, cwd=tmp_path)


# Each looks the focal loss up by a name in its own module.
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_torchvision_detection(name, device):
    detection = pytest.importorskip("torchvision.models.detection")
    anchor_utils = detection.anchor_utils

    def make():
        backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, stride=4, padding=1), torch.nn.ReLU()
        )
        backbone.out_channels = 32
        sizes = ((16,),) if name == "FCOS" else ((16, 24),)
        ratios = ((1.0,),) if name == "FCOS" else ((0.5, 1.0, 2.0),)
        anchors = anchor_utils.AnchorGenerator(sizes, ratios)
        return getattr(detection, name)(
            backbone, num_classes=5, anchor_generator=anchors, min_size=64, max_size=64
        )

    def loss_of(model, images, corners, labels):
        boxes = torch.cat([corners, corners + 20], dim=-1)
        targets = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]
        return sum(model(list(images), targets).values())

    batches = [
        (
            torch.rand(BATCH, 3, 64, 64),
            torch.randint(0, 40, (BATCH, 3, 2)).float(),
            torch.randint(1, 5, (BATCH, 3)),
        )
        for _ in range(STEPS)
    ]
    ours, theirs = train_patched(make, loss_of, batches, device, focal=True)
    assert_same_training(ours, theirs, FOCAL_LOSS, FOCAL_GRADIENT)


def assert_same_loss(ours, theirs, logits: Tensor) -> None:
    """Two functions of the logits, with their gradients."""
    results = []
    for loss in (ours, theirs):
        leaf = logits.detach().requires_grad_()
        value = loss(leaf)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    # Theirs takes 1 - p_t and its like from a p_t near 1.
    tolerance = 32 * torch.finfo(logits.dtype).eps
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


ASYMMETRIC = {
    "defaults": ({}, {}),
    "detached": ({"disable_torch_grad_focal_loss": True}, {"detach_weight": True}),
    "options": (
        {"clip": None, "gamma_pos": 0, "smoothing": 0.1, "pos_weight": 3.0},
        {"clip": 0, "gamma_pos": 0, "label_smoothing": 0.1, "pos_weight": torch.tensor(3.0)},
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_timm_asymmetric(theirs, ours, device):
    timm_loss = pytest.importorskip("timm.loss")
    target = (torch.rand(30, 20, device=device) < 0.1).float()
    theirs = timm_loss.AsymmetricLossMultiLabel(**theirs).to(device)
    ours = fused_bce.AsymmetricLoss(reduction="batchmean", **ours).to(device)
    assert_same_loss(
        lambda x: ours(x, target),
        lambda x: theirs(x, target),
        # Nowhere large: timm takes the logarithm of 1 - p, in float32.
        torch.randn(30, 20, device=device),
    )


@pytest.mark.parametrize("alpha", [0.3, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_kornia_focal(alpha, weighted, device):
    """Its weights have a value for each class."""
    losses = pytest.importorskip("kornia.losses")
    logits = 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device)
    target = (torch.rand(logits.shape, device=device) < 0.1).double()
    values = torch.tensor([0.5, 1, 4], dtype=torch.float64, device=device)
    weights = {"pos_weight": values, "weight": 1 / values} if weighted else {}
    of_images = {name: weight[:, None, None] for name, weight in weights.items()}
    our_alpha = -1 if alpha is None else alpha
    assert_same_loss(
        lambda x: fused_bce.functional.sigmoid_focal_loss(x, target, our_alpha, 1.5, **of_images),
        lambda x: losses.binary_focal_loss_with_logits(x, target, alpha, 1.5, **weights),
        logits,
    )


def test_segmentation_models_focal(device):
    smp = pytest.importorskip("segmentation_models_pytorch")
    logits = 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device)
    target = (torch.rand(logits.shape, device=device) < 0.1).double()
    theirs = smp.losses.FocalLoss("multilabel", alpha=0.3, gamma=1.5)
    ours = fused_bce.SigmoidFocalLoss(alpha=0.3, gamma=1.5)
    assert_same_loss(lambda x: ours(x, target), lambda x: theirs(x, target), logits)


def test_transformers_varifocal(device):
    """RT-DETR's: of matched boxes the target is their IoU, and the weight has no gradient."""
    transformers = pytest.importorskip("transformers")
    rt_detr = pytest.importorskip("transformers.loss.loss_rt_detr")
    criterion = rt_detr.RTDetrLoss(transformers.RTDetrConfig(num_labels=5)).to(device)
    double = {"dtype": torch.float64, "device": device}
    # Centres and sizes of boxes, four of them next to those of the targets
    boxes = 0.3 + 0.1 * torch.rand(2, 12, 4, **double)
    queries, labels = torch.tensor([[7, 3], [0, 11]]), torch.tensor([[4, 0], [2, 4]], device=device)
    targets = [
        {"class_labels": labels[image], "boxes": boxes[image, queries[image]] + 0.01}
        for image in range(2)
    ]
    indices = [(queries[image], torch.arange(2)) for image in range(2)]

    dense = torch.zeros(2, 12, 5, **double)
    for image in range(2):
        corners = [
            rt_detr.center_to_corners_format(one)
            for one in (boxes[image, queries[image]], targets[image]["boxes"])
        ]
        iou, _ = rt_detr.box_iou(*corners)
        dense[image, queries[image], labels[image]] = iou.diag()
    assert dense.count_nonzero() == 4

    def theirs(logits):
        outputs = {"logits": logits, "pred_boxes": boxes}
        return criterion.loss_labels_vfl(outputs, targets, indices, num_boxes=4)["loss_vfl"]

    def ours(logits):
        loss = fused_bce.VarifocalLoss(
            criterion.alpha, criterion.gamma, reduction="sum", detach_weight=True
        )
        return loss(logits, dense) / 4

    assert_same_loss(ours, theirs, torch.randn(2, 12, 5, **double))


@pytest.mark.parametrize("modules", [["linear"], "all-linear"], ids=str)
def test_peft(modules, device):
    """LoRA of the head's layer, whose result is the logits, not the loss."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(8, 6)
            self.head = fused_bce.LinearBCEWithLogitsLoss(6, 20, bias=True)

        def forward(self, x, target):
            return self.head(self.encoder(x), target)

    config = peft.LoraConfig(target_modules=modules, init_lora_weights=False)
    model = peft.get_peft_model(Model(), config).to(device)
    x = torch.randn(BATCH, 8, device=device)
    dense = torch.rand(BATCH, 20, device=device) < 0.2
    target = fused_bce.SparseTarget.from_coo(*dense.nonzero().t(), (BATCH, 20))
    loss = model(x, target)
    logits = model.base_model.head.linear(model.base_model.encoder(x))
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, dense.float())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (2 if modules == ["linear"] else 4)
    torch.testing.assert_close(loss, want, rtol=LOSS, atol=0)
    got, wanted = (torch.autograd.grad(one, trained) for one in (loss, want))
    largest = max(gradient.abs().max().item() for gradient in wanted)
    torch.testing.assert_close(got, wanted, rtol=0, atol=GRADIENT * largest)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x, target), want, rtol=2 * LOSS, atol=0)


def by_trainer(target, device):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    arguments = transformers.TrainingArguments(use_cpu=device == "cpu", report_to=[])
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), arguments)
    return trainer._prepare_inputs({"target": target})["target"]


def by_accelerate(target, device):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.utils.send_to_device({"target": target}, device)["target"]


def by_lightning(target, device):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    move = lightning.fabric.utilities.apply_func.move_data_to_device
    return move({"target": target}, torch.device(device))["target"]


@pytest.mark.parametrize("move", [by_trainer, by_accelerate, by_lightning])
@pytest.mark.parametrize("values", [None, 0.5])
def test_sparse_targets_are_moved(move, values, device):
    target = fused_bce.SparseTarget.from_lists([[3, 0], [], [1]], 4)
    if values is not None:
        target = target._replace(values=torch.full((3,), values))
    moved = move(target, device)
    assert type(moved) is fused_bce.SparseTarget
    assert type(moved.num_labels) is int
    assert moved.indices.device.type == device
    assert torch.equal(moved.to_dense().cpu(), target.to_dense())
