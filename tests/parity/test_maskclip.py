"""MaskCLIP on CLIP's ResNets: value path, attention-pool path, keys and refinements."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.towers.base import to_map
from clipdense.clip.towers.resnet import ResNetTower, attention_pool
from clipdense.inference import text_cosines
from tests.helpers.maskclip_files import check, refinements

_STEM = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}


def _tower(golden, folder: Path) -> ResNetTower:
    """The backbone under CLIP's names; the position table, which the file lacks, is not used."""
    args, state = golden.args, {"logit_scale": torch.zeros(())}
    for key, value in golden.part("state").items():
        root, *path = key.split(".")
        if root == "backbone" and path[0] == "stem":
            path = [_STEM[path[1]], *path[2:]]
        elif root == "backbone" and "downsample" in path:  # upstream numbers the average pool
            at = path.index("downsample") + 1
            path[at] = str(int(path[at]) - 1)
        elif root == "decode_head" and path[0].endswith("_proj"):
            path, value = ["attnpool", *path], value.flatten(1) if path[-1] == "weight" else value
        else:
            assert root == "backbone" or path == ["text_embeddings"], key
            if root == "decode_head":
                continue
        state["visual." + ".".join(path)] = value.contiguous()
    state["visual.attnpool.positional_embedding"] = torch.zeros(50, args["feat_dim"])
    vision_cfg = {
        "layers": args["layers"],
        "width": args["width"],
        "image_size": 224,
        "patch_size": None,
        "head_width": args["feat_dim"] // args["heads"],
    }
    config = {"model_cfg": {"embed_dim": args["text_dim"], "vision_cfg": vision_cfg, "text_cfg": {}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state, folder / "open_clip_model.safetensors")
    tower = load_clip(f"local-dir:{folder}", text=False).visual
    assert isinstance(tower, ResNetTower)
    return tower


@pytest.mark.golden(name="maskclip_rn*")
@torch.no_grad()
def test_maskclip_resnet(golden, tmp_path):
    tower, results = _tower(golden, tmp_path), {}
    text = golden.part("state")["decode_head.text_embeddings"]
    for i in range(len(golden.args["image_shapes"])):
        run, image = f"image_{i}", golden.part("in")[f"image_{i}"]
        out = tower(image, TowerRequest(taps=(2, 3, 4, 5), dense="maskclip", keys=True))
        results |= {f"{run}.x{level}": tap for level, (tap, _) in enumerate(out.taps)}
        results[f"{run}.feat"] = out.dense
        results[f"{run}.k"] = out.keys.flatten(2).transpose(1, 2)
        c5 = out.taps[-1][0]
        no_positions = c5.new_zeros(1 + c5.shape[2] * c5.shape[3], c5.shape[1])
        tokens = attention_pool(tower.attnpool, c5, no_positions, every_query=True)[:, 1:]
        pooled = text_cosines(to_map(tokens, c5.shape[-2:]), text)
        results[f"{run}.logits_attention_pool_path"] = pooled
        logits = text_cosines(out.dense, text)
        results |= refinements(golden, run, logits, out.keys)
        assert golden.differs(f"{run}.logits", pooled)
    check(golden, results)
