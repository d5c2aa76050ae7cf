"""Reproduction of published results, with a local server and weights made here in a published layout."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from clipdense.engine.options import ConfigError
from clipdense.run.commands.reproduce import reproduce
from clipdense.run.downloads import download
from clipdense.run.headline_rows import read_rows, select_rows
from clipdense.run.reproduce import Reproduction, compare, default_table, requirements
from clipdense.run.setup import load_config
from clipdense.systems.training_free.protocols import protocol_overrides
from tests.helpers import denseclip_files as files

from detectron2.data import DatasetCatalog

ROOT = Path(__file__).resolve().parents[2]


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, also parts of them."""

    asked: list[str | None]

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range"))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, start = path.read_bytes(), 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a server of the files in ``tmp_path/published``."""
    (tmp_path / "published").mkdir()
    _Handler.asked = []
    handler = partial(_Handler, directory=str(tmp_path / "published"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()
        thread.join()


@pytest.fixture
def table(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table with one row: a tiny DenseCLIP RetinaNet in the published layout, on two images."""
    weights = tmp_path / "published" / "retinanet.pth"
    torch.save(files.retinanet(), weights)
    data = tmp_path / "data" / "birds"
    data.mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    images = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(2)]
    for image in images:
        Image.new("RGB", (64, 64), (90, 120, 30)).save(data / str(image["file_name"]))
    objects = [
        {"id": i + 1, "image_id": i, "category_id": i + 1, "bbox": [8, 8, 30, 30], "area": 900, "iscrowd": 0}
        for i in range(2)
    ]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(files.CLASSES)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (data / "val.json").write_text(json.dumps(content))
    row = {
        "name": "tiny_retinanet",
        "system": "DenseCLIP",
        "weights": "tiny",
        "data": "birds",
        "config": str(ROOT / "projects/DenseCLIP/configs/retinanet_rn50.yaml"),
        "options": {
            "DATASETS.COCO_JSON": [f"birds:{data / 'val.json'}:{data}"],
            "DATASETS.TRAIN": ["birds"],
            "DATASETS.TEST": ["birds"],
            "MODEL.CLIP.POSITION_GRID": files.GRID,
            "MODEL.RETINANET.NUM_CLASSES": len(files.CLASSES),
            "INPUT.MIN_SIZE_TEST": 64,
            "DATALOADER.NUM_WORKERS": 0,
            "MODEL.RETINANET.SCORE_THRESH_TEST": 0.99,
        },
        "values": [
            {"metric": "bbox/AP", "paper": 0.0, "tolerance": 0.1, "evidence": "R"},
            {"metric": "bbox/AP50", "paper": 37.8, "tolerance": 0.1, "evidence": "M"},
        ],
    }
    heads = {"MODEL.CLIP.CONFIG.text_cfg.heads": 2, "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": 2}
    published = {
        "file": weights.name,
        "url": f"{server}/{weights.name}",
        "sha256": sha256(weights.read_bytes()).hexdigest(),
        "page": "https://example.org/denseclip",
        "licence": "MIT",
        "megabytes": 1,
        "options": heads,
    }
    sets = {"birds": {"needs": "two images of birds", "paths": ["birds/val.json"], "gigabytes": 0.001}}
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump({"data": sets, "weights": {"tiny": published}, "rows": [row]}))
    return path


def test_a_row_from_the_server_to_the_comparison(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert reproduce(None, dry_run=True, output=out, table=table) == 0
    printed = capsys.readouterr().out
    assert "two images of birds" in printed and "about 1 MB" in printed and "about 0.001 GB" in printed
    assert not out.exists() and _Handler.asked == []
    assert reproduce(["tiny_retinanet"], output=out, table=table) == 1  # AP50 is not that of the paper
    printed = capsys.readouterr().out
    assert "| tiny_retinanet | bbox/AP   | 0 (R)    | 0.00   | +0.00        | yes" in printed
    assert "37.8 (M) | 0.00   | -37.80       | no (more than 0.1)" in printed
    assert (out / "weights" / "tiny.safetensors").is_file()
    # a second call runs nothing and asks for nothing
    log, asked = out / "tiny_retinanet" / "log.txt", len(_Handler.asked)
    log.unlink()
    assert reproduce(None, output=out, table=table) == 1
    assert not log.exists() and len(_Handler.asked) == asked
    # the row is run again if what determines it has changed
    rows = read_rows(table)
    assert Reproduction(rows, out, overrides=("INPUT.MIN_SIZE_TEST", "96")).result(rows[0]) is None
    assert Reproduction(rows, out).result(rows[0]) is not None


def test_what_is_missing_is_asked_for(table: Path, tmp_path: Path) -> None:
    rows = read_rows(table)
    asked = Reproduction(rows, tmp_path / "out", downloads=False).run()["tiny_retinanet"]
    assert asked.startswith("retinanet.pth of https://example.org/denseclip is needed (MIT); download it to")
    assert "\n" not in asked and _Handler.asked == []
    assert compare(Reproduction(rows, tmp_path / "out")) == ("No row is finished.", 0)
    (tmp_path / "data/birds/val.json").unlink()
    assert "two images of birds" in Reproduction(rows, tmp_path / "out").run()["tiny_retinanet"]


def test_a_download_resumes_and_is_checked(server: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 64
    (tmp_path / "published" / "a.bin").write_bytes(content)
    target, part = tmp_path / "a.bin", tmp_path / "a.bin.part"
    part.write_bytes(content[:5000])
    download(f"{server}/a.bin", target, sha256(content).hexdigest())
    assert target.read_bytes() == content and _Handler.asked == ["bytes=5000-"] and not part.exists()
    part.write_bytes(content)  # killed between the last byte and the check
    download(f"{server}/a.bin", target, sha256(content).hexdigest())
    assert target.read_bytes() == content
    target.unlink()
    with pytest.raises(ConnectionError, match="has the checksum"):
        download(f"{server}/a.bin", target, "0" * 64)
    assert not target.exists() and not part.exists()
    with pytest.raises(ConnectionError, match=r"none.bin could not be downloaded .*put the file at"):
        download(f"{server}/none.bin", target)
    with pytest.raises(ConnectionError, match="not an address of the web"):
        download(f"file://{tmp_path}", target)


def test_configs_are_looked_up_beside_the_table_and_in_the_package(table: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(table.read_text())
    row, name = content["rows"][0], "projects/DenseCLIP/configs/retinanet_rn50.yaml"
    table.write_text(yaml.safe_dump({**content, "rows": [{**row, "config": name}]}))

    def config() -> str:
        reproduction = Reproduction.of_table(table, (), tmp_path / "out")
        return reproduction._arguments(reproduction.rows[0])[0]

    assert config() == name  # `clipdense evaluate` finds it
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("VERSION: 2\n")
    assert config() == str(own)


def test_rows_that_are_listed_only(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(table.read_text())
    value = {"metric": "mIoU", "paper": 72.3, "tolerance": 0.5, "evidence": "P"}
    listed: dict[str, Any] = {
        "name": "pacl_voc20",
        "system": "PACL",
        "values": [value],
        "not_run": "no weights are published",
    }
    table.write_text(yaml.safe_dump({**content, "rows": [*content["rows"], listed]}))
    out = tmp_path / "out"
    assert reproduce(None, dry_run=True, output=out, table=table) == 0
    printed = capsys.readouterr().out
    assert "1 rows, 1 weight files" in printed and "1 further rows are not run" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| pacl_voc20"))
    assert "mIoU 72.3 (P)" in line and "no weights are published" in line
    # such a row is no failure, unless it is named
    monkeypatch.setattr(Reproduction, "_run_row", lambda self, row: None)
    assert reproduce(None, output=out, table=table) == 0
    assert "not run, pacl_voc20: no weights are published" in capsys.readouterr().out
    assert reproduce(["PACL"], output=out, table=table) == 1
    for missing in ("data", "config"):
        row = {key: entry for key, entry in content["rows"][0].items() if key != missing}
        table.write_text(yaml.safe_dump({**content, "rows": [row]}))
        with pytest.raises(ConfigError, match="row tiny_retinanet: a row needs data and config, or not_run"):
            read_rows(table)


def test_wrong_tables_are_described(table: Path) -> None:
    content = yaml.safe_load(table.read_text())
    row = content["rows"][0]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": "huge"}, "weights 'huge' is not listed"),
        ({"metrics": 1}, "Row tiny_retinanet: unknown key metrics"),
        ({"values": []}, "values is empty"),
        ({"name": "../x"}, "cannot be the name of a folder"),
        (
            {"values": [{"metric": "a", "paper": 1, "tolerance": 0, "evidence": "X"}]},
            "expected one of R, P, I, M",
        ),
    ]
    for change, message in cases:
        table.write_text(yaml.safe_dump({**content, "rows": [{**row, **change}]}))
        with pytest.raises(ConfigError, match=message):
            read_rows(table)
    with pytest.raises(ConfigError, match=r"no row or system 'catseg_b_a15'; did you mean catseg_b_a150"):
        select_rows(read_rows(default_table()), ["catseg_b_a15"])


def test_the_rows_of_the_repository_fit_their_configs() -> None:
    """Every config exists, takes the options, and lists the datasets of the row."""
    rows = read_rows(default_table())
    assert len(rows) > 100 and len({row.name for row in rows}) == len(rows)
    text = requirements(Reproduction(rows, Path("output/none")))
    assert all(f"| {row.name} " in text for row in rows)
    systems = {row.system for row in rows}
    assert {"F-VLM", "ODISE", "PACL", "CLIPpy", "MaskCLIP+", "ProxyCLIP", "Trident", "CorrCLIP"} <= systems
    registered = set(DatasetCatalog.list())
    for row in (row for row in rows if not row.not_run):
        words = protocol_overrides(*row.protocol) if row.protocol else []
        words += [word for item in (row.options or {}).items() for word in item]
        cfg = load_config(str(ROOT / row.config), [str(word) for word in words])
        assert len(cfg.DATASETS.TEST) == 1 and set(cfg.DATASETS.TEST) <= registered, row.name
        assert row.weights is not None or row.clip, row.name
        if row.clip:
            assert row.clip == f"{cfg.MODEL.CLIP.NAME}:{cfg.MODEL.CLIP.PRETRAINED}", row.name
