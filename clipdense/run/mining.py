"""One run of ``tools/mine_masks.py``: from its options to the pair file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.checkpoint import config_leaves
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.captions import captioned_images
from clipdense.data.checks import check_named_datasets
from clipdense.data.datasets.own import register_from_config
from clipdense.data.mappers import build_mapper
from clipdense.data.mask_pairs import check_pair_file, write_pairs
from clipdense.data.nouns import NounFinder, noun_model
from clipdense.data.proposals import FileProposals, GroundTruthProposals
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.engine.parts import PartedRun, PartWorker, file_digest
from clipdense.files import json_text, write_text
from clipdense.open_vocabulary.protocols import Proposals
from clipdense.run.execution import Execution, execute
from clipdense.run.setup import load_config
from clipdense.systems.mining.pairs import Filters, MaskMiner, NounEmbedder
from clipdense.systems.mining.report import (
    ClassAgreement,
    MiningStatistics,
    draw_pairs,
    statistics_table,
)
from clipdense.systems.mining.worker import MiningWorker
from clipdense.systems.two_stage.meta_arch import OVSeg

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

__all__ = ["MiningJob", "build_miner", "check_model", "mine"]

_GROUND_TRUTH = "ground_truth:"
_SHEET = 64  # pairs on the contact sheet


@dataclass(frozen=True)
class MiningJob:
    """Options of a mining run; the help of ``tools/mine_masks.py`` describes them.

    Attributes:
        config_file: config of an OVSeg model.
        data: captioned images, see `captioned_images`.
        output: folder of the run.
        opts: config overrides, KEY VALUE in turn.
        image_root: see `captioned_images`.
        captions: see `captioned_images`.
        images: see `captioned_images`.
        proposals: "model", ``ground_truth:DATASET``, or a .json list.
        heads: see `NounFinder`.
        lemma: see `NounFinder`.
        filters: thresholds of pairs.
        truth: dataset whose segments are compared with the pairs.
        format: "jsonl" or "parquet".
        execution: where and how the run is executed.
    """

    config_file: str
    data: str
    output: Path
    opts: Sequence[str] = ()
    image_root: str = ""
    captions: int = 1
    images: int | None = None
    proposals: str = "model"
    heads: bool = False
    lemma: bool = False
    filters: Filters = field(default_factory=Filters)
    truth: str | None = None
    format: str = "jsonl"
    execution: Execution = field(default_factory=Execution)


def mine(job: MiningJob) -> int:
    """Mine the pairs of a dataset; print statistics and the pair file.

    Returns:
        The exit status: 1 if an image failed, else 0.

    Raises:
        ConfigError: If the model is not an OVSeg, has no weights, or the folder holds another run.
        ValueError: If the data have no captions.
    """
    job.execution.prepare()
    cfg = load_config(job.config_file, job.opts)
    register_from_config(cfg)
    cfg.freeze()
    check_pair_file(f"pairs.{job.format}")
    if job.truth is not None:  # before hours of mining, not after
        check_named_datasets([job.truth])
    records = captioned_images(job.data, job.image_root, captions=job.captions, images=job.images)
    proposals = load_proposals(job.proposals, records)
    check_model(cfg, proposals)
    nouns = {"heads": job.heads, "lemma": job.lemma}
    run = PartedRun(
        folder=job.output.absolute(),
        items=records,
        build_worker=partial(build_worker, cfg, proposals, job.filters, nouns),
        settings={
            "data": job.data,
            "captions": job.captions,
            "proposals": job.proposals,
            "finder of nouns": " ".join(noun_model()),
            "nouns": nouns,
            "filters": asdict(job.filters),
            **model_settings(cfg),
        },
        part_size=job.execution.part_size,
        device=job.execution.device(cfg.MODEL.DEVICE, chosen="MODEL.DEVICE" in job.opts),
        max_pixels=cfg.INPUT.MAX_PIXELS,
        title="Mining",
    )
    return execute(run, job.execution, partial(finish, job))


def load_proposals(choice: str, images: Sequence[dict[str, Any]]) -> Proposals | None:
    """Load the proposals of some images; None for those of the model."""
    if choice == "model":
        return None
    if choice.startswith(_GROUND_TRUTH):
        name = choice.removeprefix(_GROUND_TRUTH)
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


def build_worker(
    cfg: CfgNode, proposals: Proposals | None, filters: Filters, nouns: dict[str, bool], device: str
) -> PartWorker:
    """Build the miner and the finder of nouns of one process; arguments as of `build_miner`."""
    return MiningWorker(build_miner(cfg, proposals, filters, device), NounFinder(**nouns))


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


def finish(job: MiningJob, run: PartedRun) -> None:
    """Write the pair file, the statistics and the contact sheet from the parts."""
    statistics = MiningStatistics(load_agreement(job.data, job.truth))
    sample: list[dict[str, Any]] = []

    def pairs() -> Iterator[dict[str, Any]]:
        for part in run.contents():
            statistics.add(part)
            yield from part["pairs"]

    path = run.folder / f"pairs.{job.format}"
    write_pairs(path, pairs())
    numbers = statistics.result()
    write_text(run.folder / "stats.json", json_text(numbers, indent=1))
    step = max(1, numbers["pairs"] // _SHEET)
    seen = 0
    for part in run.contents():
        sample += [pair for i, pair in enumerate(part["pairs"], seen) if i % step == 0]
        seen += len(part["pairs"])
    draw_pairs(sample[:_SHEET], run.folder / "sheet.png")
    print(statistics_table(numbers))
    print(f"{numbers['pairs']} pairs: {path}")
