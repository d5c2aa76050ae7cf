#!/usr/bin/env python
"""Mine mask-noun pairs from captioned images, to adapt a CLIP to masked crops (OVSeg, section 3.2).

    tools/mine_masks.py --config-file configs/shapes/ovseg.yaml --data shapes_clip_train --captions 5
        --output output/mined --jobs 2 MODEL.WEIGHTS output/shapes/ovseg/model_final.pth
    tools/mine_masks.py --config-file ... --data coco_2017_train_captions --output ... --shard 1/4
        MODEL.WEIGHTS ...
    tools/mine_masks.py --config-file ... --data coco_2017_val_captions --proposals ground_truth:coco_2017_val
        --truth coco_2017_val --output ...

Every noun of an image's captions takes the proposal whose masked crop CLIP finds closest to it. Into the
output folder come
    pairs.jsonl   one pair a line (or pairs.parquet): file_name, height, width, segmentation (COCO RLE), noun,
                  score (cosine), image_id, caption; DATASETS.MASK_PAIRS takes it
    stats.json    numbers of the run, which are printed as well
    sheet.png     some of the pairs
    shards/       what is finished; a run that was stopped goes on from it, with the same options

Several machines with a common folder each take --shard 1/n .. n/n; the last one to finish writes the pair
file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessException

import clipdense  # noqa: F401
from clipdense.checkpoint import CheckpointError
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names
from clipdense.data.datasets import register_from_config
from clipdense.data.mask_pairs import write_pairs
from clipdense.data.nouns import noun_model
from clipdense.files import write_text
from clipdense.run.setup import available_device, load_config
from clipdense.systems.mining.pairs import FileProposals, Filters, GroundTruthProposals, Proposals
from clipdense.systems.mining.report import (
    ClassAgreement,
    MiningStatistics,
    draw_pairs,
    statistics_table,
)
from clipdense.systems.mining.run import MiningRun, captioned_images

from detectron2.data import DatasetCatalog, MetadataCatalog

GROUND_TRUTH = "ground_truth:"
SHEET = 64  # pairs on the contact sheet


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of an OVSeg model")
    parser.add_argument(
        "--data",
        required=True,
        help="captioned images: a registered data set, COCO captions (.json), or a .jsonl with file_name and "
        "captions",
    )
    parser.add_argument(
        "--image-root", default="", help="folder of a file's images (default: the file's own)"
    )
    parser.add_argument(
        "--captions", type=int, default=1, metavar="N", help="the first N of an image (default: 1)"
    )
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--proposals",
        default="model",
        help="model (default): the config's, which needs MODEL.WEIGHTS; ground_truth:DATASET: annotated "
        "segments; or a .json list of image_id and segmentation (COCO RLE)",
    )
    parser.add_argument(
        "--heads", action="store_true", help="nouns without their modifiers: car, not red car"
    )
    parser.add_argument("--lemma", action="store_true", help="nouns in the singular")
    parser.add_argument(
        "--min-area",
        type=int,
        default=0,
        metavar="PIXELS",
        help="leave out smaller proposals (default: none)",
    )
    parser.add_argument(
        "--min-score", type=float, default=-1.0, help="leave out pairs of a lower cosine (default: none)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="leave out pairs whose cosine exceeds that of the second best proposal by less (default: none)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes on this machine (default: 1)"
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="this machine's part, from 1/N to N/N")
    parser.add_argument("--shard-size", type=int, default=64, metavar="IMAGES", help="default: 64")
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="of the pair file")
    parser.add_argument(
        "--truth",
        metavar="DATASET",
        help="compare nouns that are class names with its segments (default: the data, if it has classes)",
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
        parser.error(f"--shard is I/N, from 1/N to N/N, not {arguments.shard}")
    arguments.part = index - 1, count
    return arguments


def find_proposals(choice: str, images: Sequence[dict[str, Any]]) -> Proposals | None:
    """Of some images; None for the model's."""
    if choice == "model":
        return None
    if choice.startswith(GROUND_TRUTH):
        name = choice.removeprefix(GROUND_TRUTH)
        check_dataset_names([name])
        files = {image["file_name"] for image in images}  # no others: every process gets a copy
        return GroundTruthProposals(
            (r for r in DatasetCatalog.get(name) if os.path.abspath(r["file_name"]) in files),
            MetadataCatalog.get(name).get("ignore_label", 255),
        )
    return FileProposals(choice)


def find_agreement(data: str, truth: str | None) -> ClassAgreement | None:
    """Of the data set `truth`, or of the data where it has instances and classes."""
    if truth is not None:
        check_dataset_names([truth])
    elif data not in DatasetCatalog.list() or not MetadataCatalog.get(data).get("thing_classes"):
        return None
    name = truth or data
    records = DatasetCatalog.get(name)  # a COCO file's classes are known once it has been read
    metadata = MetadataCatalog.get(name)
    return ClassAgreement(records, Vocabulary.from_metadata(metadata), metadata.get("ignore_label", 255))


def finish(run: MiningRun, arguments: argparse.Namespace) -> None:
    """Make one pair file of the shards, statistics and the sheet."""
    statistics = MiningStatistics(find_agreement(arguments.data, arguments.truth))
    sample: list[dict[str, Any]] = []

    def pairs() -> Iterator[dict[str, Any]]:
        for shard in run.shards():
            statistics.add(shard)
            yield from shard["pairs"]

    path = run.folder / f"pairs.{arguments.format}"
    write_pairs(path, pairs())
    numbers = statistics.result()
    write_text(run.folder / "stats.json", json.dumps(numbers, indent=1))
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
        check_dataset_names([arguments.truth])
    nouns = {"heads": arguments.heads, "lemma": arguments.lemma}
    records = captioned_images(
        arguments.data, arguments.image_root, captions=arguments.captions, images=arguments.images
    )
    run = MiningRun(
        folder=arguments.output,
        cfg=cfg,
        records=records,
        proposals=find_proposals(arguments.proposals, records),
        nouns=nouns,
        filters=Filters(arguments.min_area, arguments.min_score, arguments.margin),
        shard_size=arguments.shard_size,
        named={
            "data": arguments.data,
            "captions": arguments.captions,
            "proposals": arguments.proposals,
            "finder of nouns": " ".join(noun_model()),
        },
    )
    with run.opened(arguments.part):
        run.run(arguments.part, arguments.jobs)
        if missing := run.pending():
            print(f"{len(run) - len(missing)} of {len(run)} shards are done; other parts make the rest")
        else:
            finish(run, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # detectron2 0.6 on today's torch
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    try:
        mine(arguments)
    except (ValueError, OSError, ImportError, CheckpointError, ProcessException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
