"""The computed scaling of a training."""

from pathlib import Path

import plan_scaling
import pytest
from plan_scaling import Plan, Run

SETTINGS = {
    **{name.replace("-", "_"): default for name, _, default, _ in plan_scaling._OPTIONS},
    "parallel": "ddp",
}


def test_a_step_is_compute_and_the_messages_that_show() -> None:
    plan = Plan(**{**SETTINGS, "spread": 0.0, "latency": 0.0})
    assert plan.step(1) == pytest.approx(2 * 17.1 / (989 * 0.4))
    assert plan.communication(16) == pytest.approx(8 * 304e6 * 15 / 16 / 45e9)
    assert plan.step(16) == pytest.approx(plan.step(1) + plan.communication(16) - 0.8 * 2 / 3 * plan.step(1))
    assert plan.step(8) == plan.step(1)  # hidden beside the backward pass
    assert Plan(**{**SETTINGS, "parallel": "fsdp"}).communication(16) > Plan(**SETTINGS).communication(16)


def test_the_table_says_that_it_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    plan_scaling.main(["--hours-for", "1e8"])
    text = capsys.readouterr().out
    assert "1200.7" in text.splitlines()[2] and text.endswith("Computed from the options, not measured.\n")


def test_a_run_on_many_images_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(**SETTINGS)
    run = Run(**{name.replace("-", "_"): default for name, _, default, _ in plan_scaling._RUN_OPTIONS})
    rows = dict(run.rows(plan, 1e8))
    hours = 1e8 * plan.step(64) / (64 * plan.images) / 3600
    assert rows["time"] == f"{hours:.1f} h" and rows["cost"].endswith(f" {3 * 64 * hours:,.0f} USD")
    assert rows["storage"] == "20.0 TB in 20,000 shards" and rows["checkpoint"].startswith("3.6 GB")
    plan_scaling.main(["--distil", "1e8"])
    printed = capsys.readouterr().out
    page = (Path(__file__).resolve().parents[2] / "docs/scale.md").read_text()
    table = printed[printed.index("| one pass") : printed.index("\n\nComputed")]
    assert table in page  # the documentation has what the tool prints
