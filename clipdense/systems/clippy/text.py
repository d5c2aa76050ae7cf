"""CLIPpy's text sides: a CLIP's text tower, or a Sentence-T5 of transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError, read_checkpoint
from clipdense.clip import ClipModel
from clipdense.clip.prompts import require_text_tower
from clipdense.clip.templates import get as template_set
from clipdense.clip.vocabulary import Vocabulary

__all__ = ["CLIPTexts", "SentenceT5", "TextEncoder", "embed_names"]

_DENSE = "2_Dense/model.safetensors"


class TextEncoder(nn.Module):
    """Encoder of texts.

    Attributes:
        embed_dim: D, dimension of the embeddings.
    """

    embed_dim: int

    @abstractmethod
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embed n texts as (n, D), not L2-normalised, on the model's device."""


class CLIPTexts(TextEncoder):
    """The text tower of a CLIP.

    Args:
        clip: model with a text tower.

    Raises:
        ValueError: If it was loaded without one.
    """

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.tower = require_text_tower(clip)
        self.embed_dim = self.tower.embed_dim
        self.tokenizer = clip.tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder.forward`; texts beyond the tower's length are cut."""
        tokens: Tensor = self.tokenizer(list(texts))
        embedded: Tensor = self.tower(tokens.to(self.tower.positional_embedding.device))
        return embedded


class SentenceT5(TextEncoder):
    """Sentence-T5: the encoder of a T5, the mean of its tokens, and a linear layer without bias.

    Args:
        encoder: transformers' ``T5EncoderModel``.
        tokenizer: transformers' tokenizer.
        dense: (D, C) matrix of the linear layer.
        max_tokens: longer texts are cut.

    Source: Ni et al., Sentence-T5, ACL Findings 2022; the layout of the library sentence-transformers.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, dense: Tensor, max_tokens: int = 256) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.max_tokens = encoder, tokenizer, max_tokens
        self.embed_dim = dense.shape[0]
        self.dense = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
        self.dense.weight.data.copy_(dense)

    @classmethod
    def create(cls, name: str) -> SentenceT5:
        """Load a Sentence-T5 of the Hugging Face hub, or from a folder in its layout.

        Args:
            name: such as "sentence-transformers/sentence-t5-base", or a local folder.

        Raises:
            ImportError: If the package transformers is not installed.
            ConnectionError: If the model cannot be downloaded, or the folder lacks a file.
            CheckpointError: If tensors are missing, or the file of the linear layer is another one.
        """
        try:
            from huggingface_hub import hf_hub_download
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise ImportError(
                "a Sentence-T5 (MODEL.CLIPPY.SENTENCE_T5) needs the package transformers: pip install "
                "'clipdense[sam]'"
            ) from error
        try:
            loaded: Any = T5EncoderModel.from_pretrained(name, output_loading_info=True)
            encoder, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise CheckpointError(
                    f"{name} is not a Sentence-T5: it lacks {len(missing)} tensors, such as {missing[0]}"
                )
            tokenizer = AutoTokenizer.from_pretrained(name)
            path = Path(name, _DENSE) if Path(name).is_dir() else Path(hf_hub_download(name, _DENSE))
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}")
        except (OSError, ValueError) as error:  # a ValueError says what the folder's config lacks
            raise ConnectionError(
                f"MODEL.CLIPPY.SENTENCE_T5: '{name}' could not be loaded: {error}"
            ) from error
        state = read_checkpoint(path).state
        if set(state) != {"linear.weight"}:
            raise CheckpointError(f"{path} has the keys {sorted(state)}; expected linear.weight alone")
        return cls(encoder, tokenizer, state["linear.weight"])

    def forward(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder.forward`."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = (tokens[key].to(self.dense.weight.device) for key in ("input_ids", "attention_mask"))
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        y: Tensor = self.dense(mean)
        return y


@torch.no_grad()
def embed_names(
    encoder: TextEncoder, vocabulary: Vocabulary, templates: str, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Embed every name of every class: the mean over the templates of L2-normalised prompts, normalised.

    Args:
        encoder: embeds the prompts.
        vocabulary: the classes.
        templates: see `clipdense.clip.templates.get`.
        batch_size: prompts per forward.

    Returns:
        (S, D), L2-normalised, and (S,) int64, the class of each name.
    """
    filled = template_set(templates)
    names = [(k, name) for k, synonyms in enumerate(vocabulary.synonyms) for name in synonyms]
    prompts = [prompt for _, name in names for prompt in filled.fill(name)]
    parts = [encoder(prompts[i : i + batch_size]).float() for i in range(0, len(prompts), batch_size)]
    rows = F.normalize(torch.cat(parts), dim=1).unflatten(0, (len(names), len(filled))).mean(1)
    return F.normalize(rows, dim=1), torch.tensor([k for k, _ in names], device=rows.device)
