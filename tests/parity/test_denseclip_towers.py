"""DenseCLIP's ResNet trunk, position tables at load, and both attention pools."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import nn

from clipdense.checkpoint import load_strict
from clipdense.clip.position import resize_table, truncate_text
from clipdense.clip.towers import TowerRequest, build_tower
from clipdense.clip.towers.base import to_map
from clipdense.clip.towers.resnet import attention_pool


@pytest.mark.golden(case="seg_rn_trunk")
@torch.no_grad()
def test_trunk(golden):
    args = golden.args
    visual = ModifiedResNet(args["layers"], 1, 1, image_size=args["input_resolution"], width=args["width"])
    visual.attnpool = None
    tower = build_tower(visual)
    load_strict(tower, golden.part("state"), source=golden.id)

    def maps(name, image):
        taps = tower(image, TowerRequest(taps=(2, 3, 4, 5))).taps
        return {f"{name}.x{i}": tap for i, (tap, _) in enumerate(taps)}

    images = golden.part("in")
    tower.eval()
    golden.check({k: v for name, image in images.items() for k, v in maps(name, image).items()})
    for pool in [m for m in tower.modules() if isinstance(m, nn.AvgPool2d) and m.kernel_size == 2]:
        pool.register_forward_hook(lambda _, x, y: x[0][:, :, ::2, ::2][:, :, : y.shape[2], : y.shape[3]])
    for name, image in images.items():
        assert all(golden.differs(key, value) for key, value in maps(name, image).items())


@pytest.mark.golden(case="posembed_load")
def test_position_tables_at_load(golden):
    results, controls = {}, {}
    for i, item in enumerate(golden.args["items"]):
        table, name = golden.part("in")[f"{i}.checkpoint"], f"{i}.resized"
        if item["kind"] == "text":
            results[name] = truncate_text(table, item["context_length"])
            controls[name] = table[-item["context_length"] :]
            continue
        side = item["input_resolution"] // {"rn": 32, "vit": 16}[item["kind"]]
        old, new = (item["old_grid"],) * 2, (side, side)
        results[name] = resize_table(table, old, new, "bilinear")
        grid = table[1:].T.reshape(1, -1, *old)
        antialiased = F.interpolate(grid, new, mode="bicubic", antialias=True)
        controls[name] = torch.cat([table[:1], antialiased[0].flatten(1).T])
    golden.check(results)
    for name, value in controls.items():
        source = golden.part("in")[name.replace("resized", "checkpoint")]
        constant = golden.args["items"][int(name.split(".")[0])].get("old_grid") == 1
        assert constant or source.shape == value.shape or golden.differs(name, value)


def _pool(golden, rule, scale=1):
    """Pool every feature map under a position rule, with positions multiplied by `scale`."""
    args = golden.args
    pool = AttentionPool2d(args["grid"], args["embed_dim"], args["num_heads"], args["output_dim"])
    load_strict(pool, golden.part("state"), source=golden.id)
    results = {}
    for name, x in golden.part("in").items():
        grid = (x.shape[2], x.shape[3])
        positions = scale * resize_table(pool.positional_embedding, (args["grid"],) * 2, grid, rule)
        tokens = attention_pool(pool, x, positions, every_query=True)
        results[f"{name}.global"], results[f"{name}.dense"] = tokens[:, 0], to_map(tokens[:, 1:], grid)
        single = attention_pool(pool, x, positions)
        torch.testing.assert_close(single[:, 0], tokens[:, 0])
    return results


def _other_grids(golden):
    """Return the maps with another grid than the table; none if the table has one cell."""
    native = golden.args["grid"]
    if native == 1:
        return []
    return [n for n, x in golden.part("in").items() if tuple(x.shape[-2:]) != (native, native)]


@pytest.mark.golden(case="seg_attnpool")
@torch.no_grad()
def test_segmentation_pool_interpolates(golden):
    golden.check(_pool(golden, "bilinear"))
    assert all(golden.differs(name, value) for name, value in _pool(golden, "bilinear", scale=0).items())
    controls = _pool(golden, "bicubic")
    for name in _other_grids(golden):
        assert golden.differs(f"{name}.dense", controls[f"{name}.dense"])


@pytest.mark.golden(case="det_attnpool")
@torch.no_grad()
def test_detection_pool_crops(golden):
    golden.check(_pool(golden, "crop"))
    assert all(golden.differs(name, value) for name, value in _pool(golden, "crop", scale=0).items())
    controls = _pool(golden, "bilinear")
    for name in _other_grids(golden):
        assert golden.differs(f"{name}.dense", controls[f"{name}.dense"])
    native, width = golden.args["grid"], golden.args["embed_dim"]
    with pytest.raises(ValueError, match="larger than the"):
        resize_table(torch.zeros(native**2 + 1, width), (native, native), (native, native + 1), "crop")


@pytest.mark.golden(case="seg_attnpool")
@torch.no_grad()
def test_two_resizings_differ_from_one(golden):
    """Resizing at load and again at run time differs from resizing once."""
    table = golden.part("state")["positional_embedding"]
    native = (golden.args["grid"],) * 2
    if native == (1, 1):  # constant under any rule
        return
    target = (native[0] + 3, native[1] + 4)
    between = (native[0] * 2 + 1,) * 2
    twice = resize_table(resize_table(table, native, between, "bilinear"), between, target, "bilinear")
    assert not torch.allclose(twice, resize_table(table, native, target, "bilinear"), atol=1e-3)
