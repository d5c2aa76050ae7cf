"""FC-CLIP's published files: every key is used, and the converted model computes each recorded number."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import Checkpoint, CheckpointError, config_options, convert_model, model_layout
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.run.config import add_clipdense_config
from clipdense.run.conversion import account_model, convert_weights
from clipdense.run.keys import set_options
from clipdense.run.setup import load_config
from tests.parity.test_mask_pooling import FUSED_EPS, check_outputs, classes_of, close, far

from detectron2.config import get_cfg

ATOL = 1e-4


def converted(golden, folder):
    """Build the model of a recorded file through the converter, with the settings that it does not show."""
    c = golden.config
    options = {
        "MODEL.MASK_FORMER.NHEADS": c["dec"]["nheads"],
        "MODEL.CLIP.CONFIG.text_cfg.heads": c["text"]["heads"],
        "MODEL.MASK_POOLING.ENSEMBLE.ALPHA": c["alpha"],
        "MODEL.MASK_POOLING.ENSEMBLE.BETA": c["beta"],
        "MODEL.MASK_POOLING.ENSEMBLE.EMPTY": "in_vocabulary" if c["valid_mask"] else "pooled",
        "TEST.DETECTIONS_PER_IMAGE": c["test"]["topk"],
    }
    points = golden.tensors[
        "state/sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights.bias"
    ].numel()
    options["MODEL.MASK_FORMER.PIXEL_DECODER.POINTS"] = points // (3 * c["dec"]["nheads"])
    if c["kind"] == "resnet":
        options["MODEL.CLIP.CONFIG.vision_cfg.head_width"] = c["vision"]["head_width"]
    else:
        options["MODEL.CLIP.CONFIG.vision_cfg.image_size"] = c["vision"]["image_size"]
    torch.save({"model": golden.part("state")}, folder / "published.pth")
    target = folder / "converted.safetensors"
    conversion = convert_weights(
        folder / "published.pth", target, options=options, classes=c["train_classes"]
    )
    assert conversion.layout == "fcclip"
    (folder / "config.yaml").write_text(f"VERSION: 2\nMODEL: {{WEIGHTS: {target}, DEVICE: cpu}}\n")
    model = build_model(load_config(str(folder / "config.yaml"))).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    return model


def set_test_classes(golden, model):
    """Set the evaluation vocabulary with the embeddings of the recorded tokens."""
    c = golden.config
    tokens = golden.part("in")["test_text_tokens"]
    names = sum(c["test_num_synonyms"])
    text = F.normalize(model.clip.encode_text(tokens), dim=-1).unflatten(0, (names, -1)).mean(1)
    rows = F.normalize(text, dim=-1)
    close(golden, "text_classifier_no_void", rows, ATOL)
    vocabulary = Vocabulary.from_names(c["test_classes"])
    assert [len(synonyms) for synonyms in vocabulary.synonyms] == c["test_num_synonyms"]
    things = tuple(i in c["test_things"] for i in range(len(vocabulary)))
    classes = classes_of(c["test_num_synonyms"])
    model.set_vocabulary(replace(vocabulary, thing=things), {"rows": rows, "classes": classes})
    assert model.base_flags().int().tolist() == c["category_overlapping_mask"]


@pytest.mark.golden(name="ckpt_fcclip_*")
@torch.no_grad()
def test_fcclip(golden, tmp_path):
    c, out = golden.config, golden.part("out")
    model = converted(golden, tmp_path)
    set_test_classes(golden, model)
    batch = [
        {"image": golden.part("in")[f"image{b}"], "height": h, "width": w}
        for b, (h, w) in enumerate(c["out_hw"])
    ]
    proposals = model.propose(batch)
    names = {"clip_vis_dense": "joint"}
    recorded = [key.removeprefix("backbone.") for key in out if key.startswith("backbone.")]
    assert recorded
    for name in recorded:
        close(golden, f"backbone.{name}", proposals.features[names.get(name, name)], ATOL)
    close(golden, "mask_features", model.head.pixel_decoder(proposals.features).mask_features, ATOL)
    close(golden, "mask_logits_stride4", proposals.mask_logits, ATOL)
    text = model.text_embeddings()
    first = model.head.train()(proposals.features).aux[0]
    model.eval()
    logits = model.classifier(first.query_embeddings, text["rows"], text["classes"])
    close(golden, "aux0_logits", logits, ATOL)
    regions = model.embed_regions(proposals, batch)
    close(golden, "pooled_clip_embedding", regions.embeddings, ATOL)
    pairs = model.class_logits(proposals, batch)
    inside = torch.stack([pair.in_vocabulary for pair in pairs])
    close(golden, "in_vocab_logits_with_void", inside, ATOL)
    padded = F.interpolate(proposals.mask_logits, proposals.padded_size, mode="bilinear", align_corners=False)
    base = model.base_flags()
    for b, (image, size) in enumerate(zip(c["images"], c["out_hw"], strict=True)):
        scores = pairs[b].fuse(model.ensemble, base)
        check_outputs(golden, f"img{b}", scores, padded[b], tuple(image), tuple(size), ATOL)
        output = model(batch)[b]
        close(golden, f"img{b}.sem_seg", output["sem_seg"], ATOL)
        assert torch.equal(output["panoptic_seg"][0], out[f"img{b}.panoptic_seg"])
        assert len(output["instances"]) == len(out[f"img{b}.inst_scores"])
        # negative control: one classifier alone
        alone = pairs[b].fuse(replace(model.ensemble, source="in_vocabulary"), base)
        assert far(golden, f"img{b}.fused_class_logits", (alone + FUSED_EPS).log(), ATOL)


@pytest.mark.golden(name="ckpt_fcclip_*")
def test_incomplete_files_are_refused(golden, tmp_path):
    state = golden.part("state")
    lost = "sem_seg_head.predictor._mask_pooling_proj.1.bias"
    torch.save({"model": {k: v for k, v in state.items() if k != lost}}, tmp_path / "lacking.pth")
    options = {
        "MODEL.MASK_FORMER.NHEADS": golden.config["dec"]["nheads"],
        "MODEL.CLIP.CONFIG.text_cfg.heads": golden.config["text"]["heads"],
    }
    with pytest.raises(CheckpointError, match=r"lacks sem_seg_head\.predictor\._mask_pooling_proj\.1\.bias"):
        convert_weights(tmp_path / "lacking.pth", tmp_path / "target.safetensors", options=options)


@pytest.mark.golden(manifest="fcclip_*")
def test_full_size_maps_without_rest(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    layout = model_layout(state)
    assert layout.name == "fcclip"
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
    queries = golden.shapes["sem_seg_head.predictor.query_feat.weight"][0]
    assert options["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"] == queries
    assert options["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] == golden.shapes["criterion.empty_weight"][0] - 1
    lacking, _ = report(
        {key: value for key, value in state.items() if key != "void_embedding.weight"}
        | {"void_embedding.weight": torch.empty(2, golden.shapes["void_embedding.weight"][1], device="meta")}
    )
    assert list(lacking.mismatched) == ["classifier.void"]
    another, _ = report({**state, "sem_seg_head.predictor.other.weight": torch.empty(1, device="meta")})
    assert another.unexpected == ["head.predictor.other.weight"]
