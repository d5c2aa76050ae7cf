"""CAT-Seg: the aggregator alone, then published file -> converter -> our model -> every recorded number."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from clipdense.checkpoint import Checkpoint, config_options, convert_model, load_strict, model_layout
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.run.config import add_clipdense_config
from clipdense.run.conversion import account_model, convert_weights
from clipdense.run.keys import set_options
from clipdense.run.setup import load_config
from clipdense.systems.catseg import AggregationSettings, CostAggregator, WindowSettings
from clipdense.systems.catseg.convert import GUIDANCE
from clipdense.systems.catseg.cost import cost_volume
from clipdense.systems.catseg.views import square_view
from tests.helpers.two_stage_files import close, far

from detectron2.config import get_cfg

COST = "sem_seg_head.predictor.transformer."
CLIP = "sem_seg_head.predictor.clip_model."
TOLERANCE = 1e-4


def converted_names(state, prefix):
    """Convert a state dict as the layout does; return what lies below a prefix, and the dropped masks."""
    layout = model_layout(state)
    assert layout.name == "catseg"
    ours = layout.convert(state)
    return {k.removeprefix(prefix): v for k, v in ours.items() if k.startswith(prefix)}, layout.drops


def aggregator(golden):
    sizes = golden.config["agg"]
    model = CostAggregator(
        sizes["D"],
        prompts=sizes["P"],
        hidden_dim=sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        window=sizes["window"],
        max_classes=sizes["pad_len"],
        image_guidance_dim=sizes["ag"],
        text_guidance_dim=sizes["tg"],
        guidance_dims=sizes["dgd"],
        decoder_guidance_dims=sizes["dgp"],
        decoder_dims=sizes["dec"],
    )
    state = {f"{COST}{key}": value for key, value in golden.part("state").items()}
    state["upsample1.weight"] = torch.zeros(1)  # of the whole model, for the layout
    state, drops = converted_names(state, "aggregator.")
    state = {k: v for k, v in state.items() if not k.endswith("attn_mask")}
    assert len(drops) == 1
    load_strict(model, state, source=golden.id)
    return model.eval()


def guidance(golden):
    inputs = golden.part("in")
    return [inputs["guidance1_2x"], inputs["guidance2_4x"]]


@pytest.mark.golden(name="catseg_aggregator*")
@pytest.mark.parametrize("max_maps", [0, 3])
@torch.no_grad()
def test_logits(golden, max_maps):
    model, inputs = aggregator(golden), golden.part("in")
    for classes in golden.config["T"]:
        for pooling in golden.config["pools"]:
            settings = AggregationSettings(tuple(pooling), max_maps)
            text, name = inputs[f"text_T{classes}"], f"T{classes}_pool{pooling[0]}x{pooling[1]}.logits"
            output = model(inputs["image_feats"], text, guidance(golden), settings)
            close(golden, name, output.logits, TOLERANCE)
            height, width = inputs["image_feats"].shape[2:]
            other = (1, 1) if tuple(pooling) != (1, 1) and height > 1 and width > 1 else (2, 2)
            control = model(inputs["image_feats"], text, guidance(golden), replace(settings, pooling=other))
            assert far(golden, name, control.logits, TOLERANCE)
            mirrored = [guidance(golden)[0], guidance(golden)[1].flip(-1)]
            control = model(inputs["image_feats"], text, mirrored, settings)
            assert far(golden, name, control.logits, TOLERANCE)


@pytest.mark.golden(name="catseg_aggregator*")
@torch.no_grad()
def test_classes_beyond_the_limit(golden):
    """Absent classes have the recorded logit, and shorter sequences need the padding tokens."""
    inputs = golden.part("in")
    limit = golden.config["agg"]["pad_len"]
    for classes in golden.config["T"]:
        pooling = tuple(golden.config["pools"][0])
        name = f"T{classes}_pool{pooling[0]}x{pooling[1]}.logits"
        expected = golden.part("out")[name]
        absent = (expected == -100).flatten(2).all(2).sum(1)
        assert (absent == max(0, classes - limit)).all()
        if classes == limit:
            continue
        other = aggregator(golden)
        if classes < limit:  # no padding tokens
            for layer in other.layers:
                layer.classes.pad_length = 0
        else:  # no selection
            other.max_classes = classes
        output = other(
            inputs["image_feats"], inputs[f"text_T{classes}"], guidance(golden), AggregationSettings(pooling)
        )
        assert far(golden, name, output.logits, TOLERANCE)


@pytest.mark.golden(name="catseg_aggregator*")
@torch.no_grad()
def test_stages(golden):
    """The stages are recorded for the first class count and pooling."""
    model, inputs = aggregator(golden), golden.part("in")
    classes, pooling = golden.config["T"][0], tuple(golden.config["pools"][0])
    prefix = f"T{classes}_pool{pooling[0]}x{pooling[1]}."
    dense, text = inputs["image_feats"], inputs[f"text_T{classes}"]
    close(golden, f"{prefix}correlation", cost_volume(dense, text).transpose(1, 2), TOLERANCE)
    x = model.embed_cost(dense, text)
    close(golden, f"{prefix}embedded_corr", x.permute(0, 4, 1, 2, 3), TOLERANCE)
    image, words = F.relu(model.image_guidance(dense)).permute(0, 2, 3, 1), model.guide_text(text)
    for i, layer in enumerate(model.layers):
        spatial = layer.spatial(x, image)
        unshifted = aggregator(golden).layers[i].spatial
        unshifted.blocks[1].attn.shift = 0
        if f"{prefix}layer{i}_spatial" in golden.part("out"):
            close(golden, f"{prefix}layer{i}_spatial", spatial.permute(0, 4, 1, 2, 3), TOLERANCE)
            if max(dense.shape[2:]) > golden.config["agg"]["window"]:
                control = unshifted(x, image).permute(0, 4, 1, 2, 3)
                assert far(golden, f"{prefix}layer{i}_spatial", control, TOLERANCE)
        x = layer(x, image, words, pooling)
        close(golden, f"{prefix}layer{i}_out", x.permute(0, 4, 1, 2, 3), TOLERANCE)
        control = layer.classes(spatial, words.flip(1), pooling).permute(0, 4, 1, 2, 3)
        assert far(golden, f"{prefix}layer{i}_out", control, TOLERANCE)


# whole models


def segmentor(golden, folder, **changes):
    """Convert the file with the settings of its run, build the model that the result names, load it."""
    config = golden.config
    torch.save({"model": golden.part("state")}, folder / "published.pth")
    clip, agg = config["clip"], config["agg"]
    options = {
        "MODEL.CLIP.CONFIG.vision_cfg.head_width": clip["width"] // clip["heads"],
        "MODEL.CLIP.CONFIG.text_cfg.heads": clip["t_heads"],
        "MODEL.CAT_SEG.GUIDANCE": config["hook_blocks"],
        "MODEL.CAT_SEG.HEADS": agg["heads"],
        "MODEL.CAT_SEG.MAX_CLASSES": agg["pad_len"],
        "MODEL.CAT_SEG.POOLING": agg["pool"],
        **changes,
    }
    target = folder / "converted.safetensors"
    conversion = convert_weights(folder / "published.pth", target, options=options)
    assert conversion.layout == "catseg" and set(conversion.dropped) == {"window masks"}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target), "DEVICE": "cpu"}})
    )
    cfg = load_config(str(folder / "config.yaml"))
    assert agg["res"][0] * clip["patch"] == cfg.MODEL.CAT_SEG.RESOLUTION
    assert agg["window"] == cfg.MODEL.CAT_SEG.WINDOW
    model = build_model(cfg).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    return model


def set_classes(golden, model):
    """Set the test classes with embeddings of the recorded tokens, whose tokenizer is a stand-in."""
    text = model.prompts.embed(golden.part("in")["test_tokens"][:, None])
    names = Vocabulary.from_names(golden.config["test_classes"])
    model.set_vocabulary(names, {"prompts": text})
    return text


def sample(golden):
    height, width = golden.config["out_hw"]
    return {"image": golden.part("in")["test_image"], "height": height, "width": width}


@pytest.mark.golden(name="ckpt_catseg")
@torch.no_grad()
def test_plain(golden, tmp_path):
    pool = golden.config["agg"]["pool"]
    plain = {"MODEL.CAT_SEG.TEST.WINDOWS.ENABLED": False, "MODEL.CAT_SEG.TEST.POOLING": pool}
    model = segmentor(golden, tmp_path, **plain)
    text = set_classes(golden, model)
    close(golden, "plain.text_embeds", text[:, 0], TOLERANCE)
    image = model.preprocess_image(sample(golden)["image"])
    view = square_view(image, model.resolution, model.padding_multiple)[None]
    dense = model.clip.visual(view, model.request).dense
    tokens = golden.part("out")["plain.clip_tokens"][:, 1:]
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), tokens, atol=TOLERANCE, rtol=0)
    close(golden, "plain.logits_before_sigmoid", model.view_logits(view, text), TOLERANCE)
    close(golden, "plain.sem_seg", model([sample(golden)])[0]["sem_seg"], TOLERANCE)
    model.max_dense_classes = 1
    labels = model([sample(golden)])[0]["sem_seg_labels"]
    assert (labels == golden.part("out")["plain.sem_seg"].argmax(0)).float().mean() > 0.999

    model.max_dense_classes = 0
    height, width = sample(golden)["image"].shape[-2:]
    if height % 32 or width % 32:  # control: the image without its padding
        model.padding_multiple = 0
        assert far(golden, "plain.sem_seg", model([sample(golden)])[0]["sem_seg"], TOLERANCE)
    model.request = replace(model.request, dense="value")  # control: each token's own residual
    control = model.view_logits(view, text)
    assert far(golden, "plain.logits_before_sigmoid", control, TOLERANCE)


@pytest.mark.golden(name="ckpt_catseg")
@torch.no_grad()
def test_windows(golden, tmp_path):
    """The scores of a batch are those of its images alone, and of views one by one."""
    model = segmentor(golden, tmp_path)
    set_classes(golden, model)
    batch = [sample(golden), sample(golden) | {"image": sample(golden)["image"].flip(-1)}]
    names = [key for key in golden.part("out") if key.startswith("sliding_pool")]
    assert names
    for name in names:
        pool = int(name.removeprefix("sliding_pool").split(".")[0])
        model.evaluation = replace(model.evaluation, pooling=(pool, pool))
        close(golden, name, model(batch)[0]["sem_seg"], TOLERANCE)
        model.views_per_forward = 2
        close(golden, name, model(batch[:1])[0]["sem_seg"], TOLERANCE)
        model.views_per_forward = 5
        if pool > 1:
            other = replace(model.evaluation, pooling=(1, 1))
        else:
            other = replace(model.evaluation, pooling=(2, 2))
        model.evaluation, kept = other, model.evaluation
        assert far(golden, name, model(batch[:1])[0]["sem_seg"], TOLERANCE)
        model.evaluation, settings = kept, model.windows
        model.windows = WindowSettings()
        assert far(golden, name, model(batch[:1])[0]["sem_seg"], TOLERANCE)
        model.windows = settings


@pytest.mark.golden(name="ckpt_catseg")
def test_training(golden, tmp_path, monkeypatch):
    model = segmentor(golden, tmp_path).train()
    inputs, config = golden.part("in"), golden.config
    model.init_vocabulary(Vocabulary.from_names(config["train_classes"]))
    monkeypatch.setattr(model.prompts, "tokens", lambda vocabulary: inputs["train_tokens"][:, None])
    batch = [
        {"image": inputs[f"train_image{i}"], "sem_seg": inputs["sem_seg"][i].long()}
        for i in range(len(config["train_images"]))
    ]
    (loss,) = model(batch).values()
    torch.testing.assert_close(loss, golden.part("out")["train.loss"], atol=1e-5, rtol=0)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    layout = model_layout(golden.part("state"))
    for name in config["grad_names"]:
        expected = golden.part("out")[f"train.grad/{name}"]
        torch.testing.assert_close(
            gradient(golden, layout, gradients, name), expected, atol=TOLERANCE, rtol=0
        )

    # as many tensors learn as recorded; ours hold queries and values of CLIP in one tensor
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    fused = [name for name in trained if name.endswith("in_proj_weight")]
    assert len(trained) + len(fused) == int(golden.part("out")["train.has_grad"].sum())
    assert 2 * len(fused) == len(config["trainable_names_in_clip"])
    for name in fused:
        keys = gradients[name].chunk(3)[1]
        assert not keys.any()

    if (inputs["sem_seg"] == 255).any():  # control: ignored pixels are left out
        model.ignored_pixels = "excluded"
        (other,) = model(batch).values()
        assert abs(other - golden.part("out")["train.loss"]) > 1e-5


def gradient(golden, layout, gradients, name):
    """Return our gradient of a tensor of the published file."""
    part = next((i for i, letter in enumerate("qkv") if name.endswith(f"{letter}_proj_weight")), None)
    if part is not None:
        name = name.rpartition(".")[0] + ".in_proj_weight"
    ours, prefixes = name, layout.prefixes(golden.part("state"))
    theirs = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
    ours = prefixes[theirs] + name.removeprefix(theirs)
    return gradients[ours] if part is None else gradients[ours].chunk(3)[part]


@pytest.mark.golden(manifest="catseg_*")
def test_full_size_files_map_without_rest(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    converted = convert_model(Checkpoint(golden.path, state, "torch"))
    layout, options = model_layout(state), config_options(converted)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, options, golden.id)
    report = account_model(cfg, converted, layout.drops)
    assert report.complete, str(report)
    projections = [key for key in state if key.startswith(CLIP) and key.endswith("_proj_weight")]
    assert len(report.dropped["window masks"]) == options["MODEL.CAT_SEG.LAYERS"]
    assert len(report.loaded) == len(state) - len(report.dropped["window masks"]) - 2 * len(projections) // 3
    depth = options["MODEL.CLIP.CONFIG.vision_cfg.layers"]
    patch = options["MODEL.CLIP.CONFIG.vision_cfg.patch_size"]
    assert options["MODEL.CAT_SEG.GUIDANCE"] == GUIDANCE[depth]
    assert options["MODEL.CAT_SEG.RESOLUTION"] == 24 * patch
    assert cfg.MODEL.CAT_SEG.TEMPLATES == "single_scene" and cfg.MODEL.CAT_SEG.TEST.WINDOWS.ENABLED

    # control: a layer, a head and a projection more
    for key in (f"{COST}layers.9.swin_block.guidance_norm.weight", f"{COST}other.weight", f"{CLIP}other"):
        stray = convert_model(Checkpoint(golden.path, state | {key: torch.empty(3, device="meta")}, "torch"))
        assert not account_model(cfg, stray, layout.drops).complete
    del state["upsample2.bias"]
    lacking = convert_model(Checkpoint(golden.path, state, "torch"))
    assert account_model(cfg, lacking, layout.drops).missing == ["guidance_upsampling.1.bias"]
