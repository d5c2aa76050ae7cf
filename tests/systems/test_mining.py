"""Mining: every noun takes the closest proposal; filters; sources of proposals; agreement with classes."""

import json
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.captions import captioned_images
from clipdense.data.mask_pairs import pair_mask
from clipdense.data.proposals import FileProposals, GroundTruthProposals
from clipdense.systems.mining.pairs import Filters, MaskMiner, NounEmbedder, assign
from clipdense.systems.mining.report import ClassAgreement, MiningStatistics
from clipdense.systems.mining.worker import MiningWorker

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class FixedMasks:
    """Proposals: the same masks for every image."""

    def propose_masks(self, sample: dict[str, Any]) -> torch.Tensor:
        assert (sample["height"], sample["width"]) == MASKS.shape[1:]
        return MASKS


class MeanColor:
    """Substitute for CLIP: the embedding of a mask is its mean colour, that of a noun its colour."""

    def __call__(self, image: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        valid = masks.flatten(1).any(1)
        return torch.stack([image[:, mask].float().mean(1) for mask in masks[valid]]), valid


def color_of(noun: str) -> torch.Tensor | None:
    for word in noun.split():
        if word in COLORS:
            return torch.tensor(COLORS[word]) / 255.0
    return None  # like a noun that is too long


def stripes() -> np.ndarray:
    """Six columns each of red, green and blue, 4 rows."""
    return np.repeat(np.array([list(COLORS.values())], np.uint8), 6, axis=1).repeat(4, axis=0)


def box(x0: int, x1: int, y1: int = 4) -> torch.Tensor:
    mask = torch.zeros(4, 18, dtype=torch.bool)
    mask[:y1, x0:x1] = True
    return mask


# Beside the pure ones: a corner of green (2 pixels), half red and half green, nothing, and red again.
MASKS = torch.stack([box(0, 12), box(6, 8, 1), box(0, 6), box(0, 0), box(6, 12), box(12, 18), box(0, 6)])
RECORD = {"file_name": "/a.png", "image_id": 7}
SAMPLE = RECORD | {"height": 4, "width": 18}


def mine(nouns: dict[str, str], **filters: Any) -> list[dict[str, Any]]:
    miner = MaskMiner(FixedMasks(), MeanColor(), color_of, Filters(**filters))
    return miner(RECORD, stripes(), nouns)


def test_every_noun_takes_the_closest_mask():
    pairs = mine({"blue thing": "a blue thing", "red": "red, and red", "walrus": "", "green": "so green"})
    assert [p["noun"] for p in pairs] == ["blue thing", "red", "green"]
    for pair, mask in zip(pairs, (MASKS[5], MASKS[2], MASKS[1]), strict=True):
        assert np.array_equal(pair_mask(json.loads(json.dumps(pair))), mask.numpy())
    entries = {k: v for k, v in pairs[1].items() if k != "segmentation"}
    assert entries == {
        **RECORD,
        "height": 4,
        "width": 18,
        "noun": "red",
        "score": 1.0,
        "caption": "red, and red",
    }
    assert mine({"walrus": ""}) == [] == mine({})


def test_filters():
    def area(nouns: dict[str, str], **filters: Any) -> list[int]:
        return [int(pair_mask(pair).sum()) for pair in mine(nouns, **filters)]

    assert area({"green": ""}) == [2]  # equal to the whole stripe for CLIP; the first is taken
    assert area({"green": ""}, min_area=2) == [2]
    assert area({"green": ""}, min_area=3) == [24]
    assert area({"green": ""}, min_area=49) == []
    # the second best of red is half red: cosine 0.707; its equal is no second
    assert area({"red": ""}, margin=0.29) == [24]
    assert area({"red": ""}, margin=0.30) == []
    text = torch.tensor([[1.0, 1.0, 0.0]])
    embeddings = torch.eye(3) * 5
    assert assign(embeddings, text) == [(0, pytest.approx(0.7071, abs=1e-4))]
    assert assign(embeddings, text, Filters(min_score=0.70))[0] is not None
    assert assign(embeddings, text, Filters(min_score=0.71)) == [None]
    assert assign(embeddings[:0], text) == [None]
    assert assign(embeddings[:1], text, Filters(margin=2.0))[0] is not None  # there is no second


def test_ground_truth_as_proposals(tmp_path):
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 3.0, 1.0, 3.0]]
    full = mask_util.encode(np.asfortranarray(box(6, 12).numpy(), np.uint8))
    counts = {"size": [4, 18], "counts": [0, 4, 68]}
    annotations = [
        {"category_id": 0, "segmentation": square},
        {"category_id": 0, "segmentation": full},
        {"category_id": 1, "segmentation": counts},
        {"category_id": 1, "segmentation": full, "iscrowd": 1},
        {"category_id": 1},
    ]
    known = {"file_name": "/a.png", "annotations": annotations}
    masks = GroundTruthProposals([known]).propose_masks(SAMPLE)
    assert masks.flatten(1).sum(1).tolist() == [8, 24, 4] and torch.equal(masks[1], box(6, 12))
    assert torch.equal(masks[2], box(0, 1))
    assert GroundTruthProposals([]).propose_masks(SAMPLE).shape == (0, 4, 18)

    ids = np.zeros((4, 18, 3), np.uint8)
    ids[:, 6:12, 0], ids[:, 12:, 1] = 3, 1  # 3 and 256
    Image.fromarray(ids).save(tmp_path / "ids.png")
    panoptic = {
        **known,
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": [{"id": 256, "category_id": 1}, {"id": 3, "category_id": 0}],
    }
    assert torch.equal(GroundTruthProposals([panoptic]).propose_masks(SAMPLE), MASKS[[5, 4]])
    Image.fromarray(np.where(ids[..., 0] == 3, 255, ids[..., 1])).save(tmp_path / "labels.png")
    semantic = {"file_name": "/a.png", "sem_seg_file_name": str(tmp_path / "labels.png")}
    assert torch.equal(GroundTruthProposals([semantic]).propose_masks(SAMPLE), MASKS[[2, 5]])
    assert torch.equal(GroundTruthProposals([semantic], 0).propose_masks(SAMPLE), MASKS[[5, 4]])


def test_proposals_of_a_file(tmp_path):
    rle = mask_util.encode(np.asfortranarray(box(6, 12).numpy(), np.uint8))
    item = {"image_id": 7, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps([item, item | {"image_id": 8}]))
    proposals = FileProposals(path)
    assert torch.equal(proposals.propose_masks(SAMPLE), MASKS[[4]])
    assert len(proposals.propose_masks(SAMPLE | {"image_id": 9})) == 0
    with pytest.raises(ValueError, match=r"/a.png has 3 x 18 pixels, its proposals have 4 x 18"):
        proposals.propose_masks(SAMPLE | {"height": 3})
    path.write_text(json.dumps([{"image_id": 7}]))
    with pytest.raises(ValueError, match="not a JSON list of image_id and segmentation"):
        FileProposals(path)
    path.write_text(json.dumps([{"image_id": 7, "segmentation": [[1.0, 1.0, 5.0, 1.0, 5.0, 3.0]]}]))
    with pytest.raises(ValueError, match="polygons instead of run lengths"):
        FileProposals(path)


def test_nouns_are_embedded_alone_and_never_cut():
    bank = TextBank(load_clip("shapes-vit"), "ovseg_14", cache_dir=None, progress=False)
    embed = NounEmbedder(bank)
    assert embed("red star " * 40) is None
    first = embed("red star")
    bank.embed_names(["red star", "a very long and winding road", "grass"])
    assert torch.equal(NounEmbedder(bank)("red star"), first) and first.norm() == pytest.approx(1)


def test_captioned_images(tmp_path):
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"file_name": "a.png", "captions": ["x", "y", "z"]}\n')
    expected = {"file_name": str(tmp_path / "a.png"), "image_id": "a.png", "captions": ["x", "y"]}
    assert captioned_images(str(lines), captions=2) == [expected]
    elsewhere = captioned_images(str(lines), str(tmp_path / "b"), captions=2, images=1)
    assert elsewhere == [expected | {"file_name": str(tmp_path / "b/a.png")}]
    lines.write_text('{"file_name": "a.png", "captions": ["x"]}\n{"file_name": "b.png"}\n')
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: no file_name and captions"):
        captioned_images(str(lines))
    with pytest.raises(ValueError, match="coco_2017_val"):
        captioned_images("coco_2017_vall")


def test_a_part_counts_what_it_leaves_out():
    names = ["/a.png", "/b.png", "/c.png"]
    records = [
        {"file_name": name, "image_id": i, "captions": captions}
        for i, (name, captions) in enumerate(
            zip(names, (["red", "green red walrus"], ["blue"], ["green"]), strict=True)
        )
    ]
    miner = MaskMiner(FixedMasks(), MeanColor(), color_of)
    call = miner.proposals.propose_masks

    def propose_masks(sample: dict[str, Any]) -> torch.Tensor:
        if sample["file_name"] == "/c.png":
            raise ValueError("/c.png has 4 x 18 pixels, its proposals have 3 x 18")
        return call(sample)

    miner.proposals.propose_masks = propose_masks
    images = iter([stripes(), OSError("/b.png: cannot be decoded"), stripes()])
    worker = MiningWorker(miner, lambda captions: [c.split() for c in captions])
    part = worker(records, images)
    assert [(p["noun"], p["caption"]) for p in part["pairs"]] == [
        ("red", "red"),
        ("green", "green red walrus"),
    ]
    del part["pairs"]
    assert part == {
        "images": 3,
        "captions": 4,
        "nouns": 5,
        "too_long": ["walrus"],
        "failed": [
            {"file_name": "/b.png", "reason": "cannot be decoded"},
            {"file_name": "/c.png", "reason": "/c.png has 4 x 18 pixels, its proposals have 3 x 18"},
        ],
    }


def _pair(noun: str, mask: torch.Tensor, **more: Any) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask.numpy(), np.uint8))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    pair = {"file_name": "/a.png", "height": 4, "width": 18, "segmentation": segmentation}
    return pair | {"noun": noun, "score": 0.5, **more}


def test_agreement_with_classes():
    def annotation(label: int, mask: torch.Tensor) -> dict[str, Any]:
        return {"category_id": label, "segmentation": _pair("", mask)["segmentation"]}

    truth = {
        "file_name": "/a.png",
        "annotations": [annotation(0, box(0, 4)), annotation(0, box(6, 10)), annotation(1, box(12, 18))],
    }
    agreement = ClassAgreement([truth], Vocabulary.from_names(["dog", "hot dog", "knife", "berry"]))
    named = {
        "dogs": 0,
        "brown dog": 0,
        "hot dogs": 1,
        "big knives": 2,
        "berries": 3,
        "dog house": None,
        "": None,
    }
    assert {noun: agreement.class_of(noun) for noun in named} == named
    for pair in (
        _pair("dog", box(0, 8)),  # IoU with the first 0.5, 6 of 8 columns inside
        _pair("dogs", box(0, 10)),  # with both together 0.8
        _pair("brown dog", box(1, 2)),  # 0.25, inside
        _pair("hot dog", box(0, 6)),  # of another class
        _pair("hot dog", box(10, 18)),  # 0.75, 6 of 8 inside
        _pair("knife", box(0, 6)),  # none in this image
        _pair("sky", box(0, 6)),
        _pair("dog", box(0, 6), file_name="/unknown.png"),
    ):
        agreement.add(pair)
    assert agreement.result() == {"named": 5, "absent": 1, "right": 3 / 5, "inside": 4 / 5}


def test_statistics():
    statistics = MiningStatistics()
    part = {"images": 2, "captions": 4, "nouns": 5, "too_long": ["x"], "failed": [{"file_name": "/c.png"}]}
    pairs = [_pair("dog", box(0, 9), score=0.2), _pair("dog", box(0, 18), score=0.4)]
    statistics.add({**part, "pairs": pairs})
    statistics.add({**part, "pairs": [_pair("sky", box(0, 0), score=0.6, file_name="/b.png")]})
    result = statistics.result()
    assert (result["images"], result["images_with_pairs"], result["captions"]) == (4, 2, 8)
    assert (result["nouns_of_images"], result["pairs"], result["nouns"]) == (10, 3, 2)
    assert result["pairs_per_image"] == 0.75 and result["most_frequent"] == [("dog", 2), ("sky", 1)]
    assert result["scores"]["50"] == 0.4 and result["areas"] == {
        "0": 0.0,
        "5": 0.05,
        "25": 0.25,
        "50": 0.5,
        "75": 0.75,
        "95": 0.95,
        "100": 1.0,
    }
    assert result["too_long"] == ["x"] and result["failed"] == part["failed"] * 2
    assert "classes" not in result
