"""Semantic coherence and perceptual grouping of patch features."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.clip import load_clip
from clipdense.evaluation import CoherenceEvaluator, GroupingEvaluator
from clipdense.evaluation.attention import MEASURED, attention_shares, cut
from clipdense.evaluation.patches import coherence_curve, group_patches, overlaps, patch_labels
from clipdense.evaluation.probes import MapProbe, Probes, model_probes

from detectron2.data import DatasetCatalog, MetadataCatalog


class ColorProbe:
    """The mean colour of 8 x 8 pixels, minus grey; with noise of a given size."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def patch_features(self, image: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() - 100
        features = torch.nn.functional.avg_pool2d(pixels, 8)[0]
        generator = torch.Generator().manual_seed(0)
        return features + self.noise * torch.randn(features.shape, generator=generator)


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    """Two images, left and right halves of different classes and colours; the top rows are ignored."""
    records = []
    colors = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    for i, (left, right) in enumerate(((0, 1), (1, 2))):
        labels = np.full((64, 64), left, np.uint8)
        labels[:, 32:] = right
        Image.fromarray(colors[labels]).save(tmp_path / f"{i}.png")
        labels[:8] = 255
        Image.fromarray(labels).save(tmp_path / f"{i}_labels.png")
        names = {
            "file_name": str(tmp_path / f"{i}.png"),
            "sem_seg_file_name": str(tmp_path / f"{i}_labels.png"),
        }
        records.append({**names, "image_id": i, "height": 64, "width": 64})
    name = "halves_of_colour"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(ignore_label=255, stuff_classes=["a", "b", "c"])
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def run(evaluator: Any, name: str) -> dict[str, dict[str, float]]:
    evaluator.reset()
    records = DatasetCatalog.get(name)
    evaluator.process(records, [{} for _ in records])
    results: dict[str, dict[str, float]] = evaluator.evaluate()
    return results


def test_labels_of_patches() -> None:
    labels = np.array([[1, 1, 2, 2], [1, 2, 2, 2], [9, 9, 3, 3], [9, 9, 3, 9]])
    assert patch_labels(labels, (2, 2), 9, 0.7).tolist() == [[1, 2], [-1, 3]]
    assert patch_labels(labels, (2, 2), 9, 0.8).tolist() == [[-1, 2], [-1, -1]]
    assert patch_labels(labels, (2, 2), None, 0.7).tolist() == [[1, 2], [9, 3]]
    wide = np.repeat(np.arange(3), 5)[None].repeat(4, 0)
    assert patch_labels(wide, (1, 3), None, 1.0).tolist() == [[0, 1, 2]]


def test_the_area_counts_correctly_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator)
    labels, images = np.arange(30) % 3, np.arange(30) // 6
    areas, curve = coherence_curve(features, labels, images)
    unit = torch.nn.functional.normalize(features, dim=1)
    for key, chosen in (("AUC", lambda i, j: True), ("AUC_image", lambda i, j: images[i] == images[j])):
        pairs = [(i, j) for i in range(30) for j in range(i) if chosen(i, j)]
        values = {
            same: [float(unit[i] @ unit[j]) for i, j in pairs if (labels[i] == labels[j]) == same]
            for same in (True, False)
        }
        ordered = np.mean([a > b for a in values[True] for b in values[False]])
        assert areas[key] == pytest.approx(100 * ordered, abs=0.01)
    assert curve[-1] == [1.0, 1.0] and all(a[1] <= b[1] for a, b in zip(curve, curve[1:], strict=False))
    assert np.isnan(coherence_curve(features, np.zeros(30, int), images)[0]["AUC"])


def test_coherence_of_a_dataset(dataset: str, tmp_path: Path) -> None:
    exact = run(CoherenceEvaluator(dataset, ColorProbe(), str(tmp_path)), dataset)["coherence"]
    assert exact["AUC"] == exact["AUC_image"] == 100 and exact["patches"] == 80
    assert len(json.loads((tmp_path / "coherence.json").read_text())["curve"]) > 2
    noisy = run(CoherenceEvaluator(dataset, ColorProbe(150)), dataset)["coherence"]
    assert 50 < noisy["AUC"] < 95
    few = run(CoherenceEvaluator(dataset, ColorProbe(), patches=30, per_image=25), dataset)["coherence"]
    assert few["patches"] == 30


@pytest.mark.parametrize("how", ["kmeans", "principal"])
def test_groups_follow_the_features(how: Any) -> None:
    features = torch.zeros(3, 4, 4)
    features[0, :, :2] = features[1, :, 2:] = 1
    features[2] += 0.01 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    found = group_patches(features, 2, how).argmax(0)
    assert len(found[:, :2].unique()) == 1
    if how == "kmeans":
        assert len(found[:, 2:].unique()) == 1 and found[0, 0] != found[0, 2]
    assert len(group_patches(torch.ones(3, 2, 2), 5, how)) == 1


def test_overlaps_of_segments_and_groups() -> None:
    groups = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    segments = np.array([[5, 5, 5, 7], [5, 5, 9, 7]])
    found = overlaps(groups, segments, 9)
    np.testing.assert_allclose(found, [[4 / 5, 1 / 7], [0, 2 / 3]])
    assert overlaps(groups, segments, None).shape == (3, 2)


def test_grouping_of_a_dataset(dataset: str) -> None:
    exact = run(GroupingEvaluator(dataset, ColorProbe(), groups=2), dataset)["grouping"]
    assert exact == {"jaccard": 100, "mIoU": 100, "segments": 4}
    one = run(GroupingEvaluator(dataset, ColorProbe(), groups=1), dataset)["grouping"]
    assert one["jaccard"] == 50 and one["mIoU"] == 25  # one of two segments has a group
    noisy = run(GroupingEvaluator(dataset, ColorProbe(150), groups=2), dataset)["grouping"]
    assert noisy["jaccard"] < 95


def test_a_probe_of_maps_resizes_and_tiles() -> None:
    seen = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(images.shape))
        return torch.nn.functional.avg_pool2d(images, 8)

    image = np.full((60, 100, 3), 7, np.uint8)
    probe = MapProbe(encode, lambda x: x.float(), 8)
    assert probe.patch_features(image).shape == (3, 8, 12) and seen == [(1, 3, 64, 96)]
    assert MapProbe(encode, lambda x: x.float(), 8, window=32).patch_features(image).shape == (3, 8, 12)
    assert seen[1] == (6, 3, 32, 32)
    assert model_probes(object()) == Probes()


def test_shares_are_those_of_the_softmax() -> None:
    clip = load_clip("shapes-eva", text=False)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[0, 0, 1, 1, 2, -1]]).repeat(2, 4, 1)
    cells[1] = 0
    with torch.no_grad():
        shares = dict(zip((*MEASURED, "chance"), attention_shares(clip.visual, images, cells), strict=True))
        weights = clip.visual.history(images).weights(-1).mean(1)[:, 1:, 1:]
    for i in range(2):
        flat = cells[i].flatten()
        own = flat[:, None] == flat[None]
        expected = (weights[i] * own).sum(1)
        torch.testing.assert_close(shares["qk"][i].flatten(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shares["chance"][i].flatten(), own.float().mean(1))
    assert (shares["qk"] < 1).all()  # the class token takes the rest
    torch.testing.assert_close(shares["qq+kk"], (shares["qq"] + shares["kk"]) / 2)


def test_windows_are_cut_row_by_row() -> None:
    image = torch.arange(2 * 4 * 6).view(2, 4, 6)
    windows = cut(image, 2)
    assert windows.shape == (6, 2, 2, 2)
    assert torch.equal(windows[1], image[:, :2, 2:4]) and torch.equal(windows[3], image[:, 2:, :2])
