"""tools/mine_masks.py on a few shapes: a killed run, several processes, damaged images, other options."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mine_masks import main
from PIL import Image

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.mask_pairs import pair_mask, read_pairs
from clipdense.data.shapes.make import annotation_file
from clipdense.engine.options import ConfigError
from clipdense.run import mining
from clipdense.run.boundary import tool_errors
from clipdense.systems.mining.pairs import Filters, MaskMiner
from tests.helpers.small_models import small_ovseg_config

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.fixture(scope="module")
def arguments(small_shapes, small_shapes_root, tmp_path_factory):
    """Of four images, whose captions and instances are files: other processes need no registered data."""
    instances = [
        {"image_id": record["image_id"], "segmentation": annotation["segmentation"]}
        for record in DatasetCatalog.get("shapes_closed_train")
        for annotation in record["annotations"]
    ]
    proposals = tmp_path_factory.mktemp("proposals") / "proposals.json"
    proposals.write_text(json.dumps(instances))
    captions = annotation_file(small_shapes_root, "captions", "train")
    return [
        *("--config-file", str(ROOT / "configs/shapes/ovseg.yaml"), "--part-size", "1"),
        *("--data", str(captions), "--image-root", str(small_shapes_root / "train")),
        *("--proposals", str(proposals)),
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """Folder of a run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    assert (
        main([*arguments, "--captions", "5", "--truth", "shapes_closed_train", "--output", str(folder)]) == 0
    )
    return folder


def test_a_run(whole):
    pairs, statistics = read_pairs(whole / "pairs.jsonl"), json.loads((whole / "stats.json").read_text())
    images = DatasetCatalog.get("shapes_closed_train")
    assert {p["file_name"] for p in pairs} == {r["file_name"] for r in images}
    assert statistics["pairs"] == len(pairs) == statistics["nouns_of_images"]
    assert statistics["captions"] == 20 and statistics["images"] == statistics["images_with_pairs"] == 4
    assert all(p["noun"] in p["caption"].lower() and pair_mask(p).any() for p in pairs)
    # the nano CLIP knows shapes: nearly all nouns that are classes get the right one of the true masks
    assert statistics["classes"]["named"] >= 10 and statistics["classes"]["absent"] == 0
    assert statistics["classes"]["right"] >= 0.8 <= statistics["classes"]["inside"]
    with Image.open(whole / "sheet.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) >= 128


def test_a_killed_run_loses_and_repeats_nothing(arguments, whole, tmp_path, capsys):
    folder = tmp_path / "killed"
    command = [*arguments, "--captions", "5", "--truth", "shapes_closed_train", "--output", str(folder)]
    if (child := os.fork()) == 0:  # dies as by kill -9 in the middle of the third part
        try:
            torch.set_num_threads(1)
            calls, call = iter(range(100)), MaskMiner.__call__

            def call_or_die(*args):
                if next(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)

            MaskMiner.__call__ = call_or_die
            main(command)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    first = sorted((folder / "parts").glob("*.json"))
    assert [path.name for path in first] == ["00000.json", "00001.json"]
    assert not (folder / "pairs.jsonl").exists()
    before = [path.stat().st_mtime_ns for path in first]
    assert main([*command, "--jobs", "2"]) == 0
    assert [path.stat().st_mtime_ns for path in first] == before
    for name in ("pairs.jsonl", "stats.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert f"{folder}/pairs.jsonl" in capsys.readouterr().out


def test_a_damaged_image_is_listed_and_can_be_tried_again(
    arguments, whole, small_shapes_root, tmp_path, capsys
):
    images = shutil.copytree(small_shapes_root / "train", tmp_path / "images")
    bad, missing = sorted(images.iterdir())[1:3]
    content = {path: path.read_bytes() for path in (bad, missing)}
    bad.write_bytes(content[bad][:100])
    missing.unlink()
    root = arguments.index("--image-root") + 1
    command = [
        *arguments[:root],
        str(images),
        *arguments[root + 1 :],
        "--captions",
        "5",
        "--format",
        "parquet",
    ]
    command += ["--output", str(tmp_path / "run")]
    assert main(command) == 1
    assert "failed: 2 of 4 images" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run/errors.jsonl").read_text().splitlines()]
    assert {row["file_name"]: row["reason"] for row in rows} == {
        str(bad): "cannot be decoded, the file is damaged or truncated (image file is truncated)",
        str(missing): "No such file or directory",
    }
    assert len({pair["file_name"] for pair in read_pairs(tmp_path / "run/pairs.parquet")}) == 2

    for path, data in content.items():
        path.write_bytes(data)
    assert main(command) == 1  # finished parts are kept
    assert main([*command, "--retry-failed"]) == 0
    assert not (tmp_path / "run/errors.jsonl").exists()
    pairs = read_pairs(tmp_path / "run/pairs.parquet")
    for pair in pairs:
        pair["file_name"] = pair["file_name"].replace(str(images), str(small_shapes_root / "train"))
    assert pairs == read_pairs(whole / "pairs.jsonl")


def test_ground_truth_as_proposals(arguments, whole, tmp_path):
    truth = ["--proposals", "ground_truth:shapes_closed_train"]  # as in the file
    assert main([*arguments, *truth, "--captions", "5", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()


def test_the_models_masks_are_those_that_it_classifies(tmp_path):
    cfg = small_ovseg_config()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = "BGR", 0
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    image = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8).numpy()
    given: list[torch.Tensor] = []

    def embed_masks(pixels: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(masks)
        return torch.zeros(len(masks), model.encoder.clip.embed_dim), torch.ones(len(masks), dtype=torch.bool)

    miner = mining.build_miner(cfg, None, Filters(), "cpu")
    miner.encoder = embed_masks
    miner({"file_name": "/a.png", "image_id": 1}, image, {"red star": "a red star"})
    model.set_vocabulary(Vocabulary.from_names(["red star", "grass"]))
    model.merging = replace(model.merging, proposals_on=True, semantic_on=False)
    with torch.no_grad():
        inputs = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
        expected = model([{"image": inputs}])[0]["proposal_masks"] > model.encoder.rule.threshold
    assert expected.any() and torch.equal(given[0], expected[expected.flatten(1).any(1)])


def test_other_models_are_refused():
    cfg = small_ovseg_config()
    cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
    with pytest.raises(ConfigError, match="OVSeg, not MaskFormer"):
        mining.check_model(cfg, None)


def test_what_is_wrong_is_said(arguments, whole, tmp_path, capsys):
    def error(*more: str) -> str:
        with pytest.raises(SystemExit, match="1"), tool_errors():
            main([*arguments, "--output", str(whole), *more])
        return capsys.readouterr().err

    bytes_before = (whole / "pairs.jsonl").read_bytes()
    assert "captions was 5, is 1" in error()
    filters = error("--captions", "5", "--min-area", "9", "--lemma")
    assert "'min_area': 0" in filters and "'min_area': 9" in filters and "'lemma': True" in filters
    assert "MODEL.TWO_STAGE.TEMPLATES was single, is vild_63" in error(
        "--captions", "5", "MODEL.TWO_STAGE.TEMPLATES", "vild_63"
    )
    with FileLock(whole / ".run.lock"):
        assert "another process is working on the run" in error("--captions", "5")
    assert (whole / "pairs.jsonl").read_bytes() == bytes_before
    proposals = arguments.index("--proposals")
    arguments = [*arguments[:proposals], "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="1"), tool_errors():
        main(arguments)
    assert "set MODEL.WEIGHTS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--part-size", "0"])
    assert "--part-size must be at least 1" in capsys.readouterr().err


def test_what_is_wrong_with_ray_is_said_before_anything_is_loaded(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "load_config", lambda *_: pytest.fail("the model is being loaded"))
    command = [*arguments, "--output", str(tmp_path)]
    with pytest.raises(ConfigError, match="use --actors with --ray"):
        main([*command, "--ray", "auto", "--jobs", "2"])
    with pytest.raises(ConfigError, match="name the cluster in --ray"):
        main([*command, "--actors", "2"])
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConfigError, match=f"cluster at '{address}' .*refused.*ray start --head"):
            main([*command, "--ray", address])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'clipdense\[scale\]'"):
        main([*command, "--ray", "auto"])
