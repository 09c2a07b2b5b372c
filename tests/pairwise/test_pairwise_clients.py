"""The pairwise loss inside libraries that train with SigLIP's: open_clip and transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_double_close
from torch.nn.functional import normalize

import fused_bce
from fused_bce.functional import pairwise_sigmoid_loss

# The libraries' own, of torch
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BATCH, STEPS = 6, 3
IMAGE, CONTEXT, WORDS = 16, 8, 50


def tiny_clip(open_clip):
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": IMAGE}
    text = {"context_length": CONTEXT, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CustomTextCLIP(
        16,
        vision,
        text,
        init_logit_scale=math.log(10),
        init_logit_bias=-10,
        output_dict=True,
    ).double()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64),
            torch.randint(1, WORDS, (BATCH, CONTEXT), generator=generator),
        )
        for _ in range(STEPS)
    ]


class Loader(list):
    """What open_clip's loop asks of a data loader."""

    num_batches = STEPS
    num_samples = STEPS * BATCH


@pytest.mark.parametrize("accum_freq", [1, 3], ids=["each batch", "three accumulated"])
def test_training_loop_of_open_clip(accum_freq, monkeypatch):
    """Adopted by the line that docs/pairwise.md has."""
    open_clip = pytest.importorskip("open_clip")
    training = pytest.importorskip("open_clip_train.train")
    arguments = SimpleNamespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=accum_freq,
        model="ViT-B-16-SigLIP",
        siglip=True,
        loss_dist_impl=None,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        world_size=1,
        batch_size=BATCH,
        log_every_n_steps=1,
        wandb=False,
    )
    data = {"train": SimpleNamespace(set_epoch=lambda _: None, dataloader=Loader(batches()))}

    def train():
        loss = open_clip.create_loss(arguments)
        model = tiny_clip(open_clip)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training.train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)
        return type(loss), model.state_dict()

    before = tiny_clip(open_clip).state_dict()
    their_type, theirs = train()
    monkeypatch.setattr(open_clip.factory, "SigLipLoss", fused_bce.SigLipLoss)
    our_type, ours = train()
    assert (their_type, our_type) == (open_clip.loss.SigLipLoss, fused_bce.SigLipLoss)
    for name, want in theirs.items():
        assert_double_close(ours[name], want)
    assert not torch.equal(theirs["logit_bias"], before["logit_bias"])


def test_siglip_of_transformers():
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    common["num_attention_heads"] = 2
    config = transformers.SiglipConfig(
        text_config={**common, "vocab_size": WORDS, "max_position_embeddings": CONTEXT},
        vision_config={**common, "image_size": IMAGE, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).double().eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    images, texts = batches()[0]
    image = model.get_image_features(pixel_values=images).pooler_output
    text = model.get_text_features(input_ids=texts).pooler_output
    ours = pairwise_sigmoid_loss(
        normalize(text), normalize(image), model.logit_scale.exp(), model.logit_bias
    )
    theirs = model(input_ids=texts, pixel_values=images, return_loss=True).loss
    assert_double_close(ours, theirs)
    parameters = [*model.parameters()]
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    got = torch.autograd.grad(ours, parameters, allow_unused=True)
    for our_grad, their_grad in zip(got, expected, strict=True):
        assert (our_grad is None) == (their_grad is None)
        if our_grad is not None:
            assert_double_close(our_grad, their_grad)
