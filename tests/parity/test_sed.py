"""SED: published file -> converter -> our model -> every recorded number."""

from dataclasses import replace

import pytest
import torch
import yaml

from clipdense.checkpoint import Checkpoint, config_options, convert_model, model_layout
from clipdense.clip import TowerRequest
from clipdense.clip.templates import TEMPLATE_SETS, TemplateSet
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.run.config import add_clipdense_config
from clipdense.run.conversion import account_model, convert_weights
from clipdense.run.keys import set_options
from clipdense.run.setup import load_config
from clipdense.systems.catseg.cost import ABSENT_LOGIT, cost_volume
from clipdense.systems.catseg.views import square_view

from detectron2.config import get_cfg


def segmentor(golden, folder, monkeypatch):
    """Convert the file with the settings of its run, build the model that the result names, load it."""
    config = golden.config
    templates = TemplateSet("golden", tuple(config["templates"]))
    monkeypatch.setitem(TEMPLATE_SETS, "golden", templates)
    torch.save({"model": golden.part("state")}, folder / "published.pth")
    options = {
        "MODEL.CLIP.CONFIG.text_cfg.heads": config["clip"]["text"]["heads"],
        "MODEL.CLIP.CONFIG.vision_cfg.image_size": config["clip"]["vision"]["image_size"],
        "MODEL.CAT_SEG.TEMPLATES": "golden",
        "MODEL.CAT_SEG.RESOLUTION": config["resolution"],
        "MODEL.CAT_SEG.HEADS": config["agg"]["heads"],
        "MODEL.CAT_SEG.POOLING": config["agg"]["pool"],
    }
    target = folder / "converted.safetensors"
    conversion = convert_weights(folder / "published.pth", target, options=options)
    assert conversion.layout == "sed" and not conversion.dropped
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target), "DEVICE": "cpu"}})
    )
    cfg = load_config(str(folder / "config.yaml"))
    assert config["agg"]["kernel"] == cfg.MODEL.CAT_SEG.KERNELS
    assert config["agg"]["dec"] == cfg.MODEL.CAT_SEG.DECODER_DIMS
    model = build_model(cfg).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    return model


def name_tokens(tokens, counts, templates):
    """Reorder the recorded tokens (class, template, synonym) to those of our encoder: (names, P, L)."""
    blocks = tokens.split([templates * count for count in counts])
    return torch.cat(
        [block.unflatten(0, (templates, n)).transpose(0, 1) for block, n in zip(blocks, counts, strict=True)]
    )


def set_classes(golden, model, monkeypatch, split):
    """Set the classes of a split; their tokenizer is a stand-in."""
    config = golden.config
    tokens = name_tokens(
        golden.part("in")["text_tokens"], config[f"{split}_num_synonyms"], len(config["templates"])
    )
    monkeypatch.setattr(model.prompts, "tokens", lambda vocabulary: tokens)
    vocabulary = Vocabulary.from_names(config[f"{split}_classes"])
    assert [len(names) for names in vocabulary.synonyms] == config[f"{split}_num_synonyms"]
    return vocabulary


def close(golden, name, value):
    atol, rtol = golden.tolerance
    try:
        torch.testing.assert_close(value, golden.part("out")[name], atol=atol, rtol=rtol)
    except AssertionError as e:
        raise AssertionError(f"{golden.id} {name}: {e}") from None


@pytest.mark.golden(kind="sed_full")
@torch.no_grad()
def test_every_output(golden, tmp_path, monkeypatch):
    model = segmentor(golden, tmp_path, monkeypatch)
    model.set_vocabulary(set_classes(golden, model, monkeypatch, "test"))
    text, out = model.text_embeddings()["prompts"], golden.part("out")
    close(golden, "text_embeds", text)
    view = square_view(model.preprocess_image(golden.part("in")["image"]), model.resolution)[None]
    maps = model.clip.visual(view, TowerRequest(taps=(2, 3, 4, 5), dense="plain"))
    close(golden, "clip_vis_dense", maps.dense)
    for level, (tap, _) in zip((2, 3, 4, 5), maps.taps, strict=True):
        if f"res{level}" in out:
            close(golden, f"res{level}", tap)
    guidance = [maps.taps[i][0] for i in (2, 1, 0)]
    volume = cost_volume(maps.dense, text[None])
    close(golden, "correlation", volume.transpose(1, 2))
    pooled = replace(model.evaluation, pooling=tuple(golden.config["agg"]["pool"]))
    whole = model.aggregator(maps.dense, text, guidance, replace(pooled, max_maps=0))
    close(golden, "logits", whole.logits)
    for i, scores in enumerate(whole.rejection):
        close(golden, f"aux_head{i}", scores)
    rows = golden.config["keep_stage_rows"]
    x = model.aggregator.embed_cost(volume)
    close(golden, "conv1_first", x.flatten(0, 1).permute(0, 3, 1, 2)[:rows])

    height, width = golden.config["out_hw"]
    sample = {"image": golden.part("in")["image"], "height": height, "width": width}
    model.evaluation = pooled
    close(golden, "sem_seg", model([sample, sample])[1]["sem_seg"])
    model.evaluation = replace(pooled, pooling=(1, 1), max_maps=2)
    close(golden, "pool1x1/logits", model.view_logits(view, text))
    close(golden, "pool1x1/sem_seg", model([sample])[0]["sem_seg"])
    if tuple(golden.config["agg"]["pool"]) != (1, 1):  # control: the other pooling
        assert golden.differs("logits", model.view_logits(view, text))
    negatives = [name for name in out if name.startswith("NEG_logits")]
    assert negatives and all(golden.differs(name, whole.logits) for name in negatives)


@pytest.mark.golden(kind="sed_full")
@torch.no_grad()
def test_early_rejection(golden, tmp_path, monkeypatch):
    model = segmentor(golden, tmp_path, monkeypatch)
    model.set_vocabulary(set_classes(golden, model, monkeypatch, "test"))
    height, width = golden.config["out_hw"]
    sample = {"image": golden.part("in")["image"], "height": height, "width": width}
    view = square_view(model.preprocess_image(sample["image"]), model.resolution)[None]
    text, everything = model.text_embeddings()["prompts"], model([sample])[0]["sem_seg"]
    for topk in golden.config["topk"]:
        model.evaluation = replace(model.evaluation, rejection_topk=topk)
        result = model.aggregate(view, text, model.evaluation)
        for i, scores in enumerate([*result.rejection[1:], result.logits]):
            kept = (scores[0] != ABSENT_LOGIT).flatten(1).any(1)
            assert torch.equal(kept, golden.part("out")[f"fast_top{topk}/kept_after_head{i}"])
        close(golden, f"fast_top{topk}/sem_seg", model([sample])[0]["sem_seg"])
        if not golden.part("out")[f"fast_top{topk}/kept_after_head2"].all():  # control: no rejection
            assert golden.differs(f"fast_top{topk}/sem_seg", everything)


@pytest.mark.golden(kind="sed_train")
def test_training(golden, tmp_path, monkeypatch):
    model = segmentor(golden, tmp_path, monkeypatch).train()
    model.init_vocabulary(set_classes(golden, model, monkeypatch, "train"))
    inputs, out = golden.part("in"), golden.part("out")
    batch = [
        {"image": inputs[f"image{i}"], "sem_seg": inputs[f"sem_seg{i}"].long()}
        for i in range(len(golden.config["images"]))
    ]
    losses = model(batch)
    names = ["loss_sem_seg", *(f"loss_rejection_{i}" for i in range(3))]
    assert list(losses) == names
    for i, name in enumerate(names):
        close(golden, f"loss/loss_sem_seg_{i}", losses[name])
    total = torch.stack(list(losses.values())).sum()
    close(golden, "loss_total", total)
    total.backward()

    layout, state = model_layout(golden.part("state")), golden.part("state")
    published = dict(zip(state, layout.convert(state), strict=True))
    parameters = dict(model.named_parameters())
    trained = {key for key, ours in published.items() if parameters[ours].requires_grad}
    assert trained == set(golden.config["trainable"]) and not golden.config["trainable_without_grad"]
    assert all(parameters[published[key]].grad is not None for key in trained)
    for name in (name.removeprefix("grad/") for name in out if name.startswith("grad/")):
        close(golden, f"grad/{name}", parameters[published[name]].grad)

    assert golden.differs("NEG_loss_total__final_map_only", total)
    model.ignored_pixels = "excluded"
    other = torch.stack(list(model(batch).values())).sum()
    if any((inputs[f"sem_seg{i}"] == 255).any() for i in range(len(batch))):
        assert golden.differs("loss_total", other)
    close(golden, "NEG_loss_total__valid_pixels_only", other)


@pytest.mark.golden(manifest="sed_*")
def test_full_size_files_map_without_rest(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    converted = convert_model(Checkpoint(golden.path, state, "torch"))
    layout, options = model_layout(state), config_options(converted)
    assert layout.name == "sed"
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, options, golden.id)
    report = account_model(cfg, converted, layout.drops)
    assert report.complete and len(report.loaded) == len(state), str(report)
    assert cfg.MODEL.CAT_SEG.TEMPLATES == "clip_80" and cfg.MODEL.CAT_SEG.RESOLUTION == 768
    assert cfg.MODEL.CAT_SEG.KERNELS == [9, 9, 9]

    key = next(key for key in state if key.endswith("head2.bias"))
    lacking = {k: v for k, v in state.items() if k != key}
    report = account_model(cfg, convert_model(Checkpoint(golden.path, lacking, "torch")), layout.drops)
    assert report.missing == ["aggregator.rejection_heads.2.bias"]
    stray = convert_model(Checkpoint(golden.path, state | {f"{key}.more": state[key]}, "torch"))
    assert not account_model(cfg, stray, layout.drops).complete
