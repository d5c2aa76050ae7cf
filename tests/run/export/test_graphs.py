"""Graphs compose the parts of their models: the runner's results on the module equal the model's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.export.families import model_graph
from clipdense.run.export.text_output import save_text_input, text_inputs
from tests.helpers.exports import CLASSES, OTHER_WORDS, WORDS, EagerModel, build, picture


def predict(model: Any, runner: EagerModel, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    image = picture(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    with torch.no_grad():
        expected = model([{"image": pixels, "height": size[0], "width": size[1]}])[0]
    return runner(image), expected


@pytest.mark.parametrize("name", ["maskformer", "closed_fpn"])
def test_models_of_constant_classes(name: str) -> None:
    model = build(name)
    graph = model_graph(model, classes=tuple(CLASSES))
    own, expected = predict(model, EagerModel(graph), (90, 130))
    np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="constants of its weights"):
        text_inputs(model)
    if name == "maskformer":
        ids, segments = own["panoptic_seg"]
        assert segments == expected["panoptic_seg"][1]
        np.testing.assert_array_equal(ids, expected["panoptic_seg"][0].numpy())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sed", ()),
        ("ovseg", ("MODEL.TWO_STAGE.SCORES.SOURCE", "proposals")),
        ("ovseg", ("MODEL.TWO_STAGE.SCORES.SOURCE", "clip", "MODEL.TWO_STAGE.CROP.EXPAND", 1.3)),
        ("ovseg", ("MODEL.TWO_STAGE.SCORES.EMPTY", "boost", "MODEL.TWO_STAGE.SCORES.MIN_QUERY_SCORE", 0.2)),
        ("fcclip", ("MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD", "none")),
    ],
)
def test_models_of_any_words(name: str, overrides: tuple[object, ...], tmp_path: Path) -> None:
    model: Any = build(name, *overrides)
    graph = model_graph(model)
    for words, size in {WORDS: (96, 136), OTHER_WORDS: (120, 88)}.items():
        vocabulary = Vocabulary.parse(words)
        model.set_vocabulary(vocabulary)
        save_text_input(tmp_path / "t.safetensors", text_inputs(model), graph.metadata, vocabulary)
        own, expected = predict(model, EagerModel(graph, tmp_path / "t.safetensors"), size)
        np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)


def test_words_and_trained_classes_change_the_scores(tmp_path: Path) -> None:
    """A file that ignored its text, or its base flags, would not notice."""
    model: Any = build("fcclip")
    graph = model_graph(model)
    inputs = dict(graph.inputs())
    with torch.no_grad():
        scores = graph.module(*inputs.values())[1]
        for name in ("text", "synonyms", "base"):
            changed = inputs | {name: ~inputs[name] if name == "base" else inputs[name].flip(0)}
            assert (graph.module(*changed.values())[1] - scores).abs().max() > 1e-3, name
