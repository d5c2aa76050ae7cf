"""Annotation files with one fault each: refused by name, or repaired."""

import copy
import json
import math

import pytest
from PIL import Image

from clipdense.data.validation import DataError, read_coco

GOOD = {
    "images": [
        {"id": 1, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 2, "file_name": "b.png", "height": 40, "width": 60},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {
            "id": k,
            "image_id": k,
            "category_id": k,
            "bbox": [5, 6, 20, 10],
            "area": 200,
            "iscrowd": 0,
            "segmentation": [[5, 6, 25, 6, 25, 16, 5, 16]],
        }
        for k in (1, 2)
    ],
}


@pytest.fixture
def read(tmp_path):
    """Read a changed copy of GOOD; returns content, report."""

    def run(change=None, kind="instances", image_root=None):
        content = copy.deepcopy(GOOD)
        content = (change(content) if change else None) or content
        path = tmp_path / "train.json"
        path.write_text(json.dumps(content))
        return read_coco(path, kind, image_root)

    return run


def first(key, **fields):
    """A change of the first row of a list."""
    return lambda content: content[key][0].update(fields)


def without(key, field):
    return lambda content: content[key][0].pop(field) and None


def test_a_good_file_has_no_findings(read):
    content, report = read()
    assert report.findings == {}
    assert report.counts == {"images": 2, "annotations": 2, "classes": 2}
    assert content["annotations"] == GOOD["annotations"]


REFUSED = {
    "list": (lambda c: [1], "top level is a list"),
    "no images": (lambda c: c.pop("images") and None, "images"),
    "images null": (lambda c: c.update(images=None), '"images" is NoneType'),
    "annotations null": (lambda c: c.update(annotations=None), "annotations"),
    "image is text": (lambda c: c["images"].append("x"), r"images\[2\]"),
    "no categories": (lambda c: c.update(categories=[]), "categories"),
    "duplicate image id": (first("images", id=2), "id 2 of 'a.png' and 'b.png'"),
    "duplicate annotation id": (first("annotations", id=2), "two annotations with one id"),
    "duplicate category id": (first("categories", id=2), "id 2 of 'cat' and 'dog'"),
    "id is a fraction": (first("images", id=1.5), "id 1.5"),
    "id is true": (first("images", id=True), "id True"),
    "image without a name": (without("images", "file_name"), "file_name|file name"),
    "width is text": (first("images", width="60"), "a.png has height 40 and width '60'"),
    "height 0": (first("images", height=0), "height 0"),
    "category without a name": (without("categories", "name"), "category 1"),
    "category unknown": (first("annotations", category_id=999), "category_id 999"),
    "category null": (first("annotations", category_id=None), "category_id None"),
    "image id null": (first("annotations", image_id=None), "image_id None"),
    "no box": (without("annotations", "bbox"), "annotation 1 of a.png: bbox is None"),
    "box of 3": (first("annotations", bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\]"),
    "box of text": (first("annotations", bbox=["1", "2", "3", "4"]), "not a number"),
    "box with NaN": (first("annotations", bbox=[1, 2, math.nan, 4]), "NaN"),
    "crowd is text": (first("annotations", iscrowd="no"), "iscrowd"),
    "flat polygon": (first("annotations", segmentation=[5, 6, 25, 6, 25, 16]), "one flat list"),
    "short polygon": (first("annotations", segmentation=[[5, 6, 25, 6]]), "4 numbers"),
    "odd polygon": (first("annotations", segmentation=[[5, 6, 25, 6, 25, 16, 5]]), "7 numbers"),
    "polygon at infinity": (first("annotations", segmentation=[[math.inf, 1, 2, 3, 4, 5]]), "infinite"),
    "polygon far out": (first("annotations", segmentation=[[1e18, 1, 2, 3, 4, 5]]), "outside"),
    "polygon of text": (first("annotations", segmentation=[["a", 1, 2, 3, 4, 5]]), "not a list of numbers"),
    "mask is a number": (first("annotations", segmentation=5), "neither polygons"),
    "RLE too short": (
        first("annotations", segmentation={"size": [40, 60], "counts": [1, 2]}),
        "add up to 3, not to 40 x 60",
    ),
    "RLE empty": (first("annotations", segmentation={"size": [40, 60], "counts": ""}), "add up to 0"),
    "RLE negative": (first("annotations", segmentation={"size": [40, 60], "counts": [-5, 2405]}), "negative"),
    "RLE of another size": (
        first("annotations", segmentation={"size": [10, 10], "counts": [100]}),
        "10 x 10 in an image of 40 x 60",
    ),
    "RLE of absurd size": (
        first("annotations", segmentation={"size": [2**40, 2**40], "counts": [5]}),
        "size of a run-length encoding",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(read, change, message):
    _, report = read(change)
    with pytest.raises(DataError, match=f"train.json.*(?:{message})"):
        report.raise_errors()


REFERENCES = {
    "image id as text": (first("annotations", image_id="1"), "image_id '1', the image id 1"),
    "all of other images": (
        lambda c: [row.update(image_id=99) for row in c["annotations"]] and None,
        "none of 2 annotations belongs to one of 2 images",
    ),
    "objects to ignore": (first("annotations", ignore=1), 'objects with "ignore"'),
    "keypoints of text": (first("annotations", keypoints=["a", 1, 2]), "keypoints"),
    "crowd of 2": (first("annotations", iscrowd=2), "iscrowd"),
}


@pytest.mark.parametrize("change, message", REFERENCES.values(), ids=REFERENCES.keys())
def test_fields_without_one_meaning_are_refused(read, change, message):
    with pytest.raises(DataError, match=f"train.json.*(?:{message})"):
        read(change)[1].raise_errors()


def test_whole_floats_are_ids(read):
    def change(content):
        for key in ("images", "categories", "annotations"):
            for row in content[key]:
                row.update({k: float(v) for k, v in row.items() if k == "id" or k.endswith("_id")})

    content, report = read(change)
    assert report.findings == {} and len(content["annotations"]) == 2
    assert all(type(row["image_id"]) is type(row["category_id"]) is int for row in content["annotations"])


@pytest.mark.parametrize("identity", [-1, 0, 2**63])
def test_negative_and_large_ids_are_ids(read, identity):
    def change(content):
        for key, name in (("images", "image_id"), ("categories", "category_id")):
            content[key][0]["id"] = content["annotations"][0][name] = identity

    content, report = read(change)
    assert report.findings == {} and content["annotations"][0]["category_id"] == identity


@pytest.mark.parametrize(
    "box, found",
    [
        ([5, 6, 0, 10], "boxes without area"),
        ([5, 6, -3, 10], "boxes without area"),
        ([60, 6, 5, 5], "boxes outside their image"),
        ([-9, 6, 9, 5], "boxes outside their image"),
        ([50, 6, 20, 5], "boxes that exceed their image"),
        ([50, 6, 10.4, 5], None),
    ],
)
def test_boxes_that_do_not_lie_in_their_image_are_noticed(read, box, found):
    content, report = read(first("annotations", bbox=box))
    assert list(report.findings) == ([found] if found else [])
    assert not report.errors and content["annotations"][0]["bbox"] == box


def test_polygons_of_fewer_than_three_points_are_left_out_beside_others(read):
    square = GOOD["annotations"][0]["segmentation"][0]
    content, report = read(first("annotations", segmentation=[[1, 1, 2, 2], square, []]))
    assert content["annotations"][0]["segmentation"] == [square]
    assert [f.severity for f in report.findings.values()] == ["repaired"]


PANOPTIC = {
    "no isthing": (lambda c: None, "category 1 .cat.: None"),
    "id twice": (lambda c: c["annotations"].append(dict(c["annotations"][0])), "share their image_id"),
    "unknown category": (
        lambda c: c["annotations"][0]["segments_info"][0].update(category_id=9),
        "category_id 9",
    ),
    "segment id twice": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 5, "category_id": 1}),
        "segments that share an id",
    ),
    "no segments": (lambda c: c["annotations"][0].pop("segments_info") and None, "segments_info without id"),
}


@pytest.mark.parametrize("change, message", PANOPTIC.values(), ids=PANOPTIC.keys())
def test_panoptic_faults(read, change, message):
    def edit(content):
        content["annotations"] = [
            {"image_id": i, "file_name": f"{i}.png", "segments_info": [{"id": 5, "category_id": 1}]}
            for i in (1, 2)
        ]
        if not message.startswith("category 1"):
            for row in content["categories"]:
                row["isthing"] = 1
        change(content)

    with pytest.raises(DataError, match=f"train.json.*(?:{message})"):
        read(edit, "panoptic")[1].raise_errors()


@pytest.mark.parametrize("lists", [{"neg_category_ids": 5}, {"not_exhaustive_category_ids": [[1]]}])
def test_lvis_lists_of_categories(read, lists):
    with pytest.raises(DataError, match="train.json.*that are not lists of ids: a.png"):
        read(first("images", **lists), "lvis")[1].raise_errors()


def test_null_fields_are_absent(read):
    content, report = read(first("annotations", iscrowd=None, area=None))
    assert not report.errors
    assert content["annotations"][0]["iscrowd"] == 0
    assert "area" not in content["annotations"][0]


@pytest.mark.parametrize("empty", [None, [], [[]], "missing"])
def test_a_box_without_a_mask_is_kept(read, empty):
    change = (
        without("annotations", "segmentation")
        if empty == "missing"
        else first("annotations", segmentation=empty)
    )
    content, report = read(change)
    assert not report.errors
    assert "segmentation" not in content["annotations"][0]
    assert "segmentation" in content["annotations"][1]


@pytest.mark.parametrize("area", [-1, math.nan, "200"])
def test_odd_areas_are_left_out(read, area):
    content, report = read(first("annotations", area=area))
    assert [f.severity for f in report.findings.values()] == ["repaired"]
    assert "area" not in content["annotations"][0]


def test_annotations_of_unlisted_images_are_left_out_and_counted(read):
    content, report = read(first("annotations", image_id=999999))
    report.raise_errors()
    assert [a["id"] for a in content["annotations"]] == [2]
    assert "image_id 999999" in "\n".join(report.lines())


def test_text_and_wide_ids_are_kept(read):
    def change(content):
        for key in ("images", "annotations", "categories"):
            for row in content[key]:
                row["id"] = f"{key}_{row['id']}"
        for row in content["annotations"]:
            row["image_id"] = f"images_{row['image_id']}"
            row["category_id"] = f"categories_{row['category_id']}"
        content["images"][0]["id"] = content["annotations"][0]["image_id"] = 2**60 + 1

    content, report = read(change)
    report.raise_errors()
    assert [image["id"] for image in content["images"]] == [2**60 + 1, "images_2"]
    assert len(content["annotations"]) == 2


def test_classes_of_one_name_stay_two_and_are_noticed(read):
    content, report = read(first("categories", name="dog"))
    report.raise_errors()
    assert [c["name"] for c in content["categories"]] == ["dog", "dog"]
    assert "category 1 and 2" in "\n".join(report.lines())


def test_missing_sizes_are_read_from_the_image(read, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")

    def change(content):
        del content["images"][0]["height"], content["images"][0]["width"]

    content, report = read(change, image_root=tmp_path)
    report.raise_errors()
    assert (content["images"][0]["height"], content["images"][0]["width"]) == (40, 60)
    with pytest.raises(DataError, match="a.png has height None"):
        read(change)[1].raise_errors()


def test_a_test_set_needs_no_annotations(read):
    content, report = read(lambda c: c.pop("annotations") and None)
    report.raise_errors()
    assert content["annotations"] == []


@pytest.mark.parametrize("name", ["../../victim.png", "/etc/passwd", "..\\victim.png"])
def test_panoptic_names_stay_inside_their_folder(read, name):
    def change(content):
        content["annotations"] = [{"image_id": 1, "file_name": name, "segments_info": []}]

    with pytest.raises(DataError, match="file_name"):
        read(change, "panoptic")[1].raise_errors()


def test_captions(read):
    def change(content):
        content["annotations"] = [{"id": 1, "image_id": 1, "caption": "a cat"}, {"id": 2, "image_id": 2}]

    content, report = read(change, "captions")
    assert [a["caption"] for a in content["annotations"]] == ["a cat"]
    with pytest.raises(DataError, match="annotation 2 of b.png: None"):
        report.raise_errors()


def test_several_kinds_of_error_are_counted(read):
    def change(content):
        content["annotations"][0]["bbox"] = [1]
        content["annotations"][1]["category_id"] = 7

    with pytest.raises(DataError, match="1 more kinds of error"):
        read(change)[1].raise_errors()
