"""The text tower against open_clip's own forward."""

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from clipdense.clip.towers import TextTower
from tests.helpers.towers import DIM, randomise

TEXTS: dict[str, dict[str, object]] = {
    "clip": {},
    "eos": {"pool_type": "eos", "eos_id": 49},
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "no_projection": {"proj_type": "none"},
}


def _text(name: str) -> TextTransformer:
    sizes = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2, "output_dim": DIM}
    return randomise(TextTransformer(**{**sizes, **TEXTS[name]}))


def _tokens() -> Tensor:
    tokens = torch.zeros(3, 12, dtype=torch.long)
    for row, length in zip(tokens, (3, 7, 5), strict=True):
        row[:length] = torch.randint(1, 48, (length,), generator=torch.Generator().manual_seed(length))
        row[length] = 49
    return tokens


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_text_equals_open_clip(name):
    text = _text(name)
    tower = TextTower(text)
    torch.testing.assert_close(tower(_tokens()), text(_tokens()), atol=2e-5, rtol=1e-4)
    assert tower.embed_dim == tower(_tokens()).shape[1]


@pytest.mark.parametrize("name", ["clip", "eos"])
@torch.no_grad()
def test_text_of_any_length(name):
    text = _text(name)
    tower = TextTower(text)
    torch.testing.assert_close(tower(_tokens()[:, :9]), text(_tokens()), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="13 tokens exceed the text tower's 12"):
        tower.encode(torch.zeros(1, 13, 32), torch.tensor([0]))


def test_bidirectional_text_takes_its_whole_context():
    with pytest.raises(ValueError, match="all its 12 tokens, not 9"):
        TextTower(_text("siglip"))(_tokens()[:, :9])


@torch.no_grad()
def test_padding_is_not_computed():
    tower = TextTower(_text("clip"))
    lengths = []
    tower.ln_final.register_forward_pre_hook(lambda *_: None)
    states = tower.states
    tower.states = lambda x: (lengths.append(x.shape[1]), states(x))[1]
    tower(_tokens())
    assert lengths == [8]
