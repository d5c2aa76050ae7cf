"""Learned prompts that MODEL.PROMPT describes, for systems with text or a CLIP image tower."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from clipdense.clip.image_prompts import ConditionalPrompts, InstancePrompts, PreModelPrompts
from clipdense.clip.model import ClipModel
from clipdense.clip.prompt_files import PromptFile, load_prompts, load_visual_prompts
from clipdense.clip.prompts import ClassPrompts, ContextPrompts, require_text_tower
from clipdense.clip.towers import Tower
from clipdense.clip.visual_prompts import VisualPrompts

from detectron2.config import CfgNode as CN

__all__ = [
    "METHODS",
    "build_class_prompts",
    "build_fixed_prompts",
    "build_visual_prompts",
    "image_dependent_key",
]

METHODS = ("", "contexts", "cocoop", "pre_model", "icpc")

logger = logging.getLogger(__name__)


def build_class_prompts(cfg: CN, clip: ClipModel, classes: Sequence[str]) -> ClassPrompts | None:
    """Build the contexts of class names that a system trains, or load them from MODEL.PROMPT.WEIGHTS.

    Args:
        cfg: its ``MODEL.PROMPT`` says which.
        clip: a CLIP with a text tower.
        classes: class names of the training data, for class-specific contexts.

    Returns:
        The learner; None if neither METHOD nor WEIGHTS asks for one.

    Raises:
        ValueError: If the method is unknown, contexts are class-specific and of a method without such ones,
            or the file does not fit the text tower.
        CheckpointError: If the file cannot be read.
    """
    keys = cfg.MODEL.PROMPT
    if keys.METHOD not in METHODS:
        raise ValueError(f"MODEL.PROMPT.METHOD must be one of {', '.join(METHODS[1:])}, not {keys.METHOD!r}")
    width, dim = require_text_tower(clip).width, clip.embed_dim
    if (stored := _stored(cfg, classes)) is not None and stored.text is not None:
        _check_file(stored.text, clip, keys.WEIGHTS)
        return stored.text
    if not keys.METHOD:
        return None
    if keys.CLASS_SPECIFIC and keys.METHOD != "contexts":
        raise ValueError(
            f"MODEL.PROMPT.CLASS_SPECIFIC True: {keys.METHOD} shares its contexts among all classes; set it "
            "to False, or METHOD contexts"
        )
    shared: dict[str, Any] = {"position": keys.POSITION, "full_stop": keys.FULL_STOP}
    prompts: ClassPrompts
    if keys.METHOD == "pre_model":
        decoder = keys.PRE_MODEL
        return PreModelPrompts(
            keys.N_CONTEXTS,
            width,
            dim,
            decoder_width=decoder.WIDTH,
            heads=decoder.HEADS,
            layers=decoder.LAYERS,
            dropout=decoder.DROPOUT,
            **shared,
        )
    if keys.METHOD == "cocoop":
        prompts = ConditionalPrompts(keys.N_CONTEXTS, width, dim, keys.CONTEXT_STD, **shared)
    elif keys.METHOD == "icpc":
        tokens = keys.INSTANCE_TOKENS
        prompts = InstancePrompts(
            keys.N_CONTEXTS, width, dim, keys.CONTEXT_STD, instance_tokens=tokens, **shared
        )
    else:
        own = tuple(classes) if keys.CLASS_SPECIFIC else ()
        prompts = ContextPrompts(keys.N_CONTEXTS, width, keys.CONTEXT_STD, classes=own, **shared)
    if keys.CONTEXT_WORDS:
        prompts.start_from_words(clip, keys.CONTEXT_WORDS)
    return prompts


def build_fixed_prompts(cfg: CN, clip: ClipModel) -> ClassPrompts | None:
    """Load the contexts of class names for a system that encodes its class names once and trains no prompts.

    Args:
        cfg: ``MODEL.PROMPT.WEIGHTS`` names the file.
        clip: a CLIP with a text tower.

    Returns:
        The frozen learner in evaluation mode; None without a file, or if the file has visual prompts only.

    Raises:
        ValueError: If prompts are to be trained, if they depend on the image, or do not fit the text tower.
        CheckpointError: If the file cannot be read.
    """
    keys = cfg.MODEL.PROMPT
    if keys.METHOD and not keys.WEIGHTS:
        raise ValueError(
            f"MODEL.PROMPT.METHOD {keys.METHOD}: {cfg.MODEL.META_ARCHITECTURE} does not train contexts of "
            "class names. Train them with MODEL.META_ARCHITECTURE PromptedCLIP and name its "
            "export.safetensors in MODEL.PROMPT.WEIGHTS"
        )
    stored = _stored(cfg)
    if stored is None or stored.text is None:
        return None
    _check_file(stored.text, clip, keys.WEIGHTS)
    stored.text.require_fixed()
    return stored.text.requires_grad_(False).eval()


def build_visual_prompts(cfg: CN, tower: Tower) -> VisualPrompts | None:
    """Build or load the learned tokens of an image tower; None if MODEL.PROMPT asks for none.

    Raises:
        ValueError: If the tower is not a ViT, or the file does not fit it.
        CheckpointError: If the file cannot be read.
    """
    keys, path = cfg.MODEL.PROMPT.VISUAL, cfg.MODEL.PROMPT.WEIGHTS
    stored = load_visual_prompts(path, allow_pickle=cfg.MODEL.ALLOW_PICKLE) if path else None
    if stored is not None:
        stored.check(tower)
        stored.dropout.p = keys.DROPOUT
        return stored
    if not keys.N_TOKENS:
        return None
    return VisualPrompts.of(tower, keys.N_TOKENS, deep=keys.DEEP, project=keys.PROJECT, dropout=keys.DROPOUT)


def image_dependent_key(cfg: CN) -> str:
    """Return which key of MODEL.PROMPT asks for contexts that depend on the image: METHOD, WEIGHTS or ""."""
    stored = _stored(cfg)
    if stored is not None and stored.text is not None:
        return "WEIGHTS" if stored.text.image_dependent else ""
    return "METHOD" if cfg.MODEL.PROMPT.METHOD in ("cocoop", "pre_model", "icpc") else ""


def _stored(cfg: CN, classes: Sequence[str] = ()) -> PromptFile | None:
    keys = cfg.MODEL.PROMPT
    if not keys.WEIGHTS:
        return None
    return load_prompts(
        keys.WEIGHTS, position=keys.POSITION, classes=classes, allow_pickle=cfg.MODEL.ALLOW_PICKLE
    )


def _check_file(prompts: ClassPrompts, clip: ClipModel, path: str) -> None:
    """Raise ValueError if the sizes of a file's learner are not those of a new one for this CLIP."""
    for what, found, expected in (
        ("contexts", prompts.width, require_text_tower(clip).width),
        ("image embeddings", prompts.embed_dim, clip.embed_dim),
    ):
        if found not in (0, expected):
            raise ValueError(
                f"MODEL.PROMPT.WEIGHTS {path}: its {what} have {found} channels, those of '{clip.name}' have "
                f"{expected}: use the CLIP that the prompts were trained with"
            )
