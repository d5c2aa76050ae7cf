"""Captions in the mapper of ODISE's heads, and published files that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.checkpoint import CheckpointError
from clipdense.data.mappers import build_mapper
from clipdense.run.conversion import convert_weights
from tests.helpers.fcclip import small_fcclip_config


@pytest.fixture
def record(tmp_path: Path) -> dict[str, object]:
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / "labels.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": 32,
        "width": 48,
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }


def mapper(captions: str = "", is_train: bool = True):
    cfg = small_fcclip_config()
    cfg.INPUT.MAPPER, cfg.INPUT.CAPTIONS = "CaptionedSegmentationMapper", captions
    return build_mapper(cfg, is_train)


class TestCaptions:
    def test_their_nouns_become_phrases(self, record):
        pytest.importorskip("spacy")
        captioned = record | {"captions": ["two red stars on the grass"]}
        assert mapper()(captioned)["phrases"] == ["red stars", "grass"]
        assert "phrases" not in mapper(is_train=False)(captioned)

    def test_a_file_has_those_of_other_datasets(self, record, tmp_path):
        pytest.importorskip("spacy")
        (tmp_path / "captions.json").write_text(
            '{"images": [{"id": 1, "file_name": "a.png", "height": 32, "width": 48}],'
            ' "annotations": [{"id": 1, "image_id": 1, "caption": "a green ring"}]}'
        )
        assert mapper(str(tmp_path / "captions.json"))(record)["phrases"] == ["green ring"]

    def test_an_image_without_one_is_an_error(self, record):
        with pytest.raises(ValueError, match=r"a\.png has no caption: set INPUT.CAPTIONS"):
            mapper()(record)


def test_odises_files_are_refused_with_the_reason(tmp_path):
    state = {"sem_seg_head.predictor.post_mask_embed.logit_scale": torch.tensor(1.0)}
    torch.save({"model": state}, tmp_path / "odise.pth")
    with pytest.raises(CheckpointError, match="without its backbone: the U-Net and the captioner of Stable"):
        convert_weights(tmp_path / "odise.pth", tmp_path / "converted.safetensors")
    assert not (tmp_path / "converted.safetensors").exists()
