"""The zoo: what it lists is there, and agrees with the READMEs."""

import importlib
import re
from pathlib import Path

import open_clip
import pytest

from clipdense.checkpoint.layouts import LAYOUTS
from clipdense.clip.nano import NANO_MODELS
from clipdense.run.cli import main
from clipdense.run.headline_rows import read_rows
from clipdense.run.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_rows_agree_with_the_readmes(entry):
    readme = (ROOT / "projects" / entry.system / "README.md").read_text()
    for number in re.findall(r"\d+\.\d", entry.numbers):
        assert re.search(rf"[ *,]{re.escape(number)}[ *,]", readme)
    if entry.licence.startswith("CC"):
        assert entry.licence.partition(" (")[0] in readme
    if not entry.is_clip:
        assert (ROOT / "projects" / entry.system / "configs" / f"{entry.name}.yaml").is_file()


def test_rows_agree_with_the_published_weights():
    """Where `clipdense reproduce` names the weights of a config, the zoo says the same of them."""
    zoo = {f"projects/{entry.system}/configs/{entry.name}.yaml": entry for entry in ZOO}
    zoo |= {f"{entry.name}.pt": entry for entry in ZOO}
    compared = set()
    for row in read_rows(ROOT / "projects" / "headline_rows.yaml"):
        if row.weights is None or (entry := zoo.get(row.config) or zoo.get(row.weights.local_name)) is None:
            continue
        assert entry.page == row.weights.page and entry.licence == row.weights.licence, row.name
        assert entry.megabytes == row.weights.megabytes, row.name
        compared.add(entry.name)
    assert len(compared) > 20


def test_every_model_has_a_licence_and_a_source():
    assert len({entry.name for entry in ZOO}) == len(ZOO)
    assert all(entry.licence and (entry.page.count("/") == 4 or entry.source == "package") for entry in ZOO)
    clips = [entry.name.partition(":")[0] for entry in ZOO if entry.source == "open_clip"]
    assert clips and set(clips) <= set(open_clip.list_models())


def test_every_layout_that_is_converted_has_a_row():
    """The project of a layout is among the rows. ODISE's files are refused."""
    importlib.import_module("clipdense.systems")
    systems = {entry.system for entry in ZOO}
    names = set(LAYOUTS)
    folders = {"catseg": "CATSeg", "sed": "CATSeg", "fcclip": "FCCLIP", "segclip": "SegCLIP", "fvit": "FVLM"}
    folders |= {name: "DenseCLIP" for name in names if name.startswith("denseclip")}
    folders |= {"ovseg": "OVSeg", "zsseg": "OVSeg"}
    folders |= {"zegformer": "ZegFormer", "zegformer_proposals": "ZegFormer"}
    folders |= {"openai_clip": "ZeroShot", "open_clip": "ZeroShot", "eva_clip": "CLIPSelf"}
    folders |= {"maskformer": "MaskFormer", "mask2former": "MaskFormer"}
    assert {name for name in names if folders.get(name) not in systems} <= {"odise"}


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
