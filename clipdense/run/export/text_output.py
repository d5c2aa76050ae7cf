"""Class embeddings of a model as the inputs of its exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdense.backbone.score_map import find_language_trunk
from clipdense.clip.vocabulary import Vocabulary
from clipdense.files import atomic_path
from clipdense.regions import TextClassifier
from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.graph import ExportError
from clipdense.run.export.language import class_embeddings
from clipdense.run.export.text_input import FORMAT_KEY

__all__ = ["save_text_input", "synonym_table", "text_inputs"]


def synonym_table(classes: Tensor) -> Tensor:
    """Return the names (K, M) of each class, padded by repetition.

    Args:
        classes: (N,) int64, the class of each name, in order.
    """
    groups = [(classes == k).nonzero().flatten() for k in range(int(classes[-1]) + 1)]
    width = max(map(len, groups))
    return torch.stack([torch.cat([rows, rows[:1].expand(width - len(rows))]) for rows in groups])


def text_inputs(model: Any) -> dict[str, Tensor]:
    """Return the embeddings of a model's current classes, by the names of the file's inputs.

    Args:
        model: a model of any family; its vocabulary is set.

    Raises:
        ExportError: If its classes are constants.
    """
    trunk = find_language_trunk(model)
    if trunk is not None:
        return {"text": class_embeddings(trunk)}
    if hasattr(model, "text_embeddings"):
        found = {name: tensor.detach().float().cpu() for name, tensor in _embeddings(model).items()}
        rows = found.get("rows", found.get("text"))
        if rows is not None:
            owners = found["classes"].long()
            return {"text": rows, "synonyms": synonym_table(owners)}
        if "queries" in found:
            return {"text": found["queries"], "crop_text": found["crops"]}
        return {"text": found["prompts"] if "prompts" in found else found["classes"]}
    classifier = getattr(getattr(getattr(model, "roi_heads", None), "box_predictor", None), "cls_score", None)
    if isinstance(classifier, TextClassifier):
        return {"text": classifier.text.detach().float().cpu()}
    raise ExportError(
        f"the classes of a {type(model).__name__} are constants of its weights: leave out --text-output and "
        "--vocabulary"
    )


def _embeddings(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model.text_embeddings())


def save_text_input(
    path: str | Path, inputs: dict[str, Tensor], metadata: FileMetadata, vocabulary: Vocabulary
) -> None:
    """Write the text inputs of an exported file.

    Args:
        path: .safetensors file.
        inputs: of `text_inputs`.
        metadata: of the exported file.
        vocabulary: the classes, with their synonyms and, if known, which are things.

    Raises:
        ExportError: If the file has another suffix.
        WriteError: If the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise ExportError(f"text inputs are written as .safetensors, not '{Path(path).name}'")
    header = {
        FORMAT_KEY: metadata.text,
        "names": json.dumps([list(names) for names in vocabulary.synonyms], ensure_ascii=False),
        "model": metadata.clip,
    }
    if vocabulary.thing is not None:
        header["things"] = json.dumps([i for i, thing in enumerate(vocabulary.thing) if thing])
    contents = {name: tensor.contiguous() for name, tensor in inputs.items()}
    with atomic_path(path) as temporary:
        save_file(contents, temporary, header)
