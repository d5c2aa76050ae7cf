"""Parameter groups of every tower family, and the fine-tuning rules on them."""

from collections import Counter

import pytest
import torch

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.finetune import (
    ALL_EXCEPT_POSITIONS,
    EVERYTHING,
    FineTuneRule,
    apply_rule,
    apply_text_rule,
    freeze_unused,
    top_rule,
)
from clipdense.clip.towers import build_tower
from clipdense.clip.towers.groups import parameters_of
from tests.helpers.towers import FAMILIES, random_images, tower_pair

NO_POSITIONS = ("convnext", "convnext_mlp")


@pytest.fixture(params=FAMILIES)
def tower(request):
    return tower_pair(request.param)[1]


def learning(tower) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def names(tower, parameters) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in tower.named_parameters() if id(p) in ids}


# ---- groups


def test_groups_hold_every_parameter_once(tower):
    groups = tower.groups()
    parts = [*groups.stem, *groups.blocks, *groups.projection, *groups.positions]
    counts = Counter(map(id, parameters_of(parts)))
    assert counts == Counter(map(id, tower.parameters()))


def test_positions_are_the_position_table(tower, request):
    positions = tower.groups().positions
    if request.node.callspec.params["tower"] in NO_POSITIONS:
        assert positions == ()
    else:
        (table,) = positions
        assert table.shape[-2] >= tower.grid[0] * tower.grid[1]


def test_norms_are_one_dimensional_and_named_as_norms(tower):
    norms = names(tower, tower.groups().norms)
    assert norms
    assert all(dict(tower.named_parameters())[name].dim() == 1 for name in norms)
    blocks = {name for block in tower.groups().blocks for name in names(tower, block.parameters())}
    assert norms & blocks


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "vit_clipa", "eva02", "eva01", "eva_post_norm", "pe", "siglip"])
@pytest.mark.parametrize("part", "qkv")
def test_attention_parts_are_what_the_block_projects_with(name, part):
    """Zeroing the rows of a part zeroes that projection and no other."""
    _, tower = tower_pair(name)
    block, tokens = tower.block(1), torch.randn(2, 5, tower.tap_channels[0])
    before = dict(zip("qkv", block.qkv(tokens), strict=True))
    for rows in getattr(tower.groups().attentions[1], part):
        rows.parameter[rows.rows or slice(None)] = 0
    after = dict(zip("qkv", block.qkv(tokens), strict=True))
    for other in "qkv":
        expected = torch.zeros_like(before[other]) if other == part else before[other]
        torch.testing.assert_close(after[other], expected)


@pytest.mark.parametrize(("name", "count"), [("resnet", 1), ("vit", 3), ("siglip", 4), ("convnext", 0)])
def test_number_of_attentions(name, count):
    assert len(tower_pair(name)[1].groups().attentions) == count


def test_groups_of_a_resnet_without_attention_pool():
    visual = FAMILIES["resnet"]()
    visual.attnpool = None
    groups = build_tower(visual).groups()
    assert groups.projection == groups.positions == groups.attentions == ()


# ---- rules


def test_everything_and_nothing(tower):
    apply_rule(tower, EVERYTHING)
    assert learning(tower) == {name for name, _ in tower.named_parameters()}
    apply_rule(tower, FineTuneRule())
    assert learning(tower) == set()


def test_all_except_positions(tower):
    apply_rule(tower, ALL_EXCEPT_POSITIONS)
    frozen = {name for name, _ in tower.named_parameters()} - learning(tower)
    assert frozen == names(tower, tower.groups().positions)


def test_norms(tower):
    apply_rule(tower, FineTuneRule(norms=True))
    assert learning(tower) == names(tower, tower.groups().norms)


def test_blocks_from_the_top(tower):
    apply_rule(tower, FineTuneRule(blocks=2))
    blocks = tower.groups().blocks
    assert learning(tower) == names(tower, [p for block in blocks[-2:] for p in block.parameters()])


def test_rules_are_unions():
    _, tower = tower_pair("vit")
    apply_rule(tower, FineTuneRule(projection=True, positions=True, blocks=1))
    assert learning(tower) == {
        name
        for name, _ in tower.named_parameters()
        if name in ("proj", "positional_embedding", "ln_post.weight", "ln_post.bias")
        or name.startswith("transformer.resblocks.2.")
    }


def test_separate_projections_learn_whole():
    _, tower = tower_pair("eva02")
    assert apply_rule(tower, FineTuneRule(attention="qv")) == []
    learned = {name.split("attn.")[1].split(".")[0] for name in learning(tower)}
    assert learned == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["vit", "timm_gap"])
def test_gradient_of_a_fused_projection_is_zero_elsewhere(name):
    _, tower = tower_pair(name)
    handles = apply_rule(tower, FineTuneRule(attention="qv"))
    assert handles
    tower(random_images(tower)).pooled.square().sum().backward()
    parameters = [p for p in tower.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(tower.blocks)
    for parameter in parameters:
        q, k, v = parameter.grad.chunk(3)
        assert q.any()
        assert not k.any()
        assert v.any()


def test_removed_handles_let_the_whole_tensor_learn():
    _, tower = tower_pair("vit")
    for handle in apply_rule(tower, FineTuneRule(attention="q")):
        handle.remove()
    apply_rule(tower, EVERYTHING)
    tower(random_images(tower)).pooled.square().sum().backward()
    assert all(part.any() for part in tower.blocks[0].attn.in_proj_weight.grad.chunk(3))


def test_all_projections_of_a_fused_tensor_need_no_mask():
    _, tower = tower_pair("vit")
    assert apply_rule(tower, FineTuneRule(attention="qkv")) == []


def test_rules_that_do_not_fit_are_errors():
    _, tower = tower_pair("vit")
    with pytest.raises(ValueError, match="ViTTower cannot give 4 trainable blocks: it has 3"):
        apply_rule(tower, FineTuneRule(blocks=4))
    with pytest.raises(ValueError, match="ConvNeXtTower cannot give trainable attention projections"):
        apply_rule(tower_pair("convnext")[1], FineTuneRule(attention="qv"))
    with pytest.raises(ValueError, match="attention 'qx': expected letters among q, k and v"):
        FineTuneRule(attention="qx")


# ---- CLIPSelf's counting


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("vit", 1, {"transformer.resblocks.2"}),
        ("vit", -1, {f"transformer.resblocks.{i}" for i in range(3)}),
        ("resnet", 1, {"attnpool"}),
        ("resnet", 2, {"attnpool", "layer4"}),
        ("resnet", 5, {"attnpool", "layer1", "layer2", "layer3", "layer4"}),
        ("resnet", -1, {"attnpool", "layer1", "layer2", "layer3", "layer4"}),
        ("convnext", 1, {"trunk.stages.3"}),
    ],
)
def test_top_groups(name, count, expected):
    _, tower = tower_pair(name)
    apply_rule(tower, top_rule(tower, count))
    inside = {n for n, _ in tower.named_parameters() if n.startswith(tuple(f"{e}." for e in expected))}
    assert learning(tower) == inside


@pytest.mark.parametrize(("name", "count"), [("vit", 0), ("vit", 4), ("vit", -2), ("resnet", 6)])
def test_impossible_number_of_groups(name, count):
    _, tower = tower_pair(name)
    with pytest.raises(ValueError, match=rf"groups: expected 1 to \d, or -1 for all, not {count}"):
        top_rule(tower, count)


def test_unused_parameters_are_frozen():
    """The value mode does not depend on queries and keys of the last block; the pooled embedding does."""
    _, tower = tower_pair("eva02")
    apply_rule(tower, top_rule(tower, 1))
    freeze_unused(tower, TowerRequest(dense="value"))
    unused = names(tower, tower.blocks[2].parameters()) - learning(tower)
    assert {name.split("attn.")[-1].split(".")[0] for name in unused} == {"q_proj", "k_proj"}
    apply_rule(tower, top_rule(tower, 1))
    freeze_unused(tower, TowerRequest(dense="value", pooled=True))
    assert learning(tower) == names(tower, tower.blocks[2].parameters())


# ---- text towers


def test_queries_and_values_of_a_text_tower_learn_without_biases():
    tower = load_clip("shapes-vit").text
    apply_text_rule(tower, FineTuneRule(attention="qv", attention_biases=False))
    fused = [f"transformer.resblocks.{i}.attn.in_proj_weight" for i in range(len(tower.attentions()))]
    assert learning(tower) == set(fused)
    tower(torch.randint(1, 100, (2, 5))).sum().backward()
    for name in fused:
        q, k, v = tower.get_parameter(name).grad.chunk(3)
        assert q.any() and v.any() and not k.any()
    apply_text_rule(tower, ALL_EXCEPT_POSITIONS)
    assert {n for n, _ in tower.named_parameters()} - learning(tower) == {"positional_embedding"}
    apply_text_rule(tower, FineTuneRule())
    assert not learning(tower)
