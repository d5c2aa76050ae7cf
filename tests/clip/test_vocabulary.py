import dataclasses
import json
from types import SimpleNamespace

import pytest

from clipdense.clip.vocabulary import Vocabulary, canonical, near


def test_names_are_the_same_without_case_spaces_underscores():
    assert (
        canonical("Potted plant") == canonical("potted_plant") == canonical(" pottedplant ") == "pottedplant"
    )
    assert canonical("bow_(weapon)") != canonical("bow")
    assert canonical("bow-tie") != canonical("bow tie")


def test_from_words():
    v = Vocabulary.parse("cat|kitten, red car ,")
    assert v.synonyms == (("cat", "kitten"), ("red car",))
    assert v.names == tuple(v) == ("cat", "red car") and len(v) == 2
    assert "Kitten" in v and "dog" not in v
    assert v.index("RED_CAR") == 1 and v.index("kitten") == 0
    assert Vocabulary.parse(v) is v
    assert Vocabulary.parse(["sky, clouds", "tree"]).synonyms == (("sky", "clouds"), ("tree",))


def test_synonyms_in_one_string_or_verbatim():
    names = ["building, edifice, Building", "sky,"]
    assert Vocabulary.from_names(names).synonyms == (("building", "edifice"), ("sky",))
    assert Vocabulary.from_names(names, separator=None).names == ("building, edifice, Building", "sky,")
    assert Vocabulary.from_names([["a, b", "c"]]).synonyms == (("a, b", "c"),)


def test_immutable():
    v = Vocabulary.parse("cat")
    with pytest.raises(dataclasses.FrozenInstanceError):
        v.base = (True,)
    assert hash(v) == hash(Vocabulary.parse("cat"))


def test_bad_classes_are_named():
    with pytest.raises(ValueError, match=r"empty class names at positions 1 \[\], 2 \[\]"):
        Vocabulary.from_names(["cat", " ", ","])
    with pytest.raises(ValueError, match=r"empty.*1 \['_'\]"):
        Vocabulary.from_names(["cat", "_"])
    with pytest.raises(ValueError, match=r"classes 0 and 2 are the same: \['Traffic_light'\]"):
        Vocabulary.from_names(["traffic light", "cat", "Traffic_light"])
    with pytest.raises(ValueError, match="same"):
        Vocabulary.from_names(["a, b", "b, a"])
    with pytest.raises(ValueError, match="at least one class"):
        Vocabulary.parse(" , ")
    with pytest.raises(ValueError, match="base mask has 1 entries for 2 classes"):
        Vocabulary((("a",), ("b",)), base=(True,))
    with pytest.raises(ValueError, match="not a string"):
        Vocabulary.from_names("cat, dog")


def test_unknown_and_ambiguous_names():
    v = Vocabulary.from_names(["bag", "bag, purse", "screen, bag", "giraffe"])
    assert v.index("purse") == 1 and v.index("screen") == 2
    with pytest.raises(ValueError, match=r"'bag' names several classes: 0 \['bag'\], 1 \['bag', 'purse'\]$"):
        v.index("bag")
    with pytest.raises(ValueError, match="no class 'girafe'.*4.*did you mean 'giraffe'"):
        v.index("girafe")
    with pytest.raises(ValueError, match="nothing in it looks like"):
        v.index("xyzzy")
    assert near("POTTED-PLANT", ["potted_plant", "plane"])[0] == "potted_plant"


def test_a_display_name_goes_before_a_synonym():
    v = Vocabulary.from_names(["pier, wharf", "wharf"])
    assert v.index("wharf") == 1


def test_base_and_novel():
    v = Vocabulary.from_names(["cat", "dog", "bus"], novel=["Dog", 2])
    assert v.base == (True, False, False)
    with pytest.raises(ValueError, match="no class 'bos'.*'bus'"):
        v.with_novel(["bos"])
    with pytest.raises(ValueError, match=r"no classes \[3\] in a vocabulary of 3"):
        v.with_novel([3])


def test_base_from_a_training_vocabulary():
    training = Vocabulary.from_names(["person, child", "potted_plant", "bus"], novel=["bus"])
    v = Vocabulary.from_names(["man, Person", "Potted Plant", "bus", "cat"]).with_base_from(training)
    assert v.base == (True, True, False, False)
    without = Vocabulary.from_names(["bus", "cat"]).with_base_from(dataclasses.replace(training, base=None))
    assert without.base == (True, False)


def test_subset_keeps_flags():
    v = Vocabulary((("a",), ("b", "bee"), ("c",)), base=(True, False, True), thing=(False, True, True))
    assert v.subset(["C", 1]) == Vocabulary((("c",), ("b", "bee")), (True, False), (True, True))


def test_from_categories():
    rows = [
        {"id": 7, "name": "bull", "synonyms": ["horned_cow"], "isthing": 1},
        {"id": 2, "name": "sky, clouds", "isthing": 0},
    ]
    v = Vocabulary.from_categories(rows, novel=["bull"])
    assert v == Vocabulary((("sky", "clouds"), ("bull", "horned_cow")), (True, False), (False, True))
    with pytest.raises(ValueError, match="needs a 'name'"):
        Vocabulary.from_categories([{"id": 1}])


def metadata(**fields):
    return SimpleNamespace(name="set", **fields)


def test_from_metadata():
    things = Vocabulary.from_metadata(metadata(thing_classes=["cat", "dog"], novel_classes=["dog"]))
    assert things == Vocabulary((("cat",), ("dog",)), (True, False), (True, True))
    stuff = Vocabulary.from_metadata(metadata(stuff_classes=["sky, clouds", "tree"], base_classes=["clouds"]))
    assert stuff == Vocabulary((("sky", "clouds"), ("tree",)), (True, False), None)
    assert Vocabulary.from_metadata(metadata(stuff_classes=["a, b"]), separator=None).names == ("a, b",)
    separated = Vocabulary.from_metadata(metadata(thing_classes=["cat"], stuff_classes=["things", "sky"]))
    assert separated == Vocabulary((("cat",), ("sky",)), None, (True, False))
    panoptic = metadata(thing_classes=["cat"], stuff_classes=["sky", "cat"])
    assert Vocabulary.from_metadata(panoptic).thing == (False, True)
    copied = metadata(
        thing_classes=["cat", "sky"], stuff_classes=["cat", "sky"], thing_dataset_id_to_contiguous_id={9: 0}
    )
    assert Vocabulary.from_metadata(copied).thing == (True, False)
    with pytest.raises(ValueError, match="'set' has no thing_classes"):
        Vocabulary.from_metadata(metadata())


def test_from_metadata_with_synonyms():
    fields = {"thing_classes": ["cat", "dog"], "class_synonyms": [["cat", "kitten"], ["dog"]]}
    vocabulary = Vocabulary.from_metadata(metadata(**fields, novel_classes=["cat"]))
    assert vocabulary == Vocabulary((("cat", "kitten"), ("dog",)), (False, True), (True, True))
    with pytest.raises(ValueError, match="class_synonyms name 1 classes, the metadata has 2"):
        Vocabulary.from_metadata(metadata(**{**fields, "class_synonyms": [["cat"]]}))


def test_files(tmp_path):
    text = tmp_path / "names.txt"
    text.write_text("cat, kitten\n\nred car\n", encoding="utf-8")
    assert Vocabulary.parse(str(text)) == Vocabulary.parse("cat|kitten, red car")
    file = tmp_path / "names.json"
    for content in (
        ["cat, kitten", "red car"],
        [{"id": 1, "name": "cat, kitten"}, {"id": 2, "name": "red car"}],
    ):
        for wrapped in [content] + (
            [{"categories": content, "images": []}] if isinstance(content[0], dict) else []
        ):
            file.write_text(json.dumps(wrapped))
            assert Vocabulary.from_file(file) == Vocabulary.parse("cat|kitten, red car")
    saved = Vocabulary((("a", "ä"), ("b",)), (True, False), (False, True))
    file.write_text(saved.to_json(), encoding="utf-8")
    assert Vocabulary.from_file(file) == saved == Vocabulary.from_json(saved.to_json())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '["cat"', "Expecting"),
        ("x.json", '{"cat": 1}', "expected a list of names"),
        ("x.json", '["cat", 3]', "expected a list of names"),
        ("x.json", '["cat", "Cat"]', "are the same"),
        ("x.json", "[]", "at least one class"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.json", '{"format": "clipdense-vocabulary"}', "base"),
        ("x.txt", "0:cat\ndog", "begin with a number and a colon, but not 'dog'"),
        ("x.txt", "0:cat\n0:dog", "the same number"),
        ("x.names", "cat\0dog", "not a text file"),
        ("x.txt", "\n", "at least one class"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"class-list file '.*{name}': .*{message}"):
        Vocabulary.from_file(tmp_path / name)


TWO = ("red star", "blue ring")
TEXT = "red star\nblue ring\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", TEXT.encode()),
        ("windows.txt", TEXT.replace("\n", "\r\n").encode("utf-8-sig")),
        ("utf16.txt", TEXT.encode("utf-16")),
        ("classes.TXT", TEXT.encode()),
        ("coco.names", TEXT.encode()),
        ("classes", TEXT.encode()),
        ("labels.csv", b"red star,blue ring"),
        ("column.csv", TEXT.encode("utf-8-sig")),
        ("table.csv", b"id,name\n7,red star\n9,blue ring\n"),
        ("pairs.CSV", b"1,blue ring\n0,red star\n"),
        ("numbered.txt", b"0:red star\n1:blue ring\n"),
        ("unordered.txt", b"2: blue ring\n1: red star\n"),
        ("counted.txt", b"1. red star\n2. blue ring\n"),
        ("list.JSON", b'["red star", "blue ring"]'),
        ("bom.json", json.dumps(["red star", "blue ring"]).encode("utf-8-sig")),
        ("id2label.json", b'{"1": "blue ring", "0": "red star"}'),
        ("words.json", b'[{"id": "s", "name": "red star"}, {"id": "r", "name": "blue ring"}]'),
    ],
)
def test_class_lists_as_people_write_them(tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_bytes(content)
    assert Vocabulary.parse(str(tmp_path / name)).names == TWO
    monkeypatch.chdir(tmp_path)
    assert Vocabulary.parse(name).names == TWO
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Vocabulary.parse(f"~/{name}").names == Vocabulary.parse(f"$HOME/{name}").names == TWO
    assert Vocabulary.from_file(f"~/{name}").names == TWO


def test_numbers_keep_synonyms_and_names_keep_digits(tmp_path):
    (tmp_path / "openseg.txt").write_text("1:person,child\n2:dog\n")
    assert Vocabulary.parse(tmp_path / "openseg.txt").synonyms == (("person", "child"), ("dog",))
    (tmp_path / "cars.txt").write_text("3 wheeler\n18 wheeler\n")
    assert Vocabulary.parse(tmp_path / "cars.txt").names == ("3 wheeler", "18 wheeler")
    (tmp_path / "synonyms.csv").write_text("cat,kitten\ndog,puppy\n")
    assert Vocabulary.parse(tmp_path / "synonyms.csv").synonyms == (("cat", "kitten"), ("dog", "puppy"))


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere.TXT", "coco.names", "~/labels.csv"])
def test_a_list_that_does_not_exist_is_no_class(name):
    with pytest.raises(FileNotFoundError, match=name.split("/")[-1]):
        Vocabulary.parse(name)


def test_a_picture_is_no_class_list(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    with pytest.raises(ValueError, match="x.png.*not a text file"):
        Vocabulary.parse(str(tmp_path / "x.png"))


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        Vocabulary.parse("nowhere.json")
    with pytest.raises(ValueError, match="not a saved vocabulary"):
        Vocabulary.from_json('["cat"]')


def test_fingerprint_sees_names_order_and_flags():
    v = Vocabulary.parse("cat|kitten, dog")
    others = [
        Vocabulary.parse("dog, cat|kitten"),
        Vocabulary.parse("kitten|cat, dog"),
        v.with_novel(["dog"]),
        dataclasses.replace(v, thing=(True, True)),
    ]
    assert v.fingerprint() == Vocabulary.parse("cat|kitten,dog").fingerprint()
    assert len({w.fingerprint() for w in [v, *others]}) == 5


def test_real_class_lists(data_dir):
    lists = data_dir / "class_lists"
    sizes = {file.stem: len(Vocabulary.from_file(file)) for file in sorted(lists.glob("*.json"))}
    assert sizes["catseg_ade847"] == 847 and sizes["lvis_v1_train_cat_info"] == 1203
    assert sizes["panoptic_coco_categories"] == 133 and len(sizes) > 10
    ade = Vocabulary.from_file(lists / "catseg_ade847.json")
    assert ade.synonyms[1] == ("building", "edifice") and ade.names.count("bag") == 3
    panoptic = Vocabulary.from_file(lists / "panoptic_coco_categories.json")
    assert sum(panoptic.thing) == 80 and panoptic.names[80] == "banner"


def test_open_vocabulary_splits(data_dir):
    lists = data_dir / "class_lists"
    coco = Vocabulary.from_file(lists / "clipself_mscoco_65_classes.json")
    coco = coco.with_base_from(Vocabulary.from_file(lists / "clipself_mscoco_seen_classes.json"))
    unseen = Vocabulary.from_file(lists / "clipself_mscoco_unseen_classes.json")
    assert [n for n, base in zip(coco, coco.base, strict=True) if not base] == list(unseen)
    lvis = Vocabulary.from_file(lists / "clipself_lvis_v1_all_classes.json")
    lvis = lvis.with_base_from(Vocabulary.from_file(lists / "clipself_lvis_v1_seen_classes.json"))
    assert sum(lvis.base) == 866
