"""tools/convert_checkpoint.py: what it prints, and what it refuses."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipdense.checkpoint import CheckpointError, read_checkpoint
from clipdense.clip import load_clip
from clipdense.engine.options import ConfigError
from tests.helpers import denseclip_files as files
from tests.helpers import eva_files

from detectron2.data import DatasetCatalog, MetadataCatalog

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
HEADS = [
    "--option",
    "MODEL.CLIP.CONFIG.text_cfg.heads=2",
    "--option",
    "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS=2",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        module.main()

    return run


def test_in_a_fresh_interpreter(run_python: Callable[..., str], tmp_path: Path) -> None:
    """Where nothing but the tool's own imports has registered layouts and meta-architectures."""
    torch.save(files.retinanet(), tmp_path / "r.pth")
    source = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    printed = run_python(source, str(TOOL), str(tmp_path / "r.pth"), str(tmp_path / "r.safetensors"), *HEADS)
    assert "r.pth has layout denseclip_retinanet" in printed and (tmp_path / "r.safetensors").exists()


def test_report(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = files.mask_rcnn()
    torch.save(content, tmp_path / "m.pth")
    (tmp_path / "names.txt").write_text("\n".join(files.CLASSES))
    run(tmp_path / "m.pth", tmp_path / "m.safetensors", "--classes", tmp_path / "names.txt", *HEADS)
    printed = capsys.readouterr().out
    assert "licence" not in printed
    for line in (
        f"m.pth has layout denseclip_mask_rcnn; {len(content['state_dict'])} tensors written",
        "left out, not part of the model: meta, optimizer",
        "classes: 3, as listed",
        "  MODEL.META_ARCHITECTURE: DenseCLIPRCNN\n",
        "  MODEL.LANGUAGE.CONTEXT_DECODER.HEADS: 2\n",
    ):
        assert line in printed
    assert len(read_checkpoint(tmp_path / "m.safetensors").state) == len(content["state_dict"])


def test_a_clip(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CLIPSelf's student becomes a file that needs no name; what a training left in it is listed."""
    expected = load_clip("shapes-vit")
    names = [tmp_path / "s.pt", tmp_path / "s.safetensors"]
    torch.save({"epoch": 6, "state_dict": expected.state_dict(), "optimizer": {}}, names[0])
    with pytest.raises(CheckpointError, match=r"does not tell its activation.*MODEL\.CLIP\.NAME"):
        run(*names)
    with pytest.raises(ConfigError, match="no option except MODEL.CLIP.NAME"):
        run(*names, "--classes", "cat, dog")
    assert not names[1].exists()
    run(*names, "--option", "MODEL.CLIP.NAME=shapes-vit")
    printed = capsys.readouterr().out
    count = len(expected.state_dict())
    assert f"s.pt has layout open_clip; {count} tensors written" in printed
    assert "left out, not part of the model: epoch, optimizer" in printed and "config keys" not in printed
    state = load_clip(names[1]).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())

    torch.save(eva_files.state(eva_files.clip()), names[0])
    with pytest.raises(CheckpointError, match="cannot be split into heads"):
        run(*names)


def test_refusals(run: Callable[..., None], tmp_path: Path) -> None:
    torch.save(files.retinanet(), tmp_path / "r.pth")
    names = [tmp_path / "r.pth", tmp_path / "r.safetensors", *HEADS]
    with pytest.raises(CheckpointError, match="3 classes in the file, 80 expected"):
        run(*names, "--dataset", "coco_2017_val")
    with pytest.raises(ValueError, match="'coco_2018_val' is not registered. Did you mean .*coco_2017_val"):
        run(*names, "--dataset", "coco_2018_val")
    with pytest.raises(ConfigError, match="KEY=VALUE, not 'MODEL.LANGUAGE.TAU'"):
        run(*names, "--option", "MODEL.LANGUAGE.TAU")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        run(tmp_path / "none.pth", tmp_path / "r.safetensors")
    assert not (tmp_path / "r.safetensors").exists()


def test_the_classes_of_a_dataset_of_any_task(
    run: Callable[..., None], tmp_path: Path, catalogs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(files.retinanet(), tmp_path / "r.pth")
    names = [tmp_path / "r.pth", tmp_path / "r.safetensors", *HEADS, "--dataset", "convert_toy"]
    DatasetCatalog.register("convert_toy", list)
    with pytest.raises(ConfigError, match="dataset convert_toy names no classes; give them with --classes"):
        run(*names)
    MetadataCatalog.get("convert_toy").set(evaluator_type="sem_seg", stuff_classes=list(files.CLASSES))
    run(*names)
    assert "classes: 3, as listed" in capsys.readouterr().out


def test_a_pickle_needs_the_flag(run: Callable[..., None], tmp_path: Path) -> None:
    content = files.retinanet()
    content["meta"]["hook"] = Path("x")
    torch.save(content, tmp_path / "r.pth")
    names = [tmp_path / "r.pth", tmp_path / "r.safetensors", *HEADS]
    with pytest.raises(CheckpointError, match="pickle"):
        run(*names)
    run(*names, "--allow-pickle")
    assert (tmp_path / "r.safetensors").exists()
