"""Datasets of webdataset shards: splitting, resume, remote shards, damaged samples, and their writer."""

import io
import itertools
import json
import logging
import pickle
import random
import runpy
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import webdataset
from PIL import Image

from clipdense.data import remote
from clipdense.data.datasets.own import FORMATS, register_entry, register_from_config
from clipdense.data.image import BadImageError, read_image
from clipdense.data.loader import build_train_loader, load_dataset_dicts
from clipdense.data.mask_pairs import pair_mask, write_pairs
from clipdense.data.samplers import ShardSampler
from clipdense.data.shards import write_index
from tests.helpers.range_server import RangeServer, range_server

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

ROOT = Path(__file__).resolve().parents[2]
SIZES = (7, 1, 11, 4, 6)
TOTAL = sum(SIZES)


def png(value: int, size: tuple[int, int] = (6, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalogs: None) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five shards of unequal size; the pixels of image i have the value i, and its caption is "caption i"."""
    folder, numbers = tmp_path / "shards", itertools.count()
    folder.mkdir()
    for k, size in enumerate(SIZES):
        with webdataset.TarWriter(str(folder / f"{k}.tar"), encoder=False) as tar:
            for i in itertools.islice(numbers, size):
                tar.write({"__key__": f"{i:04d}", "png": png(i), "txt": f"caption {i}\n".encode()})
    return folder


def mapper(record: dict[str, Any]) -> int:
    value = int(read_image(record["file_name"])[0, 0, 0])
    assert record.get("captions", [f"caption {value}"]) == [f"caption {value}"]
    return value


Build = Callable[..., Iterator[list[int]]]


@pytest.fixture
def build(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Batches of one process: ``build(entry, start, rank, world)``."""

    def batches(entry: str, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
        cfg.DATASETS.CAPTIONS, cfg.DATASETS.TRAIN = [entry], [entry.partition(":")[0]]
        register_from_config(cfg)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world)
        return iter(build_train_loader(cfg, start, mapper=mapper))

    return batches


# ---- splitting and resume


def test_two_nodes_killed_at_random_see_every_sample_once_an_epoch(
    cfg: CfgNode, build: Build, shards: Path
) -> None:
    """Two processes of two workers each, started again at random points; shards do not divide evenly."""
    entry, steps, rng = f"pairs:{shards}/*.tar", 2 * TOTAL // cfg.SOLVER.IMS_PER_BATCH + 1, random.Random(0)
    whole = list(itertools.chain.from_iterable(itertools.islice(build(entry), steps)))
    cfg.DATALOADER.NUM_WORKERS, step = 2, 0
    stream: list[int] = []
    while step < steps:
        until = min(steps, step + rng.randint(1, 6))
        parts = [list(itertools.islice(build(entry, step, rank, 2), until - step)) for rank in range(2)]
        for first, second in zip(*parts, strict=True):
            stream += itertools.chain.from_iterable(zip(first, second, strict=True))
        step = until
    for epoch in range(2):
        seen = list(enumerate(stream))[epoch * TOTAL : (epoch + 1) * TOTAL]
        nodes = [[value for at, value in seen if at % 2 == rank] for rank in range(2)]
        assert not set(nodes[0]) & set(nodes[1]) and sorted(nodes[0] + nodes[1]) == list(range(TOTAL))
    assert stream[:TOTAL] != stream[TOTAL : 2 * TOTAL]
    assert stream == whole  # whatever the number of processes and workers


def test_the_order_stays_within_few_shards_and_starts_anywhere() -> None:
    sampler = ShardSampler([5, 3, 8, 1, 7, 6], mixed=2, seed=3)
    whole = list(itertools.islice(sampler.stream(), 90))
    for start in (0, 1, 17, 29, 30, 44, 61):
        assert list(itertools.islice(sampler.stream(start), 20)) == whole[start : start + 20]
    owner = np.repeat(np.arange(6), [5, 3, 8, 1, 7, 6])
    order = list(dict.fromkeys(owner[whole[:30]].tolist()))
    assert len(order) == 6 and sorted(whole[:30]) == list(range(30))
    for k in range(0, 6, 2):  # two shards at a time, thoroughly mixed
        pair = [i for i in whole[:30] if owner[i] in order[k : k + 2]]
        at = [whole.index(i) for i in pair]
        assert at == list(range(at[0], at[0] + len(at))) and pair != sorted(pair)
    large = ShardSampler([5000] * 20_000)
    assert len(set(itertools.islice(large.stream(123_456_789), 1000))) == 1000
    with pytest.raises(ValueError, match=r"DATALOADER\.SHUFFLE_SHARDS = 0"):
        ShardSampler([1], mixed=0)


def test_processes_read_from_a_mapped_index(cfg: CfgNode, build: Build, shards: Path) -> None:
    next(build(f"pairs:{shards}/*.tar"))
    records = load_dataset_dicts(cfg, ["pairs"], training=True)
    again = pickle.loads(pickle.dumps(records))
    assert len(pickle.dumps(records)) < 2000 and len(again) == TOTAL
    assert again[-1] == records[TOTAL - 1] and records[2:4] == [records[2], records[3]]
    assert records[28]["file_name"].endswith("#0028.png") and records[28]["captions"] == ["caption 28"]
    with pytest.raises(IndexError):
        records[TOTAL]


def test_shards_beside_other_data(cfg: CfgNode, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for i in range(3):
        (tmp_path / "own" / f"{i}.png").write_bytes(png(100 + i))
    cfg.DATASETS.IMAGES = [f"photos:{tmp_path}/own", f"shards:{shards}/{{0..2}}.tar"]
    cfg.DATASETS.TRAIN = ["photos", "shards"]
    register_from_config(cfg)
    batches = iter(build_train_loader(cfg, mapper=mapper))
    seen = list(itertools.chain.from_iterable(itertools.islice(batches, 6)))[:22]
    assert sorted(seen) == [*range(19), 100, 101, 102]
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN = 'RepeatFactorTrainingSampler'.*TrainingSampler"):
        build_train_loader(cfg, mapper=mapper)


# ---- remote shards


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(remote, "_DELAYS", (0.0, 0.0))
    with range_server(shards) as running:
        yield running


def test_remote_shards_give_the_batches_of_local_ones(
    cfg: CfgNode, build: Build, shards: Path, server: RangeServer
) -> None:
    whole = list(itertools.islice(build(f"here:{shards}/{{0..4}}.tar"), 8))
    read = list(itertools.islice(build(f"headers:{server.url}/{{0..4}}.tar"), 8))
    assert read == whole
    for k in range(5):
        write_index(str(shards / f"{k}.tar"))
    cfg.DATALOADER.NUM_WORKERS = 1  # a forked process reads as well
    indexed = build(f"indexed:{server.url}/{{0..4}}.tar", 3)
    assert [next(indexed) for _ in range(3)] == whole[3:6]
    del indexed
    records = load_dataset_dicts(cfg, ["indexed"], training=True)
    server.asked.clear()
    assert mapper(records[9]) == 9
    ((name, part),) = server.asked  # image and caption in one request
    assert name == "2.tar" and part.startswith("bytes=")


def test_a_remote_failure_is_tried_again_and_then_named(
    cfg: CfgNode, build: Build, shards: Path, server: RangeServer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = list(itertools.islice(build(f"here:{shards}/{{0..4}}.tar"), 2))
    batches = build(f"there:{server.url}/{{0..4}}.tar")
    server.failures = 2
    assert next(batches) == whole[0]
    server.failures = 3
    with pytest.raises(BadImageError, match=r"\.tar.*cannot be read .*503"):
        next(batches)
    cfg.INPUT.SKIP_BAD_IMAGES = True
    server.failures = 3
    with caplog.at_level(logging.WARNING):
        assert len(next(build(f"there:{server.url}/{{0..4}}.tar", 1))) == 4
    assert "Skipping a damaged sample" in caplog.text and "503" in caplog.text


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("x:{folder}/z-*.tar", FileNotFoundError, r"dataset x: no file matches .*z-\*\.tar"),
        ("x:{folder}/{{4..5}}.tar", FileNotFoundError, r"dataset x: .*5\.tar does not exist"),
        ("x:{url}/7.tar", FileNotFoundError, r"dataset x: http.*7\.tar does not exist or cannot be reached"),
        ("x:http://127.0.0.1:9/0.tar", FileNotFoundError, r"127\.0\.0\.1:9/0\.tar .*cannot be reached"),
        ("x:nosuch://bucket/0.tar", ValueError, r"nosuch://bucket/0\.tar: Protocol not known"),
        (
            "x:{folder}/labels.tar",
            ValueError,
            r"labels\.tar: none of its 1 images has captions.* \.cls, \.png",
        ),
        ("x:{folder}/texts.tar", ValueError, r"no images .*texts\.tar; the files in it end in \.txt"),
        ("x:{folder}/cut.tar", ValueError, r"cut\.tar: not an uncompressed tar file, or a truncated one"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_iteration(
    cfg: CfgNode, shards: Path, server: RangeServer, entry: str, error: type, message: str
) -> None:
    for name, files in {"labels": {"png": png(0), "cls": b"3"}, "texts": {"txt": b"a"}}.items():
        with webdataset.TarWriter(str(shards / f"{name}.tar"), encoder=False) as tar:
            tar.write({"__key__": "a", **files})
    (shards / "cut.tar").write_bytes((shards / "2.tar").read_bytes()[:3000])
    cfg.DATASETS.CAPTIONS, cfg.DATASETS.TRAIN = [entry.format(folder=shards, url=server.url)], ["x"]
    with pytest.raises(error, match=message):
        register_from_config(cfg)
        build_train_loader(cfg, mapper=mapper)


def test_a_server_that_sends_whole_files_is_refused(cfg: CfgNode, shards: Path, server: RangeServer) -> None:
    server.ranges = False
    cfg.DATASETS.IMAGES, cfg.DATASETS.TRAIN = [f"x:{server.url}/2.tar"], ["x"]
    register_from_config(cfg)
    with pytest.raises(ValueError, match="does not answer requests for parts of a file"):
        build_train_loader(cfg, mapper=mapper)


# ---- damaged samples


def test_damaged_samples_follow_the_policy(
    cfg: CfgNode, build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with webdataset.TarWriter(str(tmp_path / "some.tar"), encoder=False) as tar:
        for i in range(8):
            tar.write({"__key__": f"{i}", "png": png(i), "txt": f"caption {i}".encode()})
        tar.write({"__key__": "8", "png": b"no png", "txt": b"caption 8"})
        tar.write({"__key__": "9", "png": png(9), "txt": b" \n"})
        tar.write({"__key__": "10", "png": png(10), "txt": b"\xff\xfe"})
        tar.write({"__key__": "11", "png": png(11)})
    with caplog.at_level(logging.WARNING), pytest.raises(BadImageError, match=r"some\.tar.*#(8|9|10)\.png"):
        list(itertools.islice(build(f"pairs:{tmp_path}/some.tar"), 6))
    assert "Left out 1 images without captions" in caplog.text
    cfg.INPUT.SKIP_BAD_IMAGES = True
    with caplog.at_level(logging.WARNING):
        seen = list(itertools.chain.from_iterable(itertools.islice(build(f"pairs:{tmp_path}/some.tar"), 9)))
    assert set(seen) == set(range(8))
    for fault in ("#8.png: not an image", "#9.png: its text file holds no caption", "#10.png: its companion"):
        assert fault in caplog.text


# ---- the tool


def write_shards(*arguments: str) -> None:
    assert runpy.run_path(str(ROOT / "tools/write_shards.py"))["main"](arguments) == 0


def records(key: str, entry: str) -> Any:
    register_entry(key, entry)
    return DatasetCatalog.get(entry.partition(":")[0])


def test_captions_are_written_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no png" if i == 2 else png(i))
        lines.append({"file_name": f"{i}.png", "captions": [f"one {i}", f"two\n{i}"]})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards("--captions", f"{tmp_path}/all.jsonl", f"{tmp_path}/s/%03d.tar", "--samples", "3")
    assert "2.png" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "000.tar", "000.tar.index", "001.tar", "001.tar.index",
    ]  # fmt: skip
    read = records("CAPTIONS", f"pairs:{tmp_path}/s/*.tar")
    assert [int(read_image(r["file_name"])[0, 0, 0]) for r in read] == [0, 1, 3, 4]
    assert [r["captions"] for r in read] == [[f"one {i}", f"two {i}"] for i in (0, 1, 3, 4)]
    with pytest.raises(ValueError, match="already there"):
        write_shards("--captions", f"{tmp_path}/all.jsonl", f"{tmp_path}/s/%03d.tar")
    with pytest.raises(ValueError, match="expected a pattern"):
        write_shards("--captions", f"{tmp_path}/all.jsonl", f"{tmp_path}/s.tar")


def test_mask_pairs_are_written_and_read(tmp_path: Path) -> None:
    masks, pairs = [], []
    for i in range(3):
        (tmp_path / f"{i // 2}.png").write_bytes(png(i // 2))
        masks.append(np.zeros((6, 8), bool))
        masks[-1][: i + 1, 2:5] = True
        rle = mask_util.encode(np.asfortranarray(masks[-1], np.uint8))
        pair = {"file_name": f"{i // 2}.png", "height": 6, "width": 8, "noun": f"noun {i}"}
        pairs.append(pair | {"segmentation": {"size": [6, 8], "counts": rle["counts"].decode()}})
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    write_shards("--mask-pairs", f"{tmp_path}/pairs.jsonl", f"{tmp_path}/%d.tar")
    read = records("MASK_PAIRS", f"nouns:{tmp_path}/0.tar")
    assert [r["noun"] for r in read] == ["noun 0", "noun 1", "noun 2"] and len(read) == 3
    assert all(np.array_equal(pair_mask(r), mask) for r, mask in zip(read, masks, strict=True))
    with webdataset.TarWriter(str(tmp_path / "bad.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "png": png(1), "json": json.dumps([{"noun": "x"}, pairs[0]]).encode()})
    read = records("MASK_PAIRS", f"damaged:{tmp_path}/bad.tar")
    with pytest.raises(BadImageError, match=r"bad\.tar.*a\.png, pair 0: it lacks height"):
        read[0]
    assert read[1]["noun"] == "noun 0"


def test_an_index_of_an_older_shard_is_not_used(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards("--index", f"{shards}/{{0..1}}.tar")
    index = (shards / "0.tar.index").read_bytes()
    with tarfile.open(shards / "0.tar", "a") as tar:
        for name, content in (("new.png", png(200)), ("new.txt", b"caption 200" * 2000)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert (shards / "0.tar.index").read_bytes() == index
    with caplog.at_level(logging.WARNING):
        assert len(records("CAPTIONS", f"pairs:{shards}/{{0..1}}.tar")) == 9
    assert "0.tar.index belongs to another" in caplog.text
    assert set(FORMATS) >= {"IMAGES", "CAPTIONS", "MASK_PAIRS"}
