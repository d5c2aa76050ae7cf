"""Table files of training-free methods, and other CLIPs as second model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clipdense.clip import TowerRequest, load_clip
from clipdense.run.setup import read_config
from clipdense.systems.training_free import Sweep, Variant, load_sweep
from clipdense.systems.training_free.features import FeatureModel, TowerFeatures, build_features, renormalize

ROOT = Path(__file__).resolve().parents[2]
TABLE = """
towers: [shapes-vit]
overrides: {MODEL.DEVICE: cpu}
methods:
  - sclip
  - name: naclip with PAMR
    method: naclip
    overrides: {MODEL.ZERO_SHOT.PAMR_STEPS: 10}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.yaml"
    path.write_text(text)
    return path


def test_overrides_of_a_variant(tmp_path: Path) -> None:
    """Its own overrides follow those of the table, and these the published settings."""
    sweep = load_sweep(write(tmp_path, TABLE))
    plain, refined = sweep.variants
    assert plain == Variant("sclip", "sclip") and refined.name == "naclip with PAMR"
    assert plain.config_overrides() == ["MODEL.ZERO_SHOT.METHOD", "sclip"]
    words = refined.config_overrides("context59")
    published = words.index("MODEL.ZERO_SHOT.PAMR_STEPS")
    assert words[-2:] == ["MODEL.ZERO_SHOT.PAMR_STEPS", "10"] and published < len(words) - 2
    assert "['pascal_context_59_sem_seg_val']" in words
    common = {"MODEL.ZERO_SHOT.WINDOW": 64, "MODEL.ZERO_SHOT.PAMR_STEPS": 3}
    words = refined.config_overrides("context59", common)
    assert words[-4:] == ["MODEL.ZERO_SHOT.WINDOW", "64", "MODEL.ZERO_SHOT.PAMR_STEPS", "10"]
    assert words.index("MODEL.ZERO_SHOT.WINDOW") < len(words) - 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("methods:", "method:"), "expected a mapping with 'towers' and 'methods'"),
        (("overrides: {MODEL.D", "override: {MODEL.D"), "unknown keys override; known: title"),
        (("method: naclip", "method: naclop"), "unknown method 'naclop'; known: clip, maskclip"),
        (("naclip with PAMR", "sclip"), "two methods have one name"),
        (("method: naclip", "mode: naclip"), "a method is a name, or a mapping of name, method and"),
        (("towers:", "benchmarks: [voc]\ntowers:"), "unknown benchmark 'voc'; known: voc21"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = write(tmp_path, TABLE.replace(*change))
    with pytest.raises(ValueError, match=f"table.yaml: {message}"):
        load_sweep(path)


FILES = sorted(ROOT.glob("projects/*/tables/*.yaml"))
SHIPPED = [path for path in FILES if "towers" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_tables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "datasets")
    sweep: Any = load_sweep(path)
    assert isinstance(sweep, Sweep) and len(sweep.variants) > 1
    for variant in sweep.variants:
        overrides = variant.config_overrides(next(iter(sweep.benchmarks), ""), sweep.overrides)
        cfg = read_config(str(ROOT / sweep.config), overrides).cfg
        assert variant.method == cfg.MODEL.ZERO_SHOT.METHOD and cfg.DATASETS.TEST


def test_another_clip_as_second_model() -> None:
    """Its own pixel statistics and its last map before the projection."""
    features = build_features("clip:shapes-eva")
    assert isinstance(features, TowerFeatures) and features.patch_size == 8
    clip, other = load_clip("shapes-eva"), load_clip("shapes-vit")
    images = torch.rand(1, 3, 48, 64)
    statistics = ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    own = (clip.pixel_mean, clip.pixel_std)
    expected = clip.visual(renormalize(images, statistics, own), TowerRequest(pre=True)).pre
    torch.testing.assert_close(features(images, statistics), expected)
    assert not torch.allclose(features(images, own), expected)
    assert expected.shape[-2:] == (6, 8) and other.visual is not features.visual
    assert isinstance(build_features("vit_tiny_patch16_224", "random"), FeatureModel)
