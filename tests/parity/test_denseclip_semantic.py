"""DenseCLIP's segmentors end to end: published file -> converter -> our model -> every recorded number."""

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer

from clipdense.backbone import CLIPBlockTrunk, CLIPTrunk
from clipdense.checkpoint import (
    Checkpoint,
    config_options,
    convert_model,
    load_strict,
    model_layout,
    rename,
)
from clipdense.clip.towers import build_tower
from clipdense.run.config import add_clipdense_config
from clipdense.run.config_file import read_config_file
from clipdense.run.conversion import account_model
from clipdense.run.keys import config_keys, set_options
from clipdense.run.setup import load_config
from clipdense.run.weights import apply_weight_options
from clipdense.systems.denseclip.loss import pixel_cross_entropy
from tests.helpers.denseclip_golden import build_published, gradients, language_options, published

from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage

RECIPES = Path(__file__).parents[2] / "projects/DenseCLIP/configs"
IGNORE = 255


@pytest.mark.golden(case="seg_rn_backbone")
@torch.no_grad()
def test_resnet_backbone(golden):
    """Trunk, dense map and global feature, with the position table resized to every map."""
    args = golden.args

    def run(rule):
        grid = args["input_resolution"] // 32
        visual = ModifiedResNet(
            args["layers"], args["output_dim"], 32, image_size=grid * 32, width=args["width"]
        )
        tower = build_tower(visual, rule)
        load_strict(tower, golden.part("state"), source=golden.id)
        return joint_outputs(CLIPTrunk(tower, joint=True).eval(), golden)

    golden.check(run("bilinear"))
    for name, value in run("bicubic").items():
        resized = name.endswith(".dense") and value.shape[-2:] != (args["input_resolution"] // 32,) * 2
        assert golden.differs(name, value) == resized or name.endswith(".global")


def joint_outputs(trunk, golden):
    results = {}
    for name, images in golden.part("in").items():
        maps, g, z = trunk.forward_joint(images)
        results |= {f"{name}.x{i}": x for i, x in enumerate(maps.values())}
        results |= {f"{name}.global": g, f"{name}.dense": z}
    return results


@pytest.mark.golden(case="seg_vit_backbone")
@torch.no_grad()
def test_vit_backbone(golden):
    """Pyramid over blocks, dense map, global feature, every block and the tokens before the first norm."""
    args, patch = golden.args, golden.args["patch_size"]
    visual = VisionTransformer(
        image_size=args["input_resolution"],
        patch_size=patch,
        width=args["width"],
        layers=args["layers"],
        heads=args["heads"],
        mlp_ratio=4.0,
        act_layer=open_clip.transformer.QuickGELU,
        output_dim=args["output_dim"],
    )
    trunk = CLIPBlockTrunk(
        build_tower(visual, "bilinear"),
        blocks=args["out_indices"],
        scale_factors=[patch / (4 * 2**i) for i in range(4)],
        group_norm=True,
        joint=True,
    ).eval()
    state = golden.part("state")
    prefixes = {"": "tower."}
    for i in range(4):
        single = f"fpn{i + 1}.weight" in state
        prefixes[f"fpn{i + 1}."] = f"levels.{i}.{'0.' if single else ''}"
    load_strict(trunk, {rename(key, prefixes): x for key, x in state.items()}, source=golden.id)

    def run():
        with observed(trunk.tower) as seen:
            results = {}
            for name, images in golden.part("in").items():
                maps, g, z = trunk.forward_joint(images)
                results |= {f"{name}.{key}": value for key, value in seen.items()}
                results |= {f"{name}.x{i}": x for i, x in enumerate(maps.values())}
                results |= {f"{name}.global": g, f"{name}.dense": z}
        return results

    once = run()
    trunk.tower.double_class_embedding()
    golden.check(run())
    for name, value in once.items():
        assert golden.differs(name, value), name
    trunk.tower.position_rule = "bicubic"
    native = (args["input_resolution"] // patch,) * 2
    for name, value in run().items():
        if name.endswith(".dense") and value.shape[-2:] != native:
            assert golden.differs(name, value)


class observed:
    """Values of a tower that no output shows: tokens before the first norm, and the output of each block."""

    def __init__(self, tower):
        self.tower, self.seen, self.handles = tower, {}, []

    def __enter__(self):
        def before(module, args):
            self.seen["tokens_before_ln_pre"] = args[0]

        self.handles.append(self.tower.ln_pre.register_forward_pre_hook(before))
        self.original = self.tower._run

        def run(mode, index, *inputs):
            result = self.original(mode, index, *inputs)
            self.seen[f"block_{index}"] = result.x
            return result

        self.tower._run = run
        return self.seen

    def __exit__(self, *_):
        del self.tower._run
        for handle in self.handles:
            handle.remove()


def is_vit(golden):
    return golden.args["backbone"] == "vit"


@pytest.fixture
def build(golden, tmp_path):
    """Convert the published file with changed options, build the model that the result names, load it."""

    def build(**changes):
        args = golden.args
        options = {
            **language_options(golden),
            "MODEL.LANGUAGE.CONTEXT_DECODER.DROPOUT": 0.0,
            "MODEL.SEM_SEG_HEAD.DROPOUT": 0.0,
            "MODEL.PIXEL_TEXT.WEIGHT": args["aux_weight"],
            "MODEL.SEMANTIC_SEGMENTOR.WINDOW": args["slide_crop"],
            "MODEL.SEMANTIC_SEGMENTOR.STRIDE": args["slide_stride"],
            "MODEL.SEMANTIC_SEGMENTOR.BATCH_SIZE": 2,
            **changes,
        }
        if is_vit(golden):
            options["MODEL.CLIP.CONFIG.vision_cfg.head_width"] = args["width"] // args["heads"]
            options["MODEL.TRUNK.BLOCKS"] = args["out_indices"]
        return build_published(published(golden), options, tmp_path)

    return build


def batch(golden):
    """The recorded images and label maps as Detectron2's input."""
    inputs = golden.part("in")
    return [
        {"image": image, "sem_seg": labels[0].long(), "height": image.shape[1], "width": image.shape[2]}
        for image, labels in zip(inputs["image"], inputs["label_map"], strict=True)
    ]


def outputs(model, golden):
    """By the names of the recorded outputs."""
    inputs, trunk = golden.part("in"), model.backbone.bottom_up
    images = inputs["image"]
    maps, g, z = trunk.trunk.forward_joint(images)
    text = trunk.text()[None]
    features = model.backbone(images)
    score = features.pop("score")
    logits = model.predict(images)
    results = {
        **{f"x{i}": x for i, x in enumerate(maps.values())},
        **{f"neck.{i}": x for i, x in enumerate(features.values())},
        "global": g,
        "dense": z,
        "text": text,
        "text_refined": trunk.refine(text.expand(len(z), -1, -1), g, z),
        "score_map": score * trunk.tau,
        "concat_level": trunk(images)[trunk.scored],
        "head_logits": logits,
        "logits": torch.stack([x["sem_seg"] for x in whole(model)(batch(golden))]),
    }
    if "slide_image" in inputs:
        results["slide_logits"] = torch.stack(
            [model([{"image": x}])[0]["sem_seg"] for x in inputs["slide_image"]]
        )
    return results


def whole(model):
    """The model without windows, until the next call of `windows`."""
    model.windows = model.inference
    model.inference = replace(model.inference, window=(), stride=())

    def run(inputs):
        try:
            return model(inputs)
        finally:
            model.inference = model.windows

    return run


def losses(model, golden, *, train):
    """All losses, by recorded name, with batch or with running statistics."""
    if train:
        model.train()
    else:
        for module in model.modules():
            module.training = module is model or module is model.sem_seg_head
    try:
        with EventStorage():
            found = model(batch(golden))
    finally:
        model.eval()
    mode = "bn_train" if train else "bn_eval"
    return {
        f"{mode}.decode.loss_ce": found["loss_sem_seg"],
        f"{mode}.aux_identity.loss_ce": found["loss_pixel_text"],
    }


def accuracy(logits, labels):
    """Percent of all pixels, ignored ones included, whose best class is their label."""
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    return 100 * (logits.argmax(1) == labels).float().mean()[None]


@pytest.mark.golden(case="segmentor")
def test_every_output_and_loss(golden, build):
    model = build()
    labels = golden.part("in")["label_map"][:, 0].long()
    with torch.no_grad():
        results = outputs(model, golden)
    running = losses(model, golden, train=False)
    total = sum(running.values())
    results |= running | {"bn_eval.total_loss": total}
    results |= gradients(model, golden, total, "bn_eval.grad.")
    with torch.no_grad():
        score = model.backbone(golden.part("in")["image"])["score"]
        results["bn_eval.decode.acc_seg"] = accuracy(results["head_logits"], labels)
        results["bn_eval.aux_identity.acc_seg"] = accuracy(score, labels)
        seen = {}
        handles = [
            model.backbone.register_forward_hook(lambda m, x, y: seen.update(score=y["score"])),
            model.sem_seg_head.predictor.register_forward_hook(lambda m, x, y: seen.update(logits=y)),
        ]
        results |= losses(model, golden, train=True)
        for handle in handles:
            handle.remove()
        results["bn_train.decode.acc_seg"] = accuracy(seen["logits"], labels)
        results["bn_train.aux_identity.acc_seg"] = accuracy(seen["score"], labels)
    layout = model_layout(golden.part("state"))
    prefixes, buffers = layout.prefixes(golden.part("state")), dict(model.named_buffers())
    after = "bn_train.after."
    for name in golden.part("out"):
        if name.startswith(after):
            results[name] = buffers[rename(name.removeprefix(after), prefixes)]
    golden.check({name: value.detach() for name, value in results.items()})


@pytest.mark.golden(case="seg_ckpt")
@torch.no_grad()
def test_checkpoint(golden, build):
    golden.check(outputs(build(), golden))


def check_controls(golden, model):
    """The file distinguishes the published rules from their alternatives."""
    trunk = model.backbone.bottom_up
    if trunk.tau != 1:
        trunk.concatenate = "scaled"
        assert golden.differs("logits", outputs(model, golden)["logits"])
        trunk.concatenate = "cosine"
    tower = trunk.trunk.tower
    grid = outputs(model, golden)["dense"].shape[-2:]
    if tuple(grid) != tuple(tower.grid):
        tower.position_rule = "bicubic"
        assert golden.differs("score_map", outputs(model, golden)["score_map"])
        tower.position_rule = "bilinear"
    if is_vit(golden):
        tower.class_embedding_factor = 1
        assert golden.differs("text_refined", outputs(model, golden)["text_refined"])
        tower.double_class_embedding()


@pytest.mark.golden(case="seg_ckpt")
@torch.no_grad()
def test_controls_of_checkpoints(golden, build):
    check_controls(golden, build())


@pytest.mark.golden(case="segmentor")
@torch.no_grad()
def test_controls(golden, build):
    model, labels = build(), golden.part("in")["label_map"][:, 0].long()
    check_controls(golden, model)
    logits = golden.part("out")["head_logits"]
    assert not golden.differs("bn_eval.decode.loss_ce", pixel_cross_entropy(logits, labels, IGNORE, "all"))
    if (labels == IGNORE).any():
        loss = pixel_cross_entropy(logits, labels, IGNORE)
        assert golden.differs("bn_eval.decode.loss_ce", loss)
    slide = golden.part("in").get("slide_image")
    if slide is not None and any(
        side > window for side, window in zip(slide.shape[-2:], golden.args["slide_crop"], strict=True)
    ):
        maps = torch.stack([whole(model)([{"image": x}])[0]["sem_seg"] for x in slide])
        assert golden.differs("slide_logits", maps)


@pytest.mark.golden(manifest="denseclip_seg_*")
def test_every_key_of_full_size_files_is_converted(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    converted, cfg, layout = converted_config(golden, state)
    assert layout.name == "denseclip_semantic_fpn"
    report = account_model(cfg, converted, layout.drops)
    assert report.complete, str(report)
    assert len(report.loaded) == len(state) and not report.dropped

    names = {"rn50": "RN50-quickgelu", "rn101": "RN101-quickgelu", "vitb": "ViT-B-16-quickgelu"}
    named = open_clip.get_model_config(names[golden.id.split("_")[-1]])
    model_cfg = cfg.MODEL.CLIP.CONFIG
    assert model_cfg.embed_dim == named["embed_dim"] and model_cfg.quick_gelu
    layers = named["vision_cfg"]["layers"]
    assert model_cfg.vision_cfg.layers == layers and cfg.MODEL.LANGUAGE.N_CONTEXTS == 8
    assert model_cfg.text_cfg.context_length == 13
    if isinstance(layers, int):
        assert model_cfg.vision_cfg.head_width == 64 and cfg.MODEL.CLIP.POSITION_GRID == 40
    else:
        assert cfg.MODEL.CLIP.POSITION_GRID == 16


def converted_config(golden, state):
    converted = convert_model(Checkpoint(golden.path, state, "torch"))
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, config_options(converted), golden.id)
    return converted, cfg, model_layout(state)


@pytest.mark.golden(manifest="denseclip_seg_*")
def test_full_size_files_with_wrong_keys_are_refused(golden):
    """A missing key, an unexpected key and a mismatched shape are each listed."""
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    del state["neck.lateral_convs.0.conv.bias"]
    state["neck.extra"] = torch.empty(1, device="meta")
    state["decode_head.scale_heads.3.4.bn.weight"] = torch.empty(5, device="meta")
    converted, cfg, _ = converted_config(golden, state)
    report = account_model(cfg, converted)
    assert (report.missing, report.unexpected) == (["backbone.fpn_lateral2.bias"], ["neck.extra"])
    assert list(report.mismatched) == ["sem_seg_head.p5.4.norm.weight"]


@pytest.mark.golden(manifest="denseclip_seg_*")
def test_configs_agree_with_the_published_files(golden, caplog):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    converted = convert_model(Checkpoint(golden.path, state, "torch"))
    trunk = golden.id.split("_")[-1].replace("vitb", "vit_b16")
    recipe = RECIPES / f"semantic_fpn_{trunk}.yaml"
    explicit = set(config_keys(read_config_file(recipe)))
    cfg = load_config(str(recipe))
    apply_weight_options(cfg, converted, explicit)
    assert not caplog.records
    assert explicit & set(config_options(converted)) > {
        "MODEL.CLIP.POSITION_RULE",
        "MODEL.SEMANTIC_SEGMENTOR.WINDOW",
    }
