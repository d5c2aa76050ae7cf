"""DenseCLIP's text encoders, context decoder, detection backbone, auxiliary loss and optimizer recipe."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, _build_text_tower
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from clipdense.backbone import CLIPTrunk, ContextDecoder
from clipdense.checkpoint import load_strict
from clipdense.clip.prompts import encode_with_contexts, insert_contexts
from clipdense.clip.tokenizer import build_tokenizer
from clipdense.clip.towers import TextTower, build_tower
from clipdense.engine.optimizer import ParamRule, param_groups
from clipdense.engine.schedule import build_schedule
from clipdense.run.setup import load_config
from clipdense.systems.denseclip.loss import binary_loss, box_targets

from detectron2.structures import Boxes, Instances

FULL_VOCABULARY = 49408
RECIPE = Path(__file__).parents[2] / "projects/DenseCLIP/configs/mask_rcnn_rn50.yaml"


def _text_tower(golden, length, quick_gelu=True):
    """Build a tower with the file's weights and a token table of the full vocabulary."""
    args, state, ids = golden.args, golden.part("state"), golden.part("in")["vocab_ids"]
    if len(ids):
        table = torch.zeros(FULL_VOCABULARY, args["width"])
        table[ids] = state["token_embedding.weight"]
        state["token_embedding.weight"] = table
    cfg = CLIPTextCfg(context_length=length, width=args["width"], heads=args["heads"], layers=args["layers"])
    tower = TextTower(_build_text_tower(args["embed_dim"], cfg, quick_gelu))
    load_strict(tower, state, source=golden.id)
    return tower.eval()


def _tokens(golden):
    args = golden.args
    tokenizer = build_tokenizer("CLIP", {}, FULL_VOCABULARY, args["token_length"])
    tokens = tokenizer(args["class_names"], context_length=args["token_length"])
    recorded = golden.part("in").get("token_ids_bpe", golden.part("in")["token_ids"])
    assert torch.equal(tokens, recorded)
    return tokens


@pytest.mark.golden(case="text_encoder")
@torch.no_grad()
def test_text_encoder(golden):
    tokens = _tokens(golden)
    golden.check({"text": _text_tower(golden, golden.args["token_length"])(tokens)})
    exact = _text_tower(golden, golden.args["token_length"], quick_gelu=False)
    assert golden.differs("text", exact(tokens))


@pytest.mark.golden(case="text_context_encoder")
@torch.no_grad()
def test_text_encoder_with_contexts(golden):
    inputs, tokens = golden.part("in"), _tokens(golden)
    tower = _text_tower(golden, golden.args["token_length"] + golden.args["n_ctx"])
    shared, each = inputs["contexts_shared"], inputs["contexts_per_image"]
    sequence = insert_contexts(tower, tokens, shared)[0] + tower.positional_embedding
    results = {
        "sequence_with_pos_shared": sequence,
        "text_shared": encode_with_contexts(tower, tokens, shared),
        "text_per_image": encode_with_contexts(tower, tokens, each),
    }
    golden.check({name: results[name] for name in golden.part("out")})
    if shared.numel():
        # Channels, not vectors, are reversed: there may be one vector.
        assert golden.differs("text_shared", encode_with_contexts(tower, tokens, shared.flip(-1)))
        assert golden.differs("text_per_image", encode_with_contexts(tower, tokens, each.flip(-1)))
    if shared.numel() and len(each) > 1:
        assert golden.differs("text_per_image", encode_with_contexts(tower, tokens, each.roll(1, 0)))


@pytest.mark.golden(case="context_decoder")
@torch.no_grad()
def test_context_decoder(golden):
    args, inputs = golden.args, golden.part("in")

    def run(gelu=None, **changes):
        sizes = {"width": args["width"], "heads": args["heads"], "layers": args["layers"]} | changes
        decoder = ContextDecoder(args["visual_dim"], dropout=args["dropout"], **sizes).eval()
        load_strict(decoder, golden.part("state"), source=golden.id)
        results = {}
        for i, layer in enumerate(decoder.decoder):
            layer.register_forward_hook(lambda m, x, y, i=i: results.update({f"layer_{i}": y}))
            if gelu is not None:
                layer.mlp[1] = gelu
        decoder.memory_proj.register_forward_hook(lambda m, x, y: results.update({"memory_projected": y}))
        results["delta"] = decoder(inputs["text"], inputs["memory"])
        results["refined"] = inputs["text"] + inputs["gamma"] * results["delta"]
        return results

    golden.check(run())
    others = [h for h in range(1, args["width"] + 1) if args["width"] % h == 0 and h != args["heads"]]
    if inputs["memory"].shape[1] > 1 and others:  # heads that attend to one token do not matter
        assert golden.differs("delta", run(heads=others[0])["delta"])
    assert golden.differs("delta", run(gelu=nn.ReLU())["delta"])


@pytest.mark.golden(case="det_rn_backbone")
@torch.no_grad()
def test_detection_backbone(golden):
    """Trunk, dense map and global feature with the position table cropped, not resized."""
    args = golden.args

    def run(rule):
        grid = args["input_resolution"] // 32
        visual = ModifiedResNet(
            args["layers"], args["output_dim"], 32, image_size=grid * 32, width=args["width"]
        )
        tower = build_tower(visual, rule)
        load_strict(tower, golden.part("state"), source=golden.id)
        trunk = CLIPTrunk(tower, joint=True).eval()
        results = {}
        for name, images in golden.part("in").items():
            maps, g, z = trunk.forward_joint(images)
            if args["att_level3"]:
                maps["res5"] = z
            results |= {f"{name}.x{i}": x for i, x in enumerate(maps.values())}
            results |= {f"{name}.global": g, f"{name}.dense": z}
        return results

    golden.check(run("crop"))
    controls = run("bilinear")
    native = (args["input_resolution"] // 32,) * 2
    for name, value in controls.items():
        if name.endswith(".dense") and tuple(value.shape[-2:]) != native:
            assert golden.differs(name, value)


@pytest.mark.golden(case="det_aux")
def test_auxiliary_targets_and_loss(golden):
    """Targets exact; losses 1e-5 relative; 0, not NaN, where a batch has no box."""
    inputs, expected = golden.part("in"), golden.part("out")
    controls = []
    for i, case in enumerate(golden.args["cases"]):
        score = inputs[f"{i}.score_map"].requires_grad_()
        size = tuple(case["image_hw"])
        images = []
        for j in range(len(score)):
            image = Instances(size)
            image.gt_boxes = Boxes(inputs[f"{i}.boxes.{j}"])
            image.gt_classes = inputs[f"{i}.labels.{j}"]
            images.append(image)
        target, inside = box_targets(images, score.shape[1], size, score.device)
        assert torch.equal(target.float(), expected[f"{i}.target"].float())
        assert torch.equal(inside.float(), expected[f"{i}.mask"].float())
        loss = binary_loss(F.interpolate(score, target.shape[-2:]), target, inside)
        loss.backward()
        for name in ("loss_maskrcnn", "loss_retinanet"):
            recorded = expected[f"{i}.{name}"]
            recorded = recorded.nan_to_num(0.0) if not inside.any() else recorded
            torch.testing.assert_close(loss, recorded, atol=0, rtol=1e-5)
        if inside.any():
            torch.testing.assert_close(score.grad, expected[f"{i}.grad_score_map"], atol=1e-8, rtol=1e-4)
            everywhere = F.binary_cross_entropy_with_logits(score, target.float())
            controls.append(bool((everywhere - loss).abs() > 1e-5 * loss))
        else:
            assert not score.grad.any()
    assert any(controls) or not controls


def _ours(name):
    """Convert a published parameter's name to its name in our detector."""
    for theirs, ours in (
        ("backbone.", "backbone.bottom_up.trunk.tower."),
        ("text_encoder.", "backbone.bottom_up.text.tower."),
        ("context_decoder.", "backbone.bottom_up.context_decoder."),
        ("contexts", "backbone.bottom_up.text.prompts.contexts"),
        ("gamma", "backbone.bottom_up.gamma"),
        ("neck.", "backbone.neck."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _stand_in(golden, trained):
    """Build a model with the file's parameter names, and return it with the published name of each.

    Args:
        trained: whether the text tower's parameters are trained.
    """
    model, names = nn.Module(), {}
    for key in golden.part("out"):
        if key.startswith("base_lr."):
            name = key.removeprefix("base_lr.")
            names[_ours(name)] = name
            *path, last = _ours(name).split(".")
            module = model
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            grad = trained or ".text.tower." not in _ours(name)
            module.register_parameter(last, nn.Parameter(torch.zeros(1), requires_grad=grad))
    return model, names


def _recipe(golden, path):
    """The optimizer of a config, with the file's rate, weight decay and number of iterations."""
    cfg, args = load_config(str(path)), golden.args
    epochs = cfg.SOLVER.MAX_ITER / 12
    cfg.SOLVER.STEPS = [round(s / epochs) * args["iters_per_epoch"] for s in cfg.SOLVER.STEPS]
    cfg.SOLVER.MAX_ITER = args["max_iters"]
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = args["lr"], args["weight_decay"]
    return cfg


def _settings(model, names, cfg):
    """Rate and weight decay of every trained parameter, by published name."""
    rules = [ParamRule.parse(rule) for rule in cfg.SOLVER.PARAM_GROUPS]
    groups = param_groups(model, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, rules=rules)
    return {names[n]: (group["lr"], group["weight_decay"]) for group in groups for n in group["names"]}


_GROUPS = {"decoder_group": 1.0, "backbone_group": 0.1, "text_group": 0.0}


def _rates(cfg, golden, group):
    """The learning rates of a group at the recorded iterations."""
    schedule, iterations = build_schedule(cfg), golden.part("in")["iterations"].tolist()
    base = _GROUPS[group] * cfg.SOLVER.BASE_LR
    return [schedule(t, t / cfg.SOLVER.MAX_ITER, base) for t in iterations]


@pytest.mark.golden(name="dc_optimizer_det*")
def test_optimizer_recipe_of_detectors(golden):
    """Learning rates and weight decays of every parameter, and the schedule, agree to 1e-12."""
    expected, cfg = golden.part("out"), _recipe(golden, RECIPE)
    model, names = _stand_in(golden, trained=False)
    settings = _settings(model, names, cfg)
    for name in names.values():
        rate = float(expected[f"base_lr.{name}"])
        if name.startswith("text_encoder."):
            assert rate == 0 and name not in settings  # frozen, not trained at rate 0
            continue
        assert settings[name][0] == pytest.approx(rate, abs=1e-12)
        assert settings[name][1] == pytest.approx(float(expected[f"weight_decay.{name}"]), abs=1e-12)
    plain = param_groups(model, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY)
    assert len(plain) == 1 or len(plain) < len(set(settings.values()))
    for group in _GROUPS:
        recorded = expected[f"lr_schedule.{group}"].tolist()
        assert _rates(cfg, golden, group) == pytest.approx(recorded, abs=1e-12)


@pytest.mark.golden(name="dc_optimizer_seg*")
def test_optimizer_recipe_of_segmentors(golden):
    """The same; the text encoder has multiplier 0, and the last rate of the schedule moves it."""
    expected = golden.part("out")
    cfg = _recipe(golden, RECIPE.with_name("semantic_fpn_rn50.yaml"))
    model, names = _stand_in(golden, trained=True)
    settings = _settings(model, names, cfg)
    assert set(settings) == set(names.values())
    for name, (rate, decay) in settings.items():
        assert rate == pytest.approx(float(expected[f"base_lr.{name}"]), abs=1e-12)
        assert decay == pytest.approx(float(expected[f"weight_decay.{name}"]), abs=1e-12)

    recorded = {group: expected[f"lr_schedule.{group}"].tolist() for group in _GROUPS}
    for group, rates in recorded.items():
        assert _rates(cfg, golden, group) == pytest.approx(rates, abs=1e-12)
    if any(recorded["text_group"]):  # the alternatives, as far as the recorded iterations tell them apart
        cfg.SOLVER.MIN_LR = 0.0
        assert not any(_rates(cfg, golden, "text_group"))
        cfg.SOLVER.BASE_LR_END = float(
            load_config(str(RECIPE.with_name("semantic_fpn_rn50.yaml"))).SOLVER.MIN_LR
        )
        assert _rates(cfg, golden, "backbone_group") != pytest.approx(recorded["backbone_group"], abs=1e-12)
