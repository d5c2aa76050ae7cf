"""CLIPSelf and its RegionCLIP baseline: trained parameters, losses, the ensemble."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipdense.checkpoint import save_checkpoint
from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.clip.windows import dense_map
from clipdense.evaluation import CLIPProbe, model_probes
from clipdense.run.setup import load_config
from clipdense.systems.clipself import CLIPSelf, RegionCLIPBaseline
from clipdense.systems.clipself.loss import concept_loss, cosine_loss, sample_concepts

from detectron2.config import CfgNode as CN

TOWERS = ("shapes-vit", "shapes-eva", "shapes-rn")


def nano(name: str) -> ClipModel:
    torch.manual_seed(0)
    return load_clip(name, "random")


def batch(images: int = 2, side: int = 64) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[0.0, 0, 0.5, 1], [0.25, 0.25, 1, 1], [0.1, 0.2, 0.4, 0.5]])
    return [
        {
            "image": torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator),
            "boxes": boxes[: 3 - i],
            "crops": torch.randint(256, (3 - i, 3, 64, 64), dtype=torch.uint8, generator=generator),
        }
        for i in range(images)
    ]


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", TOWERS)
def test_trains_what_the_dense_map_depends_on(name: str) -> None:
    """Every parameter that is trained gets a gradient, in every process: no search for unused ones."""
    model = CLIPSelf(clip=nano(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(batch())["loss_distillation"].backward()
    assert trained(model) == {n for n, p in model.named_parameters() if p.grad is not None}
    last = {
        "shapes-vit": "transformer.resblocks.3.",
        "shapes-eva": "trunk.blocks.3.",
        "shapes-rn": "attnpool.",
    }
    last_of = {n.split(last[name])[1] for n in trained(model) if last[name] in n}
    assert any("v_proj" in n or "in_proj" in n for n in last_of)
    assert not any(n.startswith(("q_proj", "k_proj", "attn.q_", "attn.k_", "positional")) for n in last_of)
    groups = ("resblocks.", "blocks.", "layer", "attnpool.")
    assert all(n.startswith("student.visual.") and any(g in n for g in groups) for n in trained(model))
    with torch.no_grad():  # running statistics stay as well
        model(batch())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_unlocked_groups() -> None:
    model = CLIPSelf(clip=nano("shapes-vit"), unlocked_groups=1)
    assert {n.split(".")[4] for n in trained(model)} == {"3"}
    assert {n.split(".")[2] for n in trained(CLIPSelf(clip=nano("shapes-rn"), unlocked_groups=2))} == {
        "layer4",
        "attnpool",
    }
    assert trained(CLIPSelf(clip=nano("shapes-vit"), unlocked_groups=4)) == trained(
        CLIPSelf(clip=nano("shapes-vit"))
    )
    for count in (0, 5, -2):  # [-0:] would be all of them
        with pytest.raises(ValueError, match=f"UNLOCKED_GROUPS {count}: .* expected 1 to 4"):
            CLIPSelf(clip=nano("shapes-vit"), unlocked_groups=count)


def test_queries_and_keys_are_trained_if_the_loss_depends_on_them() -> None:
    value = trained(CLIPSelf(clip=nano("shapes-eva")))
    plain = trained(CLIPSelf(clip=nano("shapes-eva"), mode="plain"))
    preserving = trained(CLIPSelf(clip=nano("shapes-eva"), embedding_weight=1.0))
    more = {
        f"student.visual.trunk.blocks.3.attn.{n}" for n in ("q_proj.weight", "q_proj.bias", "k_proj.weight")
    }
    assert plain - value == preserving - value == more and value < plain


@pytest.mark.parametrize("name", TOWERS)
def test_the_loss_is_that_of_the_method(name: str) -> None:
    """At the start, the student is the teacher; the dense map pooled here by hand for a whole-cell box."""
    model = CLIPSelf(clip=nano(name), weight=2.0)
    (sample,) = batch(1)
    sample["boxes"], sample["crops"] = torch.tensor([[0.0, 0, 1, 1]]), sample["crops"][:1]
    x, crop = model.student.normalize(sample["image"][None]), model.student.normalize(sample["crops"])
    dense = F.normalize(model.teacher.visual(x, TowerRequest(dense="value")).dense, dim=1)
    cosine = F.cosine_similarity(dense.mean((2, 3)), model.teacher.encode_image(crop))
    assert float(model([sample])["loss_distillation"]) == pytest.approx(2 * float(1 - cosine), abs=1e-5)


def test_embeddings_of_crops_can_be_preserved() -> None:
    model = CLIPSelf(clip=nano("shapes-vit"), embedding_weight=0.5)
    assert float(model(batch())["loss_embedding"].detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in model.student.visual.parameters():
            p.add_(0.05 * torch.randn_like(p))
    losses = model(batch())
    crops = model.student.normalize(torch.cat([sample["crops"] for sample in batch()]))
    with torch.no_grad():
        pairs = model.student.encode_image(crops), model.teacher.encode_image(crops)
    assert float(losses["loss_embedding"]) == pytest.approx(0.5 * float(cosine_loss(*pairs)), rel=1e-4)
    assert float(losses["loss_embedding"]) > 1e-3


def test_half_precision() -> None:
    model = CLIPSelf(clip=nano("shapes-vit"))
    exact = float(model(batch())["loss_distillation"])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch())["loss_distillation"]
    half.backward()
    assert float(half) == pytest.approx(exact, abs=0.02) and half.dtype == torch.float32


def test_the_loss_of_no_regions() -> None:
    """Over processes: tests/helpers/shares.py."""
    empty = torch.zeros(0, 8)
    assert cosine_loss(empty, empty) == 0


def test_a_step_costs_no_more_than_its_parts() -> None:
    """Student forward and backward on the images, teacher forward on the crops of valid regions, no more."""
    model, samples = CLIPSelf(clip=nano("shapes-vit")), batch(2, 128)
    with FlopCounterMode(display=False) as step:
        model(samples)["loss_distillation"].backward()
    x = model.student.normalize(torch.stack([sample["image"] for sample in samples]))
    with FlopCounterMode(display=False) as parts:
        model.student.visual(x, TowerRequest(dense="value")).dense.sum().backward()
        with torch.no_grad():
            model.teacher.encode_image(model.student.normalize(torch.cat([s["crops"] for s in samples])))
    assert step.get_total_flops() <= 1.001 * parts.get_total_flops()


def test_multiscale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CLIPSelf(clip=nano("shapes-vit"), multiscale=(32, 96))
    sides = set()
    tower = type(model.student.visual)
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, x, *a: sides.add(x.shape[-1]) or forward(self, x, *a))
    for _ in range(12):
        model(batch())
    assert sides == {32, 96, 64}  # 64: the teacher's crops
    with pytest.raises(ValueError, match=r"MULTISCALE: \[60\] are not multiples of the stride 8"):
        CLIPSelf(clip=nano("shapes-vit"), multiscale=(64, 60))
    with pytest.raises(ValueError, match="IMAGE_SIZE 60 is not a multiple of the stride 8"):
        CLIPSelf(clip=nano("shapes-vit"))(batch(1, 60))


@torch.no_grad()
def move(model: CLIPSelf) -> None:
    for p in model.student.visual.parameters():
        p.add_(0.1 * torch.randn_like(p))


def test_the_ensemble_averages_the_weights() -> None:
    model = CLIPSelf(clip=nano("shapes-eva"), alpha=0.7)
    move(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    clip = model.ensemble()
    assert not clip.training and clip.text is model.student.text
    for name, value in clip.visual.named_parameters():
        a, b = before[f"student.visual.{name}"], before[f"teacher.visual.{name}"]
        torch.testing.assert_close(value, 0.7 * a + 0.3 * b)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_student_alone() -> None:
    model = CLIPSelf(clip=nano("shapes-eva"), alpha=2.0)
    move(model)
    clip, student = model.ensemble().state_dict(), model.student.state_dict()
    assert all(torch.equal(clip[k], v) for k, v in student.items())


def test_the_ensemble_is_exported(tmp_path: Path) -> None:
    model = CLIPSelf(clip=nano("shapes-eva"), alpha=0.7)
    move(model)
    image, clip = torch.randn(1, 3, 64, 64), model.ensemble()
    save_checkpoint(tmp_path / "export.safetensors", *model.export_state())
    again = load_clip(str(tmp_path / "export.safetensors"))
    tokens = again.tokenize(["a red star"])
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(image), clip.encode_image(image))
        torch.testing.assert_close(again.encode_text(tokens), clip.encode_text(tokens))
        assert not torch.allclose(model.student.encode_image(image), clip.encode_image(image), atol=1e-3)


def test_the_ensemble_is_evaluated() -> None:
    """In evaluation the model predicts nothing; its probe gives the features of the current ensemble."""
    model = CLIPSelf(clip=nano("shapes-eva"), alpha=0.7).eval()
    assert model(batch()) == [{}, {}]
    image = batch(1)[0]["image"].permute(1, 2, 0).numpy()
    probe = model_probes(model).dense
    start = CLIPProbe(model.teacher).dense_map(image, "value")
    torch.testing.assert_close(probe.dense_map(image, "value"), start)
    move(model)
    torch.testing.assert_close(probe.dense_map(image, "value"), start)
    torch.testing.assert_close(
        model_probes(model).dense.dense_map(image, "value"),
        CLIPProbe(model.ensemble()).dense_map(image, "value"),
    )
    assert not torch.allclose(model_probes(model).dense.dense_map(image, "value"), start, atol=1e-3)
    assert model_probes(model).regions is None


def test_the_exported_temperature_is_in_range() -> None:
    model = CLIPSelf(clip=nano("shapes-vit"))
    torch.nn.init.constant_(model.student.logit_scale, 9.0)
    assert float(model.ensemble().logit_scale.exp()) == pytest.approx(100, rel=1e-4)


def test_concepts_of_hand_computed_regions() -> None:
    features, embeddings = F.normalize(torch.tensor([[1.0, 0], [1, 1]]), dim=1), torch.eye(2)
    scale = torch.tensor(3.0, requires_grad=True)
    logits = 3 * features
    targets = torch.tensor([[1.0, 0], [0, 1]])
    expected = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum(1).mean()
    features.requires_grad_()
    value = concept_loss(features, torch.tensor([0, 1]), embeddings, scale)
    value.backward()
    assert float(value) == pytest.approx(float(expected), rel=1e-6) and scale.grad is None


def test_sampled_concepts() -> None:
    present = torch.tensor([7, 2, 7])
    drawn = sample_concepts(present, 20, 6)
    assert drawn[:2].tolist() == [2, 7] and len(drawn) == 6 == len(drawn.unique()) and drawn.max() < 20
    assert {tuple(sample_concepts(present, 20, 6).tolist()) for _ in range(5)} != {tuple(drawn.tolist())}
    assert sample_concepts(present, 20, 1).tolist() == [2, 7]
    assert sorted(sample_concepts(present, 8, 100).tolist()) == list(range(8))
    assert len(sample_concepts(present[:0], 8, 3)) == 3


def concept_batch() -> list[dict]:
    return [
        {"image": s["image"], "boxes": s["boxes"], "concepts": torch.tensor([4, 1, 1][: 3 - i])}
        for i, s in enumerate(batch())
    ]


@pytest.fixture
def baseline() -> RegionCLIPBaseline:
    torch.manual_seed(0)
    return RegionCLIPBaseline(
        clip=nano("shapes-vit"), concepts=torch.randn(9, 128), num_concepts=5, weight=2.0
    )


def test_the_baseline_classifies_regions(baseline: RegionCLIPBaseline) -> None:
    samples = concept_batch()
    torch.manual_seed(3)
    value = baseline(samples)["loss_concepts"]
    torch.manual_seed(3)
    concepts = torch.cat([sample["concepts"] for sample in samples])
    sampled = sample_concepts(concepts, 9, 5)
    unit = F.normalize(baseline.pool_regions(samples, "clipself"), dim=1)
    rows = torch.tensor([sampled.tolist().index(c) for c in concepts])
    scale = baseline.student.logit_scale.exp()
    expected = 2 * concept_loss(unit, rows, baseline.concepts[sampled], scale)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    value.backward()
    assert trained(baseline) == {n for n, p in baseline.named_parameters() if p.grad is not None}


def test_the_baseline_takes_images_without_regions(baseline: RegionCLIPBaseline) -> None:
    samples = [{**s, "boxes": s["boxes"][:0], "concepts": s["concepts"][:0]} for s in concept_batch()]
    loss = baseline(samples)["loss_concepts"]
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in baseline.parameters())


def test_inputs_of_the_other_method(baseline: RegionCLIPBaseline) -> None:
    with pytest.raises(ValueError, match="inputs have no concepts: set INPUT.CLIPSELF.REGIONS to concepts"):
        baseline(batch())
    with pytest.raises(ValueError, match="inputs have no crops: set INPUT.CLIPSELF.REGIONS to patches"):
        CLIPSelf(clip=nano("shapes-vit"))(concept_batch())


@pytest.fixture
def cfg() -> CN:
    cfg = load_config("configs/shapes/clipself_vit_patches.yaml")
    cfg.defrost()
    return cfg


def test_the_clip_of_the_config(cfg: CN) -> None:
    """MODEL.CLIP means the same as for trunks; what the exported file cannot store is refused."""
    cfg.MODEL.CLIP.CONFIG = CN(nano("shapes-vit").config["model_cfg"], new_allowed=True)
    cfg.MODEL.CLIP.CONFIG.vision_cfg.layers = 2
    cfg.MODEL.CLIP.PRETRAINED = "random"
    assert len(CLIPSelf(cfg).student.visual.blocks) == 2
    cfg.MODEL.CLIP.POSITION_GRID = 4
    with pytest.raises(ValueError, match="POSITION_GRID"):
        CLIPSelf(cfg)


def test_keys_of_the_other_method(cfg: CN) -> None:
    with pytest.raises(ValueError, match=r"RegionCLIPBaseline needs MODEL\.CLIPSELF\.CONCEPTS"):
        RegionCLIPBaseline(cfg)
    cfg.MODEL.CLIPSELF.CONCEPTS = "nouns.npy"
    with pytest.raises(ValueError, match="set MODEL.META_ARCHITECTURE to RegionCLIPBaseline"):
        CLIPSelf(cfg)


# ---- windowed students (not in the paper)


@pytest.mark.parametrize("name", TOWERS)
def test_windows_are_images_of_their_own(name: str) -> None:
    clip = nano(name)
    images, side = torch.randn(2, 3, 96, 128), 64
    with torch.no_grad():
        found = dense_map(clip.visual, images, "value", window=side)
        padded = F.pad(images, (0, 0, 0, 32))
        rows = []
        for y in (0, 64):
            parts = [padded[..., y : y + side, x : x + side] for x in (0, 64)]
            rows.append(torch.cat([dense_map(clip.visual, part, "value") for part in parts], dim=3))
        expected = torch.cat(rows, dim=2)[:, :, : 96 // clip.visual.stride]
        whole = dense_map(clip.visual, images, "value")
    torch.testing.assert_close(found, expected)
    assert found.shape == whole.shape
    assert (found - whole).abs().max() > 1e-3 * whole.abs().max()


def test_a_windowed_student_trains_and_is_measured_in_windows() -> None:
    whole, windowed = (CLIPSelf(clip=nano("shapes-vit"), window=window) for window in (0, 64))
    inputs = batch(side=128)
    losses = [float(model(inputs)["loss_distillation"].detach()) for model in (whole, windowed)]
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)
    windowed(inputs)["loss_distillation"].backward()
    assert trained(windowed) == {n for n, p in windowed.named_parameters() if p.grad is not None}
    image = inputs[0]["image"].permute(1, 2, 0).numpy()
    maps = [model.dense_probe().dense_map(image) for model in (whole, windowed)]
    torch.testing.assert_close(maps[1][..., :8, :8], whole.dense_probe().dense_map(image[:64, :64]))
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)
    with pytest.raises(ValueError, match="WINDOW 60 is not a multiple of the stride 8"):
        CLIPSelf(clip=nano("shapes-vit"), window=60)
