"""Tables of numbers as pictures."""

import numpy as np
import pytest
from PIL import Image

from clipdense.visualization.heatmap import draw_heatmaps


def test_tables_stand_side_by_side_and_the_best_is_framed(tmp_path):
    tables = {"PQ": [[1.0, 2.0], [3.0, float("nan")]], "mIoU": [[1.0, 2.0], [3.0, 4.0]]}
    draw_heatmaps({"PQ": tables["PQ"]}, ["0", "1"], ["0", "1"], tmp_path / "one.png")
    draw_heatmaps(tables, ["0", "1"], ["0", "1"], tmp_path / "two.png", row_title="a", column_title="b")
    one, two = (
        np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int) for n in ("one", "two")
    )
    assert two.shape[1] > 1.8 * one.shape[1]
    red = (two[..., 0] > 200) & (two[..., 1] < 60) & (two[..., 2] < 60)
    assert red[:, : two.shape[1] // 2].any() and red[:, two.shape[1] // 2 :].any()


def test_no_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no table"):
        draw_heatmaps({}, [], [], tmp_path / "none.png")
