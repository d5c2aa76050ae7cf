"""Meta architecture of contrastive pre-training on captioned crops."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.checkpoint import read_checkpoint
from clipdense.clip import ClipModel, load_clip
from clipdense.clip.contrastive import contrastive_loss, gather_rows, sigmoid_loss
from clipdense.clip.nano import nano_path
from clipdense.data.shapes.pretraining.local_pool import localize_pool
from clipdense.data.shapes.world import CLASSES, GROUNDS

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY


@META_ARCH_REGISTRY.register()
class ContrastiveCLIP(nn.Module):
    """CLIP trained with an image-text contrastive loss in which a crop may have several positive captions.

    With unit embeddings u_i of crops and v_j of captions, logit scale s and the positives P_i of crop i, the
    loss is the cross-entropy of softmax_j(s u_i.v_j) against the uniform distribution over P_i, averaged with
    its transpose. A caption is a positive of a crop if it names the same things and only grounds that the
    crop shows. A CLIP with a logit bias (SigLIP) is trained with the `sigmoid_loss` of the same pairs.

    Args:
        clip: the model to train.
        text_only: train only the text tower; paraphrases of the captions replace the crops.
        locked_text: freeze the text tower (LiT).
        centring_weight: weight of ``loss_centring``, see `centring_loss`.
        init_logit_scale: initial logit scale s (inverse temperature); 0 keeps the one of ``clip``.
        max_logit_scale: upper bound of the logit scale s.
        local_pool: initialise the image tower's attention pool with `localize_pool`.

    Raises:
        ValueError: If ``clip`` has no text tower, if ``text_only`` and ``locked_text`` are both set, or if
            ``local_pool`` is set and the image tower has no attention pool.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        text_only: bool = False,
        locked_text: bool = False,
        centring_weight: float = 0.0,
        init_logit_scale: float = 0.0,
        max_logit_scale: float = 100.0,
        local_pool: bool = False,
    ) -> None:
        super().__init__()
        if clip.text is None:
            raise ValueError(f"contrastive training needs a text tower; {clip.name} was loaded without one")
        if text_only and locked_text:
            raise ValueError(
                "nothing would be trained: set MODEL.CONTRASTIVE_CLIP.TEXT_ONLY False or LOCKED_TEXT ''"
            )
        self.clip = clip
        self.text_only, self.locked_text = text_only, locked_text
        self.centring_weight = centring_weight
        self.max_logit_scale = math.log(max_logit_scale)
        if init_logit_scale:
            torch.nn.init.constant_(clip.logit_scale, math.log(init_logit_scale))
        clip.text.requires_grad_(not locked_text)
        clip.visual.requires_grad_(not text_only)
        if local_pool:
            localize_pool(clip.visual)
        clip.visual.to(memory_format=torch.channels_last)  # faster convolutions
        self.register_buffer(
            "pixel_mean", torch.tensor(clip.pixel_mean).view(3, 1, 1) * 255, persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(clip.pixel_std).view(3, 1, 1) * 255, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments from ``MODEL.CLIP`` and ``MODEL.CONTRASTIVE_CLIP``."""
        clip = load_clip(cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.PRETRAINED, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        teacher = cfg.MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT
        if teacher and clip.text is not None:
            clip.text.load_state_dict(_text_state(teacher, cfg.MODEL.ALLOW_PICKLE))
        return {
            "clip": clip,
            "text_only": cfg.MODEL.CONTRASTIVE_CLIP.TEXT_ONLY,
            "locked_text": bool(teacher),
            "centring_weight": cfg.MODEL.CONTRASTIVE_CLIP.CENTRING_WEIGHT,
            "init_logit_scale": cfg.MODEL.CONTRASTIVE_CLIP.INIT_LOGIT_SCALE,
            "max_logit_scale": cfg.MODEL.CONTRASTIVE_CLIP.MAX_LOGIT_SCALE,
            "local_pool": cfg.MODEL.CONTRASTIVE_CLIP.LOCAL_POOL,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model and its inputs."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses of a batch in training, or its embeddings in evaluation.

        Args:
            batched_inputs: dicts with ``crops`` (n, 3, S, S) uint8 RGB, ``captions`` (n strings), with
                ``text_only`` also ``paraphrases`` (n strings), and ``contents`` (n, 96) uint8 (see
                `crops.CONTENT_SIZE`). Inputs may differ in n and S.

        Returns:
            In training ``loss_contrastive`` and, if its weight is not 0, ``loss_centring``. In
            evaluation, one dict per input with ``image_embeddings`` (of the paraphrases, with ``text_only``)
            and ``text_embeddings`` (n, D), L2-normalised.
        """
        if self.text_only:
            u = self.encode_captions([p for x in batched_inputs for p in x["paraphrases"]])
        else:
            u = self.encode_crops([x["crops"] for x in batched_inputs])
        u = F.normalize(u.float(), dim=-1)
        v = self.encode_captions([c for x in batched_inputs for c in x["captions"]])
        v = F.normalize(v.float(), dim=-1)
        if not self.training:
            sizes = [len(x["captions"]) for x in batched_inputs]
            return [
                {"image_embeddings": i, "text_embeddings": t}
                for i, t in zip(u.split(sizes), v.split(sizes), strict=True)
            ]
        content = torch.cat([x["contents"] for x in batched_inputs]).to(self.device)
        scale = self.clip.logit_scale.clamp(max=self.max_logit_scale).exp()
        pairs: dict[str, Any] = {"labels": content, "matches": positive_pairs}
        if self.clip.logit_bias is None:
            loss = contrastive_loss(u, v, scale, **pairs)
        else:
            loss = sigmoid_loss(u, v, scale, self.clip.logit_bias, **pairs)
        losses = {"loss_contrastive": loss}
        if self.centring_weight:
            losses["loss_centring"] = self.centring_weight * (centring_loss(u) + centring_loss(v))
        return losses

    def encode_crops(self, crops: list[Tensor]) -> Tensor:
        """Embed crops, with one forward pass per crop size.

        Args:
            crops: (n_i, 3, S_i, S_i) uint8 RGB.

        Returns:
            (sum n_i, D) embeddings in the order of ``crops``, not normalised.
        """
        by_size: dict[int, list[int]] = {}
        for i, part in enumerate(crops):
            by_size.setdefault(part.shape[-1], []).append(i)
        embeddings: dict[int, Tensor] = {}
        for members in by_size.values():
            pixels = torch.cat([crops[i] for i in members]).to(self.device, non_blocking=True).float()
            embedded = self.clip.encode_image((pixels - self.pixel_mean) / self.pixel_std)
            parts = embedded.split([len(crops[i]) for i in members])
            embeddings |= dict(zip(members, parts, strict=True))
        return torch.cat([embeddings[i] for i in range(len(crops))])

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Embed captions, without the padding beyond the longest one.

        Args:
            captions: n strings.

        Returns:
            (n, D) embeddings, not normalised.
        """
        tokens = self.clip.tokenizer(captions)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())].to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.locked_text):
            return self.clip.encode_text(tokens)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the CLIP in the format of `load_clip`.

        Returns:
            Its state in half precision, and the metadata of the file.
        """
        state = {
            k: (v.half() if v.is_floating_point() else v).contiguous()
            for k, v in self.clip.state_dict().items()
        }
        return state, self.clip.file_metadata()


def _text_state(name: str, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the state of the text tower of a CLIP, or of "shapes-text".

    Raises:
        ValueError: If the CLIP has no text tower.
    """
    if name == "shapes-text":
        state = read_checkpoint(nano_path(name)).state
        return {key.removeprefix("text."): value for key, value in state.items()}
    text = load_clip(name, allow_pickle=allow_pickle).text
    if text is None:
        raise ValueError(
            f"MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT: {name} has no text tower; name a CLIP with one"
        )
    return text.state_dict()


def centring_loss(embeddings: Tensor) -> Tensor:
    """Compute the squared length of the mean embedding over all processes.

    Args:
        embeddings: (B, D) unit embeddings of this process.

    Returns:
        Scalar: 0 if the embeddings are centred, 1 if they are all equal.
    """
    return gather_rows(embeddings).mean(0).square().sum()


def positive_pairs(image: Tensor, caption: Tensor) -> Tensor:
    """Match captions to crops by content.

    Args:
        image: (N, `CONTENT_SIZE`) content vectors of crops.
        caption: (M, `CONTENT_SIZE`) content vectors of captions.

    Returns:
        (N, M) float: 1 if the caption names the same things as the crop's own caption and only grounds that
        are visible in the crop, else 0.
    """
    (things, _, seen), (named_things, named_grounds, _) = (
        x.float().split([len(CLASSES), len(GROUNDS), len(GROUNDS)], 1) for x in (image, caption)
    )
    # Counts are small integers, so squared distances computed from inner products are exact.
    lengths = (things * things).sum(1)[:, None] + (named_things * named_things).sum(1)[None]
    distance = lengths - 2 * things @ named_things.T
    unseen = (1 - seen) @ named_grounds.T
    return ((distance == 0) & (unseen == 0)).float()
