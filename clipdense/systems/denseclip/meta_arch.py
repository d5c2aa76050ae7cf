"""DenseCLIP's detectors, and pixel-text supervision of any other meta-architecture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clipdense.backbone import SCORE
from clipdense.backbone.class_text import ClassText
from clipdense.backbone.score_map import record_scores
from clipdense.data.heads import register_head_classes
from clipdense.systems.denseclip.loss import PixelTextLoss
from clipdense.systems.denseclip.retinanet import MMDetRetinaNet

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.events import get_event_storage

__all__ = [
    "DenseCLIPRCNN",
    "DenseCLIPRetinaNet",
    "PixelTextModel",
    "PixelTextSupervised",
    "export_without_text_tower",
]

LOSS = "loss_pixel_text"
"""Name of the auxiliary loss among a model's losses."""

Export = tuple[dict[str, Tensor], dict[str, Any]]


class PixelTextModel:
    """What DenseCLIP's models add to their meta-architecture, a module, which is the next base class."""

    @configurable
    def __init__(self, *, pixel_text_loss: PixelTextLoss, **kwargs: Any) -> None:
        """
        Args:
            pixel_text_loss: the auxiliary loss.
            kwargs: arguments of the meta-architecture; its backbone must have a score map.

        Raises:
            ValueError: If the backbone has no score map.
        """
        super().__init__(**kwargs)
        check_score_map(self)
        self.pixel_text_loss = pixel_text_loss

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg)  # type: ignore[misc]
        return arguments | {"pixel_text_loss": PixelTextLoss(cfg)}

    def export_state(self) -> Export:
        """See `export_without_text_tower`."""
        return export_without_text_tower(self)


@META_ARCH_REGISTRY.register()
class DenseCLIPRCNN(PixelTextModel, GeneralizedRCNN):
    """Detectron2's Mask R-CNN on a language backbone, with the auxiliary pixel-text loss.

    Source: Rao et al., DenseCLIP, CVPR 2022, section 3.4.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return Detectron2's losses and "loss_pixel_text" in training, its detections in evaluation."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        instances = [x["instances"].to(self.device) for x in batched_inputs]

        features = self.backbone(images.tensor)
        score = features.pop(SCORE)
        if self.proposal_generator is None:
            proposals, proposal_losses = [x["proposals"].to(self.device) for x in batched_inputs], {}
        else:
            proposals, proposal_losses = self.proposal_generator(images, features, instances)
        _, head_losses = self.roi_heads(images, features, proposals, instances)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        auxiliary = self.pixel_text_loss(score, batched_inputs, images.tensor.shape[-2:])
        return {**head_losses, **proposal_losses, LOSS: auxiliary}


@META_ARCH_REGISTRY.register()
class DenseCLIPRetinaNet(PixelTextModel, MMDetRetinaNet):
    """RetinaNet under mmdetection's or Detectron2's rules on a language backbone, with the auxiliary loss.

    Source: Rao et al., DenseCLIP, CVPR 2022, section 3.4.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return RetinaNet's losses and "loss_pixel_text" in training, its detections in evaluation."""
        if not self.training:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        instances = [x["instances"].to(self.device) for x in batched_inputs]

        maps = self.backbone(images.tensor)
        features = [maps[name] for name in self.head_in_features]
        losses = self.forward_training(images, features, self.head(features), instances)
        auxiliary = self.pixel_text_loss(maps[SCORE], batched_inputs, images.tensor.shape[-2:])
        return {**losses, LOSS: auxiliary}


@META_ARCH_REGISTRY.register()
class PixelTextSupervised(nn.Module):
    """Any meta-architecture on a language backbone, with the auxiliary pixel-text loss in training.

    Losses and outputs are the base's. Parameters are named "base.…" in the optimizer and in checkpoints. A
    checkpoint of the base, without that prefix, loads too; `export_state` writes the base's names.
    """

    @configurable
    def __init__(self, base: nn.Module, pixel_text_loss: PixelTextLoss) -> None:
        """
        Args:
            base: a meta-architecture that calls its ``backbone`` once per forward, with the padded images.
            pixel_text_loss: the auxiliary loss.

        Raises:
            ValueError: If the base has no backbone with a score map.
        """
        super().__init__()
        check_score_map(base)
        self.base = base
        self.pixel_text_loss = pixel_text_loss

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        base = META_ARCH_REGISTRY.get(cfg.MODEL.PIXEL_TEXT.BASE)
        return {"base": base(cfg), "pixel_text_loss": PixelTextLoss(cfg)}

    @property
    def backbone(self) -> Any:
        """The base's backbone."""
        return self.base.backbone

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return the base's losses and "loss_pixel_text" in training, its outputs in evaluation."""
        if not self.training:
            return self.base(batched_inputs)
        with record_scores(self.backbone) as recorded:
            losses = self.base(batched_inputs)
        (call,) = recorded
        return {**losses, LOSS: self.pixel_text_loss(call.score, batched_inputs, call.padded_size)}

    def prepare_state(self, state: dict[str, Tensor]) -> None:
        """Rename the keys of a checkpoint of the base (in place); see `LoadHook`."""
        _add_base_prefix(state, "")

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        _add_base_prefix(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def export_state(self) -> Export:
        """See `export_without_text_tower`; the names are the base's."""
        return export_without_text_tower(self.base)


def export_without_text_tower(model: Any) -> Export:
    """Return the model for inference: class embeddings replace the text tower that computed them.

    Returns:
        The state dict, and metadata with the config keys that a model for it needs.
    """
    state = model.state_dict()
    options: dict[str, Any] = {}
    for name, module in model.named_modules():
        # class embeddings that depend on the image need the text tower
        if isinstance(module, ClassText) and not module.image_dependent:
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": value for key, value in module.table().state_dict().items()}
            options = {
                "MODEL.LANGUAGE.TEXT": "table",
                "MODEL.LANGUAGE.TABLE_DIM": module.embed_dim,
                "MODEL.LANGUAGE.CLASSES": list(module.classes),
            }
    if "pixel_text_loss.bias" in state:
        options["MODEL.PIXEL_TEXT.LEARN_BIAS"] = True
        options["MODEL.PIXEL_TEXT.LOSS"] = model.pixel_text_loss.loss
        options["MODEL.PIXEL_TEXT.SOURCE"] = model.pixel_text_loss.source
    return state, {"layout": "clipdense", "options": {"config": options}}


def check_score_map(model: Any) -> None:
    """Raise ValueError if the model's backbone has no score map."""
    backbone = getattr(model, "backbone", None)
    if backbone is None or SCORE not in backbone.output_shape():
        raise ValueError(
            f"the backbone of {type(model).__name__} has no {SCORE!r} map for the pixel-text loss: set "
            "MODEL.TRUNK.NAME LanguageTrunk"
        )


def _add_base_prefix(state: dict[str, Tensor], prefix: str) -> None:
    """Rename the keys below ``prefix`` that are not those of `PixelTextSupervised` (in place)."""
    own = (f"{prefix}base.", f"{prefix}pixel_text_loss.")
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(own)]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)


register_head_classes("PixelTextSupervised", base_key="MODEL.PIXEL_TEXT.BASE")
register_head_classes("DenseCLIPRCNN", base="GeneralizedRCNN")
register_head_classes("DenseCLIPRetinaNet", base="MMDetRetinaNet")
