"""tools/patch_coherence.py: CLIPs, a timm ViT and a patch embedder on a few scenes of shapes."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdense.checkpoint import save_checkpoint
from clipdense.clip import load_clip
from clipdense.clip.patch_embedder import PatchEmbedder, patch_channels
from clipdense.visualization.roc import draw_roc

TOOL = Path(__file__).resolve().parents[2] / "tools/patch_coherence.py"


@pytest.mark.usefixtures("small_shapes")
def test_areas_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    torch.manual_seed(0)
    clip = load_clip("shapes-vit")
    embedder = PatchEmbedder(patch_channels(clip.visual), clip.embed_dim)
    file, picture = tmp_path / "embedder.safetensors", tmp_path / "curves.png"
    save_checkpoint(file, embedder.state_dict(), embedder.file_metadata("shapes-vit"))
    models = ["shapes-vit", "shapes-vit:random", "timm:vit_tiny_patch16_224"]
    options = ["--pretrained", "random", "--embedder", str(file), "--images", "4", "--device", "cpu"]
    assert main([str(picture), "--model", *models, *options, "--patches", "60"]) == 0
    rows = re.findall(
        r"^\| ([\w:. -]+?) *\| *([\d.]+) \| *([\d.]+) \| *(\d+) \|$", capsys.readouterr().out, re.M
    )
    areas = {name: float(area) for name, area, _, _ in rows}
    assert list(areas) == [models[0], "shapes-vit with embedder.safetensors", *models[1:]]
    assert {count for *_, count in rows} == {"60"}
    assert len(set(areas.values())) == 4 and areas["shapes-vit"] > 60
    assert Image.open(picture).size[0] > 400


@pytest.mark.usefixtures("small_shapes")
def test_attention_within_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    options = ["--images", "3", "--patches", "60", "--attention", "--window", "64", "--device", "cpu"]
    assert main([str(tmp_path / "curves.png"), "--model", "shapes-vit", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| model") and "chance" in line)
    names, values = ([cell.strip() for cell in lines[i].split("|")[2:-1]] for i in (header, header + 2))
    shares = dict(zip(names, map(float, values), strict=True))
    assert shares["kk+gauss"] > shares["kk"] > shares["chance"] > 0  # neighbours have one class


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize(
    ("model", "message"), [("timm:vit_tiny_patch16_224", "needs CLIPs"), ("shapes-rn", "has a ResNetTower")]
)
def test_attention_needs_a_vit(
    model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    options = ["--pretrained", "random", "--images", "1", "--patches", "20", "--attention", "--device", "cpu"]
    with pytest.raises((SystemExit, ValueError)) as error:
        main([str(tmp_path / "curves.png"), "--model", model, *options])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_no_curve_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ROC curve to draw"):
        draw_roc({"one class": []}, tmp_path / "none.png")
