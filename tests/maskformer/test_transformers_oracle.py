"""MaskFormer of Hugging Face's transformers as a second oracle.

Its modules are private and renamed between releases; if they are missing, the test is skipped.
"""

from typing import Any

import pytest
import torch

from clipdense.maskformer import MaskFormerHead
from clipdense.run.config import add_clipdense_config

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

CHANNELS, DIM, QUERIES, LAYERS, HEADS, FFN = (16, 24, 32, 48), 32, 7, 3, 4, 40


def head() -> MaskFormerHead:
    """Ours, with random norms and biases, too."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    keys = cfg.MODEL.MASK_FORMER
    keys.PIXEL_DECODER.CONV_DIM = keys.MASK_DIM = keys.HIDDEN_DIM = DIM
    keys.NUM_OBJECT_QUERIES, keys.DEC_LAYERS, keys.NHEADS, keys.DIM_FEEDFORWARD = QUERIES, LAYERS, HEADS, FFN
    keys.DROPOUT = 0.0
    shapes = {f"res{i}": ShapeSpec(channels=c, stride=2**i) for i, c in enumerate(CHANNELS, 2)}
    torch.manual_seed(0)
    model = MaskFormerHead(cfg, shapes).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def oracle() -> tuple[Any, Any]:
    """Their pixel decoder and transformer, of the same sizes."""
    theirs = pytest.importorskip(
        "transformers.models.maskformer.modeling_maskformer", reason="transformers is not installed"
    )
    decoder = theirs.MaskFormerConfig().decoder_config.__class__(
        d_model=DIM,
        num_queries=QUERIES,
        encoder_layers=0,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=FFN,
        dropout=0.0,
    )
    try:
        pixels = theirs.MaskFormerPixelDecoder(
            in_features=CHANNELS[-1],
            feature_size=DIM,
            mask_feature_size=DIM,
            lateral_widths=list(CHANNELS[:-1]),
        )
        config = theirs.MaskFormerConfig(decoder_config=decoder)
        transformer = theirs.MaskFormerTransformerModule(in_features=CHANNELS[-1], config=config)
    except (AttributeError, TypeError) as e:
        pytest.skip(f"this release of transformers has other modules ({e})")
    return pixels.eval(), transformer.eval()


def their_keys(key: str) -> list[str]:
    """One of our keys under theirs; three where they have query, key and value apart."""
    if key.startswith("pixel_decoder."):
        part, _, rest = key.removeprefix("pixel_decoder.").partition(".")
        place = {"layer_4": "fpn.stem", "mask_features": "mask_projection"} | {
            name: f"fpn.layers.{3 - i}.{block}"
            for i in (1, 2, 3)
            for name, block in ((f"adapter_{i}", "proj"), (f"layer_{i}", "block"))
        }
        if part == "mask_features":
            return [f"{place[part]}.{rest}"]
        return [
            f"{place[part]}.1.{rest.removeprefix('norm.')}" if "norm" in rest else f"{place[part]}.0.{rest}"
        ]
    name = key.removeprefix("predictor.")
    for old, new in {
        "query_embed": "queries_embedder",
        "input_proj": "input_projection",
        "transformer.decoder.norm": "decoder.layernorm",
        "transformer.decoder.": "decoder.",
        "out_proj": "o_proj",
        "multihead_attn": "encoder_attn",
        "norm1": "self_attn_layer_norm",
        "norm2": "encoder_attn_layer_norm",
        "norm3": "final_layer_norm",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    }.items():
        name = name.replace(old, new)
    if "in_proj_" in name:
        return [name.replace("in_proj_", f"{x}_proj.") for x in "qkv"]
    return [name]


@torch.no_grad()
def test_against_transformers() -> None:
    model, (pixels, transformer) = head(), oracle()
    states: dict[str, dict[str, torch.Tensor]] = {"pixel_decoder": {}, "predictor": {}}
    for key, value in model.state_dict().items():
        if "class_embed" in key or "mask_embed" in key:  # no parts of their two modules
            continue
        names = their_keys(key)
        states[key.split(".")[0]].update(zip(names, value.chunk(len(names)), strict=True))
    pixels.load_state_dict(states["pixel_decoder"])
    transformer.load_state_dict(states["predictor"])

    generator = torch.Generator().manual_seed(1)
    features = {
        f"res{i}": torch.randn(2, c, 96 // 2**i, -(-136 // 2**i), generator=generator)
        for i, c in enumerate(CHANNELS, 2)
    }
    mask_features, _ = model.pixel_decoder(features)
    theirs = pixels(list(features.values())).last_hidden_state
    torch.testing.assert_close(mask_features, theirs, atol=1e-6, rtol=0)

    queries = transformer(features["res5"], output_hidden_states=True)
    embed, class_head = model.predictor.mask_embed, model.predictor.class_embed

    def classify(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, class_head.weight, class_head.bias)

    masks = torch.einsum("bqc,bchw->bqhw", embed(queries.last_hidden_state), theirs)
    prediction = model(features)
    torch.testing.assert_close(
        prediction.class_logits, classify(queries.last_hidden_state), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(prediction.mask_logits, masks, atol=1e-4, rtol=0)
    # Their states between layers are not normalised; with the last norm they are those of deep supervision.
    states_between = [transformer.decoder.layernorm(x) for x in queries.hidden_states[1:-1]]
    for layer, state in zip(model.train()(features).aux, states_between, strict=False):
        torch.testing.assert_close(layer.class_logits, classify(state), atol=1e-5, rtol=0)
    model.predictor.query_embed.weight[0] += 1
    assert (model.eval()(features).mask_logits - masks).abs().max() > 1e-3
