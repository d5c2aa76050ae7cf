"""Files of OVSeg, zsseg and ZegFormer: every key of full-size files is used; older and partial files load."""

import json

import pytest
import torch

from clipdense.checkpoint import Checkpoint, CheckpointError, config_options, convert_model, model_layout
from clipdense.clip.layouts import JIT_ENTRIES
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.config import add_clipdense_config
from clipdense.run.conversion import account_model, convert_weights
from clipdense.run.keys import set_options
from tests.helpers import two_stage_files as files
from tests.helpers.two_stage_files import close, far

from detectron2.config import get_cfg

LAST_BIAS = "predictor.mask_embed.layers.2.bias"


def fits(golden, shapes, layout_name):
    """Check that the keys of the file and of its model agree, and return its config keys."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    layout = model_layout(state)
    assert layout.name == layout_name
    cfg = get_cfg()
    add_clipdense_config(cfg)

    def report(state):
        file = convert_model(Checkpoint(golden.path, state, "torch"))
        options = config_options(file)
        keys = cfg.clone()
        set_options(keys, options, golden.id)
        return account_model(keys, file, layout.drops, layout.optional), options

    whole, options = report(state)
    assert whole.complete, str(whole)
    lacking, _ = report({key: value for key, value in state.items() if LAST_BIAS not in key})
    assert lacking.missing == [f"head.{LAST_BIAS}"]
    another, _ = report({**state, "sem_seg_head.predictor.other.weight": torch.empty(1, device="meta")})
    assert another.unexpected == ["head.predictor.other.weight"]
    return options


@pytest.mark.golden(manifest="ovseg_*")
def test_full_size_ovseg_maps_without_rest(golden):
    options = fits(golden, golden.shapes, "ovseg")
    prompts = golden.shapes["clip_adapter.clip_model.visual.mask_embedding"]
    assert options["MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH"] == prompts[0]
    assert options["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] == golden.shapes["criterion.empty_weight"][0] - 1


@pytest.mark.golden(manifest="zsseg_*")
def test_full_size_zsseg_maps_without_rest(golden):
    prefix = golden.shapes["clip_adapter.prompt_learner.prefix_prompt"][0]
    options = fits(golden, golden.shapes, "zsseg")
    assert options["MODEL.TWO_STAGE.PROMPT_CONTEXT"] == [prefix, 0]
    assert options["MODEL.TWO_STAGE.TEMPLATES"] == "{}."
    absent = json.loads(golden.path.read_text())["_info"]["absent_in_cross_dataset_file"]
    options = fits(golden, {k: v for k, v in golden.shapes.items() if k not in absent}, "zsseg")
    assert options["MODEL.TWO_STAGE.PROMPT_CONTEXT"] == [0, 0]
    assert options["MODEL.TWO_STAGE.TEMPLATES"] == "ovseg_14"


@pytest.mark.golden(manifest="zegformer_*")
def test_full_size_zegformer_maps_without_rest(golden):
    """As training saves it, and with OpenAI's CLIP for evaluation."""
    options = fits(golden, golden.shapes, "zegformer_proposals")
    assert options["MODEL.CLIP.NAME"] == "ViT-B-16-quickgelu"
    listed = json.loads((golden.path.parent / "openai_clip_ViT-B-16.json").read_text())
    optional = json.loads(golden.path.read_text())["_info"]["optional_in_checkpoint"]
    clip = {optional["prefix"] + k: v for k, v in listed.items() if k not in ("_info", *JIT_ENTRIES)}
    assert len(clip) == optional["num_tensors"]
    options = fits(golden, golden.shapes | clip, "zegformer")
    assert options["MODEL.CLIP.CONFIG.vision_cfg.patch_size"] == 16
    clip.popitem()
    with pytest.raises(AssertionError, match=r"missing in the file: encoder\.clip\."):
        fits(golden, golden.shapes | clip, "zegformer")


@torch.no_grad()
def segment(golden, model):
    model.set_vocabulary(Vocabulary.from_names(golden.config["class_names"], separator=None))
    return model(files.samples(golden))[0]["sem_seg"]


def tolerance(golden):
    return 1e-3 * golden.part("out")["sem_seg0"].abs().max().item()


@pytest.mark.golden(kind="ovseg_full")
def test_older_files(golden, tmp_path):
    """Old head keys, prefixes of distributed training, and no class weights."""
    head, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head."
    state = {
        f"module.{key.replace(head, predictor)}": value
        for key, value in files.whole_state(golden).items()
        if key != "criterion.empty_weight"
    }
    options = files.ovseg_options(golden.config)
    content = {"model": state, "iteration": 3, "optimizer": {}}
    model = files.converted(golden, tmp_path, options, content=content)
    close(golden, "sem_seg0", segment(golden, model), tolerance(golden))
    del state[f"module.sem_seg_head.{LAST_BIAS}"]
    torch.save({"model": state}, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"lacks sem_seg_head\.predictor\.mask_embed\.layers\.2\.bias"):
        convert_weights(tmp_path / "lacking.pth", tmp_path / "lacking.safetensors", options=options)


@pytest.mark.golden(kind="ovseg_full")
def test_files_without_mask_prompts(golden, tmp_path):
    """They are OVSeg models that see plain crops, for any number of training classes."""
    state = files.whole_state(golden)
    del state["clip_adapter.clip_model.visual.mask_embedding"]
    state["criterion.empty_weight"] = torch.ones(3)
    options = files.ovseg_options(golden.config)
    model = files.converted(golden, tmp_path, options, content={"model": state}, layout="zsseg")
    plain = segment(golden, model)
    complete = files.converted(golden, tmp_path, options | {"MODEL.TWO_STAGE.MASK_PROMPTS.ENABLED": False})
    torch.testing.assert_close(plain, segment(golden, complete))
    model.scoring = files.other_source(model.scoring)
    assert far(golden, "sem_seg0", segment(golden, model), tolerance(golden))


@pytest.mark.golden(kind="zegformer_full")
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # the accounts' model
@torch.no_grad()
def test_zegformer_without_clip(golden, tmp_path):
    """CLIP comes from MODEL.CLIP; nothing else may be missing in the file."""
    prefix = "sem_seg_head.predictor.clip_model."
    clip, _ = files.load(golden, prefix)
    clip.save(tmp_path / "clip.safetensors")
    state = {k: v for k, v in files.whole_state(golden).items() if not k.startswith(prefix)}
    c = golden.config
    options = files.zegformer_options(c) | {"MODEL.CLIP.NAME": str(tmp_path / "clip.safetensors")}
    arguments = {"content": {"model": state}, "layout": "zegformer_proposals"}
    model = files.converted(golden, tmp_path, options, **arguments)
    seen = set(c["train_classes"])
    novel = [i for i, name in enumerate(c["test_classes"]) if name not in seen]
    model.set_vocabulary(Vocabulary.from_names(c["test_classes"], novel=novel))
    for b, output in enumerate(model(files.samples(golden))):
        close(golden, f"sem_seg{b}", output["sem_seg"], 1e-3)
    if model.scoring.source != "proposals":
        torch.nn.init.normal_(model.encoder.clip.visual.proj)
        assert far(golden, "sem_seg0", model(files.samples(golden))[0]["sem_seg"], 1e-3)
    del state[f"sem_seg_head.{LAST_BIAS}"]
    with pytest.raises(CheckpointError, match=r"lacks sem_seg_head\.predictor\.mask_embed\.layers\.2\.bias"):
        files.converted(golden, tmp_path, options, **arguments)
