"""The tokenizer of a model config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

CLIP_VOCABULARY = 49408


def build_tokenizer(name: str, text_cfg: dict[str, Any], vocabulary: int, context_length: int) -> Any:
    """Build open_clip's tokenizer, a callable from texts to ids (n, context_length).

    The tokenizer truncates long texts without a warning; see `token_counts`.

    Args:
        name: name of the model, for errors.
        text_cfg: ``text_cfg`` of open_clip's model config; empty if unknown.
        vocabulary: number of rows of the token table.
        context_length: length of the id rows.

    Raises:
        ValueError: If the vocabulary is not CLIP's and the config names no tokenizer.
        ConnectionError: If a hub tokenizer cannot be downloaded.
        ImportError: If a hub tokenizer needs the package transformers and it is not installed.
    """
    hub_name, kwargs = text_cfg.get("hf_tokenizer_name"), text_cfg.get("tokenizer_kwargs") or {}
    if hub_name:
        mode = text_cfg.get("tokenizer_mode")
        try:
            return HFTokenizer(hub_name, context_length, tokenizer_mode=mode, **kwargs)
        except OSError as e:
            raise ConnectionError(
                f"the tokenizer '{hub_name}' of '{name}' could not be downloaded: {e}"
            ) from e
        except ImportError as e:
            raise ImportError(f"the tokenizer '{hub_name}' of '{name}' needs the package transformers") from e
    if vocabulary != CLIP_VOCABULARY:
        raise ValueError(
            f"'{name}' has {vocabulary} tokens, which is not CLIP's vocabulary, and no tokenizer: "
            f"set hf_tokenizer_name in its text_cfg"
        )
    return SimpleTokenizer(context_length=context_length, **kwargs)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Count the ids of each text before truncation, start and end tokens included."""
    if isinstance(tokenizer, SimpleTokenizer):
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    return [len(tokenizer.tokenizer(tokenizer.clean_fn(text))["input_ids"]) for text in texts]
