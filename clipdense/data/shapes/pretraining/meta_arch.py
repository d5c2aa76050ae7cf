"""`ContrastiveCLIP`: a CLIP trained on captioned crops."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_gather
from torch import Tensor, nn

from clipdense.clip import ClipModel, load_clip
from clipdense.data.shapes.world import CLASSES, GROUNDS

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY


@META_ARCH_REGISTRY.register()
class ContrastiveCLIP(nn.Module):
    """Image-text contrast in which every pair with equal content counts as positive.

    With unit embeddings u_i of crops and v_j of captions, temperature s and the positives P_i of crop i, the
    loss is the cross-entropy of softmax_j(s u_i.v_j) against the uniform distribution over P_i, averaged with
    its transpose. A caption is a positive of a crop if it names the same things and only grounds that the
    crop shows.

    Args:
        clip: the model to train.
        locked_text: whether the text tower stays as it is (LiT).
        init_logit_scale: temperature s at the start; 0 leaves the one of ``clip``.
        max_logit_scale: upper bound of the temperature s.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        locked_text: bool = False,
        init_logit_scale: float = 0.0,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if clip.text is None:
            raise ValueError(f"contrastive training needs a text tower; {clip.name} was loaded without one")
        self.clip = clip
        self.locked_text = locked_text
        self.max_logit_scale = math.log(max_logit_scale)
        if init_logit_scale:
            torch.nn.init.constant_(clip.logit_scale, math.log(init_logit_scale))
        clip.text.requires_grad_(not locked_text)
        self.register_buffer(
            "pixel_mean", torch.tensor(clip.pixel_mean).view(3, 1, 1) * 255, persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(clip.pixel_std).view(3, 1, 1) * 255, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from ``MODEL.CLIP`` and ``MODEL.CONTRASTIVE_CLIP``."""
        clip = load_clip(cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.PRETRAINED, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        teacher = cfg.MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT
        if teacher:
            text = load_clip(teacher, allow_pickle=cfg.MODEL.ALLOW_PICKLE).text
            if text is None or clip.text is None:
                raise ValueError(f"MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT: {teacher} has no text tower")
            clip.text.load_state_dict(text.state_dict())
        return {
            "clip": clip,
            "locked_text": bool(teacher),
            "init_logit_scale": cfg.MODEL.CONTRASTIVE_CLIP.INIT_LOGIT_SCALE,
            "max_logit_scale": cfg.MODEL.CONTRASTIVE_CLIP.MAX_LOGIT_SCALE,
        }

    @property
    def device(self) -> torch.device:
        """Where inputs are moved to."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Loss of a batch, or embeddings in evaluation.

        Args:
            batched_inputs: dicts with ``crops`` (n, 3, S, S) uint8 RGB, ``captions`` (n strings) and
                ``contents`` (n, 96) uint8 (see `crops.CONTENT_SIZE`).

        Returns:
            In training ``{"loss_contrastive"}``; else one dict an input with ``image_embeddings`` and
            ``text_embeddings`` (n, D), L2-normalised.
        """
        crops = torch.cat([x["crops"] for x in batched_inputs]).to(self.device, non_blocking=True)
        u = F.normalize(self.clip.encode_image((crops.float() - self.pixel_mean) / self.pixel_std), dim=-1)
        v = F.normalize(self.encode_captions([c for x in batched_inputs for c in x["captions"]]), dim=-1)
        if not self.training:
            sizes = [len(x["captions"]) for x in batched_inputs]
            return [
                {"image_embeddings": i, "text_embeddings": t}
                for i, t in zip(u.split(sizes), v.split(sizes), strict=True)
            ]
        content = torch.cat([x["contents"] for x in batched_inputs]).to(self.device)
        scale = self.clip.logit_scale.clamp(max=self.max_logit_scale).exp()
        return {"loss_contrastive": contrastive_loss(u, v, content, scale)}

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Embeddings (n, D) of captions, not normalised; padding beyond the longest one is not computed."""
        tokens = self.clip.tokenizer(captions)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())].to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.locked_text):
            return self.clip.encode_text(tokens)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The CLIP alone, in half precision: what `load_clip(file)` takes."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.clip.state_dict().items()}
        return state, self.clip.file_metadata()


def contrastive_loss(u: Tensor, v: Tensor, content: Tensor, scale: Tensor) -> Tensor:
    """Symmetric multi-positive contrastive loss over all processes.

    Args:
        u, v: (B, D) unit embeddings of this process's crops and captions.
        content: (B, 96) uint8 content vectors.
        scale: temperature s > 0.

    Returns:
        Scalar; averaged over processes it is the loss of the global batch (equal B on every process).
    """
    all_u, all_v, all_content = (torch.cat(differentiable_all_gather(x)) for x in (u, v, content))
    to_text = _soft_cross_entropy(scale * u @ all_v.T, positive_pairs(content, all_content))
    to_image = _soft_cross_entropy(scale * v @ all_u.T, positive_pairs(all_content, content).T)
    return 0.5 * (to_text + to_image)


def _soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean cross-entropy of rows of logits (N, M) against uniform distributions over their positives."""
    return -(positives / positives.sum(1, keepdim=True) * F.log_softmax(logits, dim=1)).sum(1).mean()


def positive_pairs(image: Tensor, caption: Tensor) -> Tensor:
    """(N, M) zeros and ones: whether caption j (content row) says no more and no other than crop i shows."""
    (things, _, seen), (told, named, _) = (
        x.float().split([len(CLASSES), len(GROUNDS), len(GROUNDS)], 1) for x in (image, caption)
    )
    # counts are small integers: squared distances through products are exact
    distance = (things * things).sum(1)[:, None] + (told * told).sum(1)[None] - 2 * things @ told.T
    unseen = (1 - seen) @ named.T
    return ((distance == 0) & (unseen == 0)).float()
