"""CLIPpy: pooling of patches, dropped patches, DINO and Sentence-T5, training and segmentation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from clipdense.checkpoint import CheckpointError
from clipdense.clip.attention import TokenStream
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.setup import load_config
from clipdense.systems.clippy import CLIPpy, PatchEncoder, SentenceT5
from clipdense.systems.clippy.image import PatchDrop, timm_tower
from clipdense.systems.clippy.text import TextEncoder, embed_names
from tests.helpers.towers import random_images, tower_pair

from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/shapes/clippy_vit.yaml")


def model(*settings: Any) -> CLIPpy:
    torch.manual_seed(0)
    built: CLIPpy = build_model(load_config(CONFIG, ["MODEL.CLIP.PRETRAINED", "random", *map(str, settings)]))
    return built


def batch(count: int = 3) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=random),
            "caption": f"a red star and {i} rings",
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("family", ["vit", "eva02", "siglip", "resnet"])
@torch.no_grad()
def test_pooling(family: str) -> None:
    tower = tower_pair(family)[1]
    images = random_images(tower)
    encoders = {p: PatchEncoder(tower, pooling=p).eval() for p in ("max", "mean", "class")}  # type: ignore[arg-type]
    patches = encoders["max"].patches(images).flatten(2)
    assert torch.equal(encoders["max"](images), patches.max(2).values)  # channel by channel
    assert torch.equal(encoders["mean"](images), patches.mean(2))
    assert torch.equal(encoders["class"](images), tower(images).pooled)


@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_patches_are_dropped_in_training_only(family: str) -> None:
    tower = tower_pair(family)[1]
    images = random_images(tower)
    encoder = PatchEncoder(tower, token_drop=0.75)
    seen: list[TokenStream] = []
    kept = encoder.drop
    assert kept is not None
    encoder.drop = lambda i, stream: seen.append(kept(i, stream)) or seen[-1]  # type: ignore[assignment,func-returns-value]
    with torch.no_grad():
        whole = encoder.eval()(images)
        assert not seen
        encoder.train()(images)
    counts = {stream.x.shape[1] - tower.prefix for stream in seen[1:]}  # type: ignore[operator]
    assert counts == {4} and seen[1].grid == (1, 4)
    plain = PatchEncoder(tower, token_drop=0.0).train()
    torch.testing.assert_close(plain(images), whole)


def test_each_image_keeps_its_own_patches() -> None:
    x = torch.arange(20.0).reshape(1, 20, 1).expand(8, -1, -1).contiguous()
    stream = PatchDrop(0.5)(0, TokenStream(x, (2, 8)))
    assert (stream.x[:, :4, 0] == torch.arange(4.0)).all()  # tokens before the patches
    kept = [tuple(row[4:, 0].tolist()) for row in stream.x]
    assert all(len(set(row)) == 8 and list(row) == sorted(row) and min(row) >= 4 for row in kept)
    assert len(set(kept)) > 1
    rope = (torch.arange(16.0)[:, None], -torch.arange(16.0)[:, None])
    turned = PatchDrop(0.5)(0, TokenStream(x, (2, 8), rope=rope))
    assert turned.rope is not None
    for row in turned.x:  # one choice for the batch, and its rows of the table
        assert torch.equal(row[4:], turned.rope[0] + 4) and torch.equal(turned.rope[1], -turned.rope[0])
    assert PatchDrop(0.5)(1, stream) is stream


@pytest.mark.parametrize("pooling", ["max", "class"])
def test_a_training_step_reaches_every_trained_weight(pooling: str) -> None:
    built = model("MODEL.CLIPPY.POOLING", pooling, "MODEL.CLIPPY.TOKEN_DROP", 0.5).train()
    losses = built(batch())
    assert set(losses) == {"loss_contrastive"}
    losses["loss_contrastive"].backward()
    assert [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None] == []
    assert built.text.tower.token_embedding.weight.grad is not None


@torch.no_grad()
def test_segmentation_compares_patches_with_names() -> None:
    built = model("MODEL.CLIPPY.WINDOW", 0, "MODEL.CLIPPY.STRIDE", 0).eval()
    names = Vocabulary.from_names(["red star", "grass"])
    built.set_vocabulary(names)
    sample = batch(1)[0]
    (output,) = built([sample])
    patches = F.normalize(built.image.patches(built.normalize(sample["image"][None])), dim=1)
    text = embed_names(built.text, names, "single")[0]
    cosines = torch.einsum("bdhw,kd->bkhw", patches, text)
    expected = F.interpolate(cosines, (64, 64), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(output["sem_seg"].argmax(0), expected)
    assert built.patch_probe().patch_features(sample["image"].permute(1, 2, 0).numpy()).shape[1:] == (8, 8)


@torch.no_grad()
def test_text_embeddings_follow_the_weights() -> None:
    built = model().eval()
    built.set_vocabulary(Vocabulary.from_names(["red star", "grass"]))
    before = built.text_embeddings()["text"].clone()
    built.train()
    built.text.tower.text_projection.mul_(-1)
    built.eval()
    assert not torch.allclose(built.text_embeddings()["text"], before)


class Letters(TextEncoder):
    """Counts of letters."""

    embed_dim = 26

    def forward(self, texts: Any) -> torch.Tensor:
        return torch.tensor([[float(t.lower().count(chr(97 + i))) for i in range(26)] for t in texts])


def test_names_are_means_of_templates() -> None:
    rows, classes = embed_names(Letters(), Vocabulary.from_names(["ab, ba", "c"], separator=","), "single")
    assert classes.tolist() == [0, 0, 1]
    torch.testing.assert_close(rows[0], F.normalize(Letters()(["a photo of a ab."])[0], dim=0))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    two, _ = embed_names(Letters(), Vocabulary.from_names(["zz"]), "siglip_80", batch_size=7)
    assert two.shape == (1, 26) and not torch.allclose(two[0], rows[2])


@torch.no_grad()
def test_dino_from_timm() -> None:
    tower, mean, std = timm_tower("vit_tiny_patch16_224", "random")
    source: nn.Module = tower.trunk
    images = torch.randn(1, 3, 224, 224)
    tokens = source.forward_features(images)
    torch.testing.assert_close(
        PatchEncoder(tower).eval()(images), tokens[:, 1:].amax(1), atol=1e-4, rtol=1e-4
    )
    assert tower.embed_dim == 192 and len(mean) == len(std) == 3
    with pytest.raises(ValueError, match="timm has no model 'vit_none'"):
        timm_tower("vit_none", "random")
    with pytest.raises(ValueError, match="resnet18 is not a ViT"):
        timm_tower("resnet18", "random")
    settings = ["MODEL.CLIPPY.IMAGE", "timm", "MODEL.TIMM.NAME", "vit_tiny_patch16_224"]
    with pytest.raises(ValueError, match="the patches have 192 channels and the texts"):
        model(*settings, "MODEL.TIMM.PRETRAINED", "random")


def sentence_t5(folder: Path, width: int = 16) -> tuple[Any, torch.Tensor]:
    """Write a tiny Sentence-T5 in the layout of sentence-transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "star", "photo", "of"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    encoder.save_pretrained(folder)
    dense = torch.randn(12, width)
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": dense}, folder / "2_Dense/model.safetensors")
    return encoder, dense


@torch.no_grad()
def test_sentence_t5_is_the_mean_of_its_tokens(tmp_path: Path) -> None:
    encoder, dense = sentence_t5(tmp_path)
    texts = SentenceT5.create(str(tmp_path)).eval()
    assert texts.embed_dim == 12
    both = texts(["a red star", "a photo of a star"])
    for text, found in zip((["a", "red", "star"], ["a", "photo", "of", "a", "star"]), both, strict=True):
        ids = texts.tokenizer(" ".join(text), return_tensors="pt").input_ids
        assert ids.shape == (1, len(text))
        expected = dense @ encoder(input_ids=ids).last_hidden_state[0].mean(0)  # padding does not count
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(CheckpointError, match=r"2_Dense is not a Sentence-T5: it lacks \d+ tensors"):
        SentenceT5.create(str(tmp_path / "2_Dense"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConnectionError, match=r"SENTENCE_T5: .*empty' could not be loaded"):
        SentenceT5.create(str(tmp_path / "empty"))
    save_file({"linear.bias": dense[0]}, tmp_path / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match=r"has the keys \['linear.bias'\]"):
        SentenceT5.create(str(tmp_path))


def test_towers_without_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="dropped patches: only ViTs can"):
        PatchEncoder(tower_pair("resnet")[1], token_drop=0.5)
