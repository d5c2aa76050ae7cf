"""Language backbones whose class embeddings are an input or a constant, instead of a text tower."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.backbone.class_text import ClassTable
from clipdense.backbone.language import LanguageTrunk
from clipdense.run.export.graph import ExportError

__all__ = ["class_embeddings", "without_text_tower"]


def class_embeddings(trunk: LanguageTrunk) -> Tensor:
    """Return the class embeddings (K, D) of a trunk, not L2-normalised.

    Raises:
        ExportError: If they depend on the image.
    """
    if getattr(trunk.text, "image_dependent", False):
        raise ExportError(
            "the prompts of the classes depend on the image (MODEL.PROMPT.METHOD), so that no table can hold "
            "them: export a model whose contexts do not (MODEL.PROMPT.METHOD contexts)"
        )
    with torch.no_grad():
        embeddings: Tensor = trunk.text().detach().float().clone()
    return embeddings


def without_text_tower(backbone: nn.Module) -> tuple[nn.Module, str]:
    """Copy a backbone with a table of class embeddings in the place of its text tower.

    Args:
        backbone: contains a `LanguageTrunk`.

    Returns:
        The copy, and the name of the table among its buffers.

    Raises:
        ExportError: See `class_embeddings`.
    """
    name, trunk = next((n, m) for n, m in backbone.named_modules() if isinstance(m, LanguageTrunk))
    table = ClassTable(trunk.text.classes, trunk.text.embed_dim)
    table.table.copy_(class_embeddings(trunk))
    memo: dict[int, Any] = {id(trunk.text): table}
    return copy.deepcopy(backbone, memo), ".".join(filter(None, (name, "text", "table")))
