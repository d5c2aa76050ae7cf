"""From words to what F-VLM classifies with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import load_clip
from clipdense.clip.tables import TextTable, find_table
from clipdense.clip.text import TextBank, TextEmbedder
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.data.checks import check_dataset_names
from clipdense.data.classes import dataset_vocabulary

from detectron2.config import CfgNode

__all__ = ["BACKGROUND", "build_text", "known_rows", "training_vocabulary"]

BACKGROUND = Vocabulary((("background",),))


def build_text(cfg: CfgNode) -> TextEmbedder | None:
    """What MODEL.FVLM.TEXT names; None for "weights".

    Raises:
        FileNotFoundError: no such table.
        ValueError: a table that does not name its rows, or a CLIP without a text tower.
    """
    keys = cfg.MODEL.FVLM
    if keys.TEXT == "weights":
        return None
    if keys.TEXT == "clip":
        if not keys.TEXT_CLIP and cfg.MODEL.CLIP.PRETRAINED == "random" and cfg.MODEL.WEIGHTS:
            raise ValueError(
                "MODEL.FVLM.TEXT clip: the CLIP in MODEL.CLIP has random weights, as those of the detector "
                "come from MODEL.WEIGHTS, which has no text tower: set MODEL.FVLM.TEXT_CLIP"
            )
        clip = load_clip(*keys.TEXT_CLIP) if keys.TEXT_CLIP else clip_from_config(cfg)
        clip.visual = nn.Identity()  # type: ignore[assignment]  # the trunk has its own
        bank = TextBank(clip, keys.TEMPLATES, synonyms=keys.SYNONYMS)
        if bank.device.type != "meta":
            clip.to(cfg.MODEL.DEVICE)  # the words of LVIS in 63 templates are hours on a CPU
        return bank
    table = find_table(keys.TEXT, "MODEL.FVLM.TEXT (clip, weights, or a text table)")
    return TextTable.load(table, synonyms=keys.SYNONYMS)


def training_vocabulary(cfg: CfgNode) -> Vocabulary | None:
    """The classes of DATASETS.TRAIN, which of them are novel where the data set says so; None without data.

    Raises:
        ValueError: unknown data sets, or classes that differ.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        return None
    check_dataset_names(names)
    vocabularies = [dataset_vocabulary(cfg, name) for name in names]
    for name, vocabulary in zip(names, vocabularies, strict=True):
        if vocabulary != vocabularies[0]:
            raise ValueError(
                f"data sets {names[0]} and {name} have other classes ({len(vocabularies[0])}, "
                f"{len(vocabulary)}): the labels of one training need one list"
            )
    return vocabularies[0]


def known_rows(vocabulary: Vocabulary, known: Vocabulary | None, text: Tensor) -> Tensor:
    """Embeddings (K, D) of classes that are all among the known ones, whose rows ``text`` has.

    Raises:
        ValueError: some are not; they are named.
    """
    rows: dict[str, int] = {}
    if known is not None:
        for i, names in enumerate(known.synonyms):
            for name in names:
                rows.setdefault(canonical(name), i)
    found = [next((rows[c] for c in map(canonical, s) if c in rows), None) for s in vocabulary.synonyms]
    if missing := [vocabulary.names[i] for i, row in enumerate(found) if row is None]:
        raise ValueError(
            f"the weights hold no embedding of {', '.join(map(repr, missing[:20]))}"
            f"{' and others' if len(missing) > 20 else ''}, and MODEL.FVLM.TEXT weights has no other words: "
            "set it to clip (MODEL.FVLM.TEXT_CLIP names the text tower), or to a text table"
        )
    return text[torch.tensor(found, device=text.device)]
