"""Lines about the progress of a training that no terminal shows."""

from types import SimpleNamespace
from typing import Any

import pytest

from clipdense.engine import hooks
from clipdense.engine.hooks import Progress


def test_slow_iterations_get_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(hooks, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Progress, "_line", lambda self: f"iteration {self.trainer.iter + 1}")
    trainer: Any = SimpleNamespace(iter=0, start_iter=0, max_iter=100, progress=lambda done: done / 100)
    progress = Progress(20)
    progress.trainer = trainer
    progress.before_train()

    def logged(seconds: float, count: int) -> list[str]:
        nonlocal now
        caplog.clear()
        with caplog.at_level("INFO", "clipdense"):
            for _ in range(count):
                now += seconds
                progress.after_step()
                trainer.iter += 1
        return [record.message for record in caplog.records]

    assert logged(0.1, 20) == ["iteration 20"]
    assert logged(2.0, 6) == ["iteration 23", "iteration 26"]
    assert logged(9.0, 2) == ["iteration 27", "iteration 28"]
