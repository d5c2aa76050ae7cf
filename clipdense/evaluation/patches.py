"""How patch features agree with labels: semantic coherence (PACL) and perceptual grouping (CLIPpy)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clipdense.data.image import read_image, read_labels
from clipdense.evaluation.base import Results, TaskEvaluator
from clipdense.evaluation.probes import PatchProbe

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import create_small_table

__all__ = [
    "CoherenceEvaluator",
    "GroupingEvaluator",
    "LabelledPatchEvaluator",
    "Grouping",
    "coherence_curve",
    "group_patches",
    "overlaps",
    "patch_labels",
]

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]
Grouping = Literal["kmeans", "principal"]
"""How patches are grouped: k-means on the sphere, or the leading principal directions."""
CURVE_POINTS = 201


def patch_labels(labels: Labels, grid: tuple[int, int], ignore: int | None, min_share: float) -> Labels:
    """Label the cells of a grid by their most frequent label.

    Args:
        labels: (H, W).
        grid: (h, w), which divides the map evenly.
        ignore: label of pixels without a class; None: every pixel has one.
        min_share: share of the pixels of a cell, 0 to 1, that must have its label.

    Returns:
        (h, w); -1 for a cell without a label: too few of its pixels have it, or they have no class.
    """
    height, width = labels.shape
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    cells = rows[:, None] * grid[1] + columns
    count = int(labels.max()) + 1
    votes = np.bincount((cells * count + labels).ravel(), minlength=grid[0] * grid[1] * count)
    votes = votes.reshape(-1, count)
    best = votes.argmax(1)
    clear = votes.max(1) >= min_share * votes.sum(1)
    if ignore is not None:
        clear &= best != ignore
    return np.where(clear & (votes.sum(1) > 0), best, -1).reshape(grid).astype(np.int64)


def coherence_curve(features: Tensor, labels: Labels, images: Labels) -> tuple[dict[str, float], list[Any]]:
    """Tell pairs of patches of one class from other pairs by their cosine: area below the ROC curve.

    Args:
        features: (N, C).
        labels: (N,) class of each patch.
        images: (N,) image of each patch.

    Returns:
        ``AUC`` over all pairs and ``AUC_image`` over the pairs of patches of one image, in percent (NaN if
        all pairs, or none, are of one class), and the curve of all pairs, at most `CURVE_POINTS` points
        [false positive rate, true positive rate].

    Source: Mukhoti et al., PACL, CVPR 2023, section 3 (semantic coherence of vision encoders).
    """
    from sklearn.metrics import roc_curve  # scikit-learn takes a second to import

    first, second = np.triu_indices(len(labels), k=1)
    unit = F.normalize(features.float(), dim=1)
    cosines = (unit @ unit.T).numpy()[first, second]
    same, within = labels[first] == labels[second], images[first] == images[second]
    areas = {"AUC": _area(same, cosines), "AUC_image": _area(same[within], cosines[within])}
    if np.isnan(areas["AUC"]):
        return areas, []
    fpr, tpr, _ = roc_curve(same, cosines)
    at = np.linspace(0, 1, CURVE_POINTS)
    return areas, np.stack([at, np.interp(at, fpr, tpr)], 1).round(4).tolist()


def _area(same: npt.NDArray[np.bool_], cosines: npt.NDArray[np.float32]) -> float:
    from sklearn.metrics import roc_auc_score

    if not same.any() or same.all():
        return float("nan")
    return 100 * float(roc_auc_score(same, cosines))


def group_patches(features: Tensor, groups: int, how: Grouping = "kmeans", seed: int = 0) -> Tensor:
    """Group the patches of an image without labels.

    Args:
        features: (C, h, w).
        groups: number of groups; fewer if there are fewer different patches.
        how: "kmeans" on L2-normalised patches; or "principal", the leading principal directions of the
            patches as centres (CLIPpy, bottom-up).
        seed: of k-means.

    Returns:
        (G, h, w) cosines of the patches with the centres; a patch belongs to the largest one.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    x = F.normalize(features.float().flatten(1).T, dim=1)
    distinct = len(torch.unique(x, dim=0))
    if how == "kmeans":
        found = KMeans(min(groups, distinct), n_init=1, random_state=seed).fit(x.numpy())
        centres = torch.from_numpy(np.asarray(found.cluster_centers_)).float()
    else:
        count = min(groups, distinct, x.shape[1])
        centres = torch.from_numpy(PCA(count, random_state=seed).fit(x.numpy()).components_).float()
        x = x - x.mean(0)
    cosines = F.normalize(x, dim=1) @ F.normalize(centres, dim=1).T
    return cosines.T.reshape(-1, *features.shape[1:])


def overlaps(groups: Labels, segments: Labels, ignore: int | None) -> npt.NDArray[np.float64]:
    """Compute the IoU (S, G) of every labelled segment with every group.

    Args:
        groups: (H, W), values 0 to G - 1.
        segments: (H, W) classes; the pixels of a class are one segment.
        ignore: label of pixels that count for no group; None: all count.
    """
    valid = np.ones(segments.shape, bool) if ignore is None else segments != ignore
    kinds, inside = np.unique(segments[valid], return_inverse=True)
    count = int(groups.max()) + 1
    joint = np.bincount(inside * count + groups[valid], minlength=len(kinds) * count)
    joint = joint.reshape(len(kinds), count).astype(float)
    union = joint.sum(1, keepdims=True) + joint.sum(0, keepdims=True) - joint
    return joint / np.maximum(union, 1)


class LabelledPatchEvaluator(TaskEvaluator):
    """Base of evaluators that compare patches with the label maps of a semantic dataset.

    Args:
        dataset_name: registered dataset whose dicts have ``sem_seg_file_name``.
        output_dir: see `TaskEvaluator`.
        distributed: see `TaskEvaluator`.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, distributed: bool = True) -> None:
        super().__init__(output_dir, distributed=distributed)
        self._name = dataset_name
        self._ignore: int | None = MetadataCatalog.get(dataset_name).get("ignore_label")
        self._files = {d["file_name"]: d["sem_seg_file_name"] for d in DatasetCatalog.get(dataset_name)}

    def _read(self, sample: Mapping[str, Any]) -> tuple[npt.NDArray[np.uint8], Labels]:
        """Return an image (H, W, 3), RGB, and its label map (H, W)."""
        file_name = sample["file_name"]
        labels = read_labels(self._files[file_name]).astype(np.int64)
        image = read_image(file_name, "RGB", size=(labels.shape[0], labels.shape[1]))
        return np.ascontiguousarray(image), labels


class _PatchEvaluator(LabelledPatchEvaluator):
    """Base: reads features from a probe, too."""

    def __init__(
        self, dataset_name: str, probe: PatchProbe, output_dir: str | None = None, *, distributed: bool = True
    ) -> None:
        super().__init__(dataset_name, output_dir, distributed=distributed)
        self._probe = probe

    def _features(self, sample: Mapping[str, Any]) -> tuple[Tensor, Labels]:
        """Return the features (C, h, w) and the label map (H, W) of an image."""
        image, labels = self._read(sample)
        return self._probe.patch_features(image), labels


class CoherenceEvaluator(_PatchEvaluator):
    """Semantic coherence: does the cosine of two patches tell whether they have one class?

    Results are ``{"coherence": {"AUC", "AUC_image", "patches"}}``, see `coherence_curve`; the curve is
    written to ``coherence.json``.

    Args:
        dataset_name: registered dataset whose dicts have ``sem_seg_file_name``.
        probe: computes the features.
        output_dir: folder for the curve; None writes nothing.
        patches: number of labelled patches of the whole dataset that are compared, drawn at random.
        per_image: number of them of one image at most.
        min_share: see `patch_labels`.
        distributed: see `TaskEvaluator`.
    """

    def __init__(
        self,
        dataset_name: str,
        probe: PatchProbe,
        output_dir: str | None = None,
        *,
        patches: int = 3000,
        per_image: int = 40,
        min_share: float = 0.9,
        distributed: bool = True,
    ) -> None:
        super().__init__(dataset_name, probe, output_dir, distributed=distributed)
        self.patches, self.per_image, self.min_share = patches, per_image, min_share

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> tuple[str, Tensor, Labels]:
        """Draw labelled patches of one image: its name, features (n, C) and classes (n,)."""
        features, labels = self._features(sample)
        cells = patch_labels(labels, (features.shape[1], features.shape[2]), self._ignore, self.min_share)
        chosen = np.flatnonzero(cells.ravel() >= 0)
        random = np.random.default_rng(len(chosen))
        chosen = np.sort(random.permutation(chosen)[: self.per_image])
        return sample["file_name"], features.flatten(1).T[chosen], cells.ravel()[chosen]

    def measure(self, records: list[Any]) -> tuple[dict[str, float], list[Any]]:
        """Return the metrics over the patches of all images, and the curve, see `coherence_curve`."""
        records = sorted(records, key=lambda record: record[0])
        features = torch.cat([record[1] for record in records])
        labels = np.concatenate([record[2] for record in records])
        images = np.repeat(np.arange(len(records)), [len(record[2]) for record in records])
        chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[: self.patches])
        areas, curve = coherence_curve(features[chosen], labels[chosen], images[chosen])
        return {**areas, "patches": float(len(chosen))}, curve

    def score(self, records: list[Any]) -> Results:
        """Compute the areas over the patches of all images."""
        metrics, curve = self.measure(records)
        self.save("coherence.json", {**metrics, "curve": curve})
        logger.info("%s, semantic coherence:\n%s", self._name, create_small_table(metrics))
        return Results(coherence=metrics)


class GroupingEvaluator(_PatchEvaluator):
    """Perceptual grouping: do groups of patches, found without labels, cover the labelled segments?

    Results are ``{"grouping": {"jaccard", "mIoU", "segments"}}`` in percent, over the segments of all images:
    ``jaccard`` is the mean IoU of a segment with its best group (CLIPpy's Jaccard similarity); ``mIoU`` the
    same under the best one-to-one assignment of groups and segments, 0 for a segment without a group.

    Args:
        dataset_name: registered dataset whose dicts have ``sem_seg_file_name``.
        probe: computes the features.
        output_dir: see `TaskEvaluator`.
        groups: number of groups in an image.
        how: see `group_patches`.
        distributed: see `TaskEvaluator`.

    Source: Ranasinghe et al., Perceptual Grouping in Contrastive Vision-Language Models, ICCV 2023,
        section 4.
    """

    def __init__(
        self,
        dataset_name: str,
        probe: PatchProbe,
        output_dir: str | None = None,
        *,
        groups: int = 8,
        how: Grouping = "kmeans",
        distributed: bool = True,
    ) -> None:
        super().__init__(dataset_name, probe, output_dir, distributed=distributed)
        self.groups, self.how = groups, how

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> tuple[float, float, int]:
        """Return the sum of the best IoUs, of the assigned IoUs, and the number of segments of one image."""
        features, labels = self._features(sample)
        maps = group_patches(features, self.groups, self.how)[None]
        maps = F.interpolate(maps, labels.shape, mode="bilinear", align_corners=False)
        found = overlaps(maps[0].argmax(0).numpy(), labels, self._ignore)
        if not found.size:
            return 0.0, 0.0, 0
        assigned = found[linear_sum_assignment(found, maximize=True)].sum()
        return float(found.max(1).sum()), float(assigned), len(found)

    def score(self, records: list[Any]) -> Results:
        """Compute the means over the segments of all images."""
        best, assigned, count = np.sum(np.asarray(records, float).reshape(-1, 3), axis=0)
        metrics = {
            "jaccard": 100 * best / count if count else float("nan"),
            "mIoU": 100 * assigned / count if count else float("nan"),
            "segments": float(count),
        }
        logger.info("%s, perceptual grouping:\n%s", self._name, create_small_table(metrics))
        return Results(grouping=metrics)
