"""Import of crops whose background is painted in one colour."""

from pathlib import Path
from typing import Any

import import_mask_csv
import numpy as np
import pytest
from PIL import Image

from clipdense.data.datasets.mask_pairs import register_mask_pairs
from clipdense.data.mask_pairs import pair_mask, read_pairs
from clipdense.regions import CropRule
from clipdense.run.boundary import tool_errors
from clipdense.systems.mask_adaptation import MaskPairMapper
from clipdense.systems.mask_adaptation.keyed_crops import BACKGROUND

from detectron2.data import DatasetCatalog


@pytest.fixture
def crops(tmp_path: Path) -> np.ndarray:
    """Write two crops, the second without foreground; return the mask of the first."""
    rng = np.random.default_rng(0)
    mask = np.zeros((10, 14), bool)
    mask[2:8, :9] = True
    pixels = rng.integers(0, 100, (10, 14, 3), dtype=np.uint8)  # none has the background colour
    pixels[~mask] = BACKGROUND
    pixels[3, 3] = (124, 116, 104)  # similar, but foreground
    (tmp_path / "crops").mkdir()
    Image.fromarray(pixels).save(tmp_path / "crops" / "a.png")
    Image.new("RGB", (5, 5), BACKGROUND).save(tmp_path / "crops" / "b.png")
    (tmp_path / "list.csv").write_text("filepath\ttitle\ncrops/a.png\tred kite\ncrops/b.png\tsky\n")
    return mask


def test_masks_are_recovered_from_the_colour(
    tmp_path: Path, crops: np.ndarray, catalogs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_mask_csv.main([str(tmp_path / "list.csv"), str(tmp_path / "pairs.jsonl")]) == 0
    assert "1 pairs" in capsys.readouterr().out
    (pair,) = read_pairs(tmp_path / "pairs.jsonl")
    assert pair["noun"] == "red kite" and (pair["height"], pair["width"]) == (10, 14)
    assert np.array_equal(pair_mask(pair), crops)
    register_mask_pairs("imported", str(tmp_path / "pairs.jsonl"))
    sample: Any = MaskPairMapper(rule=CropRule(0.4), size=32)(DatasetCatalog.get("imported")[0])
    assert sample["region"].shape == (3, 32, 32)


def test_unusable_crops_are_errors(
    tmp_path: Path, crops: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(tmp_path / "crops" / "a.png").save(tmp_path / "crops" / "a.jpg", quality=100)
    (tmp_path / "crops" / "c.png").write_bytes(b"no png")
    for lines, message in (
        ("filepath\ttitle\ncrops/a.jpg\tkite", "a.jpg is a JPEG file, a format that may change colours"),
        ("filepath\ttitle\ncrops/c.png\tkite", "c.png: not an image"),
        ("filepath\ttitle\ncrops/d.png\tkite", "d.png"),
        ("filepath\ttitle\ncrops/a.png\t", "list.csv, line 2: lacks filepath or title"),
        ("filepath,title\ncrops/a.png,kite", "no column filepath and no column title"),
    ):
        (tmp_path / "list.csv").write_text(lines + "\n")
        with pytest.raises(SystemExit, match="1"), tool_errors():
            import_mask_csv.main([str(tmp_path / "list.csv"), str(tmp_path / "pairs.jsonl")])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "pairs.jsonl").exists()
