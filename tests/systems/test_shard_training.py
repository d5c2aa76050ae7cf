"""Every system that learns from images, captions or mask-category pairs trains from the same shards."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import webdataset

from clipdense.data.shards import write_index
from tests.helpers.range_server import range_server

from detectron2.engine import default_argument_parser

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ("INPUT.MAPPER", "CaptionMapper", "INPUT.CAPTION.SIZE", 64)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two shards on a server: images of 64 pixels, each with two captions and two mask-category pairs."""
    folder = tmp_path_factory.mktemp("shards")
    rng, mask = np.random.default_rng(0), np.zeros((64, 64), np.uint8, order="F")
    mask[8:40, 10:50] = 1
    rle = {"size": [64, 64], "counts": mask_util.encode(mask)["counts"].decode()}
    for k in range(2):
        with webdataset.TarWriter(str(folder / f"{k}.tar")) as tar:
            for i in range(3 * k, 3 * k + 3):
                pairs = [
                    {"height": 64, "width": 64, "noun": f"{kind} {i}", "segmentation": rle}
                    for kind in ("kite", "tree")
                ]
                image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                texts = {"txt": f"a kite {i}\na tree {i}\n", "json": json.dumps(pairs).encode()}
                tar.write({"__key__": f"{i}", "png": image, **texts})
        write_index(str(folder / f"{k}.tar"))
    with range_server(folder) as server:
        yield server.url


def train(config: str, output: Path, *settings: Any, resume: bool = False) -> dict[str, Any]:
    """Train on a CLIP with random weights; return the final weights."""
    words = [
        *(
            "--config-file",
            str(ROOT / "configs/shapes" / f"{config}.yaml"),
            *(["--resume"] if resume else []),
        ),
        *("DATASETS.TRAIN", "['mine']", "DATASETS.TEST", "[]", "DATALOADER.NUM_WORKERS", "1"),
        *("MODEL.CLIP.PRETRAINED", "random", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4"),
        *(
            "SOLVER.CHECKPOINT_PERIOD",
            "2",
            "SOLVER.WARMUP_ITERS",
            "0",
            "SEED",
            "1",
            "OUTPUT_DIR",
            str(output),
        ),
        *map(str, settings),
    ]
    runpy.run_path(str(ROOT / "tools/train_net.py"))["main"](default_argument_parser().parse_args(words))
    weights: dict[str, Any] = torch.load(output / "model_final.pth")["model"]
    return weights


@pytest.mark.parametrize(
    ("config", "key", "settings"),
    [
        ("pacl_vit", "CAPTIONS", CAPTIONS),
        ("clippy_vit", "CAPTIONS", CAPTIONS),
        ("segclip_vit", "CAPTIONS", ()),
        ("clipself_vit_patches", "IMAGES", ("INPUT.CLIPSELF.IMAGE_SIZE", 64, "INPUT.CLIPSELF.CROP_SIZE", 64)),
        ("adapt_joint_gt", "MASK_PAIRS", ()),
    ],
)
def test_a_run_from_remote_shards_resumes_exactly(
    tmp_path: Path, catalogs: None, url: str, config: str, key: str, settings: tuple[Any, ...]
) -> None:
    data = (f"DATASETS.{key}", f"['mine:{url}/{{0..1}}.tar']", *settings)
    whole = train(config, tmp_path, *data)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = train(config, tmp_path, *data, resume=True)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    first = torch.load(tmp_path / "model_0000001.pth")["model"]
    assert any(not torch.equal(first[name], value) for name, value in whole.items())
