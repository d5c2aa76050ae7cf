"""Checks of config values: each error names the key, and every key of the table exists."""

import math
import re
from pathlib import Path

import pytest

from clipdense.checkpoint import CheckpointError
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from clipdense.run.config import add_clipdense_config
from clipdense.run.config_checks import choice, either, items, nothing, number, whole
from clipdense.run.config_rules import PATH_KEYS, check_config, check_files, config_remarks
from clipdense.run.config_table import CHECKS
from clipdense.run.keys import config_keys, config_value
from clipdense.run.setup import load_config

from detectron2.config import get_cfg

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/shapes/mask_rcnn_clip_rn.yaml"


@pytest.fixture(scope="module")
def defaults():
    cfg = get_cfg()
    add_clipdense_config(cfg)
    return cfg


def test_every_key_of_the_table_exists(defaults):
    known = set(config_keys(defaults))
    assert len(CHECKS) > 250
    assert sorted(set(CHECKS) - known) == []
    assert sorted(set(PATH_KEYS) - known) == []


def test_the_defaults_pass(defaults):
    check_config(defaults)
    assert [key for key, check in CHECKS.items() if check(config_value(defaults, key)) is not None] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_of_the_package_pass(path):
    """`load_config` checks; a remark would be a mistake in the config."""
    assert config_remarks(load_config(str(path))) == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.IMS_PER_BATCH", "0", "from 1 to 100000"),
        ("SOLVER.IMS_PER_BATCH", "None", "whole number"),
        ("SOLVER.IMS_PER_BATCH", "3000000000000", "from 1 to 100000"),
        ("SOLVER.BASE_LR", "-1.0", "at least 0"),
        ("SOLVER.BASE_LR", "1e999", "finite"),
        ("SOLVER.BETAS", "(0.9,)", "2 entries"),
        ("SOLVER.BETAS", "(0.9, 1.0)", "below 1, not 1.0"),
        ("SOLVER.PARAM_GROUPS", "[{'MATCH': '.', 'LR': 'x'}]", "for LR instead of 'x'"),
        ("SOLVER.PARAM_GROUPS", "['backbone']", "a list of dicts"),
        ("SOLVER.STEPS", "(5, 3)", "ascending"),
        ("SOLVER.OPTIMIZER", "Adam", r"SGD, AdamW \(did you mean AdamW"),
        ("MODEL.META_ARCHITECTURE", "GeneralisedRCNN", "did you mean GeneralizedRCNN"),
        ("MODEL.BACKBONE.FREEZE_AT", "99", "from 0 to 5"),
        ("MODEL.CLIP.NAME", "shapes-rm", "did you mean .*shapes-rn"),
        ("MODEL.DEVICE", "gpu", "cuda"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[]", "at least 1 entry"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], []]", "at least 1 entry"),
        ("MODEL.FPN.NORM", "XX", "FrozenBN"),
        ("MODEL.PIXEL_MEAN", "[1.0]", "3 numbers.*INPUT.FORMAT RGB"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]", "above 0, not 0.0"),
        ("MODEL.MASK_ON", "None", "True or False"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "0", "at least 1"),
        ("MODEL.FVLM.ALPHA", "1.5", "from 0 to 1"),
        ("MODEL.FVLM.TEMPLATES", "clip80", "did you mean 'clip_80'"),
        ("DATASETS.TEST", "[3]", "text, not 3"),
        ("DATALOADER.SAMPLER_TRAIN", "x", "RepeatFactorTrainingSampler"),
        ("DATALOADER.NUM_WORKERS", "-1", "at least 0"),
        ("INPUT.MAPPER", "DetektionMapper", "did you mean DetectionMapper"),
        ("INPUT.FORMAT", "x", "RGB, BGR"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "at least 1 entry"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "x", "choice, range"),
        ("INPUT.CROP.TYPE", "x", "relative_range"),
        ("INPUT.CROP_CAPTION.VIEWS", "[]", "one or more views"),
        ("INPUT.CROP_CAPTION.VIEWS", "[{'SIZE': 64, 'SHARE': -1}]", "at least 0.* for SHARE instead of -1"),
        ("INPUT.CROP_CAPTION.VIEWS", "[{'SIZE': 64, 'SHARE': 0}]", "a SHARE above 0"),
        ("INPUT.CLIPSELF.JITTER", "-1", "at least 0"),
        ("MODEL.CLIPSELF.WINDOW", "-8", "at least 0"),
        ("MODEL.LANGUAGE.CONTEXT_STD", "-1.0", "at least 0"),
        ("MODEL.PIXEL_TEXT.LOSS", "mse", "bce, focal, ce"),
        ("TEST.METRIC_BACKEND", "x", "hotcoco, reference"),
        ("TEST.MAX_DETS", "-1", "at least 0"),
        ("OUTPUT_DIR", "", "a folder"),
        ("OUTPUT_DIR", "$CLIPDENSE_NOT_SET/a", "variable .*is not set"),
    ],
)
def test_errors_name_the_key(key, value, expected):
    with pytest.raises(ConfigError, match=f"{key} is .*{expected}") as error:
        load_config(CONFIG, [key, value])
    assert len(str(error.value).splitlines()) == 1


def test_sizes_of_a_range_are_two():
    with pytest.raises(ConfigError, match=r"INPUT.MIN_SIZE_TRAIN is \(1, 2, 3\).*SAMPLING is range"):
        load_config(CONFIG, ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(1, 2, 3)"])


def test_a_weight_file_that_is_none_names_the_key(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("text")
    with pytest.raises(CheckpointError, match=r"MODEL.WEIGHTS: .*weights\.pth"):
        load_config(CONFIG, ["MODEL.WEIGHTS", str(path)])


def test_a_map_that_the_backbone_lacks_is_named():
    cfg = load_config(CONFIG, ["MODEL.RPN.IN_FEATURES", "['p9']", "MODEL.DEVICE", "cpu"])
    with pytest.raises(ConfigError, match=r"MODEL.RPN.IN_FEATURES is \['p9'\].*no map 'p9'; it has p3"):
        run_config(cfg).build_model()


def test_each_check_accepts_and_refuses():
    for check, right, wrong in (
        (whole(0, 3), (0, 3), (-1, 4, 1.0, True, None, "1")),
        (number(0), (0, 2.5), (-0.1, math.nan, math.inf, True, None, "1")),
        (number(above=0, below=1), (0.5,), (0, 1)),
        (choice("a", ""), ("a", ""), ("b", None, 1)),
        (items(whole(), length=2), ([1, 2], (1, 2)), ([1], [1, 2, 3], [1, "2"], 5, None)),
        (items(least=1), ([0],), ([], ())),
        (either(nothing, number(0)), (None, 1), (-1, "x")),
    ):
        assert [check(value) for value in right] == [None] * len(right)
        assert all(check(value) for value in wrong)


# ---- paths


def test_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIPDENSE_TEST_FOLDER", str(tmp_path / "folder"))
    for key in PATH_KEYS:
        if key in ("MODEL.WEIGHTS", "MODEL.CLIP.NAME") or "PROPOSAL" in key:
            continue  # read at once; a list
        for value, folder in (("~/a", tmp_path), ("$CLIPDENSE_TEST_FOLDER/a", tmp_path / "folder")):
            assert config_value(load_config(CONFIG, [key, value]), key) == str(folder / "a"), key
    value = "['~/a', 'b']"
    cfg = load_config(CONFIG, ["DATASETS.PROPOSAL_FILES_TEST", value, "MODEL.WEIGHTS", "~/none.pth"])
    assert list(cfg.DATASETS.PROPOSAL_FILES_TEST) == [str(tmp_path / "a"), "b"]
    assert str(tmp_path / "none.pth") == cfg.MODEL.WEIGHTS


def test_paths_of_a_config_file_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(f"_BASE_: {ROOT / CONFIG}\nOUTPUT_DIR: ~/runs/birds\n")
    assert str(tmp_path / "runs" / "birds") == load_config("~/own.yaml").OUTPUT_DIR


def test_paths_of_a_lazy_config_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["train.output_dir='~/out'", "train.init_checkpoint='~/none.pth'"]
    train = load_config(str(ROOT / "tests/helpers/lazy_toy.py"), words).train
    assert (train.output_dir, train.init_checkpoint) == (str(tmp_path / "out"), str(tmp_path / "none.pth"))


@pytest.mark.parametrize("word", ["train.output_dir=~/out", "train.max_iter"])
def test_words_that_a_lazy_config_cannot_take_are_described(word):
    with pytest.raises(ConfigError, match="the command line: .*a .py config takes key=value") as error:
        load_config(str(ROOT / "tests/helpers/lazy_toy.py"), [word])
    assert len(str(error.value).splitlines()) == 1


# ---- files


@pytest.mark.parametrize(
    "key",
    [
        "MODEL.CLIP.PRETRAINED",
        "MODEL.TWO_STAGE.ADAPTED_CLIP",
        "MODEL.TEXT_RCNN.TABLE",
        "MODEL.FVLM.TEXT_TABLE",
    ],
)
def test_files_are_looked_at_first(tmp_path, key):
    path = tmp_path / "there.safetensors"
    path.touch()
    check_files(run_config(load_config(CONFIG, [key, str(path)])), False)
    with pytest.raises(ConfigError, match=f"{key}: file .*none.safetensors does not exist"):
        check_files(run_config(load_config(CONFIG, [key, str(tmp_path / "none.safetensors")])), False)


def test_weights_that_a_checkpoint_replaces_are_not_needed(tmp_path):
    run = run_config(load_config(CONFIG, ["MODEL.WEIGHTS", str(tmp_path / "none.pth")]))
    check_files(run, checkpoint_exists=True)
    with pytest.raises(ConfigError, match=r"MODEL.WEIGHTS: weight file .*none.pth does not exist"):
        check_files(run, checkpoint_exists=False)


# ---- remarks


@pytest.mark.parametrize(
    ("words", "remark"),
    [
        (["SOLVER.STEPS", "(5, 20)", "SOLVER.MAX_ITER", "20"], r"SOLVER.STEPS \[20\] have no effect"),
        (["MODEL.CLIPSELF.ALPHA", "0.7"], "MODEL.CLIPSELF.ALPHA has no effect: MODEL.META_ARCHITECTURE is"),
        (["SOLVER.AMP.DTYPE", "bfloat16"], "SOLVER.AMP.DTYPE has no effect: SOLVER.AMP.ENABLED is False"),
        (
            ["MODEL.LANGUAGE.CONTEXT_STD", "0.5", "MODEL.PROMPT.METHOD", "contexts"],
            "MODEL.LANGUAGE.CONTEXT_STD has no effect: MODEL.PROMPT.METHOD is 'contexts', not ''",
        ),
        (["TEST.BEST_METRIC", "bbox/AP", "DATASETS.TEST", "()"], "TEST.BEST_METRIC has no effect"),
    ],
)
def test_keys_without_effect_are_remarked(words, remark):
    base = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    cfg = load_config(CONFIG, [*base, "SOLVER.WARMUP_ITERS", "1", *words])
    remarks = config_remarks(cfg, words[::2])
    assert len(remarks) == 1
    assert re.search(remark, remarks[0])
