"""What does not export is refused with the reason and the remedy, before anything is traced."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from clipdense.clip import load_clip
from clipdense.run.export.api import export_model, export_tower
from clipdense.run.export.families import FAMILIES, REFUSED, model_graph, support_table
from clipdense.run.export.graph import ExportError
from clipdense.run.export.names import tower_graph
from clipdense.run.export.write import write_onnx
from tests.helpers.exports import build, tower_clip

DOCS = Path(__file__).parents[3] / "docs" / "export.md"

SETTINGS: list[tuple[str, list[Any], str]] = [
    ("zero_shot", ["MODEL.ZERO_SHOT.PAMR_STEPS", 2], "MODEL.ZERO_SHOT.PAMR_STEPS: these steps follow"),
    ("zero_shot", ["MODEL.ZERO_SHOT.AREA_THRESHOLD", 0.1], "AREA_THRESHOLD.*set them to 0"),
    ("zero_shot", ["MODEL.CLIP.POSITION_RULE", "crop"], "has a largest size: give a fixed size"),
    ("zero_shot", ["MODEL.ZERO_SHOT.METHOD", "resclip"], "'resclip' cannot be exported: its second pass"),
    ("catseg", ["MODEL.CAT_SEG.TEST.WINDOWS.ENABLED", True], "MODEL.CAT_SEG.TEST.WINDOWS.ENABLED False"),
    ("catseg", ["MODEL.CAT_SEG.REJECTION.TOPK", 2], "MODEL.CAT_SEG.REJECTION.TOPK 0"),
    ("score_map", ["MODEL.SEMANTIC_SEGMENTOR.FLIP", True], "SCALES \\[1.0\\] and FLIP False"),
    (
        "score_map",
        ["MODEL.SEMANTIC_SEGMENTOR.WINDOW", [64, 96], "MODEL.SEMANTIC_SEGMENTOR.STRIDE", [32, 32]],
        "an exported file has square windows",
    ),
    ("fvlm", ["MODEL.FVLM.SQUARE_SIZE", 256], "--size 256 256"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), SETTINGS)
def test_settings_that_do_not_export_name_their_remedy(name: str, overrides: list[Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        model_graph(build(name, *overrides))


def test_a_square_model_takes_its_fixed_size() -> None:
    graph = model_graph(build("fvlm", "MODEL.FVLM.SQUARE_SIZE", 256), fixed_size=(256, 256))
    assert graph.dynamic["images"] == () and graph.inputs()["images"].shape == (1, 3, 256, 256)


def test_towers_name_what_their_modes_lack() -> None:
    with pytest.raises(ExportError, match="has no dense map of mode 'gem': its modes are plain, value"):
        tower_graph(tower_clip("resnet"), "gem")
    with pytest.raises(ExportError, match="reads patch features .* of another model"):
        tower_graph(tower_clip("vit"), "proxyclip")
    clip = load_clip("shapes-vit", text=False, position_rule="dino_scale")
    with pytest.raises(ExportError, match="give a fixed size"):
        tower_graph(clip)
    assert tower_graph(clip, fixed_size=(64, 64)).metadata.fixed_size == (64, 64)


def test_models_without_an_adapter_say_so() -> None:
    for name, (reason, remedy) in REFUSED.items():
        with pytest.raises(ExportError) as error:
            model_graph(type(name, (nn.Module,), {})())
        assert reason in str(error.value) and remedy in str(error.value)
    with pytest.raises(ExportError, match="no family with an adapter contains it .ZeroShotSegmentor"):
        model_graph(nn.Linear(1, 1))


def test_outputs_and_options_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=".onnx file, or a .pt2 file"):
        export_model("no_such_config.yaml", tmp_path / "model.pt")
    with pytest.raises(ExportError, match="belong together"):
        export_tower("shapes-vit", tmp_path / "a.onnx", text_output=tmp_path / "words.safetensors")
    with pytest.raises(ExportError, match="use --opset 18"):
        write_onnx(tower_graph(tower_clip("vit")), tmp_path / "a.onnx", opset=17)
    assert not list(tmp_path.iterdir())


def test_the_documentation_holds_the_generated_tables() -> None:
    assert support_table() in DOCS.read_text(encoding="utf-8")
    order = [family.model for family in FAMILIES]
    for i, model in enumerate(order):
        assert not any(issubclass(later, model) for later in order[i + 1 :])
