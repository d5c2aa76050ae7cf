"""SegCLIP: groups, losses, training input and windows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.clip import load_clip
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.setup import load_config
from clipdense.systems.segclip import SegCLIP, SegCLIPMapper
from clipdense.systems.segclip.decoder import mask_tokens, patch_pixels, reconstruction_loss
from clipdense.systems.segclip.groups import SemanticGroups, gumbel_noise
from clipdense.systems.segclip.loss import patch_segments, superpixel_loss
from clipdense.systems.segclip.model import SegCLIPTower

from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def groups() -> SemanticGroups:
    torch.manual_seed(0)
    module = SemanticGroups(16, 2, centers=4).eval()
    torch.nn.init.normal_(module.semantic_center)
    return module


def model(*settings: Any) -> SegCLIP:
    torch.manual_seed(0)
    overrides = ["MODEL.CLIP.PRETRAINED", "random", *map(str, settings)]
    built: SegCLIP = build_model(load_config(str(ROOT / "configs/shapes/segclip_vit.yaml"), overrides))
    return built


def batch(count: int = 3) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=random),
            "caption": f"a red star and {i} rings",
            "segments": torch.randint(0, 5, (64,), generator=random),
        }
        for i in range(count)
    ]


@torch.no_grad()
def test_every_patch_has_one_group_in_every_image(groups: SemanticGroups) -> None:
    x = torch.randn(3, 10, 16)
    for noise in (None, gumbel_noise(3, 4, 10, torch.device("cpu"))):
        found = groups(x, noise)
        torch.testing.assert_close(found.hard.sum(1), torch.ones(3, 10))
        torch.testing.assert_close(found.hard.amax(1), torch.ones(3, 10))
    whole = groups(x)
    for b in range(3):
        torch.testing.assert_close(groups(x[b : b + 1]).tokens, whole.tokens[b : b + 1])
    assert not torch.equal(groups(x, noise).hard, whole.hard)


@torch.no_grad()
def test_mixed_keys_change_batches_only(groups: SemanticGroups) -> None:
    mixed = SemanticGroups(16, 2, centers=4, mixed_keys=True).eval()
    mixed.load_state_dict(groups.state_dict())
    x = torch.randn(3, 10, 16)
    torch.testing.assert_close(mixed(x[:1]).tokens, groups(x[:1]).tokens)
    assert not torch.allclose(mixed(x).tokens, groups(x).tokens)


def test_the_assignment_has_the_gradient_of_the_softmax(groups: SemanticGroups) -> None:
    x = torch.randn(1, 6, 16)
    weights = torch.randn(1, 4, 6)
    (groups(x, torch.zeros(1, 4, 6)).hard * weights).sum().backward()
    found = groups.semantic_center.grad.clone()
    groups.zero_grad()
    scores = groups.queries(x) @ groups.keys_values(x)[0].transpose(1, 2)
    ((scores / 0.9).softmax(1) * weights).sum().backward()
    torch.testing.assert_close(found, groups.semantic_center.grad)
    groups.zero_grad()


def test_superpixels_of_one_group_cost_nothing() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 2]])
    constant = torch.eye(3)[[0, 0, 2, 2, 1, 1]][None]
    assert superpixel_loss(constant, segments) == pytest.approx(0, abs=1e-7)
    mixed = torch.eye(3)[[0, 1, 2, 2, 1, 1]][None]
    assert superpixel_loss(mixed, segments) > 0.01
    assert superpixel_loss(mixed, torch.arange(6)[None]) == pytest.approx(0, abs=1e-7)  # one patch each


def test_superpixels_of_patches() -> None:
    segments = torch.tensor([[0, 0, 7, 7], [0, 7, 7, 7], [3, 3, 3, 4], [3, 3, 4, 4]])
    assert patch_segments(segments, 2).tolist() == [0, 7, 3, 4]
    assert patch_segments(segments, 2, "mean").tolist() == [1, 7, 3, 3]  # 1 is no superpixel
    with pytest.raises(ValueError, match="PATCH_LABEL must be majority or mean"):
        patch_segments(segments, 2, "median")


def test_masks_keep_the_class_token_and_restore_the_order() -> None:
    noise = torch.rand(2, 17, generator=torch.Generator().manual_seed(0))
    mask = mask_tokens(noise, 0.25)
    assert mask.visible.shape == (2, 4) and (mask.visible[:, 0] == 0).all()
    for b in range(2):
        kept = sorted(mask.visible[b].tolist())
        assert (mask.masked[b] == 0).nonzero()[:, 0].tolist() == kept
        best = sorted((noise[b, 1:].argsort() + 1)[:3].tolist())
        assert kept == [0, *best]
        rest = [i for i in range(17) if i not in kept]
        order = [*mask.visible[b].tolist(), *sorted(rest, key=lambda i, b=b: float(noise[b, i]))]
        assert [order[i] for i in mask.restore[b]] == list(range(17))


def test_reconstruction_compares_masked_patches() -> None:
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    pixels = patch_pixels(images, 2)
    assert torch.equal(pixels[1, 2].reshape(2, 2, 3), images[1, :, 2:, :2].permute(1, 2, 0))
    masked = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]])
    wrong = pixels.clone()
    wrong[0, 1] += 5  # visible
    assert reconstruction_loss(wrong, pixels, masked) == 0
    wrong[1, 3] += 3
    assert reconstruction_loss(wrong, pixels, masked) == pytest.approx(9 / 3)


def test_a_training_step() -> None:
    built = model().train()
    losses = built(batch())
    assert set(losses) == {"loss_contrastive", "loss_superpixel", "loss_reconstruction"}
    sum(losses.values()).backward()
    without = {n for n, p in built.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    small = model("MODEL.SEGCLIP.DECODER.DEPTH", 0, "MODEL.SEGCLIP.SUPERPIXEL_WEIGHT", 0.0).train()
    losses = small(batch())
    assert set(losses) == {"loss_contrastive"}
    losses["loss_contrastive"].backward()
    assert {n for n, p in small.named_parameters() if p.requires_grad and p.grad is None} == set()


@torch.no_grad()
def test_segmentation_of_any_size_and_vocabulary() -> None:
    built = model("MODEL.SEGCLIP.TOP_CLASSES", 2).eval()
    built.set_vocabulary(Vocabulary.from_names(["red star", "blue ring", "sand"]))
    for height, width in ((64, 64), (96, 130), (40, 70)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        found = built([{"image": image, "height": 50, "width": 80}])[0]["sem_seg"]
        assert found.shape == (3, 50, 80) and found.isfinite().all() and (found >= 0).all()
    window = built._normalize(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    scores = built.window_scores(window)
    assert ((scores.amax((2, 3)) > 0).sum(1) == 2).all()  # the two best classes of the window
    distinct = {tuple(row) for row in scores[0].flatten(1).T.tolist()}
    assert 1 <= len(distinct) <= 8  # one vector of scores for each group


@torch.no_grad()
def test_the_tower_starts_as_clip() -> None:
    """Patch blocks, norms and projection are CLIP's own; only open_clip's ViTs have them."""
    clip = load_clip("shapes-vit", "random")
    blocks = list(clip.visual.blocks)
    tower = SegCLIPTower(clip.visual, group_layers=1, reconstruct_layers=1)
    assert [*tower.patch_blocks, *tower.group_blocks] == blocks
    assert (
        torch.equal(tower.reconstruct_blocks[0].ln_1.weight, blocks[-1].ln_1.weight)
        and tower.reconstruct_blocks[0] is not blocks[-1]
    )
    with pytest.raises(ValueError, match="needs open_clip's ViT"):
        SegCLIPTower(load_clip("shapes-rn", "random").visual)
    with pytest.raises(ValueError, match="4 blocks on groups"):
        SegCLIPTower(load_clip("shapes-vit", "random").visual, group_layers=4)
    with pytest.raises(ValueError, match="DECODER.DEPTH needs"):
        model("MODEL.SEGCLIP.RECONSTRUCT_LAYERS", 0)


def test_the_mapper(tmp_path: Path) -> None:
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, 40:] = (250, 10, 10)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "captions": ["one", "two"]}
    mapper = SegCLIPMapper(True, size=32, patch=8, crop_scale=(0.9, 1.0), superpixels=(50.0, 0.5, 10))
    torch.manual_seed(0)
    samples = [mapper(record) for _ in range(8)]
    assert {s["caption"] for s in samples} == {"one", "two"}
    for sample in samples:
        assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.uint8
        left, right = sample["segments"].reshape(4, 4)[:, [0, 3]].T
        assert len({*left.tolist()}) == len({*right.tolist()}) == 1 and left[0] != right[0]
    with pytest.raises(KeyError, match="has no captions"):
        mapper({"file_name": record["file_name"]})
    with pytest.raises(ValueError, match="not a multiple of INPUT.SEGCLIP.PATCH 7"):
        SegCLIPMapper(True, size=32, patch=7)
