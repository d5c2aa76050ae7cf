"""Files as DenseCLIP publishes its detectors, at tiny sizes, with random numbers and no trained weight."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CLASSES = ("person", "traffic light", "cell phone")
WIDTH, JOINT, TEXT, DECODER, NECK, CONTEXTS, GRID = 2, 16, 16, 8, 8, 8, 3
ANCHORS = 9


def retinanet(classes: Sequence[str] | None = CLASSES) -> dict[str, Any]:
    """{meta, state_dict, optimizer} of a RetinaNet; bare without ``classes``."""
    return _file({**dict(_shared(3)), **dict(_retinanet_head())}, classes)


def mask_rcnn(classes: Sequence[str] | None = CLASSES) -> dict[str, Any]:
    """{meta, state_dict, optimizer} of a Mask R-CNN; bare without ``classes``."""
    return _file({**dict(_shared(4)), **dict(_mask_rcnn_heads())}, classes)


def _file(shapes: dict[str, Sequence[int]], classes: Sequence[str] | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        least = 0.5 if "running_var" in key else 0.0
        state[key] = torch.rand(tuple(shape), generator=generator) * 0.2 + least
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    if classes is None:
        return state
    meta = {"CLASSES": tuple(classes), "epoch": 12, "mmcv_version": "1.3.17"}
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def _layer(name: str, *shape: int) -> Iterator[tuple[str, Sequence[int]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _norm(name: str, channels: int) -> Iterator[tuple[str, Sequence[int]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def _shared(levels: int) -> Iterator[tuple[str, Sequence[int]]]:
    yield "contexts", (1, CONTEXTS, TEXT)
    yield "gamma", (JOINT,)
    yield from _resnet()
    yield from _text()
    yield from _decoder()
    inputs = [8 * 2**i for i in range(4)][-levels:]
    inputs[-1] += len(CLASSES)
    for i, channels in enumerate(inputs):
        yield from _layer(f"neck.lateral_convs.{i}.conv", NECK, channels, 1, 1)
        yield from _layer(f"neck.fpn_convs.{i}.conv", NECK, NECK, 3, 3)


def _resnet() -> Iterator[tuple[str, Sequence[int]]]:
    half, width = WIDTH // 2, WIDTH
    for i, (inputs, outputs) in enumerate(((3, half), (half, half), (half, width)), start=1):
        yield f"backbone.conv{i}.weight", (outputs, inputs, 3, 3)
        yield from _norm(f"backbone.bn{i}", outputs)
    inputs = width
    for stage in range(1, 5):
        block, planes = f"backbone.layer{stage}.0", width * 2 ** (stage - 1)
        for i, shape in enumerate(
            ((planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)), start=1
        ):
            yield f"{block}.conv{i}.weight", shape
            yield from _norm(f"{block}.bn{i}", shape[0])
        yield f"{block}.downsample.0.weight", (4 * planes, inputs, 1, 1)
        yield from _norm(f"{block}.downsample.1", 4 * planes)
        inputs = 4 * planes
    yield "backbone.attnpool.positional_embedding", (GRID**2 + 1, inputs)
    for name, outputs in (("q_proj", inputs), ("k_proj", inputs), ("v_proj", inputs), ("c_proj", JOINT)):
        yield from _layer(f"backbone.attnpool.{name}", outputs, inputs)


def _text() -> Iterator[tuple[str, Sequence[int]]]:
    yield "text_encoder.positional_embedding", (CONTEXTS + 5, TEXT)
    yield "text_encoder.text_projection", (TEXT, JOINT)
    yield "text_encoder.token_embedding.weight", (49408, TEXT)
    yield from _layer("text_encoder.ln_final", TEXT)
    block = "text_encoder.transformer.resblocks.0"
    yield f"{block}.attn.in_proj_weight", (3 * TEXT, TEXT)
    yield f"{block}.attn.in_proj_bias", (3 * TEXT,)
    yield from _layer(f"{block}.attn.out_proj", TEXT, TEXT)
    yield from _layer(f"{block}.ln_1", TEXT)
    yield from _layer(f"{block}.ln_2", TEXT)
    yield from _layer(f"{block}.mlp.c_fc", 4 * TEXT, TEXT)
    yield from _layer(f"{block}.mlp.c_proj", TEXT, 4 * TEXT)


def _decoder() -> Iterator[tuple[str, Sequence[int]]]:
    for name, *shape in (
        ("memory_proj.0", JOINT),
        ("memory_proj.1", DECODER, JOINT),
        ("memory_proj.2", DECODER),
        ("text_proj.0", JOINT),
        ("text_proj.1", DECODER, JOINT),
        ("out_proj.0", DECODER),
        ("out_proj.1", JOINT, DECODER),
        ("decoder.0.norm1", DECODER),
        ("decoder.0.norm2", DECODER),
        ("decoder.0.norm3", DECODER),
        ("decoder.0.mlp.0", 4 * DECODER, DECODER),
        ("decoder.0.mlp.3", DECODER, 4 * DECODER),
    ):
        yield from _layer(f"context_decoder.{name}", *shape)
    for attention in ("self_attn", "cross_attn"):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"context_decoder.decoder.0.{attention}.{name}.weight", (DECODER, DECODER)
        yield from _layer(f"context_decoder.decoder.0.{attention}.proj", DECODER, DECODER)


def _retinanet_head() -> Iterator[tuple[str, Sequence[int]]]:
    yield from _layer("neck.fpn_convs.3.conv", NECK, 64 + len(CLASSES), 3, 3)
    yield from _layer("neck.fpn_convs.4.conv", NECK, NECK, 3, 3)
    for branch in ("cls", "reg"):
        for i in range(2):
            yield from _layer(f"bbox_head.{branch}_convs.{i}.conv", NECK, NECK, 3, 3)
    yield from _layer("bbox_head.retina_cls", ANCHORS * len(CLASSES), NECK, 3, 3)
    yield from _layer("bbox_head.retina_reg", ANCHORS * 4, NECK, 3, 3)


def _mask_rcnn_heads() -> Iterator[tuple[str, Sequence[int]]]:
    yield from _layer("rpn_head.rpn_conv", NECK, NECK, 3, 3)
    yield from _layer("rpn_head.rpn_cls", 3, NECK, 1, 1)
    yield from _layer("rpn_head.rpn_reg", 12, NECK, 1, 1)
    yield from _layer("roi_head.bbox_head.shared_fcs.0", 12, NECK * 49)
    yield from _layer("roi_head.bbox_head.shared_fcs.1", 12, 12)
    yield from _layer("roi_head.bbox_head.fc_cls", len(CLASSES) + 1, 12)
    yield from _layer("roi_head.bbox_head.fc_reg", 4 * len(CLASSES), 12)
    for i in range(4):
        yield from _layer(f"roi_head.mask_head.convs.{i}.conv", NECK, NECK, 3, 3)
    yield from _layer("roi_head.mask_head.upsample", NECK, NECK, 2, 2)
    yield from _layer("roi_head.mask_head.conv_logits", len(CLASSES), NECK, 1, 1)
