"""Every shipped config loads, names its keys rightly, and builds a model that trains one step."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.engine.optimizer import ParamRule
from clipdense.run.setup import load_config

from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = REPOSITORY / "configs"
# Those of PlugIn have keys of the projects that they plug into: tests/e2e/test_plug_in.py.
EVERY = sorted(
    p.relative_to(REPOSITORY).as_posix()
    for p in [*ROOT.rglob("*.yaml"), *REPOSITORY.glob("projects/*/configs/*.yaml")]
    if "PlugIn" not in p.parts
)
CONFIGS = [name for name in EVERY if not Path(name).name.startswith("Base-")]
DETECTORS = [
    name.removeprefix("configs/")
    for name in CONFIGS
    if name.startswith("configs/")
    and not Path(name).name.startswith(
        ("adapt_", "clip_", "clippy_", "clipself_", "pacl_", "prompt_", "segclip_", "zero_shot_")
    )
]
UNTRAINED = [name for name in CONFIGS if Path(name).name.startswith("zero_shot_")]
PROJECTS = [name for name in CONFIGS if name.startswith("projects/")]


@pytest.mark.parametrize("name", EVERY)
def test_loads(name: str) -> None:
    cfg = load_config(str(REPOSITORY / name))
    assert cfg.INPUT.FORMAT == "RGB" or Path(name).name == "Base-CLIP.yaml" or "/clip_" in name


@pytest.mark.parametrize("name", CONFIGS)
def test_says_what_it_is(name: str) -> None:
    assert (REPOSITORY / name).read_text().startswith("# ")


@pytest.mark.parametrize("name", DETECTORS)
def test_output_folders_follow_the_names(name: str) -> None:
    """So that two configs never write into one folder."""
    cfg = load_config(str(ROOT / name))
    assert Path(cfg.OUTPUT_DIR) == Path("output", name).with_suffix("")


@pytest.mark.parametrize("name", CONFIGS)
def test_sets_no_key_twice(name: str) -> None:
    class Loader(yaml.SafeLoader):
        pass

    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, object]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct)
    yaml.load((REPOSITORY / name).read_text(), Loader)


@pytest.mark.parametrize("name", PROJECTS)
def test_full_size_models_are_built(name: str, tmp_path: Path, catalogs: None) -> None:
    device, overrides = "meta", ["MODEL.CLIP.PRETRAINED", "random", "MODEL.TIMM.PRETRAINED", "random"]
    if Path(name).stem == "eva_b16_coco_regionclip":  # the user gives its boxes and its text table
        table, device = tmp_path / "nouns.npy", "cpu"
        np.save(table, np.eye(3, 512, dtype=np.float32))
        MetadataCatalog.get("coco_nouns_train").thing_classes = ["cat", "dog", "tree"]
        overrides += ["MODEL.CLIPSELF.CONCEPTS", str(table), "MODEL.CLIPSELF.NUM_CONCEPTS", "2"]
    cfg = load_config(str(REPOSITORY / name), [*overrides, "MODEL.DEVICE", device])
    with torch.device(device):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) > 1e7
    for rule in cfg.SOLVER.PARAM_GROUPS:
        assert list(ParamRule.parse(rule).matched(model)), rule


@pytest.mark.parametrize("name", DETECTORS)
def test_takes_a_step(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path))
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.CLIP.PRETRAINED", "random", "MODEL.TIMM.PRETRAINED", "random"]
    overrides += ["MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"]
    overrides += ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "TEST.DETECTIONS_PER_IMAGE", "5"]
    cfg = load_config(str(ROOT / name), overrides)
    if cfg.MODEL.TEXT_RCNN.TABLE:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(request.getfixturevalue("data_dir")))
    model = build_model(cfg)
    assert len(cfg.MODEL.PIXEL_MEAN) == 3 and cfg.INPUT.FORMAT == "RGB"
    image = {"image": torch.randint(0, 255, (3, 128, 160), dtype=torch.uint8), "height": 128, "width": 160}
    instances = Instances((128, 160), gt_boxes=Boxes(torch.tensor([[20.0, 20, 90, 100]])))
    # the last class of the training data, which an open-vocabulary detector's labels count
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    last = len(metadata.get("thing_classes") or metadata.stuff_classes) - 1
    instances.gt_classes = torch.tensor([last])
    instances.gt_masks = BitMasks(torch.ones(1, 128, 160, dtype=torch.bool))
    segment = torch.ones(128, 160, dtype=torch.int64)
    maps = {"pan_seg": segment, "segments_info": [{"id": 1, "category_id": last}], "sem_seg": segment}
    maps["phrases"] = ["red star", "grass"]
    with EventStorage():
        losses = model([image | {"instances": instances} | maps])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    with torch.no_grad():
        assert {"instances", "panoptic_seg", "sem_seg"} & set(model.eval()([image])[0])


@pytest.mark.parametrize("name", UNTRAINED)
def test_predicts_without_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path))
    cfg = load_config(str(REPOSITORY / name), ["MODEL.CLIP.PRETRAINED", "random"])
    assert Path(cfg.OUTPUT_DIR) == Path("output", name.removeprefix("configs/")).with_suffix("")
    model = build_model(cfg).eval()
    model.set_vocabulary(Vocabulary.from_names(["red star", "sand", "grass"]))
    image = {"image": torch.randint(0, 255, (3, 128, 160), dtype=torch.uint8), "height": 64, "width": 80}
    (output,) = model([image])
    assert output["sem_seg"].shape == (3, 64, 80)
    torch.testing.assert_close(output["sem_seg"].sum(0), torch.ones(64, 80))
    assert torch.equal(output["sem_seg_labels"], output["sem_seg"].argmax(0))
