"""`PromptedCLIP`: what learns, what it predicts for any vocabulary, and what it exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import save_checkpoint
from clipdense.clip.prompt_files import load_prompts
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.own import register_from_config
from clipdense.engine.optimizer import build_optimizer
from clipdense.run.config import add_clipdense_config
from clipdense.run.setup import load_config
from clipdense.systems.prompting import PromptedCLIP

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs/shapes").glob("prompt_*.yaml"))
METHODS = ["contexts", "cocoop", "pre_model", "icpc"]
NAMES = ["red star", "blue ring", "green moon"]


def config(*settings: Any) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "PromptedCLIP", "MODEL.DEVICE", "cpu", "MODEL.CLIP.NAME", "shapes-vit"]
        + ["MODEL.CLIP.PRETRAINED", "random", "MODEL.PROMPT.N_CONTEXTS", 2, *settings]
    )
    return cfg


def model(*settings: Any) -> PromptedCLIP:
    torch.manual_seed(0)
    built = build_model(config(*settings))
    built.init_vocabulary(Vocabulary.from_names(NAMES))
    return built


def batch(count: int = 3) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=random)
    return [{"image": image, "label": i % len(NAMES)} for i, image in enumerate(images)]


@pytest.mark.parametrize("visual", [0, 2])
@pytest.mark.parametrize("method", ["", *METHODS])
def test_only_prompts_learn(method: str, visual: int) -> None:
    built = model("MODEL.PROMPT.METHOD", method, "MODEL.PROMPT.VISUAL.N_TOKENS", visual)
    built.train()
    if not method and not visual:
        with pytest.raises(ValueError, match="nothing to train: set MODEL.PROMPT.METHOD"):
            built(batch())
        with pytest.raises(ValueError, match="no prompts to export"):
            built.export_state()
        return
    before = {name: value.clone() for name, value in built.state_dict().items()}
    cfg = config("SOLVER.BASE_LR", 0.1)
    optimizer = build_optimizer(cfg, built)
    losses = built(batch())
    assert set(losses) == {"loss_cls"}
    losses["loss_cls"].backward()
    optimizer.step()
    changed = {n for n, value in built.state_dict().items() if not torch.equal(value, before[n])}
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    assert changed == trained and all(n.startswith(("prompts.", "visual_prompts.")) for n in trained)
    assert not any(module.training for module in built.clip.modules())


@torch.no_grad()
def test_scores_are_scaled_cosines() -> None:
    """Templates alone: CLIP's zero-shot classifier."""
    built = model("MODEL.PROMPTED_CLIP.TEMPLATES", "a picture of {}").eval()
    clip = built.clip
    images = clip.normalize(torch.stack([x["image"] for x in batch()]).float())
    text = TextBank(clip, "a picture of {}", cache_dir=None)(NAMES)
    expected = clip.logit_scale.exp() * F.normalize(clip.encode_image(images), dim=1) @ text.T
    torch.testing.assert_close(torch.stack([x["class_scores"] for x in built(batch())]), expected)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_training_and_evaluation_agree(method: str) -> None:
    """The loss is the cross-entropy of the scores; any vocabulary can be set, in any order."""
    built = model("MODEL.PROMPT.METHOD", method, "MODEL.PROMPT.PRE_MODEL.DROPOUT", 0.0)
    images = batch()
    loss = built.train()(images)["loss_cls"]
    scores = torch.stack([x["class_scores"] for x in built.eval()(images)])
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.tensor([0, 1, 2])))
    built.set_vocabulary(Vocabulary.from_names([NAMES[2], "purple heart", NAMES[0]]))
    other = torch.stack([x["class_scores"] for x in built(images)])
    torch.testing.assert_close(other[:, [2, 0]], scores[:, [0, 2]], atol=1e-4, rtol=1e-4)


def test_evaluation_after_a_step_uses_the_new_contexts() -> None:
    built = model("MODEL.PROMPT.METHOD", "contexts").eval()
    with torch.no_grad():
        before = built(batch())[0]["class_scores"]
        built.train()
        built.prompts.contexts.mul_(-3)
        assert not torch.allclose(built.eval()(batch())[0]["class_scores"], before)


@torch.no_grad()
def test_class_specific_contexts_know_their_classes() -> None:
    built = model()
    cfg = config("MODEL.PROMPT.METHOD", "contexts", "MODEL.PROMPT.CLASS_SPECIFIC", True)
    cfg.DATASETS.TRAIN = ("shapes_closed_mini_train",)
    built = build_model(cfg).eval()
    assert built.prompts.contexts.shape[0] == len(built.prompts.classes) == 80
    assert built(batch())[0]["class_scores"].shape == (80,)
    with pytest.raises(ValueError, match="know the 80 classes"):
        built.set_vocabulary(Vocabulary.from_names(["zebra"]))
    cfg.DATASETS.TEST = ("shapes_closed_mini_val",)
    build_model(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_ov_mini_train",), ("shapes_ov_mini_val",)
    with pytest.raises(ValueError, match="know the 60 classes that they were trained on, not 'red star'"):
        build_model(cfg)  # not after the training


def test_alignment_adds_a_loss() -> None:
    losses = model("MODEL.PROMPT.METHOD", "icpc", "MODEL.PROMPTED_CLIP.ALIGNMENT_WEIGHT", 0.5).train()(
        batch()
    )
    assert set(losses) == {"loss_cls", "loss_alignment"} and losses["loss_alignment"] > 0


@torch.no_grad()
def test_pre_model_prompting_reads_the_map() -> None:
    built = model("MODEL.PROMPT.METHOD", "pre_model")
    assert built.request.dense == "plain" and model("MODEL.PROMPT.METHOD", "cocoop").request.dense is None
    with pytest.raises(ValueError, match="DENSE 'nothing'"):
        model("MODEL.PROMPT.METHOD", "pre_model", "MODEL.PROMPTED_CLIP.DENSE", "nothing")


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_exports_are_small_and_restore_the_prompts(method: str, tmp_path: Path) -> None:
    keys = (
        "MODEL.PROMPT.METHOD",
        method,
        "MODEL.PROMPT.VISUAL.N_TOKENS",
        2,
        "MODEL.PROMPT.VISUAL.DEEP",
        True,
    )
    built = model(*keys).eval()
    path = tmp_path / "export.safetensors"
    save_checkpoint(path, *built.export_state())
    assert load_prompts(path).clip == "shapes-vit"
    assert not any("clip" in name for name, _ in load_prompts(path).text.named_parameters())
    again = model("MODEL.PROMPT.WEIGHTS", str(path)).eval()
    for a, b in zip(again(batch()), built(batch()), strict=True):
        torch.testing.assert_close(a["class_scores"], b["class_scores"])


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_take_a_step(name: str, catalogs: None) -> None:
    cfg = load_config(str(ROOT / "configs/shapes" / name), ["MODEL.CLIP.PRETRAINED", "random"])
    register_from_config(cfg)
    assert Path(cfg.OUTPUT_DIR).name == Path(name).stem
    built = build_model(cfg).train()
    assert len(built.label_vocabulary) == 60
    if name == "prompt_templates.yaml":
        assert not any(p.requires_grad for p in built.parameters())
    else:
        sum(built(batch()).values()).backward()
        assert all(p.grad is not None for p in built.parameters() if p.requires_grad)
    assert built.eval()(batch())[0]["class_scores"].shape == (60,)
