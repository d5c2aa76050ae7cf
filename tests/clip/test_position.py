"""Position tables and RoPE against independent computations."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed

from clipdense.clip.position import (
    POSITION_RULES,
    resize_table,
    rope_table,
    rotate,
    square_grid,
    truncate_text,
)

TABLE = torch.randn(1 + 4 * 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("prefix", [0, 1])
def test_rules_keep_prefix_and_native_grid(rule, prefix):
    table = TABLE[1 - prefix :]
    assert resize_table(table, (4, 6), (4, 6), rule, prefix) is table
    resized = resize_table(table, (4, 6), (3, 2), rule, prefix)
    assert resized.shape == (prefix + 6, 8)
    assert torch.equal(resized[:prefix], table[:prefix])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("new", [(7, 6), (9, 13), (2, 3)])
def test_interpolation_is_torchs_without_antialias(mode, new):
    grid = TABLE[1:].T.reshape(1, 8, 4, 6)
    ours = resize_table(TABLE, (4, 6), new, mode)[1:].T.reshape(8, *new)
    enlarged_bilinear = mode == "bilinear" and new[0] >= 4 and new[1] >= 6
    for antialias in (False, True):
        expected = F.interpolate(grid, new, mode=mode, align_corners=False, antialias=antialias)[0]
        assert torch.allclose(ours, expected, atol=1e-4) == (not antialias or enlarged_bilinear)


def test_crop_takes_the_top_left():
    cropped = resize_table(TABLE, (4, 6), (2, 3), "crop")
    assert torch.equal(cropped[1:].reshape(2, 3, 8), TABLE[1:].reshape(4, 6, 8)[:2, :3])
    with pytest.raises(ValueError, match="a 5 x 6 feature map is larger than the 4 x 6 position grid"):
        resize_table(TABLE, (4, 6), (5, 6), "crop")


def test_half_precision_tables_keep_their_type():
    assert resize_table(TABLE.half(), (4, 6), (5, 5), "bicubic").dtype == torch.float16


def test_errors():
    with pytest.raises(ValueError, match="unknown position rule 'nearest'; known: bicubic, .*bilinear, crop"):
        resize_table(TABLE, (4, 6), (2, 2), "nearest")
    with pytest.raises(ValueError, match=r"25 rows is not 1 \+ 5 x 5"):
        resize_table(TABLE, (5, 5), (2, 2), "crop")
    with pytest.raises(ValueError, match="26 tokens exceed the text tower's 25 positions"):
        truncate_text(TABLE, 26)
    with pytest.raises(ValueError, match=r"not 1 \+ a square"):
        square_grid(27)
    assert square_grid(26) == (5, 5) and square_grid(25, prefix=0) == (5, 5)
    assert torch.equal(truncate_text(TABLE, 3), TABLE[:3])


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (10, 2)])
@pytest.mark.parametrize("reference", [(16, 16), (14, 9), None])
@pytest.mark.parametrize(("order", "offset"), [("ij", 0.0), ("xy", 1.0)])
def test_rope_equals_timm(grid, reference, order, offset):
    theirs = build_rotary_pos_embed(
        list(grid),
        dim=32,
        in_pixels=False,
        ref_feat_shape=reference,
        grid_offset=offset,
        grid_indexing=order,
    )
    ours = rope_table(grid, 32, reference, order=order, offset=offset)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    x = torch.randn(2, 3, grid[0] * grid[1], 32)
    torch.testing.assert_close(
        rotate(x, ours), apply_rot_embed_cat(x, torch.cat(theirs, -1)), atol=1e-5, rtol=1e-5
    )


def test_rope_formula():
    """By hand: row 1 of 4 at reference 16 stands at 4; frequency i is 10000^(-i / 4) for a head of 16."""
    sin, cos = rope_table((4, 2), 16, (16, 16))
    token = 1 * 2 + 1
    angles = torch.cat([torch.tensor(p) * 10000.0 ** (-torch.arange(4) / 4) for p in (4.0, 8.0)])
    torch.testing.assert_close(sin[token], angles.repeat_interleave(2).sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(cos[token], angles.repeat_interleave(2).cos(), atol=1e-6, rtol=0)


def test_a_slice_of_a_larger_rope_is_not_the_smaller_one():
    small, large = rope_table((4, 4), 16, (16, 16))[0], rope_table((8, 8), 16, (16, 16))[0]
    assert not torch.allclose(large.reshape(8, 8, -1)[:4, :4].flatten(0, 1), small, atol=1e-2)


def test_rope_of_a_grid_that_is_not_square():
    """Rows turn as in the square of their height, columns as in that of their width."""
    h, w, half = 3, 5, 8
    for table, tall, wide in zip(
        *(rope_table(grid, 2 * half, (16, 16)) for grid in ((h, w), (h, h), (w, w))), strict=True
    ):
        table = table.reshape(h, w, 2 * half)
        assert torch.equal(table[:, 0, :half], tall.reshape(h, h, -1)[:, 0, :half])
        assert torch.equal(table[0, :, half:], wide.reshape(w, w, -1)[0, :, half:])
    transposed = rope_table((w, h), 2 * half, (16, 16))[1].reshape(w, h, -1).transpose(0, 1)
    assert torch.equal(table, torch.cat([transposed[..., half:], transposed[..., :half]], dim=2))
