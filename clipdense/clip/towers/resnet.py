"""CLIP's ModifiedResNet: C2 to C5, and its attention pool for positions, boxes and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor, nn

from clipdense.clip.attention import AttentionParameters
from clipdense.clip.position import resize_table, square_grid
from clipdense.clip.roi_align import roi_align
from clipdense.clip.towers.base import Tower, TowerOutput, TowerRequest, to_map
from clipdense.clip.towers.groups import TowerGroups, norm_parameters


class ResNetTower(Tower):
    """CLIP's ModifiedResNet.

    Modes of `dense`: in "plain" every position is a query of the attention pool, and the mean token is among
    the keys (z of DenseCLIP, Rao et al., CVPR 2022); "value" or "maskclip" is c_proj(v_proj(C5)), without
    positions or attention. `pre` is C5, `keys` is k_proj(C5). If `attnpool` is None, the tower is the trunk
    alone.
    """

    avgpool: nn.AvgPool2d
    attnpool: AttentionPool2d | None
    has_keys = True
    stride = 32

    def __init__(self, visual: ModifiedResNet, position_rule: str = "bicubic") -> None:
        super().__init__(visual, position_rule)
        self.image_size = (visual.image_size, visual.image_size)
        self.grid = (visual.image_size // 32, visual.image_size // 32)
        stages = {2: visual.layer1, 3: visual.layer2, 4: visual.layer3, 5: visual.layer4}
        self.tap_channels = {tap: stage[0].conv3.out_channels for tap, stage in stages.items()}
        self.tap_strides = {2: 4, 3: 8, 4: 16, 5: 32}
        if visual.attnpool is None:
            self.attnpool, self.has_keys = None, False
            self.why_no_dense = "the trunk has no attention pool"
            self.embed_dim = self.tap_channels[5]
        else:
            self.grid = square_grid(visual.attnpool.positional_embedding.shape[0])
            self.embed_dim = visual.attnpool.c_proj.out_features

    @property
    def dense_modes(self) -> tuple[str, ...]:
        """Valid values of `TowerRequest.dense`; empty without an attention pool."""
        return () if self.why_no_dense else ("plain", "value", "maskclip")

    def features(self, images: Tensor, request: TowerRequest) -> TowerOutput:
        """Run the stem, the stages up to the last requested one, and the pool if it is needed."""
        if request.pooled and self.attnpool is None:
            raise self.cannot("pooled", self.why_no_dense)
        out = TowerOutput()
        whole = request.pre or request.keys or request.pooled or request.dense is not None
        stages = self._stages()[: 4 if whole else max(request.taps, default=1) - 1]
        maps, x = {}, self._stem(images)
        for tap, stage in enumerate(stages, start=2):
            x = stage(x)
            if tap in request.taps:
                maps[tap] = x
        out.taps = [(maps[tap], self.tap_strides[tap]) for tap in request.taps]
        if request.pre:
            out.pre = x
        return self.read(x, request, out)

    def read(self, x: Tensor, request: TowerRequest, out: TowerOutput | None = None) -> TowerOutput:
        """Compute the requested keys, dense map and embedding from the trunk's last map.

        Args:
            x: `TowerOutput.pre` (B, C, h, w).
            request: what it asks for beyond that is left out.
            out: output to complete; None: a new one.
        """
        out, pool = TowerOutput() if out is None else out, self.attnpool
        if pool is None:
            return out
        if request.keys:
            out.keys = _pointwise(x, pool.k_proj)
        if request.dense in ("value", "maskclip"):
            out.dense = value_map(pool, x)
        every = request.dense == "plain"
        if every or request.pooled:
            tokens = attention_pool(pool, x, self._positions(x), every_query=every)
            if every:
                out.dense = to_map(tokens[:, 1:], (x.shape[2], x.shape[3]))
            if request.pooled:
                out.pooled = tokens[:, 0]
        return out

    def position_owner(self) -> Any:
        """Return the attention pool."""
        return self.attnpool

    def groups(self) -> TowerGroups:
        """See `Tower.groups`; the blocks are the four stages, the projection is the attention pool."""
        pool = self.attnpool
        return TowerGroups(
            stem=tuple(getattr(self, f"{layer}{i}") for i in "123" for layer in ("conv", "bn")),
            blocks=tuple(self._stages()),
            projection=() if pool is None else tuple(pool.children()),
            positions=() if pool is None else (pool.positional_embedding,),
            norms=norm_parameters(self),
            attentions=()
            if pool is None
            else (AttentionParameters.from_linears(pool.q_proj, pool.k_proj, pool.v_proj),),
        )

    def embed_boxes(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Pool boxes of C5 by RoIAlign to the native grid, then by the attention pool.

        Source: F-VLM (Kuo et al., ICLR 2023), section 3.
        """
        if self.attnpool is None:
            raise self.cannot("region embeddings", self.why_no_dense)
        rois = roi_align(features, boxes, self.grid, scale=1 / self.stride)
        return attention_pool(self.attnpool, rois, self._positions(rois))[:, 0]

    def embed_masks(self, features: Tensor, masks: Tensor) -> Tensor:
        """Attend from the mean over the whole map to the positions inside each mask (> 0).

        The mean token is not among the keys. An empty mask gives the bias of c_proj. This is how the released
        code of FC-CLIP (Yu et al., NeurIPS 2023) pools ResNets.
        """
        if self.attnpool is None:
            raise self.cannot("region embeddings", self.why_no_dense)
        return masked_attention_pool(self.attnpool, features, self._positions(features), masks)

    def _positions(self, features: Tensor) -> Tensor:
        assert self.attnpool is not None
        h, w = features.shape[-2:]
        return resize_table(self.attnpool.positional_embedding, self.grid, (h, w), self.position_rule)

    def _stem(self, x: Tensor) -> Tensor:
        for i in "123":
            x = getattr(self, f"act{i}")(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        y: Tensor = self.avgpool(x)
        return y

    def _stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{i}") for i in range(1, 5)]


def attention_pool(pool: AttentionPool2d, x: Tensor, positions: Tensor, every_query: bool = False) -> Tensor:
    """Run the pool's attention on the tokens [mean; x_1 .. x_hw] + positions.

    Args:
        pool: CLIP's attention pool.
        x: (B, C, h, w).
        positions: (1 + h * w, C).
        every_query: use every token as a query; by default only the mean token.

    Returns:
        (B, 1 + h * w, D) with ``every_query``, otherwise (B, 1, D).
    """
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + positions.to(x.dtype)
    queries = tokens if every_query else tokens[:, :1]
    k, v = _heads(pool, pool.k_proj(tokens)), _heads(pool, pool.v_proj(tokens))
    y = F.scaled_dot_product_attention(_heads(pool, pool.q_proj(queries)), k, v)
    return _linear(pool.c_proj, y.transpose(1, 2).flatten(2))


def value_map(pool: AttentionPool2d, x: Tensor) -> Tensor:
    """Compute c_proj(v_proj(x)) at every position, without attention: (B, C, h, w) to (B, D, h, w)."""
    return _pointwise(_pointwise(x, pool.v_proj), pool.c_proj)


def masked_attention_pool(pool: AttentionPool2d, x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """Run the pool with one query per mask, whose keys and values are the positions inside the mask.

    Args:
        pool: CLIP's attention pool.
        x: (B, C, h, w).
        positions: (1 + h * w, C).
        masks: (B, Q, h, w); a position is inside where > 0.

    Returns:
        (B, Q, D).
    """
    tokens = x.flatten(2).transpose(1, 2)
    inside = masks.flatten(2) > 0
    filled = inside.any(2, keepdim=True)
    mean = tokens.mean(1, keepdim=True) + positions[:1].to(x.dtype)
    tokens = tokens + positions[1:].to(x.dtype)
    scores = _shared_query_scores(pool, _heads(pool, pool.q_proj(mean)), tokens)
    # The softmax of an empty mask is undefined: attend everywhere, then drop the result.
    outside = (filled & ~inside)[:, None]
    weights = scores[:, :, None].masked_fill(outside, -math.inf).softmax(-1)  # (B, heads, Q, h * w)
    y = weights.to(x.dtype) @ _heads(pool, pool.v_proj(tokens))
    return _linear(pool.c_proj, y.transpose(1, 2).flatten(2) * filled)


def _shared_query_scores(pool: AttentionPool2d, query: Tensor, tokens: Tensor) -> Tensor:
    """Compute the scaled scores of one query per image: q^T (W x + b) = (W^T q)^T x + q^T b.

    The query is the same for every mask, so that W^T q replaces the keys W x of all positions.

    Args:
        pool: CLIP's attention pool.
        query: (B, heads, 1, d).
        tokens: (B, N, C).

    Returns:
        (B, heads, N).
    """
    heads, d = query.shape[1], query.shape[3]
    weight, bias = pool.k_proj.weight.unflatten(0, (heads, d)), pool.k_proj.bias.unflatten(0, (heads, d))
    folded = torch.einsum("bhqd,hdc->bhc", query, weight)
    products = folded @ tokens.transpose(1, 2) + (query[:, :, 0] * bias).sum(-1, keepdim=True)
    scores: Tensor = products / math.sqrt(d)
    return scores


def _heads(pool: AttentionPool2d, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], pool.num_heads, -1).transpose(1, 2)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _pointwise(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
