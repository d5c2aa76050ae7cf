"""The same training from a yacs config, a LazyConfig, and Detectron2's own trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdense.checkpoint import CheckpointError
from clipdense.engine.build import build_model, evaluate_weights
from clipdense.engine.options import ConfigError
from clipdense.engine.trainer import Trainer
from clipdense.run.setup import load_config
from tests.helpers import engine_toy

from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model as detectron2_build_model
from detectron2.utils.env import seed_all_rng

Build = Callable[..., Trainer]
SAME_AS_LAZY = ("MODEL.TOY.DROPOUT", 0.0, "SOLVER.WARMUP_ITERS", 0, "SOLVER.EMA_DECAY", 0.9)


def lazy(tmp_path: Path, *overrides: str) -> Any:
    file = Path(engine_toy.__file__).with_name("lazy_toy.py")
    return load_config(str(file), [f"train.output_dir={tmp_path}", *overrides])


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


def test_lazy_config_builds_the_same(build_trainer: Build, tmp_path: Path) -> None:
    yacs = build_trainer(*SAME_AS_LAZY, "DATASETS.TEST", ("toy",), folder="yacs")
    expected = yacs.train()
    seed_all_rng(0)
    trainer = Trainer(lazy(tmp_path))
    trainer.resume_or_load(False)
    assert trainer.train() == expected
    assert losses(tmp_path) == losses(tmp_path / "yacs")
    assert trainer.options.checkpoint_keep == 10 and (tmp_path / "model_0000004.pth").exists()
    last = torch.load(tmp_path / "model_final.pth")["model"]
    for name, value in torch.load(tmp_path / "yacs" / "model_final.pth")["model"].items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=0)


def test_lazy_config_resumes(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool) -> Trainer:
        seed_all_rng(0)
        folder.mkdir(exist_ok=True)
        trainer = Trainer(lazy(folder))
        trainer.resume_or_load(resume)
        trainer.train()
        return trainer

    run(tmp_path / "a", False)
    run(tmp_path / "b", False)
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000004.pth")
    assert run(tmp_path / "b", True).start_iter == 5
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_lazy_overrides(tmp_path: Path) -> None:
    cfg = lazy(
        tmp_path, "train.max_iter=3", "model.dropout=0.5", "train.amp.enabled=true", "train.max_seconds=9"
    )
    trainer = Trainer(cfg)
    assert trainer.max_iter == 3 and trainer.model.dropout.p == 0.5
    assert trainer.options.precision == "float16" and trainer.options.max_seconds == 9


def test_evaluation_alone(build_trainer: Build, tmp_path: Path) -> None:
    trainer = build_trainer("DATASETS.TEST", ("toy",), "SOLVER.EMA_DECAY", 0.9)
    expected = trainer.train()
    path = trainer.checkpointer.get_checkpoint_file()
    cfg = engine_toy.toy_config(tmp_path / "run", "DATASETS.TEST", ("toy",), "MODEL.WEIGHTS", path)
    assert evaluate_weights(cfg) == pytest.approx(expected)
    cfg.MODEL.WEIGHTS = ""
    assert evaluate_weights(cfg, resume=True) == pytest.approx(expected)
    assert evaluate_weights(lazy(tmp_path / "run", f"train.init_checkpoint={path}")) == pytest.approx(
        expected
    )
    torch.save({"head.bias": torch.zeros(1)}, tmp_path / "part.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="trunk.0.weight: not in the file"):
        evaluate_weights(cfg)


@pytest.mark.parametrize("key", ["TEST.PRECISE_BN.ENABLED", "TEST.AUG.ENABLED"])
def test_keys_of_detectron2_that_are_left_out_are_not_ignored(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="is not supported here"):
        Trainer(engine_toy.toy_config(tmp_path, key, True))


def test_several_test_sets(build_trainer: Build) -> None:
    results = build_trainer("DATASETS.TEST", ("toy", "toy_steep")).train()
    assert set(results) == {"toy/toy/error", "toy_steep/toy/error"}


def test_sync_bn_key(tmp_path: Path) -> None:
    cfg = engine_toy.toy_config(tmp_path, "MODEL.SYNC_BN", True)
    assert type(build_model(cfg).trunk[1]).__name__ == "SyncBatchNorm"
    assert type(detectron2_build_model(cfg).trunk[1]).__name__ == "BatchNorm2d"


def test_detectron2s_own_tools_take_our_configs(tmp_path: Path) -> None:
    """`build_model(cfg)`, as analyze_model uses it, and DefaultTrainer."""
    cfg = engine_toy.toy_config(tmp_path, "SOLVER.OPTIMIZER", "SGD", "SOLVER.MAX_ITER", 3)
    cfg.SOLVER.AMP.DTYPE = "bfloat16"

    class Theirs(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            from clipdense.data.loader import build_train_loader

            return build_train_loader(cfg)

    trainer = Theirs(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_final.pth").exists()
    # and its checkpoint begins one of ours
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "model_final.pth"), str(tmp_path / "ours")
    (tmp_path / "ours").mkdir()
    ours = Trainer(cfg)
    ours.resume_or_load(False)
    assert torch.equal(ours.model.head.weight, trainer.model.head.weight)
