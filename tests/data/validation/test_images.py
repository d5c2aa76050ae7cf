"""Image files, label maps, registered datasets and the tool."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from clipdense.data.image import header_size
from clipdense.data.mappers import read_image_or_skip
from clipdense.data.validation import (
    DataError,
    Report,
    check_dataset,
    check_datasets,
    check_image_files,
    check_label_maps,
)

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def report():
    return Report("data")


def save(path, size=(60, 40), **kwargs):
    Image.new("RGB", size, "red").save(path, **kwargs)
    return {"file_name": str(path), "height": size[1], "width": size[0]}


def test_files_that_fit(tmp_path, report):
    check_image_files([save(tmp_path / "a.png")], report)
    assert report.findings == {}


def test_missing_damaged_and_resized_files_are_named(tmp_path, report):
    record = save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    records = [
        {**record, "width": 61},
        {**record, "file_name": str(tmp_path / "b.png")},
        {**record, "file_name": str(tmp_path / "c.png")},
    ]
    check_image_files(records, report)
    kinds = {kind: finding.examples[0] for kind, finding in report.findings.items()}
    assert "a.png is 40 x 60, stated 40 x 61" in kinds["images of another size than stated"]
    assert kinds["files that are not images"].endswith("b.png")
    assert kinds["images that are not there"].endswith("c.png")


def test_turned_photographs(tmp_path, report):
    exif = Image.Exif()
    exif[0x0112] = 6
    record = save(tmp_path / "a.jpg", exif=exif)
    assert header_size(tmp_path / "a.jpg") == (60, 40)
    check_image_files([{**record, "height": 60, "width": 40}], report)  # upright, as annotation tools show it
    assert report.findings == {}
    check_image_files([record], report)  # as stored
    assert [finding.severity for finding in report.findings.values()] == ["note"]


def test_very_large_images_are_noticed_by_their_header(tmp_path, report):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 20000 15000 255\n")  # a header alone
    check_image_files([{"file_name": str(path), "height": 15000, "width": 20000}], report)
    (finding,) = report.findings.values()
    assert finding.severity == "note" and finding.examples == [f"{path} is 15000 x 20000"]


def test_label_maps(tmp_path, report):
    record = save(tmp_path / "a.png")
    for name, labels in {
        "good": np.array([[0, 1], [255, 1]]).repeat(20, 0).repeat(30, 1),
        "beyond": np.full((40, 60), 7),
        "small": np.zeros((4, 6)),
    }.items():
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / f"{name}_l.png")
    records = [{**record, "sem_seg_file_name": str(tmp_path / f"{n}_l.png")} for n in ("good", "absent")]
    check_label_maps(records[:1], report, num_classes=2)
    assert report.findings == {}
    records += [{**record, "sem_seg_file_name": str(tmp_path / f"{n}_l.png")} for n in ("beyond", "small")]
    check_label_maps(records, report, num_classes=2)
    text = "\n".join(report.lines())
    assert "beyond_l.png: 7. Expected 0 to 1, or 255" in text
    assert "small_l.png is 4 x 6, the image 40 x 60" in text
    assert "absent_l.png" in text


def test_label_maps_of_turned_photographs(tmp_path, report):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", exif=exif)  # stored as 40 x 60, shown as 60 x 40
    for name, shape in (("stored", (40, 60)), ("upright", (60, 40)), ("other", (30, 40))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{name}.png")
        record = {"file_name": str(tmp_path / "a.jpg"), "sem_seg_file_name": str(tmp_path / f"{name}.png")}
        if name == "other":
            break
        check_label_maps([record], report, num_classes=1)
        assert read_image_or_skip(record, "RGB", skip=False).shape[:2] == shape
    assert report.findings == {}
    check_label_maps([record], report, num_classes=1)
    assert "other.png is 30 x 40, the image 60 x 40" in "\n".join(report.lines())


@pytest.fixture
def registered(tmp_path):
    """A registered dataset of one image; returns its annotation file."""
    image = save(tmp_path / "a.png")
    content = {
        "images": [{**image, "file_name": "a.png", "id": 1}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    DatasetCatalog.register("checked", list)
    MetadataCatalog.get("checked").set(json_file=str(path), image_root=str(tmp_path), evaluator_type="coco")
    yield path
    DatasetCatalog.remove("checked")
    MetadataCatalog.remove("checked")


def test_a_registered_dataset_is_checked_once(registered, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLIPDENSE_CACHE", str(cache))
    assert check_dataset("checked").counts == {"images": 1, "annotations": 1, "classes": 1}
    cached = list((cache / "checks").iterdir())
    assert len(cached) == 1
    check_datasets(["checked"])
    assert list((cache / "checks").iterdir()) == cached
    content = json.loads(registered.read_text())
    content["annotations"][0]["category_id"] = 12
    registered.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a\.json.*category_id 12"):
        check_datasets(["checked"])


def test_images_that_are_replaced_are_noticed(registered, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    checked = []
    monkeypatch.setattr(
        "clipdense.data.validation.datasets.check_image_files",
        lambda *args, **kwargs: checked.append(1) or check_image_files(*args, **kwargs),
    )
    assert not check_dataset("checked").errors
    assert not check_dataset("checked").errors
    assert len(checked) == 1
    image = tmp_path / "a.png"
    time = image.stat().st_mtime_ns
    os.utime(image, ns=(time, time + 1))  # replaced by one that is as good
    assert not check_dataset("checked").errors
    assert len(checked) == 2
    save(image, size=(61, 40))
    with pytest.raises(DataError, match=r"a\.png is 40 x 61, stated 40 x 60"):
        check_datasets(["checked"])
    save(image)
    check_datasets(["checked"])
    image.unlink()  # of the folder, only the time of change differs
    with pytest.raises(DataError, match=r"images that are not there: .*a\.png"):
        check_datasets(["checked"])


def test_the_tool(registered, tmp_path, capsys):
    from check_data import main

    assert main([str(registered), "--images", str(tmp_path)]) == 0
    assert "1 images, 1 annotations, 1 classes" in capsys.readouterr().out
    (tmp_path / "a.png").unlink()
    assert main([str(registered), "--images", str(tmp_path)]) == 1
    assert "refused: images that are not there" in capsys.readouterr().out
