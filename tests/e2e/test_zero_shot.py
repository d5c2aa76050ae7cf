"""Zero-shot segmentation from the command line: masks without weights, and the table of methods."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))


def test_demo_draws_masks_of_an_untrained_clip(tmp_path: Path) -> None:
    pixels = np.full((120, 160, 3), 90, np.uint8)
    pixels[30:90, 40:100] = (220, 30, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = [
        "--config-file",
        str(ROOT / "configs/shapes/zero_shot_sclip_vit.yaml"),
        "--input",
        str(tmp_path / "a.png"),
    ]
    words += ["--output", str(tmp_path / "out"), "--vocabulary", "red square|red block, blue disc"]
    assert tool("demo").main(words) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["red square", "blue disc"]
    assert content["segments"] and {s["category"] for s in content["segments"]} <= {"red square", "blue disc"}
    assert (tmp_path / "out" / "a.jpg").is_file()


def test_table_of_methods(tmp_path: Path, small_shapes: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the command line replace entries of the file; a method that does not fit says why."""
    (tmp_path / "table.yaml").write_text(
        f"config: {ROOT / 'configs/shapes/Base-ZeroShot.yaml'}\n"
        "towers: [shapes-eva]\nimages: 2\n"
        "methods: [maskclip, {name: smooth, method: maskclip, "
        "overrides: {MODEL.ZERO_SHOT.KEY_SMOOTHING: 1.0}}, sclip]\n"
    )
    words = ["--table", str(tmp_path / "table.yaml"), "--towers", "shapes-vit", "shapes-rn"]
    words += ["--images", "1", "--output", str(tmp_path)]
    assert tool("run_zero_shot").main(words) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    names = [(row["tower"], row["method"]) for row in rows]
    assert names == [(t, m) for t in ("shapes-vit", "shapes-rn") for m in ("maskclip", "smooth", "sclip")]
    assert all(0 <= row["mIoU"] <= 100 and row["images"] == 1 for row in rows[:5])
    assert rows[0]["pACC"] != rows[1]["pACC"] and rows[0]["classes"] == 88
    assert "needs a ViT" in rows[5]["note"] and "mIoU" not in rows[5]
    assert "| shapes-vit" in (tmp_path / "table.md").read_text()
    assert "sclip" in capsys.readouterr().out


def test_table_of_own_label_maps(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((64, 64, 3) if folder == "images" else (64, 64), np.uint8)).save(
            tmp_path / folder / "a.png"
        )
    (tmp_path / "classes.txt").write_text("red square\nsand\n")
    maps = f"['zero_shot_own_maps:{tmp_path}/images:{tmp_path}/labels:{tmp_path}/classes.txt']"
    words = ["--config-file", str(ROOT / "configs/shapes/Base-ZeroShot.yaml"), "--towers", "shapes-vit"]
    words += ["--methods", "maskclip", "--output", str(tmp_path / "out")]
    opts = ["--opts", "DATASETS.LABEL_MAPS", maps, "DATASETS.TEST", "('zero_shot_own_maps',)"]
    assert tool("run_zero_shot").main([*words, *opts]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["dataset"] == "zero_shot_own_maps" and row["classes"] == 2 and row["images"] == 1


def test_benchmark_counts_memory_of_many_classes(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert (
        tool("benchmark").main(["zero_shot", "--rows", "k847", "--device", "meta", "--json", str(path)]) == 0
    )
    (row,) = json.loads(path.read_text())["rows"]
    assert row["name"] == "zero_shot/k847_extra_gb" and row["ours"] < 1.0 < row["other"]


def test_benchmark_counts_forwards(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    words = [
        "zero_shot",
        "--flops-only",
        "--size",
        "224",
        "336",
        "--methods",
        "sclip",
        "naclip",
        "--json",
        str(path),
    ]
    assert tool("benchmark").main(words) == 0
    for row in json.loads(path.read_text())["rows"]:
        assert row["ratio"] <= 1.05, row
