"""Text embeddings of F-VLM's classes, from the source that MODEL.FVLM.TEXT_SOURCE names."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip import load_clip
from clipdense.clip.tables import TextTable, find_table
from clipdense.clip.text import TextBank, TextEmbedder
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.paths import datasets_root

from detectron2.config import CfgNode

__all__ = ["BACKGROUND", "TextSource", "build_text_embedder", "embed_on_cpu", "select_rows"]

TextSource = Literal["clip", "table", "weights"]

BACKGROUND = Vocabulary((("background",),))


def build_text_embedder(cfg: CfgNode) -> TextEmbedder | None:
    """Build the text embedder of MODEL.FVLM; None for TEXT_SOURCE "weights".

    Raises:
        FileNotFoundError: If TEXT_TABLE does not exist.
        ValueError: If TEXT_SOURCE is unknown, the table does not name its rows, or the CLIP has no text tower
            or a random one.
    """
    keys = cfg.MODEL.FVLM
    if keys.TEXT_SOURCE != "clip" and cfg.MODEL.PROMPT.WEIGHTS:
        raise ValueError(
            f"MODEL.PROMPT.WEIGHTS has no effect with MODEL.FVLM.TEXT_SOURCE {keys.TEXT_SOURCE}: a text "
            "table holds finished embeddings; set TEXT_SOURCE clip"
        )
    if keys.TEXT_SOURCE not in get_args(TextSource):
        known = ", ".join(get_args(TextSource))
        raise ValueError(f"MODEL.FVLM.TEXT_SOURCE must be one of {known}, not {keys.TEXT_SOURCE!r}")
    if keys.TEXT_SOURCE == "weights":
        return None
    if keys.TEXT_SOURCE == "table":
        table = find_table(keys.TEXT_TABLE, datasets_root(), key="MODEL.FVLM.TEXT_TABLE")
        return TextTable.load(table, synonyms=keys.SYNONYMS)
    encoder = keys.TEXT_ENCODER
    if not encoder.NAME and cfg.MODEL.CLIP.PRETRAINED == "random" and cfg.MODEL.WEIGHTS:
        raise ValueError(
            "MODEL.FVLM.TEXT_SOURCE clip: the text tower of MODEL.CLIP has random weights, and a detector's "
            "MODEL.WEIGHTS has no text tower. Set MODEL.FVLM.TEXT_ENCODER.NAME and PRETRAINED"
        )
    clip = load_clip(encoder.NAME, encoder.PRETRAINED) if encoder.NAME else clip_from_config(cfg)
    clip.visual = nn.Identity()  # type: ignore[assignment]  # the trunk has its own image tower
    bank = TextBank(clip, keys.TEMPLATES, synonyms=keys.SYNONYMS, prompts=build_fixed_prompts(cfg, clip))
    if bank.device.type != "meta":
        clip.to(cfg.MODEL.DEVICE)  # the class names of LVIS in 63 templates take hours on a CPU
    return bank


def embed_on_cpu(embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
    """Embed a vocabulary: (K, D) on the CPU; an empty tensor of that shape for a model on the meta device."""
    if embedder.device.type == "meta":
        return torch.empty(len(vocabulary), embedder.dim)
    return embedder(vocabulary).cpu()


def select_rows(vocabulary: Vocabulary, stored: Vocabulary | None, text: Tensor) -> Tensor:
    """Select the embeddings of classes that are all among the stored ones.

    Args:
        vocabulary: the K classes to look up; any shared synonym matches.
        stored: the classes of the rows of ``text``; None if they are not known.
        text: (N, D).

    Returns:
        (K, D).

    Raises:
        ValueError: If a class has no row. The message names up to 20 of them.
    """
    rows: dict[str, int] = {}
    if stored is not None:
        for i, names in enumerate(stored.synonyms):
            for name in names:
                rows.setdefault(canonical(name), i)
    found = [next((rows[c] for c in map(canonical, s) if c in rows), None) for s in vocabulary.synonyms]
    if missing := [vocabulary.names[i] for i, row in enumerate(found) if row is None]:
        raise ValueError(
            f"the weights hold no text embedding of {', '.join(map(repr, missing[:20]))}"
            f"{' and others' if len(missing) > 20 else ''}, and MODEL.FVLM.TEXT_SOURCE is weights: set it to "
            "clip (MODEL.FVLM.TEXT_ENCODER names the text tower), or to table with MODEL.FVLM.TEXT_TABLE"
        )
    return text[torch.tensor(found, device=text.device)]
