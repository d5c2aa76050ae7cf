import argparse
import logging
from pathlib import Path

import pytest
import yaml

from clipdense.engine.options import ConfigError
from clipdense.engine.output import prepare_output_dir
from clipdense.run.setup import load_config, setup

from detectron2.data import DatasetCatalog, MetadataCatalog


def config_file(tmp_path: Path, text: str = "MODEL: {META_ARCHITECTURE: ToyNet}") -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def arguments(tmp_path: Path, *opts: str, **changes: bool) -> argparse.Namespace:
    text = """
MODEL: {META_ARCHITECTURE: ToyNet}
INPUT: {MAPPER: ToyMapper}
DATASETS:
  TRAIN: ("toy",)
"""
    options = {"resume": False, "eval_only": False, **changes}
    output = ["OUTPUT_DIR", str(tmp_path / "out")]
    return argparse.Namespace(config_file=config_file(tmp_path, text), opts=[*output, *opts], **options)


@pytest.mark.parametrize(
    "key, near",
    [
        ("SOLVER.BASE_LRR", "SOLVER.BASE_LR"),
        ("SOLVER.MAX_ITERS", "SOLVER.MAX_ITER"),
        ("MODEL.EVAL_PERIOD", "TEST.EVAL_PERIOD"),  # the right name in the wrong place
        ("MODEL.CLIPP", "MODEL.CLIP.NAME"),
    ],
)
def test_unknown_keys_have_near_ones(tmp_path: Path, key: str, near: str) -> None:
    message = f"unknown config key {key}. Did you mean .*{near}"
    with pytest.raises(ConfigError, match=f"the command line: {message}"):
        load_config(config_file(tmp_path), [key, "1"])
    node: object = 1
    for part in reversed(key.split(".")):
        node = {part: node}
    path = config_file(tmp_path, yaml.safe_dump(node))
    with pytest.raises(ConfigError, match=f"config.yaml: {message}"):
        load_config(path)


@pytest.mark.parametrize("key", ["MODEL.CLIP.ALLOW_PICKLE", "MODEL.TIMM.ALLOW_PICKLE"])
def test_renamed_keys_name_the_new_one(tmp_path: Path, key: str) -> None:
    message = f"the config key {key} is now MODEL.ALLOW_PICKLE"
    with pytest.raises(ConfigError, match=f"the command line: {message}"):
        load_config(config_file(tmp_path), [key, "True"])
    node: object = True
    for part in reversed(key.split(".")):
        node = {part: node}
    with pytest.raises(ConfigError, match=f"config.yaml: {message}"):
        load_config(config_file(tmp_path, yaml.safe_dump(node)))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    with pytest.raises(ConfigError, match=r"SOLVER.MAX_ITER"):
        load_config(path, ["SOLVER.MAX_ITER", "many"])
    with pytest.raises(ConfigError, match="there are 1 words: SOLVER.MAX_ITER"):
        load_config(path, ["SOLVER.MAX_ITER"])
    with pytest.raises(ConfigError, match="before the KEY VALUE pairs, but --resume follows"):
        load_config(path, ["SOLVER.MAX_ITER", "3", "--resume"])
    with pytest.raises(ConfigError, match="no config file is named"):
        load_config("")
    with pytest.raises(ConfigError, match="configs/shapes/clip_rm.yaml does not exist.*clip_rn.yaml"):
        load_config("configs/shapes/clip_rm.yaml")
    with pytest.raises(ConfigError, match="config.yaml"):
        load_config(config_file(tmp_path, "MODEL: [unclosed"))


def test_an_int_will_do_for_a_float(tmp_path: Path) -> None:
    cfg = load_config(config_file(tmp_path), ["SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER", "7", "SEED", "-1"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SEED) == (1.0, 7, -1)


def test_configs_of_the_package_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/shapes/clip_rn.yaml").MODEL.META_ARCHITECTURE == "ContrastiveCLIP"


# ---- the output folder


def test_an_earlier_run_is_moved_not_overwritten(tmp_path: Path) -> None:
    for name in ("model_final.pth", "last_checkpoint", "metrics.json", "log.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "inference").mkdir()
    assert prepare_output_dir(str(tmp_path), keep=True) is None
    assert prepare_output_dir(str(tmp_path), keep=False) == tmp_path / "old_1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.md", "old_1", "run.lock"]
    assert (tmp_path / "old_1" / "model_final.pth").read_text() == "model_final.pth"
    assert prepare_output_dir(str(tmp_path), keep=False) is None  # nothing left to move
    (tmp_path / "metrics.json").write_text("second")
    assert prepare_output_dir(str(tmp_path), keep=False) == tmp_path / "old_2"


def test_weights_are_not_moved_away(tmp_path: Path) -> None:
    for name in ("model_final.pth", "last_checkpoint"):
        (tmp_path / name).touch()
    weights = str(tmp_path / "model_final.pth")
    with pytest.raises(ConfigError, match="model_final.pth belongs to the run in OUTPUT_DIR"):
        prepare_output_dir(str(tmp_path), keep=False, weights=weights)
    assert prepare_output_dir(str(tmp_path), keep=True, weights=weights) is None


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="OUTPUT_DIR .*file/out cannot be written: Not a directory"):
        prepare_output_dir(str(tmp_path / "file" / "out"), keep=False)


# ---- setup


def test_setup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = setup(arguments(tmp_path, "MODEL.DEVICE", "cuda:0")).cfg
    noted = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert cfg.SEED >= 0 and noted["SEED"] == cfg.SEED  # drawn, and kept
    assert cfg.is_frozen() and (tmp_path / "out" / "environment.txt").exists()
    assert "clipdense" in (tmp_path / "out" / "log.txt").read_text()
    resumed = setup(arguments(tmp_path, resume=True)).cfg
    assert resumed.SEED == cfg.SEED
    assert setup(arguments(tmp_path, "SEED", "7", resume=True)).cfg.SEED == 7
    assert not list((tmp_path / "out").glob("old_*"))


def test_without_a_gpu_training_runs_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert setup(arguments(tmp_path, "MODEL.DEVICE", "cuda")).cfg.MODEL.DEVICE == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert setup(arguments(tmp_path, "MODEL.DEVICE", "cuda")).cfg.MODEL.DEVICE == "cuda"


def test_data_sets_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'toi' is not registered"):
        setup(arguments(tmp_path, "DATASETS.TRAIN", "('toi',)"))
    head = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "5")
    with pytest.raises(ConfigError, match="NUM_CLASSES = 5, but dataset toy has 1 thing classes"):
        setup(arguments(tmp_path, *head))
    MetadataCatalog.get("toy_untold")
    if "toy_untold" not in DatasetCatalog.list():
        DatasetCatalog.register("toy_untold", list)
    with pytest.raises(ConfigError, match="toy_untold has evaluator_type None.*known types are .*coco"):
        setup(arguments(tmp_path, "DATASETS.TEST", "('toy_untold',)"))
    assert not (tmp_path / "out").exists()


def test_max_iter_of_the_command_line_lifts_the_time_limit_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = config_file(tmp_path, "VERSION: 2\nSOLVER: {MAX_SECONDS: 300.0, MAX_ITER: 5}")
    assert load_config(file).SOLVER.MAX_SECONDS == 300.0
    limited = load_config(file, ["SOLVER.MAX_ITER", "9", "SOLVER.MAX_SECONDS", "60.0"])
    assert limited.SOLVER.MAX_SECONDS == 60.0 and not caplog.records
    assert load_config(file, ["SOLVER.MAX_ITER", "9"]).SOLVER.MAX_SECONDS == 0.0
    assert "SOLVER.MAX_SECONDS 300 of the config file does not apply" in caplog.text


@pytest.fixture(autouse=True)
def quiet_loggers() -> object:
    """`setup` adds handlers to global loggers; take them away again."""
    loggers = [logging.getLogger(name) for name in ("clipdense", "detectron2", "fvcore")]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate


def test_configs_choose_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(*overrides: str) -> str:
        return str(load_config("configs/shapes/fvlm_rn.yaml", overrides).MODEL.DEVICE)

    monkeypatch.delenv("CLIPDENSE_DEVICE", raising=False)
    for available, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert device() == expected and device("MODEL.DEVICE", "cpu") == "cpu"
    monkeypatch.setenv("CLIPDENSE_DEVICE", "cuda:1")
    assert device() == "cuda:1" and device("MODEL.DEVICE", "cpu") == "cpu"
    shipped = Path(__file__).resolve().parents[2].glob("configs/shapes/*.yaml")
    assert not [path.name for path in shipped if " DEVICE:" in path.read_text()]
