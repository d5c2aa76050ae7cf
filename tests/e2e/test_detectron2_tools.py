"""Detectron2's own analyze_model and visualize_data on our configs: projects/PlugIn/with_clipdense.py."""

import itertools
import logging
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.backbone import CLIPTrunk
from clipdense.backbone.flops import ATTENTION, FlopCountAnalysis
from clipdense.clip import load_clip
from clipdense.engine.build import build_model
from clipdense.run.setup import load_config

import detectron2
import detectron2.config
import detectron2.data
import detectron2.utils.analysis
from detectron2.utils.analysis import activation_count_operators, parameter_count

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "projects" / "PlugIn" / "with_clipdense.py"
TOOLS = Path(detectron2.__file__).parents[1] / "tools"
CONFIGS = ["mask_rcnn_clip_rn", "denseclip_mask_rcnn_rn_published"]

pytestmark = pytest.mark.usefixtures("small_shapes")

Tool = Callable[..., str]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Tool:
    """``tool(name, word, ...)``: run one of Detectron2's tools; returns what it logs."""

    def run(name: str, *words: str) -> str:
        if not (TOOLS / f"{name}.py").is_file():
            pytest.skip(f"the installed detectron2 brings no {TOOLS.name}/{name}.py")
        monkeypatch.setattr(sys, "argv", [str(LAUNCHER), str(TOOLS / f"{name}.py"), *words])
        for module, patched in (
            (detectron2.config, "get_cfg"),
            (detectron2.utils.analysis, "FlopCountAnalysis"),
        ):
            monkeypatch.setattr(module, patched, getattr(module, patched))  # restored afterwards
        with caplog.at_level(logging.INFO):
            logging.getLogger("detectron2").addHandler(caplog.handler)
            try:
                runpy.run_path(str(LAUNCHER), run_name="__main__")
            finally:
                logging.getLogger("detectron2").removeHandler(caplog.handler)
        return caplog.text

    return run


def test_analyze_model(tool: Tool) -> None:
    words = ["--tasks", "flop", "activation", "parameter", "structure", "--num-inputs", "2"]
    words += ["--config-file", str(ROOT / "configs/shapes/denseclip_mask_rcnn_rn_published.yaml")]
    output = tool("analyze_model", *words, "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64")
    assert float(re.search(r"Total GFlops: (\d+\.\d)", output)[1]) > 0
    assert "Total (Million) Activations" in output
    assert "backbone.bottom_up.context_decoder" in output
    assert "PixelTextLoss()" in output and "(text): ClassText(" in output


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
@pytest.mark.parametrize("layout", ["", "panoptic_"])
def test_visualize_data(
    source: str, layout: str, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = detectron2.data.build_detection_train_loader
    # the tool itself goes on for ever
    monkeypatch.setattr(
        detectron2.data, "build_detection_train_loader", lambda cfg: itertools.islice(loader(cfg), 1)
    )
    words = ["--source", source, "--output-dir", str(tmp_path)]
    words += ["--config-file", str(ROOT / "configs/shapes/denseclip_mask_rcnn_rn.yaml")]
    tool("visualize_data", *words, "DATASETS.TRAIN", f"['shapes_closed_{layout}mini_train']")
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in tmp_path.iterdir()]
    assert len(pictures) == 4 and all(picture.shape == (256, 256, 3) for picture in pictures)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(name: str) -> None:
    """What analyze_model calls, where there is no such tool."""
    cfg = load_config(str(ROOT / f"configs/shapes/{name}.yaml"))
    model = build_model(cfg).eval()
    inputs = [{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}]
    with torch.no_grad():
        model(inputs)  # the classes are encoded
    flops = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = flops.by_module()
    assert min(by_module[f"model.{name}"] for name in ("backbone", "proposal_generator", "roi_heads")) > 0
    assert (ATTENTION.split("::")[1] in flops.by_operator()) == name.startswith("denseclip")
    assert ATTENTION not in flops.unsupported_ops()
    assert activation_count_operators(model, inputs)["conv"] > 0
    assert parameter_count(model)[""] == sum(p.numel() for p in model.parameters())


def test_fused_attention_is_counted() -> None:
    trunk = CLIPTrunk(load_clip("shapes-vit", text=False)).eval()
    flops = FlopCountAnalysis(trunk, torch.zeros(1, 3, 64, 64)).unsupported_ops_warnings(False)
    counted = flops.by_operator()[ATTENTION.split("::")[1]]
    blocks, width, tokens = 4, 128, 8 * 8 + 1
    assert counted == math.prod((blocks, tokens, tokens, width, 2))
