import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from clipdense.engine.report import class_table, export, results_table, write_report
from clipdense.engine.run_config import run_config
from clipdense.files import WriteError

from detectron2.config import get_cfg

NAN = math.nan


def test_table() -> None:
    table = results_table(
        {"bbox/AP": 12.3456, "bbox/AP50": 30.0, "bbox/AP-red star": 1.0, "segm/AP": 11.0, "segm/AP50": NAN}
    )
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["task", "AP", "AP50"]
    assert lines[2:] == [["bbox", "12.35", "30.00"], ["segm", "11.00", "nan"]]
    several = results_table({"a/bbox/AP": 1.0, "a/sem_seg/mIoU": 2.0, "b/bbox/AP": 3.0})
    assert [line.split() for line in several.splitlines() if line][2] == ["a/bbox", "1.00"]
    assert "mIoU" in several and "red star" not in table


class Exported(nn.Linear):
    def export_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {"w": self.weight.T}, {"layout": "toy"}


def test_export(tmp_path: Path) -> None:
    model = Exported(2, 3)
    export(model, tmp_path / "export.safetensors")
    with safe_open(tmp_path / "export.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), model.weight.T)
        assert "toy" in str(file.metadata())
    export(nn.Linear(2, 3), tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write .*export.safetensors"):
        export(model, tmp_path / "file" / "export.safetensors")


def test_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"iteration": i, "total_loss": 1.0 / (1 + i), "lr": 0.1} for i in range(5)]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", "clipdense"):
        metrics = {"bbox/AP": 12.3, "bbox/APs": float("nan")}
        write_report(Exported(2, 3), str(tmp_path), metrics, "SOLVER.MAX_ITER")
    assert "12.30" in caplog.text
    assert "curve.png, export.safetensors, metrics.json, results.json" in caplog.text
    assert (tmp_path / "curve.png").stat().st_size > 1000
    written = {"bbox/AP": 12.3, "bbox/APs": None, "ended_by": "SOLVER.MAX_ITER"}
    assert json.loads((tmp_path / "results.json").read_text()) == written


def test_expected_results() -> None:
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 12.0, 0.5]]
    run = run_config(cfg)
    run.verify({"bbox/AP": 12.3})
    with pytest.raises(SystemExit):
        run.verify({"bbox/AP": 13.0})
    run.verify({})  # a process that is not the main one has none


def test_metrics_of_single_classes_are_a_table_of_their_own():
    results = {"bbox/AP": 5.0, "bbox/AP-cat": 1.0, "segm/AP-cat": 2.0, "bbox/AP-T-shirt": 3.0}
    lines = [line.split() for line in class_table(results).splitlines()]
    assert lines[0] == ["class", "bbox", "AP", "segm", "AP"]
    assert lines[2:] == [["cat", "1.00", "2.00"], ["T-shirt", "3.00"]]
    assert "cat" not in results_table(results) and class_table({"bbox/AP": 5.0}) == ""


def test_of_many_classes_the_best_and_the_worst_are_printed() -> None:
    many = {f"bbox/AP-class{i}": float(i) for i in range(300)} | {"bbox/AP-unseen": NAN}
    lines = class_table(many).splitlines()[2:]
    assert len(lines) == 102 and lines[0].split() == ["class299", "299.00"]
    assert lines[50].strip() == "..." and lines[-2].split() == ["class0", "0.00"]
    assert lines[-1].strip() == "301 classes; results.json has all"
