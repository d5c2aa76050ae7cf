"""Every mapper of a system opens images by the rules of INPUT.*: formats, pixels, EXIF orientation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdense.data.caption_mapper import CaptionMapper
from clipdense.data.image import BadImageError, file_format
from clipdense.data.object_crops import ObjectCropMapper
from clipdense.regions import CropRule
from clipdense.run.config import add_clipdense_config
from clipdense.systems.clipself.mapper import CLIPSelfMapper
from clipdense.systems.mask_adaptation.keyed_crops import BACKGROUND, read_keyed_pair
from clipdense.systems.mask_adaptation.mapper import MaskPairMapper
from clipdense.systems.segclip.mapper import SegCLIPMapper

from detectron2.config import get_cfg
from detectron2.structures import BoxMode

Mapper = Callable[..., Any]


def clipself(is_train: bool = True, **rules: Any) -> CLIPSelfMapper:
    return CLIPSelfMapper(is_train, image_size=32, crop_size=16, **rules)


def mask_pairs(is_train: bool = True, **rules: Any) -> MaskPairMapper:
    return MaskPairMapper(is_train, rule=CropRule(0.4, masked=False), size=16, crop_scale=(1.0, 1.0), **rules)


MAPPERS = pytest.mark.parametrize("build", [clipself, mask_pairs])


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """A photograph stored as 20 x 40 pixels (height x width) that viewers turn, with its pair's mask."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    whole = {"size": [20, 40], "counts": [0, 800]}
    return {
        "file_name": str(tmp_path / "0.png"),
        "image_id": 1,
        "height": 20,
        "width": 40,
        "segmentation": whole,
        "noun": "kite",
    }


@MAPPERS
def test_the_stated_size_and_the_key_decide_the_orientation(build: Mapper, record: dict[str, Any]) -> None:
    assert build(False)(record)["image"].shape == (3, 20, 40)
    assert build(False, exif_orientation="apply")(record)["image"].shape == (3, 40, 20)
    turned = record | {"height": 40, "width": 20}
    assert build(False)(turned)["image"].shape == (3, 40, 20)
    assert build(False, exif_orientation="ignore")(turned)["image"].shape == (3, 20, 40)
    with pytest.raises(ValueError, match=r"INPUT\.EXIF_ORIENTATION = 'never'"):
        build(exif_orientation="never")


def object_crops(**rules: Any) -> ObjectCropMapper:
    return ObjectCropMapper(size=16, **rules)


def segclip(**rules: Any) -> SegCLIPMapper:
    return SegCLIPMapper(size=16, patch=8, **rules)


def captions(**rules: Any) -> CaptionMapper:
    return CaptionMapper(size=16, **rules)


@pytest.mark.parametrize("build", [object_crops, segclip, captions])
def test_mappers_of_crops_refuse_large_images(build: Mapper, record: dict[str, Any]) -> None:
    record |= {"bbox": [2, 3, 8, 9], "bbox_mode": BoxMode.XYXY_ABS, "label": 0, "captions": ["a kite"]}
    with pytest.raises(BadImageError, match=r"0\.png: 40 x 20 are more than 799 pixels"):
        build(max_pixels=799)(record)
    with pytest.raises(ValueError, match="EXIF_ORIENTATION"):
        build(exif_orientation="never")


def test_training_reads_images_in_the_same_orientation(record: dict[str, Any]) -> None:
    # letterboxed to 32: a wide image leaves the lower half empty, a tall one the right half
    assert not clipself()(record)["image"][:, 16:].any()
    assert not clipself(exif_orientation="apply")(record)["image"][:, :, 16:].any()
    assert mask_pairs()(record)["region"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"has size \(20, 40\), the image \(40, 20\)"):
        mask_pairs(exif_orientation="apply")(record)


@MAPPERS
@pytest.mark.parametrize("is_train", [True, False])
def test_large_images_are_refused(build: Mapper, is_train: bool, record: dict[str, Any]) -> None:
    with pytest.raises(BadImageError, match=r"0\.png: 40 x 20 are more than 799 pixels.*INPUT\.MAX_PIXELS"):
        build(is_train, max_pixels=799)(record)
    assert build(is_train, max_pixels=800)(record) is not None


@pytest.mark.parametrize(
    "kind", [CLIPSelfMapper, MaskPairMapper, ObjectCropMapper, SegCLIPMapper, CaptionMapper]
)
def test_the_rules_come_from_the_config(kind: Any) -> None:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.INPUT.EXIF_ORIENTATION, cfg.INPUT.MAX_PIXELS = "ignore", 12345
    mapper = kind(cfg, False)
    assert (mapper.exif_orientation, mapper.max_pixels) == ("ignore", 12345)


def test_crops_with_a_painted_background_are_opened_by_the_same_rules(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EOF\n")
    with pytest.raises(ValueError, match=r"a\.png: not an image, or of a format that is not accepted"):
        read_keyed_pair("a.png", "kite", tmp_path)
    Image.new("RGB", (4, 3), BACKGROUND).save(tmp_path / "b.jpg")
    assert file_format(tmp_path / "b.jpg") == "JPEG"
    with pytest.raises(ValueError, match=r"b\.jpg is a JPEG file"):
        read_keyed_pair("b.jpg", "kite", tmp_path)
