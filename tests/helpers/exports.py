"""Small models of every family that exports, and images and vocabularies of two sizes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from clipdense.clip import ClipModel
from clipdense.clip.towers import build_tower
from clipdense.engine.build import build_model
from clipdense.run.export.graph import Graph
from clipdense.run.export.runner import OnnxModel
from clipdense.run.export.write import run_eager
from clipdense.run.setup import load_config
from tests.helpers.towers import FAMILIES

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["CLASSES", "OTHER_WORDS", "WORDS", "EagerModel", "build", "picture", "tower_clip"]

ROOT = Path(__file__).parents[2]
CLASSES = ["red star", "blue star", "green ring", "grass"]
WORDS = "red star|crimson star, green ring, grass"
OTHER_WORDS = "blue star, grass|lawn|meadow, red ring, sand, snow"

_DATASET = "export_test"
_DETECTOR = ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "TEST.DETECTIONS_PER_IMAGE", 5]
_DETECTOR += ["MODEL.RPN.CONV_DIMS", [16], "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
_MASKS = ["MODEL.MASK_FORMER.HIDDEN_DIM", 32, "MODEL.MASK_FORMER.MASK_DIM", 32]
_MASKS += ["MODEL.MASK_FORMER.PIXEL_DECODER.CONV_DIM", 32, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 32]
_MASKS += ["MODEL.MASK_FORMER.NHEADS", 4, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 6]
_MASKS += ["MODEL.MASK_FORMER.DEC_LAYERS", 1, "MODEL.MASK_FORMER.PIXEL_DECODER.ENC_LAYERS", 1]
_MASKS += ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0]

_MODELS: dict[str, tuple[str, list[Any]]] = {
    "zero_shot": ("zero_shot_clearclip_eva", ["MODEL.ZERO_SHOT.WINDOW", 64, "MODEL.ZERO_SHOT.STRIDE", 48]),
    "score_map": ("denseclip_score_map_rn", []),
    "semantic_fpn": ("denseclip_semantic_fpn_vit", ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]),
    "catseg": (
        "catseg_vit",
        [
            "MODEL.CAT_SEG.TEST.WINDOWS.ENABLED",
            False,
            "MODEL.CAT_SEG.RESOLUTION",
            64,
            "MODEL.CAT_SEG.WINDOW",
            4,
        ],
    ),
    "sed": ("sed_rn", ["MODEL.CAT_SEG.TEST.WINDOWS.ENABLED", False]),
    "closed_fpn": ("semantic_fpn_clip_rn", ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4]),
    "maskformer": ("mask2former_clip_rn", [*_MASKS, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4]),
    "fcclip": ("fcclip_rn", _MASKS),
    "ovseg": ("ovseg", [*_MASKS, "MODEL.TWO_STAGE.EMBED_HIDDEN_DIM", 32]),
    "mask_rcnn": ("mask_rcnn_clip_rn", [*_DETECTOR, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001]),
    "fvlm": ("fvlm_vit", [*_DETECTOR, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001]),
}


def build(name: str, *overrides: object) -> nn.Module:
    """Build the model of a family with random weights, except those of the nano CLIPs."""
    config, keys = _MODELS[name]
    DatasetCatalog.register(_DATASET, list)
    MetadataCatalog.get(_DATASET).set(
        thing_classes=CLASSES, stuff_classes=CLASSES, thing_dataset_id_to_contiguous_id={0: 0, 1: 1, 2: 2}
    )
    options = [] if name == "zero_shot" else ["DATASETS.TRAIN", [_DATASET], "DATASETS.TEST", []]
    if name == "mask_rcnn":
        options += ["MODEL.ROI_HEADS.NUM_CLASSES", 3]  # the things among the classes
    if name == "semantic_fpn":
        options += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", len(CLASSES)]
    options += [*keys, *overrides]
    try:
        cfg = load_config(str(ROOT / f"configs/shapes/{config}.yaml"), [str(word) for word in options])
        torch.manual_seed(0)
        return build_model(cfg).eval()
    finally:
        DatasetCatalog.remove(_DATASET)
        MetadataCatalog.remove(_DATASET)


class EagerModel(OnnxModel):
    """The runner, with the module of a graph in the place of onnxruntime."""

    def __init__(self, graph: Graph, text: Path | None = None) -> None:
        self.graph, self.metadata, self.session = graph, graph.metadata, self
        self.inputs, self.outputs, self.text = set(graph.inputs()), list(graph.outputs), None
        if text is not None:
            self.set_text(text)

    def run(self, *arguments: Any) -> Any:
        """Run the file (images, size), or as its session (names, feeds)."""
        if not isinstance(arguments[0], list):
            return super().run(*arguments)
        feeds = {name: torch.as_tensor(arguments[1][name]) for name in self.graph.inputs()}
        return [result.numpy() for result in run_eager(self.graph, feeds)]


def tower_clip(family: str) -> ClipModel:
    """Wrap a tiny tower of a family in a CLIP without text tower."""
    torch.manual_seed(0)
    config = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    tower, scale = build_tower(FAMILIES[family]()), nn.Parameter(torch.tensor(3.0))
    return ClipModel(family, tower, None, scale, None, config).eval().requires_grad_(False)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Draw smooth random colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=generator).numpy()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
