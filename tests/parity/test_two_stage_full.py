"""OVSeg and ZegFormer: each recorded number of the model that a published file is converted to."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import model_layout
from clipdense.clip.vocabulary import Vocabulary
from clipdense.maskformer import EmbeddingHead, MaskFormerHead
from clipdense.regions import cosine_logits
from clipdense.run.config import add_clipdense_config
from clipdense.systems.two_stage import QueryClassifier
from tests.helpers import two_stage_files as files
from tests.helpers.two_stage_files import close, far

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec


@pytest.mark.golden(kind="ovseg_full")
@torch.no_grad()
def test_ovseg(golden, tmp_path):
    c, batch = golden.config, files.samples(golden)
    model = files.converted(golden, tmp_path, files.ovseg_options(c))
    model.set_vocabulary(Vocabulary.from_names(c["class_names"], separator=None))
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    for name in ("res2", "res3", "res4", "res5"):
        close(golden, f"backbone_{name}", features[name], 1e-4)
    prediction = model.head(features)
    close(golden, "pred_embeddings", prediction.query_embeddings, 5e-4)
    close(golden, "pred_masks", prediction.mask_logits, 5e-4)
    text = model.text_embeddings()["queries"]
    masks = F.interpolate(
        prediction.mask_logits, images.tensor.shape[-2:], mode="bilinear", align_corners=False
    )
    for b, (h, w) in enumerate(images.image_sizes):
        close(golden, f"pred_logits{b}", model.classifier(prediction.query_embeddings[b], text), 5e-3)
        embeddings, valid = model.encoder(batch[b]["image"], masks[b, :, :h, :w].sigmoid())
        close(golden, f"valid{b}", valid, 0)
        no_object = torch.cat([text, model.classifier.no_object])
        close(golden, f"clip_logits{b}", cosine_logits(embeddings, no_object), 5e-3)
    outputs = model(batch)
    for b, output in enumerate(outputs):
        largest = golden.part("out")[f"sem_seg{b}"].abs().max().item()
        close(golden, f"sem_seg{b}", output["sem_seg"], 1e-3 * largest)
    model.merging = replace(model.merging, max_dense_classes=1)
    for dense, sparse in zip(outputs, model(batch), strict=True):
        assert (sparse["sem_seg_labels"] == dense["sem_seg"].argmax(0)).float().mean() > 0.999
    model.merging = replace(model.merging, max_dense_classes=0)
    model.scoring = files.other_source(model.scoring)
    largest = golden.part("out")["sem_seg0"].abs().max().item()
    assert far(golden, "sem_seg0", model(batch)[0]["sem_seg"], 1e-3 * largest)


@pytest.mark.golden(kind="zegformer_full")
@torch.no_grad()
def test_zegformer(golden, tmp_path):
    c, batch = golden.config, files.samples(golden)
    model = files.converted(golden, tmp_path, files.zegformer_options(c))
    seen = set(c["train_classes"])
    unseen = [i for i, name in enumerate(c["test_classes"]) if name not in seen]
    model.set_vocabulary(Vocabulary.from_names(c["test_classes"], novel=unseen))
    text = model.text_embeddings()
    queries, crops = text["queries"], text["crops"]
    close(golden, "text_features_test", queries, 1e-5)
    close(golden, "text_features_test_clip", crops, 1e-5)
    images = model.preprocess_image(batch)
    prediction = model.head(model.backbone(images.tensor))
    close(golden, "pred_logits", model.classifier(prediction.query_embeddings, queries), 5e-3)
    close(golden, "pred_masks", prediction.mask_logits, 5e-4)
    masks = F.interpolate(
        prediction.mask_logits, images.tensor.shape[-2:], mode="bilinear", align_corners=False
    )
    for b, sample in enumerate(batch):
        embeddings, valid = model.encoder(sample["image"], masks[b])
        assert valid.all()
        close(golden, f"clip_image_features{b}", embeddings, 1e-3)
    for b, output in enumerate(model(batch)):
        close(golden, f"sem_seg{b}", output["sem_seg"], 1e-3)
    if seen & set(c["test_classes"]):
        calibration = 0.0 if c["gzero_calibrate"] > 0 else 0.1
        model.merging = replace(model.merging, calibration=calibration)
        assert far(golden, "sem_seg0", model(batch)[0]["sem_seg"], 1e-3)
    model.scoring = files.other_source(model.scoring)
    assert far(golden, "sem_seg0", model(batch)[0]["sem_seg"], 1e-3)


@pytest.mark.golden(kind="zegformer_head")
@torch.no_grad()
def test_zegformer_head(golden):
    h, features = golden.config["head"], dict(golden.part("in"))
    text = features.pop("text_features_test")
    cfg = get_cfg()
    add_clipdense_config(cfg)
    keys = cfg.MODEL.MASK_FORMER
    keys.PIXEL_DECODER.CONV_DIM, keys.MASK_DIM, keys.HIDDEN_DIM = (
        h["conv_dim"],
        h["mask_dim"],
        h["hidden_dim"],
    )
    keys.NHEADS, keys.DIM_FEEDFORWARD = h["nheads"], h["dim_feedforward"]
    keys.NUM_OBJECT_QUERIES, keys.DEC_LAYERS = h["num_queries"], h["dec_layers"]
    shapes = {
        f"res{i}": ShapeSpec(channels=channels, stride=2**i) for i, channels in enumerate(h["in_channels"], 2)
    }
    keys.DROPOUT = 0.0
    embed = EmbeddingHead(h["hidden_dim"], 0, text.shape[1], 1)
    model = MaskFormerHead(cfg, shapes, class_embed=embed)
    classifier = QueryClassifier(text.shape[1], normalize_no_object=False)
    layout = model_layout(golden.part("state"))
    state = layout.convert(golden.part("state"))
    files.load_strict(model, files.below(state, "head."), source=golden.id)
    files.load_strict(classifier, files.below(state, "classifier."), source=golden.id)
    prediction = model.train()(features)  # so that every layer predicts
    for prefix, p in [("", prediction), *((f"aux{i}/", p) for i, p in enumerate(prediction.aux))]:
        close(golden, f"{prefix}pred_masks", p.mask_logits, 1e-4)
        close(golden, f"{prefix}pred_logits", classifier(p.query_embeddings, text), 1e-3)
    classifier.normalize_no_object = True
    assert far(golden, "pred_logits", classifier(prediction.query_embeddings, text), 1e-3)
