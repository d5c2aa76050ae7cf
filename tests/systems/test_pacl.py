"""PACL: patch-aligned compatibility and loss, training, segmentation, and the exported embedder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import CheckpointError, save_checkpoint
from clipdense.clip import TowerRequest
from clipdense.clip.patch_embedder import PatchEmbedder, load_patch_embedder
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.report import export
from clipdense.run.setup import load_config
from clipdense.systems.pacl import PACL, patch_alignment, patch_contrastive_loss
from tests.helpers.towers import tower_pair

from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = Vocabulary.from_names(["red star", "blue ring, azure hoop", "grass"], separator=",")


def model(*settings: Any, tower: str = "vit") -> PACL:
    torch.manual_seed(0)
    overrides = ["MODEL.CLIP.PRETRAINED", "random", *map(str, settings)]
    built: PACL = build_model(load_config(str(ROOT / f"configs/shapes/pacl_{tower}.yaml"), overrides))
    return built


def batch(count: int = 3, side: int = 64) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    image = lambda: torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=random)  # noqa: E731
    return [{"image": image(), "caption": f"a red star and {i} rings"} for i in range(count)]


def test_every_text_pools_the_patches_anew() -> None:
    patches, text = F.normalize(torch.randn(2, 5, 8), dim=2), F.normalize(torch.randn(3, 8), dim=1)
    found = patch_alignment(patches, text, 0.3)
    for i in range(2):
        for j in range(3):
            weights = (patches[i] @ text[j] / 0.3).softmax(0)
            pooled = weights @ patches[i]  # not normalised again
            torch.testing.assert_close(found[i, j], pooled @ text[j])
    # pooling each image with its own caption is another function
    own = torch.stack([(p @ t / 0.3).softmax(0) @ p for p, t in zip(patches, text[:2], strict=True)])
    assert not torch.allclose(found[0, 1], own[0] @ text[1])


def test_a_cold_softmax_takes_the_best_patch_and_a_hot_one_the_mean() -> None:
    patches, text = F.normalize(torch.randn(2, 5, 8), dim=2), F.normalize(torch.randn(3, 8), dim=1)
    cosines = torch.einsum("btd,kd->bkt", patches, text)
    torch.testing.assert_close(patch_alignment(patches, text, 1e-4), cosines.amax(2))
    torch.testing.assert_close(patch_alignment(patches, text, 1e4), cosines.mean(2), atol=1e-4, rtol=0)


def test_the_loss_is_low_for_aligned_pairs() -> None:
    text = torch.eye(4, 8)
    patches = F.normalize(text[:, None] + 0.1 * torch.randn(4, 6, 8), dim=2)
    scale = torch.tensor(20.0)
    aligned = patch_contrastive_loss(patches, text, scale)
    assert aligned < 0.1 < patch_contrastive_loss(patches, text.roll(1, 0), scale)
    phi = scale * patch_alignment(patches, text)
    target = torch.arange(4)
    torch.testing.assert_close(aligned, (F.cross_entropy(phi, target) + F.cross_entropy(phi.T, target)) / 2)


@pytest.mark.parametrize("tower", ["vit", "rn"])
def test_only_embedder_and_temperature_learn(tower: str) -> None:
    built = model(tower=tower).train()
    assert not built.clip.training and built.embedder.training
    loss = built(batch(side=128))["loss_contrastive"]
    loss.backward()
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    parts = {f"embedder.{k}" for k in built.embedder.state_dict()}
    assert trained == {"logit_scale", *parts}
    assert all(built.get_parameter(n).grad is not None for n in trained)


@pytest.mark.parametrize("tower", ["vit", "eva", "rn"])
@torch.no_grad()
def test_an_embedder_can_start_from_the_projection(tower: str) -> None:
    built = model("MODEL.PACL.INIT", "projection", "MODEL.PACL.MODE", "value", tower=tower)
    images = torch.randn(2, 3, 64, 96)
    request = TowerRequest(dense="value")
    torch.testing.assert_close(
        built.dense_map(images), built.clip.visual(images, request).dense, atol=1e-5, rtol=1e-4
    )
    random = model("MODEL.PACL.INIT", "random", "MODEL.PACL.MODE", "value", tower=tower)
    assert not torch.allclose(random.dense_map(images), built.dense_map(images), atol=0.1)
    map_head = tower_pair("siglip")[1]
    with pytest.raises(ValueError, match=r"set MODEL\.PACL\.INIT random"):
        PatchEmbedder(24, 24).start_from_projection(map_head)


def test_the_published_embedder_has_a_million_parameters() -> None:
    assert sum(p.numel() for p in PatchEmbedder(768, 512).parameters()) == 1_050_112
    embedder = PatchEmbedder(6, 4)
    v = torch.randn(2, 6, 3, 5)
    e = embedder(v)
    at = v[1, :, 2, 4]
    expected = embedder.shortcut(at) + embedder.output(embedder.hidden(at).clamp(min=0))
    torch.testing.assert_close(e[1, :, 2, 4], expected)


@torch.no_grad()
def test_segmentation_and_classification_agree_with_the_patches() -> None:
    built = model("MODEL.PACL.WINDOW", 0, "MODEL.PACL.STRIDE", 0).eval()
    built.set_vocabulary(NAMES)
    sample = batch(1)[0] | {"height": 32, "width": 48}
    (output,) = built([sample])
    assert output["sem_seg"].shape == (3, 32, 48) and output["class_scores"].shape == (3,)
    e = F.normalize(built.dense_map(built.clip.normalize(sample["image"][None])), dim=1)
    text, classes = built.bank.per_synonym(NAMES)
    assert classes.tolist() == [0, 1, 1, 2]
    cosines = torch.einsum("bdhw,sd->bshw", e, text)
    cosines = F.interpolate(F.interpolate(cosines, (64, 64), mode="bilinear"), (32, 48), mode="bilinear")
    assert torch.equal(output["sem_seg"].argmax(0), classes[cosines[0].argmax(0)])
    phi = patch_alignment(e.flatten(2).transpose(1, 2), text, built.patch_temperature)[0]
    torch.testing.assert_close(output["class_scores"], torch.stack([phi[0], phi[1:3].max(), phi[3]]))
    (alone,) = built([sample | {"label": 1}])  # an image of one class
    assert set(alone) == {"class_scores"} and torch.equal(alone["class_scores"], output["class_scores"])
    flipped = model("MODEL.PACL.WINDOW", 0, "MODEL.PACL.STRIDE", 0, "INPUT.FORMAT", "BGR").eval()
    flipped.set_vocabulary(NAMES)
    (same,) = flipped([sample | {"image": sample["image"].flip(0)}])
    assert torch.equal(same["sem_seg"], output["sem_seg"])


@torch.no_grad()
def test_large_vocabularies_give_labels() -> None:
    built = model("MODEL.PACL.WINDOW", 32, "MODEL.PACL.STRIDE", 16).eval()
    built.set_vocabulary(Vocabulary.from_names([f"thing {i}" for i in range(70)]))
    (maps,) = built(batch(1))
    built.max_dense_classes = 69
    (labels,) = built(batch(1))
    assert "sem_seg" not in labels and torch.equal(labels["sem_seg_labels"], maps["sem_seg"].argmax(0))


@torch.no_grad()
def test_overlapping_patches_give_a_finer_map() -> None:
    built = model("MODEL.CLIP.PATCH_STRIDE", 4).eval()
    features = built.patch_probe().patch_features(np.zeros((64, 96, 3), np.uint8))
    assert features.shape == (built.clip.embed_dim, 16, 24)


@torch.no_grad()
def test_the_export_is_a_method_of_the_zero_shot_segmentor(tmp_path: Path) -> None:
    built = model("MODEL.PACL.MODE", "value", "MODEL.PACL.WINDOW", 128, "MODEL.PACL.STRIDE", 64).eval()
    built.set_vocabulary(NAMES)
    path = tmp_path / "export.safetensors"
    export(built, path)
    loaded = load_patch_embedder(path)
    assert loaded.mode == "value" and path.stat().st_size < 500_000  # without the CLIP
    overrides = ["MODEL.ZERO_SHOT.METHOD", "pacl", "MODEL.ZERO_SHOT.EMBEDDER", str(path)]
    config = str(ROOT / "configs/shapes/zero_shot_sclip_vit.yaml")
    torch.manual_seed(0)  # the same random CLIP
    segmentor: Any = build_model(load_config(config, [*overrides, "MODEL.CLIP.PRETRAINED", "random"]))
    segmentor.eval().set_vocabulary(NAMES)
    images = batch(1, side=128)
    (ours,), (theirs,) = built(images), segmentor(images)
    assert torch.equal(ours["sem_seg"].argmax(0), theirs["sem_seg_labels"])
    probes = [m.patch_probe().patch_features(np.full((64, 64, 3), 9, np.uint8)) for m in (built, segmentor)]
    torch.testing.assert_close(*probes)
    with pytest.raises(ValueError, match="it was trained on another CLIP"):
        build_model(load_config(config, [*overrides, "MODEL.CLIP.NAME", "shapes-rn"]))
    with pytest.raises(ValueError, match=r"set MODEL\.ZERO_SHOT\.EMBEDDER"):
        build_model(load_config(config, overrides[:2]))


def test_other_files_are_not_embedders(tmp_path: Path) -> None:
    embedder = PatchEmbedder(6, 4)
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.safetensors"
    save_checkpoint(other, embedder.state_dict(), {"layout": "open_clip"})
    with pytest.raises(CheckpointError, match=r"other\.safetensors is not a patch embedder"):
        load_patch_embedder(other)
    state = {k: v for k, v in embedder.state_dict().items() if k != "hidden.bias"}
    save_checkpoint(damaged, state, embedder.file_metadata("shapes-vit"))
    with pytest.raises(CheckpointError, match=r"hidden\.bias"):
        load_patch_embedder(damaged)


def test_a_mode_that_the_tower_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"patches of mode 'sclip' \(MODEL\.PACL\.MODE\)"):
        model("MODEL.PACL.MODE", "sclip", tower="rn")
