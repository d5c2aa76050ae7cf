"""Files of published models: told apart, renamed, and given the options that their weights need."""

from pathlib import Path

import pytest
import torch

from clipdense.checkpoint import (
    Checkpoint,
    CheckpointError,
    ModelLayout,
    class_differences,
    config_options,
    convert_model,
    register_layout,
    rename,
)

PREFIXES = {"neck.": "fpn.", "neck.last.": "top.", "gamma": "scale"}


@pytest.fixture(autouse=True)
def layout(monkeypatch):
    monkeypatch.setattr("clipdense.checkpoint.layouts.LAYOUTS", layouts := {})
    monkeypatch.setattr("clipdense.checkpoint.convert.LAYOUTS", layouts)

    def options(state, classes):
        if "gamma" not in state:
            raise CheckpointError("it lacks gamma")
        return {"MODEL.FPN.OUT_CHANNELS": len(state["gamma"]), "MODEL.LANGUAGE.CLASSES": classes}

    return register_layout(
        ModelLayout(
            name="toy",
            about="a toy",
            matches=lambda state: any(key.startswith("neck.") for key in state),
            convert=lambda state: {rename(key, PREFIXES): value for key, value in state.items()},
            classes="thing_classes",
            options=options,
            prefixes=lambda state: PREFIXES,
        )
    )


def file(keys=("neck.0.weight", "neck.last.weight", "gamma"), **extras):
    return Checkpoint(Path("x.pth"), {key: torch.zeros(2) for key in keys}, "torch", extras=extras)


def test_the_longest_prefix_counts():
    assert rename("neck.0.weight", PREFIXES) == "fpn.0.weight"
    assert rename("neck.last.weight", PREFIXES) == "top.weight"
    assert rename("head.neck.weight", PREFIXES) == "head.neck.weight"


def test_a_published_file():
    converted = convert_model(file(meta={"CLASSES": ("a", "b")}, optimizer={}))
    assert set(converted.state) == {"fpn.0.weight", "top.weight", "scale"}
    assert config_options(converted) == {"MODEL.FPN.OUT_CHANNELS": 2, "MODEL.LANGUAGE.CLASSES": ["a", "b"]}
    assert converted.metadata["source"] == "toy" and converted.metadata["thing_classes"] == ["a", "b"]
    assert not converted.extras  # what a training left behind is no training of ours


@pytest.mark.parametrize("extras", [{}, {"meta": {"epoch": 1}}, {"meta": None}])
def test_a_file_that_lists_no_classes(extras):
    assert "thing_classes" not in convert_model(file(**extras)).metadata
    assert config_options(convert_model(file(**extras), ["c"]))["MODEL.LANGUAGE.CLASSES"] == ["c"]


def test_other_files_stay_as_they_are():
    other = file(keys=("head.weight",), iteration=3)
    assert convert_model(other) is other and config_options(other) == {}
    other.metadata = {"layout": "open_clip", "options": {"config": {"model_cfg": {}}}}
    assert config_options(other) == {}  # a CLIP's own options are no config keys


def test_errors_name_file_and_layout():
    with pytest.raises(CheckpointError, match=r"x.pth, of layout toy: it lacks gamma"):
        convert_model(file(keys=("neck.0.weight",)))
    with pytest.raises(
        CheckpointError, match=r"x.pth lists other classes:\n  class 1: 'b' in the file, 'c' expected"
    ):
        convert_model(file(meta={"CLASSES": ("a", "b")}), ["a", "c"])


def test_capitals_and_white_space_make_no_other_class():
    assert class_differences(["bed ", "Potted  Plant"], ["bed", "potted plant"]) == []
    assert class_differences(["a"], ["a", "b"]) == ["1 classes in the file, 2 expected"]
