"""`Predictor` with FC-CLIP: panoptic pictures of any words, from 20 to 1,203 classes in one process."""

import json
from pathlib import Path

import numpy as np
import torch

from clipdense.run.predictor import Predictor
from clipdense.visualization.pictures import draw_output
from tests.helpers.fcclip import build_fcclip, small_fcclip_config


def test_from_20_to_1203_words_without_rebuilding(data_dir: Path, tmp_path: Path) -> None:
    cfg = small_fcclip_config()
    model = build_fcclip(cfg)
    torch.nn.init.constant_(model.classifier.logit_scale, -20.0)  # so that void does not win
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
    names = {
        n: json.loads((data_dir / "class_lists" / file).read_text())
        for n, file in ((20, "catseg_voc20.json"), (1203, "clipself_lvis_v1_all_classes.json"))
    }
    predictor = Predictor(cfg, tmp_path / "model.pth", vocabulary=names[20], output="panoptic")
    parts = [id(part) for part in (*predictor.model.modules(), *predictor.model.parameters())]
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    few = predictor(image)
    predictor.set_vocabulary(names[1203])
    many = predictor(image)
    assert [id(part) for part in (*predictor.model.modules(), *predictor.model.parameters())] == parts
    assert len(predictor.metadata.stuff_classes) == 1203
    for output in (few, many):
        assert list(output) == ["panoptic_seg"] and output["panoptic_seg"][0].shape == image.shape[:2]
    assert all(s["category_id"] < 20 for s in few["panoptic_seg"][1])
    assert draw_output(image, many, predictor.metadata).shape[2] == 3
    predictor.set_vocabulary(names[20])
    assert torch.equal(predictor(image)["panoptic_seg"][0], few["panoptic_seg"][0])
