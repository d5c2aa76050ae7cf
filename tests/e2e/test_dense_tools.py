"""tools/evaluate_regions.py and tools/dense_clusters.py on a few shapes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdense.checkpoint import save_checkpoint
from clipdense.clip import load_clip
from clipdense.clip.prompt_files import load_prompts
from clipdense.engine.build import build_model
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import load_config

from detectron2.data import DatasetCatalog

TOOLS = Path(__file__).resolve().parents[2] / "tools"
pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.fixture(scope="module")
def tool():
    def load(name):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "export.safetensors"
    load_clip("shapes-vit", "random").save(path)
    return str(path)


def test_regions_over_sizes(tool, weights, tmp_path, capsys):
    rows, curve = tmp_path / "out" / "rows.json", tmp_path / "curve.png"
    arguments = ["--model", "shapes-rn", weights, "--image-size", "64", "128", "--antialias", "both"]
    assert tool("evaluate_regions")([*arguments, "--json", str(rows), "--curve", str(curve)]) == 0
    content = json.loads(rows.read_text())
    assert [(r["model"], r["mode"], r["image_size"], r["antialias"]) for r in content] == [
        (model, mode, size, antialias)
        for model, mode in (("shapes-rn", "value"), (weights, content[-1]["mode"]))
        for size in (64, 128)
        for antialias in (False, True)
    ]
    things = sum(len(r["annotations"]) for r in DatasetCatalog.get("shapes_ov_panoptic_val"))
    assert 0 < content[0]["thing.n"] <= things
    printed = capsys.readouterr().out
    for kind in ("thing", "stuff"):
        assert f"{int(content[0][f'{kind}.n'])} {kind} regions of shapes_ov_panoptic_val" in printed
    assert printed.count("| crops ") == 4  # two models, two kinds: not once a view
    assert "pixels that the dense map classifies correctly" in printed
    assert f"{content[0]['pixels.thing']:.1f}" in printed
    assert f"{content[0]['crops.thing.macc1']:.1f}" in printed and "top1-color" in printed
    with Image.open(curve) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_every_mode_once(tool, weights, tmp_path):
    rows = tmp_path / "rows.json"
    arguments = ["--model", weights, "--modes", "all", "--image-size", "64", "--json", str(rows)]
    assert tool("evaluate_regions")(arguments) == 0
    modes = [row["mode"] for row in json.loads(rows.read_text())]
    assert modes[:2] == ["plain", "value"] and not {"clipself", "maskclip"} & set(modes)


def test_what_is_wrong_is_said_without_traceback(tool, weights, tmp_path, capsys):
    arguments = ["--model", weights, "--images", "1", "--dataset", "shapes_closed_panoptic_val"]
    table = tmp_path / "table.npy"
    with pytest.raises(SystemExit, match="1"), tool_errors():
        tool("evaluate_regions")([*arguments, "--table", str(table)])
    assert f"error: no text table '{table}'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"), tool_errors():
        tool("evaluate_regions")([*arguments, "--image-size", "100"])
    assert "image size 100 is not a multiple of the stride 8" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"), tool_errors():
        tool("evaluate_regions")(["--dataset", "shapes_closed_panoptic_vall"])
    assert "shapes_closed_panoptic_val" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool("evaluate_regions")([*arguments, "--curve", str(tmp_path / "curve.png")])
    assert "--curve needs --image-size" in capsys.readouterr().err


def test_clusters_side_by_side(tool, weights, tmp_path, capsys):
    panel = tmp_path / "panel.png"
    arguments = [str(panel), "--model", "shapes-rn", weights, "--titles", "before", "after"]
    assert tool("dense_clusters")([*arguments, "--images", "2", "--clusters", "3"]) == 0
    with Image.open(panel) as picture:
        width, height = picture.size
    assert width > height  # three columns, two rows
    record = DatasetCatalog.get("shapes_closed_panoptic_val")[0]
    assert tool("dense_clusters")([*arguments, "--input", record["file_name"], "--image-size", "64"]) == 0
    with Image.open(panel) as picture:
        assert picture.height < height
    with pytest.raises(SystemExit, match="1"), tool_errors():
        tool("dense_clusters")([*arguments, "--input", str(tmp_path / "none.png")])
    assert "none.png" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool("dense_clusters")([str(panel), "--model", "a", "b", "--titles", "one"])


def test_neighbours_of_class_names(tool, tmp_path, capsys):
    config, weights = "configs/shapes/denseclip_semantic_fpn_rn.yaml", tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_checkpoint(weights, build_model(load_config(config)).state_dict(), {})
    words = ["--weights", str(weights), "--dataset", "shapes_closed_panoptic_val", "--images", "2"]
    words += ["--classes", "3", "--pixels", "9", "--opts", "MODEL.DEVICE", "cpu"]
    assert tool("draw_neighbours")([str(tmp_path / "n.png"), "--config-file", config, *words]) == 0
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    prompts = tmp_path / "prompts.safetensors"
    words = ["--config-file", config, "--weights", str(weights), "--opts", "MODEL.DEVICE", "cpu"]
    assert tool("export_prompts")([str(prompts), *words]) == 0
    assert load_prompts(prompts).text.contexts.shape[1] == 8
    detector = ["--dataset", "shapes_closed_mini_val", *words]
    with pytest.raises(SystemExit, match="1"), tool_errors():
        tool("draw_neighbours")([str(tmp_path / "n.png"), *detector])
    assert "shapes_closed_mini_val has no semantic maps" in capsys.readouterr().err
    words = ["--config-file", "configs/shapes/semantic_fpn_clip_rn.yaml", "--weights", str(weights)]
    with pytest.raises(SystemExit, match="1"), tool_errors():
        tool("draw_neighbours")([str(tmp_path / "n.png"), *words])
    capsys.readouterr()
