import importlib.util
import json
from pathlib import Path

import pytest
import torch

from clipdense.clip import load_clip
from clipdense.clip.tables import TextTable
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.boundary import tool_errors

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_text_table.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("make_text_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    clip = load_clip("shapes-rn", "random")
    path = tmp_path / "clip.safetensors"
    clip.save(path)
    return path


def test_reading_back_equals_the_bank(main, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))
    names = tmp_path / "names.json"
    names.write_text(
        json.dumps([{"id": 2, "name": "bow_(weapon)"}, {"id": 1, "name": "cat", "synonyms": ["kitten"]}])
    )
    output = tmp_path / "table.safetensors"
    arguments = [
        str(output),
        "--model",
        str(weights),
        "--vocabulary",
        str(names),
        "--templates",
        "a {}",
        "the {}",
    ]
    assert main([*arguments, "--no-cache"]) == 0
    assert "3 names of 2 classes x 128, custom" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    vocabulary = Vocabulary.from_file(names)
    expected = TextBank(load_clip(str(weights)), ["a {}", "the {}"], cache_dir=None)(vocabulary)
    assert torch.equal(TextTable.load(output)(vocabulary), expected)
    output.unlink()
    assert main(arguments) == 0 and (tmp_path / "cache").exists()
    assert torch.equal(TextTable.load(output)(vocabulary), expected)


def test_words_and_named_sets(main, weights, tmp_path):
    output = tmp_path / "table.safetensors"
    arguments = [
        str(output),
        "--model",
        str(weights),
        "--vocabulary",
        "cat|kitten, red car",
        "--templates",
        "vild_63",
    ]
    assert main([*arguments, "--no-cache"]) == 0
    assert TextTable.load(output)("kitten, cat, red_car").shape == (3, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--templates", "vild_62"], "did you mean 'vild_63'"),
        (["--vocabulary", "cat, Cat"], "are the same"),
        (["--vocabulary", "nowhere.txt"], "no class-list file 'nowhere.txt'"),
        (["--model", "shapes-rm", "--pretrained", "random"], "shapes-rn"),
    ],
)
def test_what_is_wrong_is_said_without_traceback(main, weights, tmp_path, capsys, change, message):
    output = tmp_path / "table.safetensors"
    arguments = [str(output), "--model", str(weights), "--vocabulary", "cat", "--no-cache", *change]
    with pytest.raises(SystemExit, match="1"), tool_errors():
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not output.exists()


def test_help_and_usage(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "zegformer_32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["table.npy", "--model", "x", "--vocabulary", "cat"])
    assert "written as .safetensors, not 'table.npy'" in capsys.readouterr().err
