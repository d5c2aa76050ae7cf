"""Denormal numbers are flushed while a model is trained or evaluated on the CPU, and only then."""

from collections.abc import Callable

import pytest
import torch

from clipdense.engine.denormals import denormals_are_flushed, flush_denormals
from clipdense.engine.trainer import Trainer

from detectron2.engine.hooks import CallbackHook

pytestmark = pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="the processor cannot flush denormals"
)


def test_context_flushes_and_restores() -> None:
    assert not denormals_are_flushed()
    with flush_denormals():
        assert denormals_are_flushed()
        with flush_denormals():
            pass
        assert denormals_are_flushed()
    assert not denormals_are_flushed()


def test_training_and_evaluation_flush(build_trainer: Callable[..., Trainer]) -> None:
    seen: dict[str, bool] = {}
    trainer = build_trainer("SOLVER.MAX_ITER", 2, "DATASETS.TEST", ("toy",))
    trainer.register_hooks([CallbackHook(after_step=lambda _: seen.update(step=denormals_are_flushed()))])
    handle = trainer.model.register_forward_hook(
        lambda model, args, out: seen.update({f"training {model.training}": denormals_are_flushed()})
    )
    trainer.train()
    handle.remove()
    assert seen == {"step": True, "training True": True, "training False": True}
    assert not denormals_are_flushed()
