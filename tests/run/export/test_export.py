"""`clipdense export`: files, text tables, the runner without torch, and .pt2 programs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from clipdense.clip import load_clip
from clipdense.clip.tables import save_table
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.cli import main
from clipdense.run.export import runner
from clipdense.run.export.api import export_model, export_tower
from clipdense.run.export.file_metadata import FileMetadataError, read_pt2_metadata
from clipdense.run.export.graph import ExportError
from clipdense.run.predictor import Predictor
from tests.helpers.exports import OTHER_WORDS, WORDS, picture

CONFIG = "shapes/zero_shot_sclip_vit.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower's file, two text tables of the tool, and an image."""
    folder = tmp_path_factory.mktemp("export")
    export_tower("shapes-vit", folder / "tower.onnx", mode="value")
    bank = TextBank(load_clip("shapes-vit"), "single", cache_dir=None)
    for name, words in (("words", WORDS), ("other", OTHER_WORDS)):
        save_table(folder / f"{name}.safetensors", bank, Vocabulary.parse(words))
    picture(100, 140).save(folder / "photo.png")
    return folder


def test_the_runner_segments_without_torch(
    folder: Path, run_python: Callable[..., str], tmp_path: Path
) -> None:
    for module in ("runner", "arrays", "text_input", "file_metadata"):
        shutil.copy(Path(runner.__file__).with_name(f"{module}.py"), tmp_path)
    source = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.modules['clipdense'] = None\n"
        "import runner\n"
        "status = runner.main(sys.argv[1:])\n"
        "assert not {'torch', 'detectron2'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    labels = {}
    for name in ("words", "other"):
        output = tmp_path / f"{name}.png"
        arguments = [str(folder / "tower.onnx"), str(folder / "photo.png"), "--output", str(output)]
        printed = run_python(
            source, *arguments, "--text", str(folder / f"{name}.safetensors"), without="torch", cwd=tmp_path
        )
        assert "%" in printed and Image.open(output).size == (140, 100)
        labels[name] = printed
    assert (
        "crimson" not in labels["words"] and "grass" in labels["words"] and labels["words"] != labels["other"]
    )


def test_a_model_keeps_its_predictions(tmp_path: Path) -> None:
    path, table = tmp_path / "model.onnx", tmp_path / "words.safetensors"
    options = ["MODEL.ZERO_SHOT.METHOD", "sclip", "MODEL.ZERO_SHOT.WINDOW", "0"]
    report = export_model(CONFIG, path, opts=options, vocabulary=WORDS, text_output=table)
    assert report.difference is not None and report.difference < 1e-4
    assert report.size == path.stat().st_size and "largest difference" in "\n".join(report.lines())
    image = picture(200, 150)
    predictor = Predictor(CONFIG, opts=options, vocabulary=WORDS)
    expected = predictor(image)
    own = runner.OnnxModel(path, table)(image)
    np.testing.assert_allclose(own["sem_seg"], expected["sem_seg"].numpy(), atol=1e-4)
    content = json.loads(onnx.load(path).metadata_props[0].value)
    assert content["opset"] == 18 == onnx.load(path).opset_import[0].version
    assert content["shortest"] == 256 and content["dense_mode"] == "sclip"


def test_a_pt2_program_takes_other_words(tmp_path: Path) -> None:
    path = tmp_path / "tower.pt2"
    report = export_tower(
        "shapes-eva", path, mode="value", text_output=tmp_path / "t.safetensors", vocabulary=WORDS
    )
    module = torch.export.load(path).module()
    for height, width, classes in ((72, 56, 2), (48, 96, 9)):
        inputs = report.graph.example(height, width, classes)
        torch.testing.assert_close(
            module(*inputs.values()), report.graph.module(*inputs.values()), atol=1e-5, rtol=1e-4
        )
    assert read_pt2_metadata(path) == report.graph.metadata


def test_files_that_set_more_than_they_may_are_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "tower.onnx")
    content = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(content | {"ALLOW_PICKLE": True})
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(FileMetadataError, match="may not set 'ALLOW_PICKLE'"):
        runner.OnnxModel(tmp_path / "changed.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(FileMetadataError, match="has no metadata of clipdense"):
        runner.OnnxModel(tmp_path / "changed.onnx")
    with pytest.raises(ValueError, match="the file needs class names"):
        runner.OnnxModel(folder / "tower.onnx")(folder / "photo.png")
    with pytest.raises(ValueError, match="at least 8 are needed"):
        runner.OnnxModel(folder / "tower.onnx", folder / "words.safetensors")(picture(40, 5))


def test_a_file_that_differs_from_eager_execution_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipdense.run.export.api.compare_onnx", lambda *args: 0.1)
    monkeypatch.setattr(
        "clipdense.run.export.api.write_onnx", lambda graph, path, opset: path.write_text("x")
    )
    with pytest.raises(ExportError, match="differs from eager execution by 1.0e-01"):
        export_tower("shapes-rn", tmp_path / "a.onnx", mode="value")


def test_the_command_lists_what_exports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "--list"])
    assert not end.value.code and "| models | file |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["export"])
    assert end.value.code == 1 and "give either a config file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["export", "--clip", "shapes-rn", "--mode", "gem", "-o", "a.onnx"])
    assert end.value.code == 1 and "its modes are plain, value" in capsys.readouterr().err
