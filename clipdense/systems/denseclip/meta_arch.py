"""Pixel-text supervision of any meta-architecture, and DenseCLIP's detectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from clipdense.backbone import SCORE
from clipdense.backbone.class_text import ClassText
from clipdense.data.heads import register_head_classes
from clipdense.systems.denseclip.loss import PixelTextLoss
from clipdense.systems.denseclip.retinanet import MMDetRetinaNet

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["DenseCLIPRCNN", "DenseCLIPRetinaNet", "PixelTextSupervised"]


@META_ARCH_REGISTRY.register()
class PixelTextSupervised(nn.Module):
    """A meta-architecture whose backbone's score map gets the auxiliary pixel-text loss in training.

    Everything else is the base's: its losses, its outputs, its attributes, and its state dict, so that
    checkpoints go from one to the other in both directions.
    """

    base_name: str = ""

    @configurable
    def __init__(self, base: nn.Module, loss: PixelTextLoss) -> None:
        """
        Args:
            base: any meta-architecture with a ``backbone`` that it calls once a forward with the padded
                images, and that gives "score" (`LanguageTrunk`, alone or below a pyramid).
            loss: the auxiliary loss.

        Raises:
            ValueError: a base whose backbone gives no score map.
        """
        super().__init__()
        backbone = getattr(base, "backbone", None)
        if backbone is None or SCORE not in backbone.output_shape():
            raise ValueError(
                f"the backbone of {type(base).__name__} gives no {SCORE!r} map for the pixel-text loss: set "
                "MODEL.TRUNK.NAME LanguageTrunk"
            )
        self.base = base
        self.pixel_text_loss = loss

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The base MODEL.PIXEL_TEXT.BASE, or the one that a named subclass knows."""
        keys = cfg.MODEL.PIXEL_TEXT
        return {
            "base": META_ARCH_REGISTRY.get(cls.base_name or keys.BASE)(cfg),
            "loss": PixelTextLoss(keys.SOURCE, keys.WEIGHT, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE),
        }

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """As the base; in training with "loss_pixel_text" among the losses."""
        if not self.training:
            return self.base(batched_inputs)
        with self._score() as seen:
            losses = self.base(batched_inputs)
        score, padded_size = seen[0]
        return losses | {"loss_pixel_text": self.pixel_text_loss(score, batched_inputs, padded_size)}

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model for inference, its text tower replaced by what it says of the classes.

        Returns:
            The tensors, and metadata with the config keys that a model for them needs.
        """
        state = self.state_dict()
        options: dict[str, Any] = {}
        for name, module in self.base.named_modules():
            if isinstance(module, ClassText):
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
                state |= {f"{name}.{key}": value for key, value in module.table().state_dict().items()}
                options = {
                    "MODEL.LANGUAGE.TEXT": "table",
                    "MODEL.LANGUAGE.TABLE_DIM": module.embed_dim,
                    "MODEL.LANGUAGE.CLASSES": list(module.classes),
                }
        return state, {"layout": "clipdense", "options": {"config": options}}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        return self.base.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        return self.base.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    @contextmanager
    def _score(self) -> Iterator[list[tuple[Tensor, tuple[int, int]]]]:
        """Collects (score map, size of the padded images) of the backbone's calls."""
        seen: list[tuple[Tensor, tuple[int, int]]] = []

        def see(module: nn.Module, args: tuple[Tensor, ...], output: dict[str, Tensor]) -> None:
            seen.append((output[SCORE], (args[0].shape[-2], args[0].shape[-1])))

        backbone: Any = self.base.backbone
        handle = backbone.register_forward_hook(see)
        try:
            yield seen
        finally:
            handle.remove()


@META_ARCH_REGISTRY.register()
class DenseCLIPRCNN(PixelTextSupervised):
    """DenseCLIP's Mask R-CNN: Detectron2's, with the auxiliary loss."""

    base_name = "GeneralizedRCNN"


@META_ARCH_REGISTRY.register()
class DenseCLIPRetinaNet(PixelTextSupervised):
    """DenseCLIP's RetinaNet: Detectron2's, with its rules to choose and the auxiliary loss."""

    base_name = MMDetRetinaNet.__name__


register_head_classes("PixelTextSupervised", base_key="MODEL.PIXEL_TEXT.BASE")
register_head_classes("DenseCLIPRCNN", base="GeneralizedRCNN")
register_head_classes("DenseCLIPRetinaNet", base="MMDetRetinaNet")
