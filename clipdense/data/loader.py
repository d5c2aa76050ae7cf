"""Training and test loaders: Detectron2's, with clipdense mappers and exact resume."""

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from clipdense.data.checks import (
    check_dataset_names,
    clean_annotations,
    drop_objects_without_mask,
    mark_objects_without_mask,
)
from clipdense.data.image import BadImageError
from clipdense.data.lines import LazyRecords
from clipdense.data.mappers import DetectionMapper, build_mapper, warn_of_skipping
from clipdense.data.samplers import (
    GlobalBatchSampler,
    RepeatFactorSampler,
    ResumableTrainingSampler,
    ShardSampler,
)
from clipdense.data.validation import DataError

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm

__all__ = [
    "KeyedDataset",
    "build_test_loader",
    "build_train_loader",
    "keyed_randomness",
    "load_dataset_dicts",
]

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], Any]

_MAX_SKIPPED = 20


def build_train_loader(
    cfg: CfgNode,
    start_iter: int = 0,
    *,
    seed: int | None = None,
    mapper: Mapper | None = None,
    dataset: Any = None,
    masks_optional: bool = False,
) -> DataLoader[Any]:
    """Build the infinite loader of this process's share of each global batch.

    The samples of step t and their augmentation depend only on the seed and t. They do not depend on when the
    run was resumed, on the number of workers, or on how many processes share ``SOLVER.IMS_PER_BATCH``.

    Args:
        cfg: reads DATASETS.*, DATALOADER.*, SOLVER.IMS_PER_BATCH, INPUT.*.
        start_iter: number of batches that a resumed run has already used.
        seed: of order and augmentation (default: ``cfg.SEED``; if that is negative, all processes draw a
            common one, and the run can be resumed exactly only if that seed is kept).
        mapper: default: ``INPUT.MAPPER``.
        dataset: dataset dicts, or a map-style dataset of them (default: ``DATASETS.TRAIN``).
        masks_optional: whether the model trains objects that have a box but no mask, see
            `clipdense.engine.mask_loss`. Without it, or with another mapper than `DetectionMapper`, they are
            left out if masks are trained.

    Raises:
        ValueError: If a dataset or the sampler is unknown, or the batch cannot be divided evenly among the
            processes.
        FileNotFoundError: If data are not on disk; says where they belong.
    """
    mapper = build_mapper(cfg, True) if mapper is None else mapper
    if dataset is None:
        dataset = clean_annotations(load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, training=True))
        if cfg.MODEL.MASK_ON:
            optional = masks_optional and isinstance(mapper, DetectionMapper)
            handle = mark_objects_without_mask if optional else drop_objects_without_mask
            dataset = handle(dataset, ", ".join(cfg.DATASETS.TRAIN))
    if seed is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    rank, world = comm.get_rank(), comm.get_world_size()
    groups = None
    if (
        cfg.DATALOADER.ASPECT_RATIO_GROUPING
        and isinstance(dataset, list)
        and all("width" in d for d in dataset)
    ):
        groups = [int(d["width"] > d["height"]) for d in dataset]
    batches = GlobalBatchSampler(
        _sampler(cfg, dataset, seed), cfg.SOLVER.IMS_PER_BATCH, rank, world, start_iter, groups
    )
    items = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
    return DataLoader(
        KeyedDataset(items, mapper, seed, cfg.INPUT.SKIP_BAD_IMAGES),
        batch_sampler=batches,  # of keys (position, index)
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        # in pinned memory, the trainer's copy to the GPU need not be waited for
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available(),
        # a separate generator: the default one belongs to the model
        generator=torch.Generator().manual_seed(seed),
    )


def build_test_loader(cfg: CfgNode, name: str, *, mapper: Mapper | None = None) -> DataLoader[Any]:
    """Build Detectron2's test loader of one dataset: batches of one image, distributed among the processes.

    Raises:
        ValueError: If the dataset is not registered.
        FileNotFoundError: If data are not on disk; says where they belong.
    """
    mapper = build_mapper(cfg, False) if mapper is None else mapper
    return build_detection_test_loader(
        load_dataset_dicts(cfg, [name], training=False), mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )


def load_dataset_dicts(cfg: CfgNode, names: list[str] | tuple[str, ...], training: bool) -> Any:
    """Load the dataset dicts of several datasets as one list.

    If one of them is made of shards or of a list of any length, the result is a map-style dataset instead.

    Args:
        cfg: reads ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``.
        names: of registered datasets.
        training: whether images without annotations are dropped, if that key is True.

    Raises:
        ValueError: If a dataset is not registered.
        FileNotFoundError: If data are not on disk; says where they belong.
        DataError: If no image is left.
    """
    check_dataset_names(names)
    filter_empty = training and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    lazy = [name for name in names if MetadataCatalog.get(name).get("lazy")]
    try:
        if not lazy:
            return get_detection_dataset_dicts(list(names), filter_empty=filter_empty)
        parts = [
            DatasetCatalog.get(name)
            if name in lazy
            else clean_annotations(get_detection_dataset_dicts([name], filter_empty=filter_empty))
            for name in names
        ]
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)
    except FileNotFoundError as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets (DETECTRON2_DATASETS is not set)")
        raise FileNotFoundError(
            f"{', '.join(names)}: {error.filename or error} does not exist. Datasets are read from {root}; "
            "datasets/README.md describes the layout."
        ) from error
    except AssertionError as error:  # Detectron2's check, after it has dropped the images
        if not str(error).startswith("No valid data found"):
            raise
        if not training or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            raise DataError(f"dataset {', '.join(names)} holds no image; add images to its file") from error
        raise DataError(
            f"dataset {', '.join(names)} holds no object to train on; objects with iscrowd 1 do not count. "
            "Annotate objects, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on empty images."
        ) from error


def _sampler(cfg: CfgNode, dataset: Any, seed: int) -> ResumableTrainingSampler:
    name, parts = cfg.DATALOADER.SAMPLER_TRAIN, _stored_parts(dataset)
    if name == "TrainingSampler" and parts is not None:
        return ShardSampler(parts, cfg.DATALOADER.SHUFFLE_SHARDS, seed=seed)
    if name == "TrainingSampler":
        return ResumableTrainingSampler(len(dataset), seed=seed)
    if name == "RepeatFactorTrainingSampler" and parts is not None:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN = {name!r} counts the objects of all images, which shards and long "
            "lists do not have: set it to TrainingSampler"
        )
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return RepeatFactorSampler(factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN = {name!r}: expected TrainingSampler or RepeatFactorTrainingSampler"
    )


def _stored_parts(dataset: Any) -> Sequence[int] | None:
    """Return the sizes of a dataset's shards or blocks; None if it is no dataset of shards or lists."""
    if isinstance(dataset, LazyRecords):
        return dataset.parts
    if isinstance(dataset, ConcatDataset):
        parts: list[Any] = dataset.datasets
        return [size for part in parts for size in _stored_parts(part) or [len(part)]]
    return None


class KeyedDataset(Dataset[Any]):
    """Dataset whose random augmentation is determined by the seed and the position in the training stream.

    Args:
        items: dataset dicts.
        mapper: may return None for an unusable sample; a sample drawn with the same key replaces it.
        seed: with the position, it seeds Python's, NumPy's and torch's random numbers while the mapper runs.
        skip_bad_images: whether a sample that is damaged is replaced as well, instead of raising an error.
    """

    def __init__(self, items: Any, mapper: Mapper, seed: int, skip_bad_images: bool = False) -> None:
        self.items, self.mapper, self.seed = items, mapper, seed
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with keyed_randomness(self.seed, position):
            for _ in range(_MAX_SKIPPED):
                if (sample := self._read(index)) is not None:
                    return sample
                index = random.randrange(len(self.items))
        raise RuntimeError(
            f"{_MAX_SKIPPED} samples in a row are unusable; the warnings above name their files"
        )

    def _read(self, index: int) -> Any:
        try:
            return self.mapper(self.items[index])
        except BadImageError as error:
            if not self.skip_bad_images:
                raise
            warn_of_skipping(error)
            return None


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Seed the global (CPU) generators of Python, NumPy and torch with a key; restore them afterwards."""
    # Detectron2's augmentations draw from NumPy's legacy global generator
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seeds = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
