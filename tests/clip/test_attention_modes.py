"""Last-block modes of the training-free line on small towers."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.attention import MODES, get_mode
from clipdense.clip.attention.outliers import above_quantile, attended_outliers, local_outlier_factor, repair
from clipdense.clip.attention.proxy import feature_attention
from clipdense.clip.attention.residual import raw_feedback, semantic_feedback
from clipdense.clip.position import resize_table

UNGUIDED = [name for name, mode in MODES.items() if not mode.guidance]


@pytest.fixture(scope="module")
def towers():
    return {name: load_clip(name, text=False).visual for name in ("shapes-vit", "shapes-eva")}


def images(seed=0):
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["shapes-vit", "shapes-eva"])
@pytest.mark.parametrize("mode", UNGUIDED)
@torch.no_grad()
def test_a_history_gives_the_map_of_the_forward(towers, name, mode):
    """One forward serves every mode; images of a batch do not influence each other."""
    tower, options = towers[name], {"blocks": (0, 1)} if mode == "rcs" else {}
    out = tower(images(), TowerRequest(dense=mode, options=options)).dense
    history = tower.history(images())
    torch.testing.assert_close(tower.dense(history, mode, None, options), out, atol=1e-5, rtol=1e-4)
    alone = tower(images()[1:], TowerRequest(dense=mode, options=options)).dense
    torch.testing.assert_close(alone, out[1:], atol=1e-4, rtol=1e-3)
    assert out.shape[-2:] == (96 // tower.stride, 64 // tower.stride) and out.isfinite().all()


@torch.no_grad()
def test_correlation_of_queries_and_keys_is_the_plain_block(towers):
    for tower in towers.values():
        plain = tower(images(), TowerRequest(dense="plain")).dense
        same = tower(images(), TowerRequest(dense="correlation")).dense
        torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-4)
        bare = tower(images(), TowerRequest(dense="correlation", options={"full": False})).dense
        assert not torch.allclose(bare, plain, atol=1e-2)


def test_options_of_a_mode(towers):
    tower = towers["shapes-vit"]
    with pytest.raises(
        ValueError, match="mode 'naclip' has no option std; its options are gaussian_std, full"
    ):
        tower(images(), TowerRequest(dense="naclip", options={"std": 1.0}))
    with pytest.raises(ValueError, match="no dense map or last-block tap is requested"):
        tower(images(), TowerRequest(pooled=True, options={"full": True}))
    with pytest.raises(ValueError, match="mode 'gem' reads earlier blocks"):
        history = tower.history(images())
        get_mode("gem")(history.block, history.stream)
    with pytest.raises(ValueError, match="last_layers must be 1 to"):
        tower(images(), TowerRequest(dense="clearclip", options={"last_layers": 99}))
    with pytest.raises(ValueError, match="levels .* do not fit a tower"):
        tower(images(), TowerRequest(dense="scclip", options={"levels": (8, 3, 3, 99)}))


@torch.no_grad()
def test_external_features_steer_the_attention(towers):
    """The map has the features' grid; each image has its own mean unless it is shared."""
    tower = towers["shapes-vit"]
    flat = tower(images(), TowerRequest(dense="proxyclip", guidance=torch.ones(2, 4, 3, 5))).dense
    assert flat.shape[-2:] == (3, 5)
    # all similarities are 1, below 1.2 times their mean: only the patch itself is left
    assert flat.isfinite().all()
    torch.testing.assert_close(feature_attention(torch.ones(1, 4, 3, 5))[0], torch.eye(15))
    features = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    features[0] += 2
    own = feature_attention(features)
    torch.testing.assert_close(own[1:], feature_attention(features[1:]))
    assert not torch.allclose(feature_attention(features, shared_mean=True)[1:], own[1:], atol=1e-4)
    torch.testing.assert_close(own.sum(2), torch.ones(2, 15))


def test_outliers_are_found_and_repaired():
    tokens = torch.randn(1, 36, 8, generator=torch.Generator().manual_seed(0))
    tokens[0, 14] += 20
    outliers = above_quantile(local_outlier_factor(tokens, 10), 0.05)
    assert outliers[0, 14] and outliers.sum() == 2
    only = torch.zeros(1, 36, dtype=torch.bool)
    only[0, 14] = True
    fixed = repair(tokens, only, (6, 6), keep_isolated=True)
    around = [7, 8, 9, 13, 15, 19, 20, 21]
    torch.testing.assert_close(fixed[0, 14], tokens[0, around].mean(0))
    everything = torch.ones(1, 36, dtype=torch.bool)
    assert torch.equal(repair(tokens, everything, (6, 6), keep_isolated=True), tokens)
    assert repair(tokens, everything, (6, 6), keep_isolated=False).eq(0).all()
    weights = torch.full((1, 5, 5), 0.2)
    weights[0, 0, 2], weights[0, 3, 3] = 0.5, 0.05
    assert attended_outliers(weights, 1, 1.0, 10)[0].tolist() == [False, True, True, False]
    assert attended_outliers(weights, 1, 1.0, 1)[0].tolist() == [False, True, False, False]


def test_feedback_connects_patches_of_one_class():
    classes = torch.tensor([[0, 1, 0, 0]])
    raw = raw_feedback(classes, std=0.1)  # hardly smoothed
    assert raw[0, 1] < 1e-3 < raw[0, 2]
    assert raw[2, 3] > raw[2, 0] > 1e-3  # the path from 2 to 0 leaves the class
    free = raw_feedback(classes, std=0.1, decay=False)
    torch.testing.assert_close(free[2, 3], free[2, 0])
    whole = semantic_feedback(classes)
    assert whole.shape == (5, 5) and whole[0].eq(0).all() and whole[:, 0].eq(0).all() and whole.max() == 1
    assert torch.equal(semantic_feedback(classes, half_precision=True), whole.half().float())


def test_position_rules_of_other_grids():
    table = torch.randn(17, 6)
    assert torch.equal(resize_table(table, (4, 4), (2, 8), "dino_scale"), table)
    scaled = resize_table(table, (4, 4), (6, 5), "dino_scale")
    plain = resize_table(table, (4, 4), (6, 5), "bicubic")
    assert scaled.shape == plain.shape and not torch.allclose(scaled, plain, atol=1e-3)
    body = table[1:].T.reshape(1, 6, 4, 4)
    antialiased = F.interpolate(body, (3, 3), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(resize_table(table, (4, 4), (3, 3), "bicubic_antialias")[1:], antialiased)
