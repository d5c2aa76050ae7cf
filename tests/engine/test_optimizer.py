import pytest
import torch
from torch import nn

from clipdense.engine.clipping import build_clipper, gradient_norms
from clipdense.engine.optimizer import (
    ParamRule,
    build_optimizer,
    freeze,
    keep_frozen_in_eval,
    param_groups,
)
from tests.helpers.engine_toy import toy_config

from detectron2.solver.build import get_default_optimizer_params


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.logit_scale = nn.Parameter(torch.zeros(()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = ViT()
        self.head = nn.Linear(4, 2)
        self.tied = self.head  # one module under two names


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("bias_factor, norm, bias", [(1.0, 0.0, None), (2.0, None, 0.0), (2.0, 0.1, 0.5)])
def test_defaults_equal_detectron2(bias_factor: float, norm: float | None, bias: float | None) -> None:
    model = Model()
    ours = param_groups(model, 0.1, 0.01, norm, bias, bias_lr_factor=bias_factor)
    theirs = get_default_optimizer_params(model, 0.1, 0.01, norm, bias_factor, bias)
    assert by_name(model, ours) == by_name(model, theirs)
    assert len(ours) == len(theirs)


def test_vectors_that_are_neither_norm_nor_bias() -> None:
    model = Model()
    groups = param_groups(model, 0.1, 0.01, weight_decay_vectors=0.0)
    decays = {name: decay for name, (_, decay) in by_name(model, groups).items()}
    assert decays["backbone.logit_scale"] == 0.0
    assert decays["head.bias"] == decays["backbone.norm.weight"] == decays["backbone.cls_token"] == 0.01


def test_later_rules_win() -> None:
    rules = [ParamRule("backbone", lr=0.1, weight_decay=0.0), ParamRule(r"blocks\.1\.", lr=0.5)]
    found = by_name(m := Model(), param_groups(m, 1.0, 0.01, rules=rules))
    assert found["head.weight"] == (1.0, 0.01)
    assert found["backbone.blocks.0.1.weight"] == (0.1, 0.0)
    assert found["backbone.blocks.1.1.weight"] == (0.5, 0.0)


def test_layer_decay() -> None:
    rules = [ParamRule("^backbone", lr=0.1, layer_decay=0.5)]
    model = Model()
    lr = {name: lr for name, (lr, _) in by_name(model, param_groups(model, 1.0, 0.0, rules=rules)).items()}
    assert lr["head.weight"] == 1.0
    assert lr["backbone.norm.weight"] == lr["backbone.logit_scale"] == 0.1
    assert [lr[f"backbone.blocks.{i}.1.weight"] for i in range(3)] == [0.1 * 0.5**d for d in (3, 2, 1)]
    assert lr["backbone.patch_embed.weight"] == lr["backbone.cls_token"] == 0.1 * 0.5**4
    with pytest.raises(ValueError, match="LAYER_DECAY needs"):
        param_groups(Model(), 1.0, 0.0, rules=[ParamRule("head", layer_decay=0.5)])


def test_frozen_parameters_are_in_no_group() -> None:
    freeze(model := Model(), [ParamRule("backbone", freeze=True), ParamRule("norm", freeze=False)])
    names = set(by_name(model, param_groups(model, 1.0, 0.0)))
    assert names == {"head.weight", "head.bias", "backbone.norm.weight", "backbone.norm.bias"}


def test_bad_rules_are_errors() -> None:
    with pytest.raises(ValueError, match="WEIGHT_DECY.*did you mean WEIGHT_DECAY"):
        ParamRule.parse({"MATCH": "a", "WEIGHT_DECY": 0.0})
    with pytest.raises(ValueError, match="no MATCH"):
        ParamRule.parse({"LR": 0.1})
    with pytest.raises(ValueError, match="not a valid regular expression"):
        ParamRule.parse({"MATCH": "("})
    with pytest.raises(ValueError, match="'bakbone' matches no parameter; names start with backbone, head"):
        freeze(Model(), [ParamRule("bakbone", freeze=True)])
    assert ParamRule.parse({"MATCH": "a", "LR": 2}) == ParamRule("a", lr=2)


def test_from_config() -> None:
    toy_cfg = toy_config("unused", "SOLVER.PARAM_GROUPS", [{"MATCH": "head", "FREEZE": True}])
    optimizer = build_optimizer(toy_cfg, model := Model())
    assert isinstance(optimizer, torch.optim.AdamW) and not model.head.weight.requires_grad
    toy_cfg.SOLVER.PARAM_GROUPS = []
    toy_cfg.SOLVER.OPTIMIZER = "Adam"
    with pytest.raises(ValueError, match="must be SGD or AdamW, got 'Adam'"):
        build_optimizer(toy_cfg, nn.Linear(1, 1))
    toy_cfg.SOLVER.PARAM_GROUPS = [{"MATCH": ".", "FREEZE": True}]
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(toy_cfg, nn.Linear(1, 1))


def test_frozen_modules_act_as_in_evaluation_and_keep_no_activations() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    model = nn.Sequential(trunk, nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 1))
    freeze(model, [ParamRule(r"^0\.", freeze=True)])
    keep_frozen_in_eval(model.train())
    images = torch.rand(2, 3, 4, 4)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        features = trunk(images)
        assert not kept
        model[3](model[1](features))
        assert kept  # the head does keep some
    assert torch.equal(features, trunk.eval()(images)) and trunk[1].num_batches_tracked == 0
    assert model[2].training and model[3].training  # what is trained is not touched


@pytest.mark.parametrize("kind", ["", "value", "norm", "full_model"])
def test_clipping(kind: str) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    before = [torch.tensor([3.0, 4.0]), torch.tensor([0.5])]
    for p, g in zip(parameters, before, strict=True):
        p.grad = g.clone()
    build_clipper(kind, 1.0)(parameters, gradient_norms(parameters))
    whole = (25 + 0.25) ** 0.5
    expected = {
        "": before,
        "value": [torch.ones(2), torch.tensor([0.5])],
        "norm": [before[0] / 5, before[1]],
        "full_model": [g / whole for g in before],
    }[kind]
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be value, norm or full_model"):
        build_clipper("global")
