"""The zoo: what it lists is there, and agrees with the READMEs."""

import re
from pathlib import Path

import pytest

from clipdense.clip.nano import NANO_MODELS
from clipdense.run.cli import main
from clipdense.run.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_rows_agree_with_the_readmes(entry):
    readme = (ROOT / "projects" / entry.system / "README.md").read_text()
    for number in re.findall(r"\d+\.\d", entry.numbers):
        assert f" {number} " in readme.replace("*", " ")
    if entry.licence.startswith("CC"):
        assert entry.licence in readme
    if entry.source == "published":
        assert (ROOT / "projects" / entry.system / "configs" / f"{entry.name}.yaml").is_file()


def test_the_package_has_what_is_said_to_be_in_it():
    assert {entry.name for entry in ZOO if entry.source == "package"} == set(NANO_MODELS)


def test_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["models"])
    printed = capsys.readouterr().out
    assert not end.value.code and all(entry.name in printed for entry in ZOO)
    with pytest.raises(SystemExit):
        main(["models", "panoptic", "--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("clipdense panoptic ") for line in lines)
    with pytest.raises(SystemExit) as end:
        main(["models", "no such model"])
    assert end.value.code == 1
