import logging

import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from clipdense.engine.schedule import PolynomialDecay, Schedule, build_schedule
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.solver import build_lr_scheduler


def config(**solver: object) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    for key, value in {
        "MAX_ITER": 40,
        "WARMUP_ITERS": 7,
        "STEPS": (20, 31),
        "BASE_LR": 0.3,
        **solver,
    }.items():
        cfg.SOLVER[key] = value
    return cfg


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
@pytest.mark.parametrize("method", ["linear", "constant"])
def test_equals_detectron2(name: str, method: str) -> None:
    cfg = config(LR_SCHEDULER_NAME=name, WARMUP_METHOD=method)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), cfg.SOLVER.BASE_LR)
    theirs = build_lr_scheduler(cfg, optimizer)
    ours = build_schedule(cfg)
    for i in range(cfg.SOLVER.MAX_ITER):
        assert 0.3 * ours(i, i / 40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), i
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupPolyLR"])
def test_decays_to_the_end_value(name: str) -> None:
    schedule = build_schedule(config(LR_SCHEDULER_NAME=name, BASE_LR_END=0.03))
    assert schedule(40, 1.0) == pytest.approx(0.1)
    values = [schedule(i, i / 40) for i in range(7, 41)]
    assert values == sorted(values, reverse=True)


def test_decays() -> None:
    assert PolynomialDecay(2.0, end=0.2)(0.5) == pytest.approx(0.2 + 0.8 * 0.25)
    steps = build_schedule(config(STEPS=(20, 32), WARMUP_ITERS=0))
    assert [steps(i, i / 40) for i in (19, 20, 32)] == pytest.approx([1, 0.1, 0.01])


def test_steps_that_do_not_ascend_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"SOLVER.STEPS must ascend, got \(31, 20\)"):
        build_schedule(config(STEPS=(31, 20)))


def test_under_a_time_cap_warmup_is_short_and_the_decay_complete() -> None:
    # a slow machine: after 10 of 1000 iterations all time is used up
    solver = {"MAX_ITER": 1000, "WARMUP_ITERS": 100, "MAX_SECONDS": 60.0}
    schedule = build_schedule(config(LR_SCHEDULER_NAME="WarmupCosineLR", **solver))
    values = [schedule(i, i / 10) for i in range(11)]
    assert values[0] == pytest.approx(0.001)
    assert values[1] == pytest.approx(CosineParamScheduler(1.0, 0.0)(0.1))
    assert values[10] == pytest.approx(0.0)
    # a fast machine: the iterations decide, as without a cap
    plain = Schedule(CosineParamScheduler(1.0, 0.0), max_iter=1000, warmup_iters=50)
    fast = Schedule(CosineParamScheduler(1.0, 0.0), max_iter=1000, warmup_iters=50, timed=True)
    assert [fast(i, i / 1000) for i in range(1000)] == [plain(i, i / 1000) for i in range(1000)]


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="must be one of.*WarmupCosineLR.*WarmupCosLR"):
        build_schedule(config(LR_SCHEDULER_NAME="WarmupCosLR"))
    with pytest.raises(
        ValueError, match="WARMUP_METHOD must be 'linear', 'constant' or 'scaled_linear', got 'log'"
    ):
        build_schedule(config(WARMUP_METHOD="log"))


def test_smallest_rate_of_all_groups() -> None:
    """mmcv's: every group decays to the same rate, which also raises a group of rate 0; warm-up scales it."""
    solver = {"LR_SCHEDULER_NAME": "WarmupPolyLR", "WARMUP_METHOD": "scaled_linear", "MIN_LR": 0.01}
    schedule = build_schedule(config(**solver, WARMUP_FACTOR=0.5))
    for base in (0.3, 0.03, 0.0):
        assert schedule(40, 1.0, base) == pytest.approx(0.01)
        assert schedule(20, 0.5, base) == pytest.approx((base - 0.01) * 0.5**0.9 + 0.01)
        decayed = (base - 0.01) * (1 - 3 / 40) ** 0.9 + 0.01
        assert schedule(3, 3 / 40, base) == pytest.approx(decayed * (1 - (1 - 3 / 7) * 0.5))
    with pytest.raises(ValueError, match="MIN_LR 0.01 and SOLVER.BASE_LR_END 0.1 both set"):
        build_schedule(config(**solver, BASE_LR_END=0.1))


def test_a_warm_up_without_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clipdense"):
        build_schedule(config(WARMUP_ITERS=39))
        assert not caplog.records
        build_schedule(config(WARMUP_ITERS=40))
    assert "SOLVER.WARMUP_ITERS 40 is not below SOLVER.MAX_ITER 40" in caplog.text
