"""ONNX files equal eager execution: every family, two vocabularies and two image sizes from one file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipdense.clip.attention import MODES
from clipdense.clip.towers import TowerRequest, TransformerTower
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import text_cosines
from clipdense.run.export.families import model_graph
from clipdense.run.export.graph import Graph
from clipdense.run.export.names import tower_graph
from clipdense.run.export.runner import OnnxModel
from clipdense.run.export.text_output import save_text_input, text_inputs
from clipdense.run.export.write import TOLERANCE, compare_onnx, run_eager, trace, write_onnx
from tests.helpers.exports import OTHER_WORDS, WORDS, build, picture, tower_clip

TOWERS = {"resnet": "plain", "vit": "naclip", "eva02": "value", "siglip": "plain", "convnext": "plain"}


def assert_equal_to_eager(graph: Graph, path: Path) -> None:
    """Compare two sizes and two numbers of classes that the file was not traced with."""
    write_onnx(graph, path)
    assert compare_onnx(graph, path, graph.other_inputs()) < TOLERANCE
    height, width = graph.size
    step = max(graph.metadata.multiple, 32)
    free = {2, 3} <= set(graph.dynamic["images"])
    size = (height + 2 * step, width - step) if free else (height, width)
    assert compare_onnx(graph, path, graph.example(*size, 1 if graph.num_classes > 1 else 2)) < TOLERANCE


@pytest.mark.parametrize("family", list(TOWERS))
def test_dense_towers(family: str, tmp_path: Path) -> None:
    graph = tower_graph(tower_clip(family), TOWERS[family])
    assert_equal_to_eager(graph, tmp_path / "tower.onnx")


class EveryMode(nn.Module):
    """The dense maps of all last-block modes that need the image alone."""

    def __init__(self, tower: TransformerTower) -> None:
        super().__init__()
        self.tower = tower
        known = {MODES[name].name for name in tower.dense_modes if not MODES[name].guidance}
        self.modes = sorted(known)

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        maps = (self.tower(images, TowerRequest(dense=mode)).dense for mode in self.modes)
        return tuple(text_cosines(dense, text) for dense in maps)


def test_every_last_block_mode_is_traced_for_any_size() -> None:
    clip = tower_clip("vit")
    module: Any = EveryMode(clip.visual)
    assert len(module.modes) >= 12
    graph = replace(tower_graph(clip), module=module.eval(), outputs=tuple(module.modes))
    traced = trace(graph).module()
    height, width = graph.size
    for inputs in (graph.other_inputs(), graph.example(height + 32, width - 32, 2)):
        for mode, own, expected in zip(
            module.modes, traced(*inputs.values()), run_eager(graph, inputs), strict=True
        ):
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4, msg=mode)


class Exported:
    """A model, its file, and outputs of both for one image and vocabulary."""

    def __init__(self, name: str, folder: Path, *overrides: object) -> None:
        self.model: Any = build(name, *overrides)
        self.graph = model_graph(self.model)
        self.path = folder / f"{name}.onnx"
        assert_equal_to_eager(self.graph, self.path)

    def outputs(self, words: str, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        vocabulary = Vocabulary.parse(words)
        self.model.set_vocabulary(vocabulary)
        table = self.path.with_suffix(".safetensors")
        save_text_input(table, text_inputs(self.model), self.graph.metadata, vocabulary)
        return self.compare(OnnxModel(self.path, table), size)

    def compare(self, runner: OnnxModel, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        image = picture(*size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        if self.graph.metadata.channels == "BGR":
            pixels = pixels.flip(0)
        with torch.no_grad():
            expected = self.model([{"image": pixels, "height": size[0], "width": size[1]}])[0]
        return runner(image), expected


SIZES = {WORDS: (96, 136), OTHER_WORDS: (120, 88)}


def test_training_free_method_with_windows(tmp_path: Path) -> None:
    exported = Exported("zero_shot", tmp_path)
    for words, size in SIZES.items():
        own, expected = exported.outputs(words, size)
        np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)
        assert (own["labels"] == expected["sem_seg_labels"].numpy()).mean() > 0.999


def test_score_map_of_any_classes(tmp_path: Path) -> None:
    exported = Exported("score_map", tmp_path)
    table = tmp_path / "own.safetensors"
    names = Vocabulary.from_names(exported.graph.metadata.classes, separator=None)
    save_text_input(table, text_inputs(exported.model), exported.graph.metadata, names)
    own, expected = exported.compare(OnnxModel(exported.path, table), (90, 130))
    np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)


def test_semantic_fpn_reads_words_of_a_fixed_number(tmp_path: Path) -> None:
    exported = Exported("semantic_fpn", tmp_path)
    metadata = exported.graph.metadata
    assert metadata.num_classes == len(metadata.classes) == 4 and metadata.own_text
    table = tmp_path / "own.safetensors"
    names = Vocabulary.from_names(metadata.classes, separator=None)
    save_text_input(table, text_inputs(exported.model), metadata, names)
    own, expected = exported.compare(OnnxModel(exported.path, table), (90, 130))
    np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)


def test_catseg(tmp_path: Path) -> None:
    exported = Exported("catseg", tmp_path)
    for words, size in SIZES.items():
        own, expected = exported.outputs(words, size)
        np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["fcclip", "ovseg"])
def test_masks_and_their_classes(name: str, tmp_path: Path) -> None:
    exported = Exported(name, tmp_path)
    for words, size in SIZES.items():
        own, expected = exported.outputs(words, size)
        np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)
        ids, segments = own["panoptic_seg"]
        assert (ids == expected["panoptic_seg"][0].numpy()).mean() > 0.999
        assert segments == expected["panoptic_seg"][1]


def test_open_vocabulary_detections(tmp_path: Path) -> None:
    model: Any = build("fvlm")
    graph = model_graph(model)
    path, table = tmp_path / "fvlm.onnx", tmp_path / "words.safetensors"
    assert_equal_to_eager(graph, path)
    for words, size in SIZES.items():
        vocabulary = Vocabulary.parse(words)
        model.set_vocabulary(vocabulary)
        save_text_input(table, text_inputs(model), graph.metadata, vocabulary)
        assert_same_detections(OnnxModel(path, table), model, size)


def test_mask_rcnn(tmp_path: Path) -> None:
    model: Any = build("mask_rcnn")
    graph = model_graph(model)
    path, table = tmp_path / "mask_rcnn.onnx", tmp_path / "words.safetensors"
    assert_equal_to_eager(graph, path)
    names = Vocabulary.parse("red star, blue star, green ring")
    save_text_input(table, text_inputs(model), graph.metadata, names)
    own = assert_same_detections(OnnxModel(path, table), model, (96, 136))
    assert own["masks"].shape[1:] == (28, 28)


def assert_same_detections(runner: OnnxModel, model: Any, size: tuple[int, int]) -> dict[str, Any]:
    image = picture(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    pixels = pixels.flip(0) if model.input_format == "BGR" else pixels
    with torch.no_grad():
        found = model([{"image": pixels, "height": size[0], "width": size[1]}])[0]["instances"]
    own = runner(image)
    assert len(found) >= 3
    np.testing.assert_allclose(own["scores"], found.scores.numpy(), atol=1e-4)
    np.testing.assert_allclose(own["boxes"], found.pred_boxes.tensor.numpy(), atol=1e-2)
    np.testing.assert_array_equal(own["classes"], found.pred_classes.numpy())
    return own
