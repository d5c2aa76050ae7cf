"""CLIP's and DenseCLIP's backbones inside Detectron2's own projects and a LazyConfig: projects/PlugIn."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from clipdense.backbone import CLIPTrunk, LanguageTrunk, SimpleFeaturePyramid
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "projects" / "PlugIn"
BASES = {
    "point_rend": "GeneralizedRCNN",
    "deeplab": "SemanticSegmentor",
    "panoptic_deeplab": "PanopticDeepLab",
}
# 80 is not a multiple of 32, so that images are padded.
SMALL = """
INPUT: {MIN_SIZE_TRAIN: [80], MAX_SIZE_TRAIN: 80, MIN_SIZE_TEST: 80, MAX_SIZE_TEST: 80}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2, WARMUP_ITERS: 0}
TEST: {DETECTIONS_PER_IMAGE: 5}
MODEL:
  ROI_HEADS: {SCORE_THRESH_TEST: 0.0}
  POINT_HEAD: {SUBDIVISION_STEPS: 3}
"""
VIT = """
MODEL:
  CLIP: {NAME: shapes-vit}
  BACKBONE: {NAME: build_trunk_simple_pyramid_backbone}
  SIMPLE_PYRAMID: {SCALE_FACTORS: [2.0, 1.0, 0.5, 0.25]}
"""

pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What projects/PlugIn/train_net.py defines."""
    for project in ("point_rend", "panoptic_deeplab"):
        pytest.importorskip(f"detectron2.projects.{project}", reason="this detectron2 has no projects")
    return runpy.run_path(str(FOLDER / "train_net.py"))


@pytest.fixture
def config(script: dict[str, Any], tmp_path: Path) -> Callable[..., CfgNode]:
    """``config(project, yaml, ...)``: the project's config, made small, and changed by pieces of YAML."""

    def make(project: str, *pieces: str) -> CfgNode:
        cfg = get_cfg()
        script["add_pointrend_config"](cfg)
        script["add_panoptic_deeplab_config"](cfg)
        add_clipdense_config(cfg)
        cfg.merge_from_file(str(FOLDER / "configs" / f"{project}.yaml"))
        for piece in (SMALL, *pieces):
            cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(piece)))
        cfg.OUTPUT_DIR = str(tmp_path / "run")
        return cfg

    return make


def check_training(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """One step without the auxiliary loss, three with it if the model has it."""
    model.train()
    base = getattr(model, "base", model)
    assert "loss_pixel_text" not in take_step(base, optimizer, batch)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    if base is model:
        assert not any(isinstance(module, LanguageTrunk) for module in model.modules())
        assert take_step(model, optimizer, batch)["total"] > 0
        return
    learned = ("context_decoder.out_proj.1.weight", "gamma", "text.prompts.contexts")
    parameters = [p for n, p in model.named_parameters() if n.endswith(learned)]
    assert len(parameters) == 3 and all(p.grad.abs().sum() > 0 for p in parameters)
    before = [p.grad.clone() for p in parameters]
    steps = [take_step(model, optimizer, batch) for _ in range(3)]
    assert not any(torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))
    for name in ("loss_pixel_text", "total"):
        assert min(losses[name] for losses in steps[1:]) < steps[0][name], steps


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> dict[str, float]:
    """The losses, which must be finite, and their "total"."""
    with EventStorage():
        losses = model(batch)
    losses["total"] = torch.stack(list(losses.values())).sum()
    assert losses["total"].isfinite(), losses
    optimizer.zero_grad()
    losses["total"].backward()
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def detect(model: nn.Module, image: torch.Tensor) -> Any:
    """Outputs for an image of 75 x 50 pixels, wanted at 150 x 100."""
    with torch.no_grad():
        return model.eval()([{"image": image[:, :75, :50], "height": 150, "width": 100}])[0]


def check_outputs(project: str, outputs: dict[str, Any]) -> None:
    if project == "point_rend":
        found = outputs["instances"]
        assert 0 < len(found) <= 5 and found.pred_masks.shape[1:] == (150, 100)
    else:
        assert outputs["sem_seg"].shape == (88, 150, 100) and outputs["sem_seg"].isfinite().all()
    if project == "panoptic_deeplab":
        labels, segments = outputs["panoptic_seg"]
        assert labels.shape == (150, 100) and segments is None
        assert labels.max() < 88_000


@pytest.mark.parametrize("language", [False, True], ids=["clip", "denseclip"])
@pytest.mark.parametrize("tower", ["resnet", "vit"])
@pytest.mark.parametrize("project", list(BASES))
def test_trains_in_a_project(
    project: str, tower: str, language: bool, config: Callable[..., CfgNode], script: dict[str, Any]
) -> None:
    pieces = [VIT] if tower == "vit" else []
    if project == "panoptic_deeplab" and tower == "vit":  # its trunk has one map, hence a pyramid
        maps = "{IN_FEATURES: [p2, p3, p4, p5], PROJECT_FEATURES: [p2, p3, p4], PROJECT_CHANNELS: [8, 8, 8]}"
        pieces.append(
            f"MODEL: {{SEM_SEG_HEAD: {maps}, INS_EMBED_HEAD: {maps}, TRUNK: {{NAME: LanguageTrunk}}}}"
        )
    if not language:
        node = "BACKBONE" if project == "panoptic_deeplab" and tower == "resnet" else "TRUNK"
        pieces.append(f"MODEL: {{META_ARCHITECTURE: {BASES[project]}, {node}: {{NAME: CLIPTrunk}}}}")
    model = check(config(project, *pieces), project, script["Trainer"])
    assert any(isinstance(module, LanguageTrunk) for module in model.modules()) == language


def test_deeplab_reads_the_trunk_itself(config: Callable[..., CfgNode], script: dict[str, Any]) -> None:
    """Without a pyramid, as it reads Detectron2's ResNet."""
    maps = "{IN_FEATURES: [res2, res5], PROJECT_FEATURES: [res2], PROJECT_CHANNELS: [8]}"
    cfg = config("deeplab", f"MODEL: {{BACKBONE: {{NAME: LanguageTrunk}}, SEM_SEG_HEAD: {maps}}}")
    model = check(cfg, "deeplab", script["Trainer"])
    assert type(model.base.backbone) is LanguageTrunk


def check(cfg: CfgNode, project: str, trainer: Any) -> Any:
    """Check training and outputs of a project's model; return the model."""
    seed_all_rng(0)
    model = build_model(cfg)
    batch = next(iter(trainer.build_train_loader(cfg)))
    check_training(model, trainer.build_optimizer(cfg, model), batch)
    check_outputs(project, detect(model, batch[0]["image"]))
    return model


# ---- LazyConfig
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lazy() -> Any:
    cfg = LazyConfig.load(str(FOLDER / "configs" / "mask_rcnn.py"))
    cfg.dataloader.train.total_batch_size = 2
    cfg.dataloader.train.mapper.augmentations = [L(T.Resize)(shape=(80, 80))]
    cfg.model.base.roi_heads.box_predictor.test_score_thresh = 0.0
    return cfg


def check_lazy(cfg: Any) -> nn.Module:
    """Check training and outputs of the model of a LazyConfig; return the model."""
    seed_all_rng(0)
    model = instantiate(cfg.model)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    check_training(model, optimizer, batch)
    found = detect(model, batch[0]["image"])["instances"]
    assert 0 < len(found) <= 30 and found.pred_masks.shape[1:] == (150, 100)
    return model


@pytest.mark.parametrize("language", [False, True], ids=["clip", "denseclip"])
@pytest.mark.parametrize("tower", ["resnet", "vit"])
def test_trains_from_a_lazy_config(tower: str, language: bool, lazy: Any) -> None:
    backbone = lazy.model.base.backbone
    trunk = backbone.bottom_up
    if tower == "vit":
        for clip in (trunk.trunk.tower, trunk.text.clip):
            clip.model = "shapes-vit"
    if not language:
        trunk = L(CLIPTrunk)(tower=trunk.trunk.tower)
    backbone.bottom_up = trunk
    if tower == "vit":
        lazy.model.base.backbone = L(SimpleFeaturePyramid)(
            trunk=trunk, in_feature="res3", out_channels=96, scale_factors=(1.0, 0.5, 0.25), top_block=""
        )
    if not language:
        lazy.model = lazy.model.base
    model = check_lazy(lazy)
    assert any(isinstance(module, LanguageTrunk) for module in model.modules()) == language


def test_detectron2s_vitdet_is_scored(lazy: Any) -> None:
    """Its ViT, which has no projection into a text's space, gets an attention pool."""
    vit = pytest.importorskip(
        "detectron2.modeling.backbone.vit", reason="this detectron2 (0.6) has no backbone/vit.py"
    )
    trunk = lazy.model.base.backbone.bottom_up
    trunk.trunk = L(vit.ViT)(
        img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, window_size=2, use_rel_pos=True
    )
    lazy.model.base.backbone = L(SimpleFeaturePyramid)(
        trunk=trunk, in_feature="last_feat", out_channels=96, scale_factors=(2.0, 1.0, 0.5), top_block=""
    )
    model = check_lazy(lazy)
    assert any(type(module) is vit.ViT for module in model.modules())


# ---- the README
# ---------------------------------------------------------------------------------------------------------


def commands(start: str) -> list[list[str]]:
    """The README's commands that start so, as words."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(f"python {start}")]


@pytest.mark.parametrize("project", list(BASES))
def test_commands_of_the_readme(
    project: str, script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but short: trained by Detectron2's own trainer, evaluated."""
    (words,) = (w[2:] for w in commands("projects/PlugIn/train_net.py") if w[3].endswith(f"/{project}.yaml"))
    monkeypatch.chdir(ROOT)
    opts = {"OUTPUT_DIR": str(tmp_path), **flat(yaml.safe_load(SMALL))}
    words += [str(word) for item in opts.items() for word in item]
    parse = default_argument_parser().parse_args
    script["main"](parse(words))
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert "loss_pixel_text" in rows[0]
    results = script["main"](
        parse(["--eval-only", *words, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")])
    )
    task, metric = {
        "point_rend": ("segm", "AP"),
        "deeplab": ("sem_seg", "mIoU"),
        "panoptic_deeplab": ("panoptic_seg", "PQ"),
    }[project]
    assert 0 <= results[task][metric] < 100


def test_the_lazy_command_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = (w[2:] for w in commands("tools/train_net.py"))
    monkeypatch.chdir(ROOT)
    words += [f"train.output_dir={tmp_path}", "train.max_iter=2", "dataloader.train.total_batch_size=2"]
    main = runpy.run_path("tools/train_net.py")["main"]
    results = main(default_argument_parser().parse_args(words))
    assert {"bbox/AP", "segm/AP"} <= set(results)


def test_the_readme_shows_what_the_configs_say(config: Callable[..., CfgNode]) -> None:
    """Each block of YAML under a project's heading is part of its config."""
    sections = (FOLDER / "README.md").read_text().split("\n## ")
    shown = dict.fromkeys(BASES, 0)
    for project in BASES:
        (section,) = (s for s in sections if f"configs/{project}.yaml" in s)
        whole = flat(config(project))
        for block in section.split("```yaml\n")[1:]:
            for key, value in flat(yaml.safe_load(block.split("```")[0])).items():
                shown[project] += 1
                assert whole[key] == value, key
    assert all(shown.values())


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# ---- keys
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("project_first", [True, False])
def test_a_projects_keys_stay(project_first: bool) -> None:
    project = pytest.importorskip(
        "detectron2.projects.panoptic_deeplab", reason="this detectron2 has no projects"
    )
    cfg = get_cfg()
    adders = [project.add_panoptic_deeplab_config, add_clipdense_config]
    for add in adders if project_first else adders[::-1]:
        add(cfg)
    assert cfg.SOLVER.OPTIMIZER == "ADAM"  # clipdense's default is SGD
    assert cfg.MODEL.INS_EMBED_HEAD.CONVS_DIM == 128 and cfg.MODEL.CLIP.NAME == "shapes-rn"


def test_a_node_of_the_same_name_is_shared() -> None:
    cfg = get_cfg()
    cfg.MODEL.TIMM = CfgNode({"BASE_NAME": "resnet50"})
    add_clipdense_config(cfg)
    assert cfg.MODEL.TIMM.BASE_NAME == "resnet50" and cfg.MODEL.TIMM.PRETRAINED == ""


# ---- Detectron2's scripts
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_with_clipdense_says_how_it_is_used(words: list[str]) -> None:
    command = [sys.executable, str(FOLDER / "with_clipdense.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) == bool(words)
    assert "usage: " in (done.stdout if words else done.stderr) and "Traceback" not in done.stderr
