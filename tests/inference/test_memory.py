"""Memory of merging: outputs of a large image take little more than their results."""

from dataclasses import replace

import pytest
import torch
from benchmarks import peak_memory
from torch import Tensor

from clipdense.inference import MergeSettings, merge_queries
from clipdense.regions import LazyMaps

QUERIES, CLASSES, SIZE = 60, 10, (1000, 800)
PIXELS = SIZE[0] * SIZE[1]
BAND = 2**20
# Bytes per pixel of the results, and of what merging keeps for each pixel until it has them.
SEMANTIC, PANOPTIC, INSTANCES = 4 * CLASSES, 4 + 8 + 8 + 1, QUERIES


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 x 800 pixels count as large: the budgets are those of 4000 x 3000, in proportion."""
    monkeypatch.setattr("clipdense.regions.lazy_maps.WHOLE", 8 * BAND)
    monkeypatch.setattr("clipdense.regions.lazy_maps.BAND", BAND)


@pytest.fixture
def queries() -> tuple[Tensor, LazyMaps]:
    generator = torch.Generator().manual_seed(0)
    scores = (6 * torch.randn(QUERIES, CLASSES + 1, generator=generator)).softmax(1)
    logits = torch.nn.functional.interpolate(
        8 * torch.randn(1, QUERIES, 9, 7, generator=generator), (56, 48), mode="bicubic"
    )[0]
    return scores, LazyMaps(logits).resize((224, 192))


def merge(queries: tuple[Tensor, LazyMaps], settings: MergeSettings) -> dict:
    sizes = {"image_size": (220, 176), "output_size": SIZE}
    return merge_queries(*queries, settings, things={1, 2, 3}, **sizes)


ALL = MergeSettings(
    panoptic_on=True,
    instance_on=True,
    resize_masks_first=True,
    object_mask_threshold=0.5,
    overlap_threshold=0.1,
    topk=QUERIES,
)


@pytest.mark.parametrize(
    ("settings", "per_pixel"),
    [
        (MergeSettings(), SEMANTIC),
        (MergeSettings(resize_masks_first=True), SEMANTIC),
        (MergeSettings(max_dense_classes=5), 8 + 4),
        (replace(ALL, semantic_on=False, instance_on=False), PANOPTIC),
        (replace(ALL, semantic_on=False, panoptic_on=False), INSTANCES),
        (ALL, SEMANTIC + PANOPTIC + INSTANCES),
    ],
    ids=["semantic", "semantic of resized masks", "labels", "panoptic", "instances", "all"],
)
@pytest.mark.usefixtures("large")
def test_the_peak_is_the_result_and_a_few_bands(
    queries: tuple[Tensor, LazyMaps], settings: MergeSettings, per_pixel: int, monkeypatch
) -> None:
    """The masks of all queries at the output's size would take 240 bytes per pixel, several times."""
    monkeypatch.setattr("clipdense.inference.semantic._BUDGET", BAND)
    peak = peak_memory(lambda: merge(queries, settings))
    # one instance mask is larger than a band: its logits, probabilities and products
    bands = 6 * BAND + (3 * 4 * PIXELS if settings.instance_on else 0)
    assert peak < per_pixel * PIXELS + bands < 0.75 * 4 * QUERIES * PIXELS


def test_bands_change_nothing(queries: tuple[Tensor, LazyMaps], request: pytest.FixtureRequest) -> None:
    whole = merge(queries, ALL)
    request.getfixturevalue("large")
    banded = merge(queries, ALL)
    torch.testing.assert_close(banded["sem_seg"], whole["sem_seg"], atol=1e-5, rtol=0)
    assert (banded["panoptic_seg"][0] != whole["panoptic_seg"][0]).float().mean() < 1e-5
    assert banded["panoptic_seg"][1] == whole["panoptic_seg"][1] != []
    ours, theirs = banded["instances"], whole["instances"]
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=0)


def test_maps_larger_than_the_limit_are_labels(queries: tuple[Tensor, LazyMaps]) -> None:
    limit = 4 * CLASSES * PIXELS
    maps = merge(queries, MergeSettings(max_dense_bytes=limit))["sem_seg"]
    output = merge(queries, MergeSettings(max_dense_bytes=limit - 1))
    assert set(output) == {"sem_seg_labels"}
    assert (output["sem_seg_labels"] == maps.argmax(0)).float().mean() > 0.9999


def test_outputs_do_not_depend_on_each_other(queries: tuple[Tensor, LazyMaps]) -> None:
    """Each alone equals the one beside the others, as the Predictor asks for one."""
    both = merge(queries, replace(ALL, things_only=True))
    alone = replace(ALL, things_only=True, semantic_on=False, panoptic_on=False, instance_on=False)
    assert merge(queries, alone) == {}
    semantic = merge(queries, replace(alone, semantic_on=True))
    assert set(semantic) == {"sem_seg"}
    assert torch.equal(semantic["sem_seg"], both["sem_seg"])
    instances = merge(queries, replace(alone, instance_on=True))["instances"]
    assert torch.equal(instances.pred_classes, both["instances"].pred_classes)
    assert torch.equal(instances.pred_masks, both["instances"].pred_masks)
    panoptic = merge(queries, replace(alone, panoptic_on=True))["panoptic_seg"]
    assert torch.equal(panoptic[0], both["panoptic_seg"][0])
