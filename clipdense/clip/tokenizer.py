"""The tokenizer that belongs to a model config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

CLIP_VOCABULARY = 49408


def build_tokenizer(name: str, text_cfg: dict[str, Any], vocabulary: int, context_length: int) -> Any:
    """open_clip's tokenizer: a callable from texts to ids (n, context_length) that cuts long texts silently.

    Args:
        name: of the model, for messages.
        text_cfg: of open_clip's model config; empty where it is unknown.
        vocabulary: rows of the token table.

    Raises:
        ValueError: the vocabulary is not CLIP's and the config names no tokenizer.
        ConnectionError, ImportError: a hub tokenizer that cannot be had.
    """
    hub_name, kwargs = text_cfg.get("hf_tokenizer_name"), text_cfg.get("tokenizer_kwargs") or {}
    if hub_name:
        mode = text_cfg.get("tokenizer_mode")
        try:
            return HFTokenizer(hub_name, context_length, tokenizer_mode=mode, **kwargs)
        except OSError as e:
            raise ConnectionError(f"the tokenizer '{hub_name}' of '{name}' could not be fetched: {e}") from e
        except ImportError as e:
            raise ImportError(f"the tokenizer '{hub_name}' of '{name}' needs the package transformers") from e
    if vocabulary != CLIP_VOCABULARY:
        raise ValueError(
            f"'{name}' has {vocabulary} tokens, which is not CLIP's vocabulary, and no tokenizer"
        )
    return SimpleTokenizer(context_length=context_length, **kwargs)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Ids that each text has, start and end included, before any is cut."""
    if isinstance(tokenizer, SimpleTokenizer):
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    return [len(tokenizer.tokenizer(tokenizer.clean_fn(text))["input_ids"]) for text in texts]
