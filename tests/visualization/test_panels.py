"""Pictures: what is drawn, where, and that a class keeps its colour."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.visualization import curves
from clipdense.visualization.canvas import Canvas
from clipdense.visualization.curves import class_color, draw_curve, read_metrics
from clipdense.visualization.fonts import load_font
from clipdense.visualization.panels import draw_panel
from clipdense.visualization.pictures import (
    draw_legend,
    draw_output,
    draw_score_map,
    draw_truth,
    list_contents,
    overlay_heat,
    save_picture,
)
from clipdense.visualization.segments import class_labels

from detectron2.structures import BitMasks, Boxes, Instances

SIZE = 64
IMAGE = np.full((SIZE, SIZE, 3), 120, np.uint8)
BOX = [8.0, 16.0, 40.0, 48.0]


class Metadata(SimpleNamespace):
    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


METADATA = Metadata(
    thing_classes=["red star", "blue ring"],
    stuff_classes=["red star", "blue ring", "sand"],
    thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
    label_divisor=1000,
)


def mask() -> np.ndarray:
    result = np.zeros((SIZE, SIZE), np.uint8)
    result[16:48, 8:40] = 1
    return result


def instances(score: float = 0.9, masks: Any = None, category: int = 0) -> Instances:
    fields: dict[str, Any] = {"pred_boxes": Boxes(torch.tensor([BOX])), "scores": torch.tensor([score])}
    fields["pred_classes"] = torch.tensor([category])
    if masks is not None:
        fields["pred_masks"] = masks
    return Instances((SIZE, SIZE), **fields)


def record(**fields: Any) -> dict[str, Any]:
    row = {"bbox": BOX, "bbox_mode": 0, "category_id": 0, "segmentation": [[8, 16, 40, 16, 40, 48, 8, 48]]}
    crowd = {**row, "bbox": [0, 0, 64, 64], "iscrowd": 1}
    return {"image": IMAGE, "file_name": "a/1.png", "annotations": [row, crowd], **fields}


def inside(picture: np.ndarray) -> np.ndarray:
    """Mean colour in the middle of the thing."""
    s = picture.shape[0] / SIZE
    return picture[int(30 * s) : int(44 * s), int(14 * s) : int(34 * s)].reshape(-1, 3).mean(0)


def test_instances_beside_truth(tmp_path: Path) -> None:
    path = tmp_path / "out" / "panel.png"
    outputs = [
        instances(masks=torch.from_numpy(mask()[None]).bool()),
        instances(masks=BitMasks(torch.from_numpy(mask()[None]).bool())),
        instances(),
        instances()[:0],
    ]
    draw_panel([record(output={"instances": o}) for o in outputs], METADATA, path, cell=256)
    width, height = Image.open(path).size
    assert width > 4 * 256 and 2 * 256 < height < 3 * 256
    assert list((tmp_path / "out").iterdir()) == [path]  # nothing half written is left


def test_a_class_has_one_colour() -> None:
    truth = draw_truth(IMAGE, record(), METADATA, cell=256)
    masks = torch.from_numpy(mask()[None]).bool()
    found = draw_output(IMAGE, {"instances": instances(masks=masks)}, METADATA, cell=256)
    other = draw_output(IMAGE, {"instances": instances(masks=masks, category=1)}, METADATA, cell=256)
    assert np.abs(inside(truth) - inside(found)).max() < 3
    assert np.abs(inside(other) - inside(found)).max() > 10
    # a crowd is not drawn: the corner is as it was
    assert np.abs(truth[-8:, -8:].astype(int) - 120).max() < 8
    assert len({class_color(i) for i in range(100)}) == 100


def test_scores_below_the_threshold_are_not_drawn() -> None:
    plain = draw_output(IMAGE, {"instances": instances(score=0.4)}, METADATA, cell=256)
    assert plain.shape == (256, 256, 3) and np.abs(plain.astype(int) - 120).max() < 8
    drawn = draw_output(IMAGE, {"instances": instances(score=0.4)}, METADATA, cell=256, score_threshold=0.3)
    assert np.abs(drawn.astype(int) - 120).max() > 80


def test_semantic_and_panoptic(tmp_path: Path) -> None:
    labels = np.where(mask(), 0, 2).astype(np.uint8)
    labels[:4] = 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    ids = np.stack([labels + 1, 0 * labels, 0 * labels], -1)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    segments = [
        {"id": 1, "category_id": 0, "isthing": True},
        {"id": 3, "category_id": 2, "isthing": False},
    ]
    files = {"sem_seg_file_name": str(tmp_path / "labels.png")}
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels).long().clamp(max=2), 3).permute(2, 0, 1)
    semantic = [
        draw_truth(IMAGE, {**files, "annotations": []}, METADATA, cell=192),
        draw_output(IMAGE, {"sem_seg_labels": torch.from_numpy(labels)}, METADATA, cell=192),
        draw_output(IMAGE, {"sem_seg": scores}, METADATA, cell=192),
    ]
    files |= {"pan_seg_file_name": str(tmp_path / "ids.png")}
    coded = torch.from_numpy(np.where(labels == 255, -1, labels.astype(np.int64) * 1000 + 3))
    panoptic = [
        draw_truth(IMAGE, {**record(), **files, "segments_info": segments}, METADATA, cell=192),
        draw_output(IMAGE, {"panoptic_seg": (torch.from_numpy(labels + 1), segments)}, METADATA, cell=192),
        draw_output(IMAGE, {"panoptic_seg": (coded, None)}, METADATA, cell=192),
    ]
    for pictures in (semantic, panoptic):
        for picture in pictures[1:]:
            assert np.abs(inside(picture) - inside(pictures[0])).max() < 8
        # void is left clear, sand is not
        assert np.abs(pictures[1][2, 100].astype(int) - 120).max() < 8
        assert np.abs(pictures[1][-10, -10].astype(int) - 120).max() > 20
    draw_panel([record(output={"sem_seg": scores}, **files)], METADATA, tmp_path / "panel.png", cell=128)


def test_pixels_without_scores_are_left_clear() -> None:
    scores = torch.zeros(3, SIZE, SIZE)
    scores[0, :32], scores[2, 32:48] = 0.1, 0.1
    labels = class_labels({"sem_seg": scores})
    assert [labels[y, 5] for y in (3, 40, 60)] == [0, 2, -1]
    assert class_labels({"sem_seg": scores[:1]})[40, 5] == -1
    drawn = draw_output(IMAGE, {"sem_seg": scores}, METADATA, cell=192).astype(int)
    assert np.abs(drawn[150:] - 120).max() < 8 and np.abs(drawn[80:88] - 120).max() > 20


def test_legend() -> None:
    scores = torch.zeros(3, SIZE, SIZE)
    scores[0, :16], scores[2, 16:48] = 1, 1
    rows = list_contents({"sem_seg": scores}, "semantic", METADATA, 0.5)
    assert rows == [("sand  50%", 2), ("red star  25%", 0), ("unlabelled  25%", None)]
    both = {"instances": Instances.cat([instances(0.9), instances(0.6), instances(0.1)])}
    assert list_contents(both, "instances", METADATA, 0.5) == [("2 \u00d7 red star", 0)]
    segments = [{"id": i, "category_id": 0, "isthing": True} for i in (1, 2)]
    ids = torch.arange(4).repeat_interleave(16)[:, None].expand(64, 64)
    rows = list_contents({"panoptic_seg": (ids, segments)}, "panoptic", METADATA, 0.5)
    assert rows == [("2 \u00d7 red star  50%", 0), ("unlabelled  50%", None)]
    picture = draw_legend(IMAGE.repeat(4, 0).repeat(4, 1), [("red star", 0), ("sand", 2)])
    assert picture.shape[1] == 256 and np.array_equal(picture[:256], IMAGE.repeat(4, 0).repeat(4, 1))
    below = picture[256:].reshape(-1, 3)
    for category in (0, 2):
        assert (below == [round(255 * c) for c in class_color(category)]).all(1).sum() > 100
    many = draw_legend(picture, [(f"class {i}", i) for i in range(100)])
    assert many.shape[0] < draw_legend(picture, [(f"class {i}", i) for i in range(40)]).shape[0] + 60


def test_names_stay_inside_and_apart() -> None:
    canvas = Canvas(IMAGE, 256)
    boxes = np.array([[50, 0, 64, 10], [50, 1, 64, 11], [0, 60, 6, 64]], float)
    canvas.things(boxes, None, [0, 1, 0], METADATA)
    placed = [(x + 2, y) for x, y, *_ in canvas._place_names()]
    width = load_font(canvas._font_size).getlength("red star")
    assert all(0 <= x <= 256 - width and 0 <= y <= 256 - canvas._font_size for x, y in placed)
    assert abs(placed[0][1] - placed[1][1]) > canvas._font_size  # the second gave way


def test_heat_map() -> None:
    heat = np.array([[0.0, 1.0], [np.nan, 1.0]])
    picture = overlay_heat(IMAGE, heat, cell=128, alpha=0.8).astype(int)
    assert picture.shape == (128, 128, 3)
    assert picture[:30, :30, 2].mean() > picture[:30, :30, 0].mean()  # low is blue
    assert picture[:30, -30:, 0].mean() > picture[:30, -30:, 2].mean()  # high is red
    assert np.abs(picture[-20:, :20] - 120).max() < 8  # unknown is clear
    flat = overlay_heat(IMAGE, torch.zeros(3, 5), cell=128, low=0, high=1)
    assert np.isfinite(flat).all() and flat.std() < overlay_heat(IMAGE, heat, cell=128).std() + 50


def test_score_map(tmp_path: Path) -> None:
    score = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    picture = draw_score_map(IMAGE, score, tmp_path / "out" / "map.png", title="red star", cell=128)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "map.png")), picture)
    above = picture.shape[0] - 128
    assert above > 0 and picture[:above].min() < 128  # a line of text above the image
    assert np.array_equal(picture[above:], overlay_heat(IMAGE, score, cell=128))
    # on a common scale a class without high scores stays blue
    low = draw_score_map(IMAGE, score[:1], low=0.0, high=10.0, cell=128)[above:].astype(int)
    assert low[..., 2].mean() > low[..., 0].mean() and picture[above:, ..., 0].max() > low[..., 0].max()


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("a.jpg", "JPEG"), ("a.JPG", "JPEG"), ("a.png", "PNG")):
        save_picture(IMAGE, tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == kind and np.abs(np.asarray(image).astype(int) - IMAGE).max() < 3
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **options: Path(path).touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_picture(IMAGE * 0, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), IMAGE)


def test_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        draw_panel([], METADATA, tmp_path / "x.png")
    with pytest.raises(ValueError, match="an output with proposals cannot be drawn"):
        draw_panel([record(output={"proposals": 1})], METADATA, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"\(H, W, 3\) of type uint8, got \(64, 64\)"):
        draw_truth(IMAGE[..., 0], {}, METADATA)


def write_metrics(path: Path, iterations: int = 100) -> None:
    rows = [
        {"iteration": i, "total_loss": 2 / (1 + i), "loss_cls": 1 / (1 + i), "lr": 0.01, "data_time": 0.5}
        for i in range(iterations)
    ]
    rows.append({"iteration": 50, "bbox/AP": 10.0, "bbox/AP-red star": 1.0, "segm/AP50": math.nan})
    rows.append({"iteration": 99, "bbox/AP": 20.0})
    rows.append({"iteration": 50, "total_loss": 7.0})  # a resumed run
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 101, "total_lo')


def test_curve(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.json")
    series = read_metrics(tmp_path / "metrics.json")
    assert series["total_loss"][1][50] == 7.0 and len(series["total_loss"][0]) == 100
    assert series["bbox/AP"] == ([50, 99], [10.0, 20.0])
    assert "segm/AP50" not in series and "data_time" not in series
    draw_curve(tmp_path / "metrics.json", tmp_path / "out" / "curve.png")
    picture = np.asarray(Image.open(tmp_path / "out" / "curve.png").convert("L"))
    assert picture.shape[0] > 600 and (picture < 128).mean() > 0.002
    # losses alone make a shorter picture
    (tmp_path / "short.json").write_text('{"iteration": 1, "total_loss": 0.5}\n')
    draw_curve(tmp_path / "short.json", tmp_path / "short.png")
    assert Image.open(tmp_path / "short.png").size[1] < picture.shape[0]


def test_curve_of_base_and_novel_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("bbox/AP50", "bbox/AP50_base", "bbox/AP50_novel", "bbox/AP50_novel_shape", "sem_seg/mIoU_base")
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 1, **dict.fromkeys(names, 1.0)}) + "\n")
    drawn: list[str] = []
    monkeypatch.setattr(curves, "_plot", lambda axes, title, lines: drawn.extend(lines))
    draw_curve(tmp_path / "metrics.json", tmp_path / "curve.png")
    assert drawn == ["bbox/AP50", "bbox/AP50_base", "bbox/AP50_novel", "sem_seg/mIoU_base"]


def test_curve_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "eta_seconds": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.json has no losses"):
        draw_curve(tmp_path / "metrics.json", tmp_path / "curve.png")
    with pytest.raises(FileNotFoundError):
        draw_curve(tmp_path / "none.json", tmp_path / "curve.png")
