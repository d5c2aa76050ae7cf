import json
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from clipdense.clip import load_clip
from clipdense.clip.tables import TableIndex, TextTable, save_table
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary

ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 5
NAMES = ["cat", "traffic light", "bus"]


def store(path, matrix, index=None):
    """Write a table in the format that the suffix names."""
    if path.suffix == ".npy":
        np.save(path, matrix.numpy())
        if index:
            path.with_name(path.name + ".json").write_text(json.dumps(index))
    elif path.suffix == ".safetensors":
        save_file({"embeddings": matrix.contiguous()}, path, {"index": json.dumps(index)} if index else None)
    else:
        torch.save({"embeddings": matrix, "index": index} if index else matrix, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("named", ["inside", "vocabulary", "file"])
def test_every_format_either_way_round(tmp_path, suffix, transposed, named):
    index = {"classes": NAMES} if named == "inside" else None
    matrix = ROWS.T if transposed else ROWS
    path = store(tmp_path / f"table{suffix}", matrix.half() if suffix == ".npy" else matrix, index)
    names = None
    if named == "vocabulary":
        names = Vocabulary.from_names(NAMES)
    elif named == "file":
        names = tmp_path / "names.txt"
        names.write_text("\n".join(NAMES))
    table = TextTable.load(path, names, dim=8 if named == "file" else None)
    assert table.dim == 8
    got = table("Bus, Traffic_Light")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.normalize(ROWS[[2, 1]], dim=1), atol=1e-3, rtol=0)
    rows, classes = table.per_synonym("bus, cat|kitten")  # a row stands for its class whole
    torch.testing.assert_close(rows, F.normalize(ROWS[[2, 0]], dim=1), atol=1e-3, rtol=0)
    assert classes.tolist() == [0, 1]


def test_rows_of_synonyms_and_templates_are_averaged(tmp_path):
    index = {
        "classes": ["cat", "cat", "cat", "bus"],
        "synonyms": ["cat", "cat", "kitten", "bus"],
        "templates": ["a {}", "the {}", "a {}", "a {}"],
    }
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    unit = F.normalize(rows, dim=1)
    cat, kitten = unit[:2].mean(0), unit[2]
    path = store(tmp_path / "table.safetensors", rows, index)
    table = TextTable.load(path)
    torch.testing.assert_close(table("cat|kitten")[0], F.normalize(cat + kitten, dim=0))
    torch.testing.assert_close(table("kitten")[0], kitten)
    torch.testing.assert_close(table.per_synonym("cat|kitten, bus")[0][0], F.normalize(cat, dim=0))
    first = TextTable.load(path, synonyms="first")
    torch.testing.assert_close(first("cat|kitten|puss")[0], F.normalize(cat, dim=0))


def test_one_row_a_name_by_the_callers_vocabulary(tmp_path):
    vocabulary = Vocabulary.parse("cat|kitten, bus")
    table = TextTable.load(store(tmp_path / "table.npy", ROWS), vocabulary)
    unit = F.normalize(ROWS, dim=1)
    torch.testing.assert_close(table(vocabulary)[0], F.normalize(unit[0] + unit[1], dim=0))
    torch.testing.assert_close(table("bus|kitten")[0], F.normalize(unit[2] + unit[1], dim=0))


def test_missing_names_are_listed_with_near_ones():
    table = TextTable(ROWS, TableIndex.from_content({"classes": NAMES}), source="text table 'x'")
    missing = r"'trafic light' \(near: 'traffic light'\), 'zebra'"
    expected = rf"text table 'x' has no row for {missing}; tools/make_text_table"
    with pytest.raises(ValueError, match=expected):
        table("cat, trafic light, zebra")
    with pytest.raises(ValueError, match="and 5 more"):
        table([f"qq {i}" for i in range(25)])


def test_a_name_of_several_classes():
    ade = Vocabulary.from_names(["bag", "bag, purse", "bus"])
    by_class = TextTable(ROWS, TableIndex.from_vocabulary(ade, 3))
    torch.testing.assert_close(by_class(ade), F.normalize(ROWS, dim=1))
    with pytest.raises(ValueError, match="several classes of the name 'bag'"):
        by_class("bag|sack")
    rows = ROWS[[0, 1, 1, 2]]
    by_name = TextTable(rows, TableIndex((("a",), ("a",), ("b",), ("b",)), ("a", "x", "x", "y")))
    torch.testing.assert_close(by_name("x"), F.normalize(ROWS[[1]], dim=1))  # both classes give the same
    differing = TextTable(
        ROWS[[0, 1, 2, 2]], TableIndex((("a",), ("a",), ("b",), ("b",)), ("a", "x", "x", "y"))
    )
    with pytest.raises(ValueError, match="several classes of the name 'x'"):
        differing("x")


def test_the_class_decides_between_equal_names():
    index = TableIndex((("a",), ("a",), ("b",), ("b",)), ("a", "x", "b", "x"))
    rows = torch.eye(4)
    table = TextTable(rows, index)
    torch.testing.assert_close(table("b|x")[0], F.normalize(rows[2] + rows[3], dim=0))


def test_a_square_table_needs_to_be_told(tmp_path):
    path = store(tmp_path / "table.npy", ROWS[:, :3])
    with pytest.raises(ValueError, match=r"\(3, 3\), and both sides fit 3 classes with 3 names: give"):
        TextTable.load(path, NAMES)
    store(path, ROWS[:, :3], {"classes": NAMES})
    torch.testing.assert_close(TextTable.load(path)("bus"), F.normalize(ROWS[2:, :3], dim=1))


def test_names_and_synonyms_that_fit_both_sides_need_the_dimension(tmp_path):
    vocabulary = Vocabulary.from_names(["a, b, c, d", "e, f", "g, h"])  # 3 classes, 8 names, a 3 x 8 table
    path = store(tmp_path / "table.npy", ROWS)
    with pytest.raises(ValueError, match="both sides fit"):
        TextTable.load(path, vocabulary)
    torch.testing.assert_close(TextTable.load(path, vocabulary, dim=8)(vocabulary), F.normalize(ROWS, dim=1))
    assert TextTable.load(path, vocabulary, dim=3).dim == 3


@pytest.mark.parametrize(
    ("names", "dim", "message"),
    [
        (["cat"], None, r"\(3, 8\); that does not fit 1 classes with 1 names"),
        (NAMES, 512, r"\(3, 8\); that does not fit 3 classes with 3 names x 512"),
        (None, 8, "does not name its rows: give their class names"),
    ],
)
def test_names_that_do_not_fit(tmp_path, names, dim, message):
    path = store(tmp_path / "table.npy", ROWS)
    with pytest.raises(ValueError, match=f"table.npy' .*{message}"):
        TextTable.load(path, names, dim=dim)


def test_bad_indices(tmp_path):
    path = store(tmp_path / "table.safetensors", ROWS, {"classes": ["cat"]})
    with pytest.raises(ValueError, match="does not fit the 1 rows of its index"):
        TextTable.load(path)
    with pytest.raises(ValueError, match="the index has 3 classes, but 2"):
        TableIndex.from_content({"classes": NAMES, "synonyms": NAMES[:2]})
    with pytest.raises(ValueError, match=r"\(3, 8\) embeddings for 1 rows"):
        TextTable(ROWS, TableIndex.from_content({"classes": ["cat"]}))


def test_rows_that_are_no_embeddings():
    index = TableIndex.from_content({"classes": NAMES})
    for bad in (0.0, float("nan")):
        rows = ROWS.clone()
        rows[1] = bad
        with pytest.raises(ValueError, match=r"rows \[1\] are zero or not finite"):
            TextTable(rows, index)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npy"):
        TextTable.load(tmp_path / "nowhere.npy", NAMES)
    for suffix in (".npy", ".pt", ".safetensors"):
        path = store(tmp_path / f"table{suffix}", ROWS)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"cannot read text table '.*table{suffix}'"):
            TextTable.load(path, NAMES)
    path = store(tmp_path / "table.npy", ROWS)
    path.write_bytes(path.read_bytes().replace(b"), }", b"(, }"))  # a header that Python cannot read
    with pytest.raises(ValueError, match=r"cannot read text table '.*table\.npy'"):
        TextTable.load(path, NAMES)
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match="not a .safetensors"):
        TextTable.load(tmp_path / "table.csv", NAMES)
    torch.save({"a": ROWS, "b": ROWS}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"expected a tensor 'embeddings', found \['a', 'b'\]"):
        TextTable.load(tmp_path / "two.pt", NAMES)
    torch.save([ROWS], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="found list"):
        TextTable.load(tmp_path / "list.pt", NAMES)
    torch.save(torch.zeros(3, 8, dtype=torch.int64), tmp_path / "int.pt")
    with pytest.raises(ValueError, match="not a matrix of floats"):
        TextTable.load(tmp_path / "int.pt", NAMES)


class Payload:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_no_file_runs_code(tmp_path, capsys):
    torch.save(Payload(), tmp_path / "table.pt")
    np.save(tmp_path / "table.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    for suffix in ("pt", "npy"):
        with pytest.raises(ValueError, match="cannot read text table"):
            TextTable.load(tmp_path / f"table.{suffix}", NAMES)
    assert "a pickle ran" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return load_clip("shapes-rn", "random")


@pytest.mark.parametrize("synonyms", ["mean", "first"])
def test_a_written_table_gives_exactly_what_the_bank_gives(clip, tmp_path, synonyms):
    vocabulary = Vocabulary.from_names(["bag, Purse", "bag", "traffic_light, stop light", "purse"])
    bank = TextBank(clip, ["a {}", "the {}", "one {}."], synonyms=synonyms, cache_dir=None)
    save_table(tmp_path / "sub" / "table.safetensors", bank, vocabulary)
    table = TextTable.load(tmp_path / "sub" / "table.safetensors", synonyms=synonyms)
    assert torch.equal(table(vocabulary), bank(vocabulary))
    for ours, theirs in zip(table.per_synonym(vocabulary), bank.per_synonym(vocabulary), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(table("purse, bag"), bank("purse, bag"))
    assert table.dim == bank.dim
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["table.safetensors"]
    with safe_open(tmp_path / "sub" / "table.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "shapes-rn" and json.loads(metadata["templates"])[1] == "the {}"
    assert json.loads(metadata["index"])["classes"][0] == "bag"
    with pytest.raises(ValueError, match="written as .safetensors, not 'table.npy'"):
        save_table(tmp_path / "table.npy", bank, vocabulary)


REAL = {
    "detic_coco80_vitb32.npy": ("clipself_mscoco_all_classes.json", 512),
    "detic_lvis1203_vitb32.npy": ("lvis_v1_train_cat_info.json", 512),
    "zegclip_cocostuff171_vitb16_multi.npy": ("catseg_coco.json", 512),
    "zegclip_cocostuff171_vitb16_single.npy": ("catseg_coco.json", 512),
    "zegclip_voc20_vitb16_single.npy": ("catseg_voc20.json", 512),
    "declip_cocopan133_siglip_so400m.npy": ("panoptic_coco_categories.json", 1152),
}


@pytest.mark.parametrize("file", REAL)
def test_real_tables(data_dir, file):
    names, dim = REAL[file]
    path = data_dir / "text_embeddings" / file
    vocabulary = Vocabulary.from_file(data_dir / "class_lists" / names)
    table = TextTable.load(path, vocabulary, dim=dim)
    classes = table(vocabulary)
    assert classes.shape == (len(vocabulary), dim)
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(len(vocabulary)))
    cosines = classes @ classes.T
    assert (cosines.argmax(1) == torch.arange(len(vocabulary))).all()
    raw = torch.from_numpy(np.load(path)).float()
    raw = raw if raw.shape[1] == dim else raw.T
    torch.testing.assert_close(classes, F.normalize(raw, dim=1), atol=1e-6, rtol=0)


def test_real_tables_agree_on_what_words_mean(data_dir):
    lists, tables = data_dir / "class_lists", data_dir / "text_embeddings"
    lvis = TextTable.load(tables / "detic_lvis1203_vitb32.npy", lists / "lvis_v1_train_cat_info.json")
    coco = TextTable.load(tables / "detic_coco80_vitb32.npy", lists / "clipself_mscoco_all_classes.json")
    words = ["bicycle", "giraffe", "frisbee", "banana", "toothbrush"]
    cosines = lvis(words) @ coco(words).T
    assert (cosines.argmax(1) == torch.arange(5)).all() and cosines.diag().min() > 0.9
    with pytest.raises(ValueError, match="no row for 'zebras' \\(near: 'zebra'"):
        coco("zebras")


def test_a_safetensors_header_is_not_trusted(tmp_path):
    (tmp_path / "table.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ValueError, match="cannot read text table"):
        TextTable.load(tmp_path / "table.safetensors", NAMES)
