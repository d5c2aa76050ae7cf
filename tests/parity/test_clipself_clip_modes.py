"""The last-block modes of other dense CLIPs: CAT-Seg's, and MaskCLIP's on both of its numerics."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.clip.attention import TokenStream, get_mode
from clipdense.clip.towers.base import to_map
from tests.helpers.maskclip_files import check, refinements


def _catseg(golden, folder: Path) -> ClipModel:
    """OpenAI's layout but for the projections of attention, which CAT-Seg stores apart."""
    state, sizes = golden.part("state"), golden.config["clip"]
    for key in [k for k in state if k.endswith(".q_proj_weight")]:
        parts = [state.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[key.replace("q_proj", "in_proj")] = torch.cat(parts)
    save_file(state, folder / "clip.safetensors")
    head_width = sizes["width"] // sizes["heads"]
    return load_clip(
        folder / "clip.safetensors", quick_gelu=True, head_width=head_width, text_heads=sizes["t_heads"]
    )


@pytest.mark.golden(name="catseg_clip_dense")
@torch.no_grad()
def test_catseg(golden, tmp_path):
    golden.tolerance = (1e-5, 0.0)
    clip, inputs = _catseg(golden, tmp_path), golden.part("in")
    tower, results, last = clip.visual, {}, golden.config["clip"]["layers"] - 1
    for size in golden.config["sizes"]:

        def keep(index: int, stream: TokenStream, size: int = size) -> TokenStream:
            if index > 0:
                results[f"block{index - 1}_LND_{size}"] = stream.x.transpose(0, 1)
            if index == last:
                tokens = get_mode("catseg")(tower.block(last), stream).x
                results[f"dense_tokens_{size}"] = tower.project(tower.norm_tokens(tokens))
            return stream

        out = tower(inputs[f"image_{size}"], TowerRequest(dense="catseg", pooled=True), hook=keep)
        patches = results[f"dense_tokens_{size}"][:, 1:]
        torch.testing.assert_close(out.dense, to_map(patches, out.dense.shape[-2:]), atol=1e-6, rtol=0)
        results[f"cls_{size}"] = out.pooled
        for mode in ("plain", "clipself"):
            other = tower(inputs[f"image_{size}"], TowerRequest(dense=mode)).dense.flatten(2).transpose(1, 2)
            tokens = torch.cat([results[f"dense_tokens_{size}"][:, :1], other], dim=1)
            assert golden.differs(f"dense_tokens_{size}", tokens)
    results["text"] = clip.encode_text(inputs["tokens"])
    golden.check(results)


# From left to right; the blocks' own `layers` before the blocks.
_MASKCLIP_NAMES = (
    ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"),
    ("patch_embed.projection.", "conv1."),
    (".attn.attn.", ".attn."),
    (".ffn.layers.0.0.", ".mlp.c_fc."),
    (".ffn.layers.1.", ".mlp.c_proj."),
    ("layers.", "transformer.resblocks."),
    (".ln1.", ".ln_1."),
    (".ln2.", ".ln_2."),
    ("ln0.", "ln_pre."),
    ("ln1.", "ln_post."),
)


def _maskclip(golden, folder: Path, quick_gelu: bool) -> ClipModel:
    """The image tower; MaskCLIP's exact GELU and epsilon are settings of open_clip's."""
    args, state = golden.args, {"logit_scale": torch.zeros(())}
    for key, value in golden.part("state").items():
        if key.startswith("backbone."):
            key = key.removeprefix("backbone.")
            for theirs, ours in _MASKCLIP_NAMES:
                key = key.replace(theirs, ours)
            state[f"visual.{key}"] = value
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    state["visual.proj"] = golden.part("state")["decode_head.proj.weight"].flatten(1).T.contiguous()
    hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    vision_cfg = {
        "image_size": args["img_size"],
        "patch_size": args["patch_size"],
        "width": args["feat_dim"],
        "layers": args["layers"],
        "head_width": args["feat_dim"] // args["heads"],
        "mlp_ratio": hidden / args["feat_dim"],
        "norm_kwargs": {"eps": args["ln_eps"]},
    }
    model_cfg = {"embed_dim": args["text_dim"], "quick_gelu": quick_gelu, "vision_cfg": vision_cfg}
    config = {"model_cfg": {**model_cfg, "text_cfg": {}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state, folder / "open_clip_model.safetensors")
    return load_clip(f"local-dir:{folder}", text=False)


@pytest.mark.golden(name="maskclip_vit_*")
@torch.no_grad()
def test_maskclip(golden, tmp_path):
    """Tokens, dense map and logits; images are padded to whole patches, right and bottom."""
    args, inputs = golden.args, golden.part("in")
    clip = _maskclip(golden, tmp_path, args["activation"] == "quickgelu")
    other = _maskclip(golden, tmp_path, args["activation"] != "quickgelu")
    tower, last, results = clip.visual, args["layers"] - 1, {}
    text = golden.part("state")["decode_head.text_embeddings"]
    for i in range(len(args["image_shapes"])):
        image, patch = inputs[f"image_{i}"], args["patch_size"]
        h, w = image.shape[-2:]
        padded = F.pad(image, (0, -w % patch, 0, -h % patch))

        def keep(index: int, stream: TokenStream, i: int = i) -> TokenStream:
            if index == last:
                block = tower.block(last)
                q, k, _ = block.qkv(block.normed(stream.patches))
                results[f"image_{i}.q"], results[f"image_{i}.k"] = block.out(q), block.out(k)
            return stream

        out = tower(padded, TowerRequest(pre=True, dense="maskclip"), hook=keep)
        logits = torch.einsum("bdhw,kd->bkhw", F.normalize(out.dense, dim=1), text)
        values: dict[str, Tensor] = {
            "final_map": tower(padded, TowerRequest(pre=True)).pre,
            "value_map": out.pre,
            "feat": out.dense,
        }
        results.update({f"image_{i}.{name}": value for name, value in values.items()})
        keys = to_map(results[f"image_{i}.k"], out.dense.shape[-2:])
        results.update(refinements(golden, f"image_{i}", logits, keys))
        for wrong in (
            other.visual(padded, TowerRequest(dense="maskclip")),
            tower(padded, TowerRequest(dense="catseg")),
        ):
            assert golden.differs(f"image_{i}.feat", wrong.dense)
    check(golden, results)
