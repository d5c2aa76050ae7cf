"""MODEL.CLIP.PATCH_STRIDE in the methods of the zero-shot segmentor and in other systems."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.setup import load_config

from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, list[str]] = {
    "resclip": ["MODEL.ZERO_SHOT.OPTIONS", "['blocks', [1, 2]]"],
    "proxyclip": ["MODEL.ZERO_SHOT.FEATURES.NAME", "vit_tiny_patch16_224"],
    "lposs": ["MODEL.ZERO_SHOT.FEATURES.NAME", "vit_tiny_patch16_224"],
}
METHODS = ("clip", "maskclip", "sclip", "clearclip", "gem", "naclip", "resclip", "scclip", "sfp", "radseg")


def segmentor(method: str, stride: int, tower: str = "shapes-vit") -> Any:
    torch.manual_seed(0)
    overrides = [
        "MODEL.CLIP.PRETRAINED",
        "random",
        "MODEL.CLIP.NAME",
        tower,
        "MODEL.ZERO_SHOT.METHOD",
        method,
    ]
    overrides += ["MODEL.CLIP.PATCH_STRIDE", str(stride), "MODEL.ZERO_SHOT.FEATURES.PRETRAINED", "random"]
    config = str(ROOT / "configs/shapes/zero_shot_sclip_vit.yaml")
    model = build_model(load_config(config, [*overrides, *OPTIONS.get(method, [])])).eval()
    model.set_vocabulary(Vocabulary.from_names(["red star", "grass", "sand"]))
    return model


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, "proxyclip", "lposs"])
def test_every_method_sees_the_finer_map(method: str) -> None:
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = [{"image": image, "height": 32, "width": 40}]
    plain, same, fine = (segmentor(method, stride)(sample)[0]["sem_seg"] for stride in (0, 8, 4))
    assert torch.equal(plain, same)  # 8 is the patch size
    assert fine.shape == plain.shape and fine.isfinite().all() and not torch.equal(fine, plain)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["shapes-vit", "shapes-eva"])
def test_the_map_of_a_method_has_the_stride(tower: str) -> None:
    model = segmentor("sclip", 4, tower)
    assert model.encoder.patch_map(torch.randn(1, 3, 64, 80)).shape[2:] == (16, 20)


def test_towers_without_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="only ViTs have patches"):
        segmentor("maskclip", 4, "shapes-rn")


def test_segclip_needs_whole_patches() -> None:
    config = str(ROOT / "configs/shapes/segclip_vit.yaml")
    with pytest.raises(ValueError, match=r"set MODEL\.CLIP\.PATCH_STRIDE 0"):
        build_model(load_config(config, ["MODEL.CLIP.PRETRAINED", "random", "MODEL.CLIP.PATCH_STRIDE", "4"]))
