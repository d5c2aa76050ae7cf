"""From an image to the cosines of its windows with class names, under one training-free method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.attention import History, get_mode
from clipdense.clip.attention.residual import semantic_feedback
from clipdense.clip.patch_embedder import PatchEmbedder, patch_channels
from clipdense.clip.towers import ResNetTower, TowerOutput, TransformerTower
from clipdense.inference import (
    Refinements,
    confident_labels,
    map_windows,
    merge_windows,
    pamr,
    patch_graph,
    patch_modes,
    patch_positions,
    projected_keys,
    propagate_patches,
    refine_cosines,
    text_cosines,
    window_starts,
)
from clipdense.systems.training_free.corrclip import PADDING_REGION, corrclip_dense
from clipdense.systems.training_free.features import FeatureModel, Statistics, TowerFeatures
from clipdense.systems.training_free.methods import METHODS
from clipdense.systems.training_free.sam import SamModel
from clipdense.systems.training_free.trident import (
    sam_affinity,
    splice,
    trident_dense,
    trident_size,
    window_tokens,
)

__all__ = ["Cosines", "DenseEncoder", "Memo", "WindowSettings"]


@dataclass(frozen=True)
class WindowSettings:
    """Sliding windows.

    Attributes:
        window: side in pixels; 0: the whole image is the only window.
        stride: distance of neighbouring windows in pixels.
        padding: windows are padded to multiples of it; 0 for none, -1 for what the method does.
        batch_size: windows per forward.
    """

    window: int = 224
    stride: int = 112
    padding: int = -1
    batch_size: int = 16


@dataclass(frozen=True)
class Cosines:
    """Cosines of the windows of an image, before windows are put together.

    Attributes:
        maps: (n, S, h, w).
        size: height and width of the image in pixels.
        window: see `WindowSettings`.
        stride: see `WindowSettings`.
        multiple: windows were padded to multiples of it; 0 for none.
        direct: the only map is resized straight to the output, not to the image first.
    """

    maps: Tensor
    size: tuple[int, int]
    window: int = 0
    stride: int = 0
    multiple: int = 0
    direct: bool = False

    def fold(self, names: slice = slice(None)) -> Tensor:
        """Put the windows together, for some of the names: (S', H, W), or (S', h, w) if ``direct``."""
        if self.direct:
            return self.maps[0, names]
        return merge_windows(self.maps[:, names], self.size, self.window, self.stride, multiple=self.multiple)


class Memo:
    """Results of forwards on windows that several methods share; one forward serves all of them.

    `clear` it after each image.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Tensor, Any]] = []

    def get(self, module: Any, images: Tensor, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned for the same module and images, or compute it."""
        for known, seen, result in self._entries:
            if known is module and seen.shape == images.shape and bool(torch.equal(seen, images)):
                return result
        result = compute()
        self._entries.append((module, images, result))
        return result

    def clear(self) -> None:
        """Forget all results."""
        self._entries.clear()


class DenseEncoder(nn.Module):
    """CLIP with a training-free method.

    Args:
        clip: the CLIP; frozen.
        method: name in `METHODS`.
        options: options of the method's mode, and of its further steps (see the functions of this module).
        windows: sliding windows.
        refinements: MaskCLIP's refinements.
        features: second model, for methods that read one.
        sam: SAM, for Trident.
        embedder: patch embedder, for PACL; on CPU or the device of the CLIP.
        memo: shared by the encoders of one CLIP that see the same images; None computes everything anew.

    Raises:
        ValueError: If the method is unknown or does not fit the tower, an option is unknown, or a second
            model is missing or does not fit.
    """

    def __init__(
        self,
        clip: ClipModel,
        method: str,
        *,
        options: Mapping[str, Any] | None = None,
        windows: WindowSettings | None = None,
        refinements: Refinements | None = None,
        features: FeatureModel | TowerFeatures | None = None,
        sam: SamModel | None = None,
        embedder: PatchEmbedder | None = None,
        memo: Memo | None = None,
    ) -> None:
        super().__init__()
        self.memo = memo
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        self.clip = clip.eval().requires_grad_(False)
        self.name, self.method = method, METHODS[method]
        self.windows = windows or WindowSettings()
        self.refinements = refinements or Refinements()
        self.features, self.sam, self.embedder = features, sam, embedder
        self.options = dict(options or {})
        self._check()
        padding = self.windows.padding if self.windows.padding >= 0 else self.method.padding
        self.multiple = clip.visual.stride if padding < 0 else padding

    def _check(self) -> None:
        tower, method = self.clip.visual, self.method
        if not isinstance(tower, TransformerTower) and not method.resnet:
            names = ", ".join(name for name, entry in METHODS.items() if entry.resnet)
            raise ValueError(
                f"method '{self.name}' needs a ViT, and '{self.clip.name}' has a {type(tower).__name__}: "
                f"use one of {names}"
            )
        if method.mode not in tower.dense_modes and method.kind not in ("corrclip", "trident"):
            why = tower.why_no_dense or f"its modes are {', '.join(tower.dense_modes)}"
            raise ValueError(f"method '{self.name}' does not fit '{self.clip.name}': {why}")
        if method.features and self.features is None:
            raise ValueError(
                f"method '{self.name}' reads patch features of a second model: set "
                "MODEL.ZERO_SHOT.FEATURES.NAME, e.g. vit_base_patch8_224.dino"
            )
        if method.kind == "trident" and self.sam is None:
            raise ValueError("method 'trident' needs SAM: set MODEL.ZERO_SHOT.SAM.NAME")
        if method.embedder:
            self._check_embedder()
        known = {*_STEP_OPTIONS[method.kind], *self._mode_options()}
        if unknown := sorted(set(self.options) - known):
            raise ValueError(
                f"method '{self.name}' has no option {', '.join(unknown)}; its options are "
                f"{', '.join(sorted(known)) or 'none'}"
            )

    def _check_embedder(self) -> None:
        if self.embedder is None:
            raise ValueError(
                "method 'pacl' needs a patch embedder: set MODEL.ZERO_SHOT.EMBEDDER to the "
                "export.safetensors of a training with MODEL.META_ARCHITECTURE PACL"
            )
        tower, embedder = self.clip.visual, self.embedder
        expected = patch_channels(tower), self.clip.embed_dim
        found = embedder.in_channels, embedder.embed_dim
        if found != expected or embedder.mode not in tower.dense_modes:
            raise ValueError(
                f"MODEL.ZERO_SHOT.EMBEDDER maps {found[0]} to {found[1]} channels of mode '{embedder.mode}', "
                f"and '{self.clip.name}' has {expected[0]} and {expected[1]}: it was trained on another CLIP"
            )

    def _mode_options(self) -> tuple[str, ...]:
        if not isinstance(self.clip.visual, TransformerTower) or self.method.kind in ("corrclip", "trident"):
            return ()
        return get_mode(self.method.mode).options

    @property
    def statistics(self) -> Statistics:
        """Pixel statistics of the CLIP."""
        return self.clip.pixel_mean, self.clip.pixel_std

    @torch.no_grad()
    def forward(self, images: Tensor, text: Tensor, scale: float, regions: Tensor | None = None) -> Cosines:
        """Compare the windows of an image with names.

        Args:
            images: (1, 3, H, W), normalised with the CLIP's statistics.
            text: (S, D), L2-normalised.
            scale: factor of the cosines in softmaxes, for methods that segment on the way.
            regions: (H, W) int64 region ids, for CorrCLIP.

        Raises:
            ValueError: If the method needs regions and there are none.
        """
        if self.method.kind == "trident":
            return self._trident(images, text)
        if self.method.kind == "lposs":
            return self._lposs(images, text)
        if self.method.kind == "corrclip":
            if regions is None:
                raise ValueError("method 'corrclip' needs region ids: set MODEL.ZERO_SHOT.REGIONS")
            # regions travel as a fourth channel; zeros pad the windows, so that ids are shifted by the
            # padding's own id
            ids = regions[None, None].to(images) - PADDING_REGION
            images = torch.cat([images, ids], 1)

        def function(crops: Tensor) -> Tensor:
            return self.window_cosines(crops, text, scale)

        return self._cosines(images, function)

    def _cosines(self, images: Tensor, function: Any) -> Cosines:
        w = self.windows
        maps = map_windows(
            function, images, w.window, w.stride, multiple=self.multiple, batch_size=w.batch_size
        )
        size = (images.shape[2], images.shape[3])
        return Cosines(maps, size, w.window, w.stride, self.multiple)

    def window_cosines(self, crops: Tensor, text: Tensor, scale: float) -> Tensor:
        """Compare windows (n, 3, H, W), already padded, with names: (n, S, h, w); see `forward`."""
        kind = self.method.kind
        if kind == "corrclip":
            return text_cosines(torch.cat([self._corrclip(window[None]) for window in crops]), text)
        if kind == "resclip":
            return text_cosines(self._resclip(crops, text, scale), text)
        if self.refinements.key_smoothing or self.refinements.prompt_denoising:
            return self._refined(crops, text)
        return text_cosines(self.patch_map(crops), text)

    @torch.no_grad()
    def patch_map(self, crops: Tensor) -> Tensor:
        """Embed the patches of normalised windows (n, 3, H, W) as (n, D, h, w), not L2-normalised.

        Raises:
            ValueError: If the method compares more than the patches of a window with the names.
        """
        if self.method.kind != "mode":
            raise ValueError(f"method '{self.name}' has no map of patches alone: measure another method")
        if self.embedder is not None and self.method.embedder:
            request = TowerRequest(pre=True, dense=self.embedder.mode)
            embedded: Tensor = self.embedder(self.clip.visual(crops, request).pre)
            return embedded
        return self._dense(crops)

    def _dense(self, crops: Tensor) -> Tensor:
        method = self.method
        guidance = self._features(crops) if method.features and method.kind == "mode" else None
        options = {k: v for k, v in {**method.options, **self.options}.items() if k in self._mode_options()}
        tower = self.clip.visual
        if self.memo is not None and isinstance(tower, TransformerTower):
            return tower.dense(self._history(crops), method.mode, guidance, options)
        request = TowerRequest(dense=method.mode, guidance=guidance, options=options)
        return self._outputs(crops, request).dense

    def _outputs(self, crops: Tensor, request: TowerRequest) -> TowerOutput:
        """Return outputs of the tower; a memo keeps the last map of a ResNet."""
        tower = self.clip.visual
        if self.memo is None or not isinstance(tower, ResNetTower):
            found: TowerOutput = tower(crops, request)
            return found
        tower.check(crops, request)
        last = self.memo.get(tower, crops, lambda: tower(crops, TowerRequest(pre=True)).pre)
        return tower.read(last, request)

    def _history(self, crops: Tensor) -> History:
        tower = self.clip.visual
        assert isinstance(tower, TransformerTower)
        if self.memo is None:
            return tower.history(crops)
        found: History = self.memo.get(tower, crops, lambda: tower.history(crops))
        return found

    def _features(self, crops: Tensor) -> Tensor:
        model = self.features
        assert model is not None
        if self.memo is None:
            plain: Tensor = model(crops, self.statistics)
            return plain
        found: Tensor = self.memo.get(model, crops, lambda: model(crops, self.statistics))
        return found

    def _refined(self, crops: Tensor, text: Tensor) -> Tensor:
        """Return the cosines with MaskCLIP's refinements."""
        tower = self.clip.visual
        if isinstance(tower, TransformerTower):
            history = self._history(crops)
            dense, keys = tower.dense(history, self.method.mode, None, self.options), projected_keys(history)
        else:
            out = self._outputs(crops, TowerRequest(dense=self.method.mode, keys=True))
            dense, keys = out.dense, out.keys
        return refine_cosines(text_cosines(dense, text), keys, self.refinements)

    def _resclip(self, crops: Tensor, text: Tensor, scale: float) -> Tensor:
        """Segment windows by a first pass, and let the labels of the patches steer a second one.

        Options: ``feedback_threshold`` (pixels of a lower score get the first label), ``feedback_std``, and
        those of the modes "rcs" and "resclip".
        """
        tower = self.clip.visual
        assert isinstance(tower, TransformerTower)
        history = self._history(crops)
        first = {k: v for k, v in self.options.items() if k in get_mode("rcs").options}
        logits = text_cosines(tower.dense(history, "rcs", None, first), text)
        logits = F.interpolate(logits, crops.shape[-2:], mode="bilinear", align_corners=False)
        scores = (scale * pamr(crops.float(), logits)).softmax(1)
        feedback = []
        for window in scores:
            labels = confident_labels(window, self.options.get("feedback_threshold", 0.1))
            classes = patch_modes(labels, tower.stride)
            std = self.options.get("feedback_std", 5.0)
            feedback.append(semantic_feedback(classes, tower.prefix, std=std))
        options = {k: v for k, v in self.options.items() if k in get_mode("resclip").options}
        return tower.dense(history, "resclip", torch.stack(feedback), options)

    def _corrclip(self, window: Tensor) -> Tensor:
        tower = self.clip.visual
        assert isinstance(tower, TransformerTower)
        images = window[:, :3]
        regions = (window[0, 3] + PADDING_REGION).round().long()
        return corrclip_dense(tower, images, self._features(images), regions, **self.options)

    def _trident(self, images: Tensor, text: Tensor) -> Cosines:
        """Splice windows, and aggregate the map by SAM's affinity.

        Options: ``beta``, ``gamma`` (see `feature_attention`), ``cos_fac`` and ``refine_neg_cos`` (see
        `sam_affinity`), and ``halves``: run SAM on the left and the right half of the image.
        """
        tower, p = self.clip.visual, self.clip.visual.stride
        assert isinstance(tower, TransformerTower) and self.sam is not None
        w, original = self.windows, (images.shape[2], images.shape[3])
        crop = w.window or min(original) // p * p
        size = trident_size(*original, p, crop)
        resized = F.interpolate(images, size, mode="bilinear", align_corners=False)
        starts = [
            (y, x)
            for y in window_starts(size[0], crop, w.stride or crop)
            for x in window_starts(size[1], crop, w.stride or crop)
        ]
        crops = torch.cat([resized[..., y : y + crop, x : x + crop] for y, x in starts])
        attention = {k: self.options[k] for k in ("beta", "gamma") if k in self.options}
        tokens = window_tokens(tower, crops, self._features(crops), **attention)
        places = [(y // p, x // p) for y, x in starts]
        canvas = splice(tokens, places, (crop // p, crop // p), (size[0] // p, size[1] // p))
        parts = images.chunk(2, 3) if self.options.get("halves") else (images,)
        affinities, grids = [], []
        for part in parts:
            weights, values, grid = self.sam.last_attention(part, self.statistics)
            factor, keep = self.options.get("cos_fac", 1.2), self.options.get("refine_neg_cos", True)
            affinities.append(sam_affinity(weights, values, factor=factor, keep_negative=keep))
            grids.append(grid)
        maps = text_cosines(trident_dense(tower, canvas, affinities, grids), text)
        return Cosines(maps, original, direct=True)

    def _lposs(self, images: Tensor, text: Tensor) -> Cosines:
        """Propagate the cosines of the patches of all windows over their graph.

        Options: ``neighbours``, ``gamma``, ``sigma`` (see `patch_graph`).
        """
        w, size = self.windows, (images.shape[2], images.shape[3])
        features = map_windows(
            self._features, images, w.window, w.stride, multiple=self.multiple, batch_size=w.batch_size
        )
        grid = (features.shape[2], features.shape[3])

        def cosines(crops: Tensor) -> Tensor:
            dense = F.normalize(self._dense(crops), dim=1)
            if dense.shape[2:] != grid:
                dense = F.interpolate(dense, grid, mode="bilinear", align_corners=False)
            return text_cosines(dense, text)

        found = self._cosines(images, cosines)
        window = (w.window, w.window) if w.window else size
        rows = window_starts(size[0], window[0], w.stride or window[0])
        columns = window_starts(size[1], window[1], w.stride or window[1])
        assert self.features is not None
        positions = patch_positions([(y, x) for y in rows for x in columns], grid, self.features.patch_size)
        flat = F.normalize(features.flatten(2), dim=1).transpose(1, 2).flatten(0, 1)
        options = {k: self.options[k] for k in ("neighbours", "gamma", "sigma") if k in self.options}
        laplacian = patch_graph(flat, positions.to(flat.device), **options)
        scores = found.maps.flatten(2).transpose(1, 2).flatten(0, 1)
        solved = propagate_patches(laplacian, scores).float()
        maps = solved.reshape(len(features), -1, solved.shape[1]).transpose(1, 2).reshape(found.maps.shape)
        return Cosines(maps, size, w.window, w.stride, self.multiple)


_STEP_OPTIONS: dict[str, tuple[str, ...]] = {
    "mode": (),
    "resclip": ("feedback_threshold", "feedback_std"),
    "corrclip": ("spatial", "semantic", "temperature", "distance", "num_spatial", "merge", "restrict"),
    "trident": ("beta", "gamma", "cos_fac", "refine_neg_cos", "halves"),
    "lposs": ("neighbours", "gamma", "sigma"),
}
"""Options of the steps around the mode, by `Method.kind`."""
