"""Longer lists of names: their classes, their order, what is kept and what stays as it is."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import clipdense.data.datasets.synonyms as module
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.data.classes import dataset_vocabulary, evaluation_vocabulary
from clipdense.data.datasets.synonyms import add_synonyms

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

DATASETS = {
    "coco_2017_val_panoptic_with_sem_seg": 133,
    "coco_2017_val_panoptic": 133,  # Detectron2's own: stuff is listed after the things
    "ade20k_panoptic_val": 150,
    "ade20k_sem_seg_val": 150,
    "cityscapes_fine_panoptic_val": 19,
    "cityscapes_fine_sem_seg_val": 19,
    "mapillary_vistas_panoptic_val": 65,
    "pascal_context_59_sem_seg_val": 59,
    "pascal_context_60_sem_seg_val": 60,
    "pascal_context_459_sem_seg_val": 459,
    "pascalvoc20_sem_seg_val": 20,
    "pascalvoc21_sem_seg_val": 21,
}


@pytest.mark.parametrize("name", DATASETS)
def test_lists(name: str, cfg: CfgNode) -> None:
    """Each class keeps its place and its flags, and no two classes share a name."""
    plain = dataset_vocabulary(cfg, name)
    cfg.DATASETS.SYNONYMS = True
    long = dataset_vocabulary(cfg, name)
    assert len(long) == len(plain) == DATASETS[name]
    assert long.thing == plain.thing and long.base == plain.base
    assert sum(len(names) for names in long.synonyms) > len(long)
    count = Counter(canonical(n) for names in long.synonyms for n in names)
    shared = {n for n, c in count.items() if c > 1}
    assert shared <= {canonical(names[0]) for names in long.synonyms}
    cfg.DATASETS.SPLIT_NAMES = False  # the classes are recognised with whole strings, too
    assert dataset_vocabulary(cfg, name).synonyms == long.synonyms


def test_names_by_hand(cfg: CfgNode) -> None:
    cfg.DATASETS.SYNONYMS = True
    coco = dataset_vocabulary(cfg, "coco_2017_val_panoptic_with_sem_seg")
    assert coco.synonyms[0][0] == "person" and "woman" in coco.synonyms[0]
    assert coco.synonyms[coco.index("brick wall")] == ("brick wall",)
    assert coco.names[-1] == "rug" and "tree-merged" not in coco.names
    voc = dataset_vocabulary(cfg, "pascalvoc21_sem_seg_val")
    assert voc.synonyms[0] == ("background",) and voc.synonyms[1] == ("aeroplane", "airplane", "plane")
    ade = dataset_vocabulary(cfg, "ade20k_panoptic_val")
    toilet, stool = ade.index("toilet"), ade.index("stool")
    assert toilet != stool and "stool" not in ade.synonyms[toilet]  # the name of another class
    assert "commode" in ade.synonyms[toilet]
    wide, mapping = evaluation_vocabulary(cfg, "pascalvoc20b_sem_seg_val")
    assert "potted plant" in wide.names and mapping is not None and len(wide) == len(mapping) == 59


def test_a_name_of_two_classes_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: dict[tuple[str, ...], tuple[tuple[str, ...], ...]]
    lists = {("a", "b", "c"): (("a", "x", "c"), ("b", "x", "y"), ("c",))}
    monkeypatch.setattr(module, "_lists", lambda: lists)
    vocabulary = replace(Vocabulary.from_names(["a", "b", "c"]), base=(True, False, True))
    long = add_synonyms(vocabulary)
    assert long.synonyms == (("a",), ("b", "y"), ("c",)) and long.base == vocabulary.base
    plain = Vocabulary.from_names(["a", "b", "c"])
    lists[plain.names] = (("A long",), ("b", "y"), ("c",))
    assert add_synonyms(plain, keep=True).synonyms == (("A long", "a"), ("b", "y"), ("c",))


def test_other_classes_keep_their_names(cfg: CfgNode) -> None:
    own = Vocabulary.from_names(["person", "tree-merged"])
    assert add_synonyms(own) is own
    full = dataset_vocabulary(cfg, "ade20k_full_sem_seg_val")
    assert add_synonyms(full) is full and max(map(len, full.synonyms)) > 3


def test_every_entry_is_a_class() -> None:
    """No misspelt class, which would be without effect."""
    content = json.loads(Path(module.__file__).with_name("synonyms.json").read_text("utf-8"))
    classes = {
        "coco_panoptic": "coco_2017_val_panoptic_with_sem_seg",
        "ade20k": "ade20k_panoptic_val",
        "cityscapes": "cityscapes_fine_sem_seg_val",
        "mapillary_vistas": "mapillary_vistas_panoptic_val",
        "pascal_context": "pascal_context_459_sem_seg_val",
        "pascal_voc": "pascalvoc20_sem_seg_val",
    }
    assert set(content) == {"about", "common", *classes}
    known = {
        key: {n.split(",")[0].strip() for n in MetadataCatalog.get(name).stuff_classes}
        for key, name in classes.items()
    }
    known["common"] = set().union(*known.values())
    for key, names in known.items():
        assert set(content[key]) <= names
        assert not [n for n, entry in content[key].items() if "" in map(str.strip, entry.split(","))]
