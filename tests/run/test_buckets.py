"""Batches of images of different sizes: what a model pads together, and equal outputs."""

from typing import Any

import numpy as np
import pytest
import torch

from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.buckets import predict_buckets, size_buckets
from clipdense.run.predictor import Predictor
from tests.helpers.small_models import small_ovseg_config

from detectron2.modeling import build_model


def test_images_of_one_padded_size_share_a_batch() -> None:
    sizes = [(30, 40), (64, 64), (32, 33), (31, 64), (33, 64), (32, 64), (1, 64)]
    assert list(size_buckets(sizes, 32, 3)) == [[0, 2, 3], [5, 6], [1, 4]]
    assert list(size_buckets(sizes[:3], 0, 3)) == [[0], [1], [2]]
    assert list(size_buckets([], 32, 3)) == []


def test_outputs_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model(small_ovseg_config()).eval()
    model.set_vocabulary(Vocabulary.from_names(["red star", "grass"]))
    shapes = [(80, 100), (96, 128), (66, 128), (40, 60), (96, 97), (64, 64)]
    samples = [{"image": torch.randint(0, 256, (3, *shape), dtype=torch.uint8)} for shape in shapes]
    batches: list[int] = []

    def predict(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        batches.append(len(batch))
        with torch.no_grad():
            return model(batch)

    alone = [predict([sample])[0]["sem_seg"] for sample in samples]
    batches.clear()
    found = predict_buckets(model, samples, 4, predict)
    assert sorted(batches) == [2, 4]
    for output, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(output["sem_seg"], expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # what padding to one size would change
        padded = model(samples)
    assert max(float((p["sem_seg"] - e).abs().max()) for p, e in zip(padded, alone, strict=True)) > 1e-3


def test_the_predictor_reads_ahead(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, sizes = predictor.model.forward, []

    def counted(samples: list[dict[str, Any]]) -> Any:
        sizes.append(len(samples))
        return forward(samples)

    monkeypatch.setattr(predictor.model, "forward", counted)
    images = [np.full((side, 50, 3), side, np.uint8) for side in (40, 60) * 3]
    outputs = list(predictor.batch(iter(images), batch_size=3))
    assert sizes == [3, 3]
    assert [output["instances"].image_size for output in outputs] == [(40, 50), (60, 50)] * 3
    sizes.clear()
    assert [p.image.shape[0] for p in predictor.stream(iter(images), batch_size=2)] == [40, 60] * 3
    assert sizes == [2, 1, 2, 1]
