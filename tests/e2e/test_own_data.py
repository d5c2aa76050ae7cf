"""The commands of docs/own_data.md, in short, on real photographs in each format."""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipdense.run.cli import main
from tests.helpers import own_samples

from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[2]

# The configs of the page need published CLIPs; those of the same systems on the nano CLIPs do not.
SMALL = {
    "projects/DenseCLIP/configs/mask_rcnn_rn50.yaml": "shapes/denseclip_mask_rcnn_rn.yaml",
    "projects/DenseCLIP/configs/retinanet_rn50.yaml": "shapes/denseclip_retinanet_rn.yaml",
    "projects/DenseCLIP/configs/semantic_fpn_rn50.yaml": "shapes/denseclip_semantic_fpn_rn.yaml",
    "projects/FCCLIP/configs/fcclip_r50.yaml": "shapes/fcclip_rn.yaml",
    "projects/FVLM/configs/fvlm_rn50_ovcoco.yaml": "shapes/fvlm_rn.yaml",
    "projects/CATSeg/configs/catseg_vitb_384.yaml": "shapes/catseg_rn.yaml",
}
SHORT = (
    "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 0 SOLVER.LOG_PERIOD 1 "
    "INPUT.MIN_SIZE_TRAIN (128,) INPUT.MIN_SIZE_TEST 128 DATALOADER.NUM_WORKERS 0"
)
# A third of the windows' side, for the tenth of the time.
SHORT_CATSEG = "MODEL.CAT_SEG.RESOLUTION 128 MODEL.CAT_SEG.TEST.WINDOWS.ENABLED False"


def commands(section: str) -> list[list[str]]:
    """The words after ``clipdense`` of each command in a section of the page."""
    text = (ROOT / "docs/own_data.md").read_text()
    _, _, rest = text.partition(f"\n## {section}\n")
    blocks = re.findall(r"^```\n(.*?)^```", rest.partition("\n## ")[0], re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert lines and all(line.startswith("clipdense ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; the catalogs are restored."""
    before = dict(DatasetCatalog.data), copy.deepcopy(MetadataCatalog.data)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    DatasetCatalog.data, MetadataCatalog.data = before


def run(words: list[str]) -> None:
    """Run a command of the page; a training in short."""
    if words[0] == "train":
        small = SMALL[words[1]]
        words = ["train", small, *words[2:], *SHORT.split()]
        words += SHORT_CATSEG.split() if "catseg" in small else []
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code, f"{shlex.join(words)} ended with {end.value.code}"


def results(output: str) -> dict[str, float]:
    return json.loads(Path("output", output, "results.json").read_text())


def test_coco(place: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = own_samples.CocoSample(data_dir)
    sample.coco(place / "birds")
    check, split, train = commands("COCO json")
    run(check)
    printed = capsys.readouterr().out
    assert "(COCO instances)" in printed and "MODEL.ROI_HEADS.NUM_CLASSES 3" in printed
    assert all(name in printed for name in sample.names) and (place / "data_sheet.png").is_file()
    run(split)
    assert "'all_train" not in capsys.readouterr().err
    run(train)
    assert {"bbox/AP", "segm/AP"} <= results("birds").keys()


def test_panoptic(place: Path, data_dir: Path) -> None:
    assert own_samples.panoptic(data_dir, place / "town") == 133
    for words in commands("COCO panoptic"):
        run(words)
    assert {"panoptic_seg/PQ", "sem_seg/mIoU"} <= results("town").keys()


def test_label_maps(place: Path, data_dir: Path) -> None:
    own_samples.indexed_maps(data_dir, place / "roads")
    own_samples.CocoSample(data_dir, 4).coloured_maps(place / "camvid")
    for words in commands("Label maps"):
        run(words)
    assert "sem_seg/mIoU" in results("roads")
    assert "sem_seg/mIoU" in results("camvid")
    assert len(MetadataCatalog.get("camvid").stuff_classes) == 3


def test_yolo(place: Path, data_dir: Path) -> None:
    sample = own_samples.CocoSample(data_dir)
    sample.yolo(place / "cups", polygons=False, parts=("train", "val"))
    sample.yolo(place / "parts", polygons=True, parts=("train",))
    for words in commands("YOLO"):
        run(words)
    assert "bbox/AP" in results("cups") and "segm/AP" not in results("cups")
    assert "segm/AP" in results("parts")


def test_voc(place: Path, data_dir: Path) -> None:
    own_samples.CocoSample(data_dir).voc_boxes(place / "VOC")
    own_samples.voc_maps(data_dir, place / "VOC")
    for words in commands("Pascal VOC"):
        run(words)
    assert "bbox/AP" in results("voc") and "sem_seg/mIoU" in results("voc_semantic")
    assert "segm/AP" in results("voc_masks")


def test_watched_training(place: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_samples.CocoSample(data_dir).yolo(place / "parts", polygons=True, parts=("train",))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(place / "trackio"))  # read when trackio is first imported
    run(next(words for words in commands("YOLO") if words[1] == "split"))
    (train,) = commands("Watch the training")
    run([*train, "TEST.LOSS.PERIOD", "1"])
    rows = [json.loads(line) for line in Path("output/watched/metrics.json").read_text().splitlines()]
    assert any("validation/loss_mask" in row for row in rows)
    assert list(Path("output/watched").glob("wandb/offline-run-*/files/media/images/predictions*.png"))
