"""SED on a nano ResNet: what learns, chunks, early rejection, towers that do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.run.setup import load_config
from clipdense.systems.catseg.cost import ABSENT_LOGIT, AggregationSettings

from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).parents[2]
CLASSES = ["red star", "blue star", "green ring", "red ring"]


@pytest.fixture(scope="module")
def dataset() -> str:
    name = "sed_test"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(stuff_classes=CLASSES)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def model(dataset: str):
    def build(*overrides: object):
        keys = ["DATASETS.TRAIN", [dataset], "DATASETS.TEST", [], "MODEL.CAT_SEG.RESOLUTION", 128]
        torch.manual_seed(0)
        options = [str(x) for x in [*keys, *overrides]]
        return build_model(load_config(str(ROOT / "configs/shapes/sed_rn.yaml"), options))

    return build


def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 80, 112), dtype=torch.uint8, generator=generator)


def test_the_image_tower_and_all_heads_learn(model) -> None:
    segmentor = model().train()
    losses = segmentor([{"image": image(), "sem_seg": torch.randint(0, 4, (80, 112))}])
    assert list(losses) == ["loss_sem_seg", *(f"loss_rejection_{i}" for i in range(3))]
    sum(losses.values()).backward()
    trained = {name for name, p in segmentor.named_parameters() if p.requires_grad}
    assert not any(name.startswith("clip.text") for name in trained)
    assert {"clip.visual.conv1.weight", "aggregator.rejection_heads.2.weight"} <= trained
    assert [n for n, p in segmentor.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_chunks_and_batches_change_nothing(model) -> None:
    segmentor = model().eval()
    samples = [{"image": image()}, {"image": image().flip(-1)[:, :70]}]
    together = segmentor(samples)
    segmentor.evaluation = replace(segmentor.evaluation, max_maps=1)
    for sample, output in zip(samples, together, strict=True):
        alone = segmentor([sample])[0]["sem_seg"]
        assert alone.shape == (4, *sample["image"].shape[1:])
        torch.testing.assert_close(alone, output["sem_seg"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_classes_are_rejected_stage_by_stage(model) -> None:
    segmentor = model().eval()
    segmentor.set_vocabulary(Vocabulary.parse([f"thing {i}" for i in range(30)]))
    text, view = segmentor.text_embeddings()["prompts"], torch.randn(1, 3, 128, 128)
    counts, flops = [], []
    for topk in (0, 30, 1):
        settings = AggregationSettings(rejection_topk=topk)
        with FlopCounterMode(display=False) as counter:
            result = segmentor.aggregate(view, text, settings)
        flops.append(counter.get_total_flops())
        maps = [*result.rejection, result.logits]
        counts.append([int((m[0] != ABSENT_LOGIT).flatten(1).any(1).sum()) for m in maps])
    assert counts[0] == counts[1] == [30] * 4
    assert counts[2] == sorted(counts[2], reverse=True) and 1 <= counts[2][-1] < 30
    assert flops[2] < flops[1] == flops[0]


def test_other_towers_are_refused(model) -> None:
    with pytest.raises(ValueError, match=r"SED needs maps of 2, 4 and 8 times.*ViTTower"):
        model("MODEL.CLIP.NAME", "shapes-vit", "MODEL.CAT_SEG.GUIDANCE", [1, 2, 3])
    with pytest.raises(ValueError, match="HEADS 3 does not divide"):
        model("MODEL.CAT_SEG.HEADS", 3)
