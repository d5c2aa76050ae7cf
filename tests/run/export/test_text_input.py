"""Text tables become the inputs of exported files, without torch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from clipdense.clip import load_clip
from clipdense.clip.tables import save_table
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.text_input import FORMAT_KEY, read_text_input
from clipdense.run.export.text_output import save_text_input, synonym_table

NAMES = FileMetadata(system="FCCLIP", task="masks", text="names", embed_dim=128, base_names=("bluestar",))
VOCABULARY = Vocabulary.parse("red star|crimson star, blue star, grass|lawn|meadow")


@pytest.fixture(scope="module")
def bank() -> TextBank:
    return TextBank(load_clip("shapes-vit"), "single", cache_dir=None)


@pytest.fixture(scope="module")
def table(bank: TextBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "words.safetensors"
    save_table(path, bank, VOCABULARY)
    return path


def test_rows_of_names_are_those_of_the_text_bank(bank: TextBank, table: Path) -> None:
    found = read_text_input(table, NAMES)
    rows, classes = bank.per_synonym(VOCABULARY)
    np.testing.assert_allclose(found.arrays["text"], rows.numpy(), atol=1e-6)
    assert found.classes == VOCABULARY.names
    assert found.base.tolist() == [False, True, False]
    np.testing.assert_array_equal(found.arrays["synonyms"], synonym_table(classes).numpy())
    assert [sorted(set(row)) for row in found.arrays["synonyms"].tolist()] == [[0, 1], [2], [3, 4, 5]]


def test_rows_of_classes_are_those_of_the_text_bank(bank: TextBank, table: Path) -> None:
    found = read_text_input(table, replace(NAMES, text="classes"))
    np.testing.assert_allclose(found.arrays["text"], bank(VOCABULARY).numpy(), atol=1e-6)
    prompts = read_text_input(table, replace(NAMES, text="prompts", prompts=1)).arrays["text"]
    rows = bank.per_synonym(VOCABULARY)[0][[0, 2, 3]]
    np.testing.assert_allclose(prompts, rows[:, None].numpy(), atol=1e-6)


def test_inputs_of_a_model_come_back_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    inputs = {"text": torch.randn(3, 2, 128)}
    metadata = replace(NAMES, text="prompts", prompts=2, own_text=True)
    save_text_input(path, inputs, metadata, replace(VOCABULARY, thing=(True, True, False)))
    found = read_text_input(path, metadata)
    np.testing.assert_array_equal(found.arrays["text"], inputs["text"].numpy())
    assert found.things == (0, 1) and found.classes == VOCABULARY.names
    with pytest.raises(ValueError, match="is for files with text 'prompts', not 'names'"):
        read_text_input(path, NAMES)


def test_tables_that_do_not_fit_are_refused(table: Path, tmp_path: Path) -> None:
    cases = [
        (replace(NAMES, text="none", classes=("a",)), "constants of its file"),
        (replace(NAMES, embed_dim=64), "rows of 64 numbers"),
        (replace(NAMES, own_text=True), "has learned its own: write the table with clipdense export"),
        (replace(NAMES, text="prompts", prompts=80), "reads 80 prompts of each class"),
        (replace(NAMES, num_classes=4), "has 3 classes, and the file is built for 4"),
        (replace(NAMES, max_classes=2), "takes at most 2"),
    ]
    for metadata, message in cases:
        with pytest.raises(ValueError, match=message):
            read_text_input(table, metadata)
    with pytest.raises(FileNotFoundError):
        read_text_input(tmp_path / "none.safetensors", NAMES)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"12345678")
    with pytest.raises(ValueError, match="cannot read text table"):
        read_text_input(damaged, NAMES)
    rows = np.full((1, 128), np.nan, np.float32)
    save_file({"embeddings": rows}, damaged, {"index": json.dumps({"classes": ["a"]})})
    with pytest.raises(ValueError, match="finite rows of 128 numbers"):
        read_text_input(damaged, NAMES)
    save_file({"text": rows}, damaged, {FORMAT_KEY: "names", "names": "[1]"})
    with pytest.raises(ValueError, match="not lists of words"):
        read_text_input(damaged, NAMES)
    save_file({"text": rows}, damaged, {FORMAT_KEY: "names", "names": '[["a"]]', "things": "[7]"})
    with pytest.raises(ValueError, match="finite rows"):
        read_text_input(damaged, NAMES)
