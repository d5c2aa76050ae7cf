#!/usr/bin/env python
"""Mine mask-noun pairs from captioned images, to adapt CLIP to masked crops (OVSeg, section 3.2).

    tools/mine_masks.py --config-file configs/shapes/ovseg.yaml --data shapes_clip_train --captions 5
        --output output/mined --jobs 2 MODEL.WEIGHTS output/shapes/ovseg/model_final.pth
    tools/mine_masks.py --config-file ... --data coco_2017_train_captions --output ... --shard 1/4
        MODEL.WEIGHTS ...
    tools/mine_masks.py --config-file ... --data coco_2017_val_captions --proposals ground_truth:coco_2017_val
        --truth coco_2017_val --output ...

CLIP embeds the masked crop of every proposal, and the nouns of the image's captions. Every noun is paired
with the proposal of highest cosine similarity. Files in the output folder:
    pairs.jsonl   one pair a line (or pairs.parquet): file_name, height, width, segmentation (COCO RLE), noun,
                  score (cosine), image_id, caption; for DATASETS.MASK_PAIRS
    stats.json    statistics of the run, which are also printed
    sheet.png     a sample of the pairs
    shards/       finished parts; the same command resumes an interrupted run from them

Several machines with a common folder run the same command with --shard 1/n to n/n; the last one to finish
writes the pair file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of an OVSeg model")
    parser.add_argument(
        "--data",
        required=True,
        help="captioned images: a registered dataset, COCO captions (.json), or a .jsonl with file_name and "
        "captions",
    )
    parser.add_argument(
        "--image-root", default="", help="folder of a file's images (default: the folder of the file)"
    )
    parser.add_argument(
        "--captions",
        type=int,
        default=1,
        metavar="N",
        help="captions of each image, the first N (default: 1)",
    )
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--proposals",
        default="model",
        help="model (default): those of the config, which needs MODEL.WEIGHTS; ground_truth:DATASET: "
        "annotated segments; or a .json list of image_id and segmentation (COCO RLE)",
    )
    parser.add_argument(
        "--heads", action="store_true", help="nouns without modifiers: car instead of red car"
    )
    parser.add_argument("--lemma", action="store_true", help="nouns in the singular")
    parser.add_argument(
        "--min-area",
        type=int,
        default=0,
        metavar="PIXELS",
        help="drop smaller proposals (default: 0)",
    )
    parser.add_argument(
        "--min-score", type=float, default=-1.0, help="drop pairs of lower cosine similarity (default: -1)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="drop pairs whose cosine exceeds that of the second-best proposal by less (default: 0)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes on this machine (default: 1)"
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="part of this machine, from 1/N to N/N")
    parser.add_argument(
        "--shard-size", type=int, default=64, metavar="IMAGES", help="images in a shard (default: 64)"
    )
    parser.add_argument(
        "--format", choices=["jsonl", "parquet"], default="jsonl", help="format of the pair file"
    )
    parser.add_argument(
        "--truth",
        metavar="DATASET",
        help="dataset whose segments are compared with the masks of nouns that are class names (default: the "
        "data, if they have classes)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.WEIGHTS FILE"
    )
    arguments = parser.parse_args(argv)
    for name in ("captions", "jobs", "shard_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        index, count = map(int, arguments.shard.split("/"))
    except ValueError:
        index = count = 0
    if not 1 <= index <= count:
        parser.error(f"--shard must be I/N, from 1/N to N/N, not {arguments.shard}")
    arguments.part = index - 1, count
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import clipdense  # noqa: F401
from clipdense.checkpoint import config_leaves
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.captions import captioned_images
from clipdense.data.checks import check_named_datasets
from clipdense.data.datasets.own import register_from_config
from clipdense.data.mappers import build_mapper
from clipdense.data.mask_pairs import write_pairs
from clipdense.data.nouns import noun_model
from clipdense.data.proposals import FileProposals, GroundTruthProposals
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.files import json_text, write_text
from clipdense.open_vocabulary.protocols import Proposals
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device, load_config
from clipdense.systems.mining.pairs import Filters, MaskMiner, NounEmbedder
from clipdense.systems.mining.report import (
    ClassAgreement,
    MiningStatistics,
    draw_pairs,
    statistics_table,
)
from clipdense.systems.mining.run import MiningRun
from clipdense.systems.two_stage.meta_arch import OVSeg

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

GROUND_TRUTH = "ground_truth:"
SHEET = 64  # pairs on the contact sheet


def load_proposals(choice: str, images: Sequence[dict[str, Any]]) -> Proposals | None:
    """Load the proposals of some images; None for those of the model."""
    if choice == "model":
        return None
    if choice.startswith(GROUND_TRUTH):
        name = choice.removeprefix(GROUND_TRUTH)
        check_named_datasets([name])
        files = {image["file_name"] for image in images}  # no others: every process gets a copy
        return GroundTruthProposals(
            (r for r in DatasetCatalog.get(name) if os.path.abspath(r["file_name"]) in files),
            MetadataCatalog.get(name).get("ignore_label", 255),
        )
    return FileProposals(choice)


def check_model(cfg: CfgNode, proposals: Proposals | None) -> None:
    """Check that the configuration is an OVSeg model, with weights if its own proposals are used."""
    if cfg.MODEL.META_ARCHITECTURE != "OVSeg":
        raise ConfigError(f"mining needs MODEL.META_ARCHITECTURE OVSeg, not {cfg.MODEL.META_ARCHITECTURE}")
    if proposals is None and not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "an untrained model gives no useful proposals: set MODEL.WEIGHTS, or choose other --proposals"
        )


def build_miner(cfg: CfgNode, proposals: Proposals | None, filters: Filters, device: str) -> MaskMiner:
    """Build a miner with the OVSeg model of a configuration: its CLIP, crop rule and templates of crops.

    Args:
        cfg: of an OVSeg model.
        proposals: None for the model's own.
        filters: thresholds of pairs.
        device: of the model.
    """
    register_from_config(cfg)  # of own datasets, in this process
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    model = build_model(cfg).eval()
    assert isinstance(model, OVSeg)
    if cfg.MODEL.WEIGHTS:
        checkpointer = TrainingCheckpointer(model, "", cfg.MODEL.WEIGHTS_SKIP, cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load_weights(cfg.MODEL.WEIGHTS, complete=True)
    keys = cfg.MODEL.TWO_STAGE
    bank = TextBank(
        model.encoder.clip,
        keys.CROP_TEMPLATES or keys.TEMPLATES,
        prompts=model.prompts,
        cache_dir=None,
        progress=False,
    )
    mapper = build_mapper(cfg, False) if proposals is None else None
    return MaskMiner(proposals or model, model.encoder, NounEmbedder(bank), filters, mapper)


def model_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings of a model that determine its pairs: its keys, and hashes of its weight files."""
    settings = dict(config_leaves(json.loads(json.dumps(cfg.MODEL)), "MODEL"))
    settings |= {f"INPUT.{k}": cfg.INPUT[k] for k in ("FORMAT", "MAPPER", "MIN_SIZE_TEST", "MAX_SIZE_TEST")}
    for key in ("MODEL.DEVICE", "MODEL.WEIGHTS"):
        settings.pop(key)
    keys = cfg.MODEL.TWO_STAGE
    clips = [keys.ADAPTED_CLIP, cfg.MODEL.CLIP.PRETRAINED, *keys.CROP_CLIP.values()]
    return {
        "MODEL.WEIGHTS (content)": file_digest(cfg.MODEL.WEIGHTS),
        "CLIP (content)": [file_digest(path) for path in clips],
        **settings,
    }


def file_digest(path: str) -> str:
    """Hash the content of a file; "" if there is no such file."""
    if not path or not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_agreement(data: str, truth: str | None) -> ClassAgreement | None:
    """Build the comparison with the dataset ``truth`` (default: the data, if they have classes)."""
    if truth is not None:
        check_named_datasets([truth])
    elif data not in DatasetCatalog.list() or not MetadataCatalog.get(data).get("thing_classes"):
        return None
    name = truth or data
    records = DatasetCatalog.get(name)  # loading a COCO file sets its class names
    metadata = MetadataCatalog.get(name)
    return ClassAgreement(records, Vocabulary.from_metadata(metadata), metadata.get("ignore_label", 255))


def finish(run: MiningRun, arguments: argparse.Namespace) -> None:
    """Write the pair file, the statistics and the contact sheet from the shards."""
    statistics = MiningStatistics(load_agreement(arguments.data, arguments.truth))
    sample: list[dict[str, Any]] = []

    def pairs() -> Iterator[dict[str, Any]]:
        for shard in run.shards():
            statistics.add(shard)
            yield from shard["pairs"]

    path = run.folder / f"pairs.{arguments.format}"
    write_pairs(path, pairs())
    numbers = statistics.result()
    write_text(run.folder / "stats.json", json_text(numbers, indent=1))
    step = max(1, numbers["pairs"] // SHEET)
    seen = 0
    for shard in run.shards():
        sample += [pair for i, pair in enumerate(shard["pairs"], seen) if i % step == 0]
        seen += len(shard["pairs"])
    draw_pairs(sample[:SHEET], run.folder / "sheet.png")
    for leftover in (run.folder / "shards").glob(".*"):  # of killed processes
        leftover.unlink(missing_ok=True)
    print(statistics_table(numbers))
    print(f"{numbers['pairs']} pairs: {path}")


def mine(arguments: argparse.Namespace) -> None:
    cfg = load_config(arguments.config_file, arguments.opts)
    register_from_config(cfg)
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    if arguments.truth is not None:  # before hours of mining, not after
        check_named_datasets([arguments.truth])
    records = captioned_images(
        arguments.data, arguments.image_root, captions=arguments.captions, images=arguments.images
    )
    proposals = load_proposals(arguments.proposals, records)
    check_model(cfg, proposals)
    filters = Filters(arguments.min_area, arguments.min_score, arguments.margin)
    run = MiningRun(
        folder=arguments.output,
        records=records,
        build_miner=partial(build_miner, cfg, proposals, filters),
        settings={
            "data": arguments.data,
            "captions": arguments.captions,
            "proposals": arguments.proposals,
            "finder of nouns": " ".join(noun_model()),
            "filters": asdict(filters),
            **model_settings(cfg),
        },
        nouns={"heads": arguments.heads, "lemma": arguments.lemma},
        shard_size=arguments.shard_size,
        device=cfg.MODEL.DEVICE,
    )
    with run.opened(arguments.part):
        run.run(arguments.part, arguments.jobs)
        if pending := run.pending():
            print(f"{len(run) - len(pending)} of {len(run)} shards are done; other parts make the rest")
        else:
            finish(run, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # detectron2 0.6 on today's torch
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    mine(arguments)
    return 0


if __name__ == "__main__":
    with tool_errors("interrupted; finished shards are kept, and the same command continues"):
        sys.exit(main())
