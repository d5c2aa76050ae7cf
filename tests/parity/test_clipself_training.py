"""CLIPSelf's training: images, regions, losses, gradients, optimizer steps and the weight ensemble."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipdense.checkpoint import detect_layout
from clipdense.data.letterbox import crop_box, letterbox
from clipdense.engine.optimizer import build_optimizer
from clipdense.run.config import add_clipdense_config
from clipdense.systems.clipself import CLIPSelf, RegionCLIPBaseline
from clipdense.systems.clipself.loss import sample_concepts
from clipdense.systems.clipself.regions import grid_boxes, grid_pairs, patch_regions, proposal_regions
from tests.helpers.eva_files import load_golden

from detectron2.config import get_cfg

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def normalized(image) -> Tensor:
    return (torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 - MEAN) / STD


def close(value: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> bool:
    return value.shape == expected.shape and torch.allclose(value, expected, atol=atol, rtol=rtol)


@pytest.mark.golden(name="cs_letterbox")
def test_letterbox(golden):
    t, size = golden.tensors, golden.config["det_size"]
    for i in range(len(golden.config["images"])):
        image = t[f"in/image{i}"].numpy()
        student, scale = letterbox(image, size)
        assert close(normalized(student), t[f"out/student{i}"], 1e-5)
        assert scale == pytest.approx(float(t[f"out/student_scale{i}"]))
        crop = golden.config["crop_size"]
        full = t[f"out/teacher_full{i}"]
        assert close(normalized(letterbox(image, crop, centered=True)[0]), full, 1e-5)
        for box, expected in zip(t[f"in/crop_xyxy{i}"].tolist(), t[f"out/teacher_crops{i}"], strict=True):
            assert close(normalized(crop_box(image, tuple(box), crop)), expected, 1e-5)
        check_padding(image, size, t[f"out/student{i}"], centered=False)
        check_padding(image, crop, full, centered=True)


def check_padding(image, size: int, expected: Tensor, centered: bool) -> None:
    """Control: padding on the other sides gives other pixels, unless the image is nearly square."""
    other, scale = letterbox(image, size, centered=not centered)
    padding = size - round(min(image.shape[:2]) * scale)
    if padding >= 2:
        assert not close(normalized(other), expected, 1e-5)


def check_crops(golden, i: int, image, regions) -> None:
    """The stored crops of the first rows. Control: boxes that are not enlarged give other crops, if the
    pixels around the box differ."""
    size, kept = golden.config["crop_size"], golden.config["keep_crops"]
    stored = golden.part("out")[f"img{i}.teacher_crops_first{kept}"]
    for j in range(min(kept, len(regions.boxes))):
        if regions.valid[j]:
            crop = normalized(crop_box(image, tuple(regions.crops[j]), size))
            assert close(crop, stored[j], 1e-5)
            tight = normalized(crop_box(image, tuple(regions.boxes[j]), size))
            if abs(tight - crop).max() > 0.01:
                assert not close(tight, stored[j], 1e-5)


@pytest.mark.golden(name="cs_grid_templates")
def test_patches(golden):
    out, config = golden.part("out"), golden.config
    pairs = grid_pairs(config["max_split"])
    assert [list(pair) for pair in pairs] == out["pairs_M_N"].tolist()
    for rows, columns in pairs:
        template = out[f"template/{rows}x{columns}"]
        assert close(torch.from_numpy(grid_boxes(rows, columns)), template, 1e-7)
        if rows != columns:
            assert not close(torch.from_numpy(grid_boxes(columns, rows)), template, 1e-7)
    for i in range(len(config["images"])):
        image = golden.part("in")[f"image{i}"].numpy()
        size, table = image.shape[:2], out[f"img{i}.boxes"]
        assert close(normalized(letterbox(image, config["det_size"])[0]), out[f"img{i}.student"], 1e-5)
        grid = tuple(out[f"img{i}.pair"].tolist())
        count = int((table[:, 4] > 0.5).sum())
        assert len(table) == config["max_boxes"] and count == min(len(table), grid[0] * grid[1])
        every = torch.from_numpy(patch_regions(size, grid, range(grid[0] * grid[1])).boxes).float()
        cells = torch.cdist(table[:count, :4], every / max(size), p=1).argmin(1).tolist()
        assert len(set(cells)) == count
        regions = patch_regions(size, grid, cells, config["crop_scale"])
        assert close(torch.from_numpy(regions.boxes).float() / max(size), table[:count, :4], 1e-6)
        check_crops(golden, i, image, regions)


@pytest.mark.golden(name="cs_proposal_sampling")
def test_proposals(golden):
    out, config = golden.part("out"), golden.config
    for i in range(len(config["images"])):
        image = golden.part("in")[f"image{i}"].numpy()
        size, table = image.shape[:2], out[f"img{i}.boxes"]
        assert close(normalized(letterbox(image, config["det_size"])[0]), out[f"img{i}.student"], 1e-5)
        boxes = golden.part("in")[f"anns{i}_xywh"].double()[out[f"img{i}.order"][: len(table)]]
        regions = proposal_regions(boxes.numpy(), size, config.get("crop_scale", 1.5))
        drawn = torch.from_numpy(regions.boxes).float() / max(size)
        assert close(drawn, table[: len(drawn), :4], 1e-6) and not table[len(drawn) :].any()
        assert torch.equal(torch.from_numpy(regions.valid), table[: len(drawn), 4] > 0.5)
        check_crops(golden, i, image, regions)
        if not regions.valid[1:].any() and config["all_tiny"][i]:  # the corner of the image, not the boxes
            assert not close(drawn, (boxes / max(size)).float(), 1e-6)


def names(state: dict[str, Tensor]) -> dict[str, str]:
    """Map the keys of the file to names in the student."""
    marked = {key: torch.full((1,), i) for i, key in enumerate(state)}
    ours = {int(v): k for k, v in detect_layout(state, "golden").convert(marked).items()}
    return {key: f"student.{ours[i]}" for i, key in enumerate(state)}


def on_floats(model: CLIPSelf) -> CLIPSelf:
    """Switch off pixel normalisation: the stored images are normalised already."""
    model.student.pixel_mean, model.student.pixel_std = (0.0,) * 3, (1 / 255,) * 3
    return model.train()


def distill_model(golden, folder: Path) -> tuple[CLIPSelf, list[dict[str, Tensor]], dict[str, str]]:
    state, config = golden.part("state"), golden.config
    prefix = "__teacher__."
    theirs = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    own = {k: v for k, v in state.items() if not k.startswith(prefix)}
    model = CLIPSelf(
        clip=load_golden(own, config, folder / "student.safetensors"),
        mode="clipself",
        unlocked_groups=config["unlocked_groups"],
        alpha=config["alpha"],
        weight=config["cosine_weight"],
    )
    teacher = load_golden(theirs, config, folder / "teacher.safetensors").state_dict()
    model.teacher.load_state_dict({k: v for k, v in teacher.items() if not k.startswith("text.")})
    inputs = golden.part("in")
    batch = []
    for image, table, crops in zip(
        inputs["images"], inputs["normed_boxes"], inputs["image_crops"], strict=True
    ):
        valid = table[:, 4] > 0.5
        batch.append({"image": image, "boxes": table[valid, :4], "crops": crops[valid]})
    return on_floats(model), batch, names(own)


def optimizer(model: CLIPSelf, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The published settings, as projects/CLIPSelf/configs/Base-CLIPSelf.yaml has them."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BETAS, cfg.SOLVER.EPS = "AdamW", (0.9, 0.98), 1e-6
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = lr, weight_decay
    cfg.SOLVER.WEIGHT_DECAY_NORM = cfg.SOLVER.WEIGHT_DECAY_BIAS = cfg.SOLVER.WEIGHT_DECAY_VECTORS = 0.0
    return build_optimizer(cfg, model)


@pytest.mark.golden(name="cs_distill_step")
def test_distillation(golden, tmp_path):
    out = golden.part("out")
    for lr, tag in ((1e-5, "1e-5"), (1e-2, "1e-2")):
        model, batch, ours = distill_model(golden, tmp_path)
        assert close(model.student.logit_scale.exp(), out["logit_scale_exp"], 1e-5)
        (loss,) = model(batch).values()
        assert close(loss, out["loss"], 1e-6)
        loss.backward()
        parameters = dict(model.named_parameters())
        stored = {ours[k.removeprefix("grad/")]: v for k, v in out.items() if k.startswith("grad/")}
        trained = {name for name, p in parameters.items() if p.grad is not None}
        assert trained == set(stored) == {name for name, p in parameters.items() if p.requires_grad}
        for name, gradient in stored.items():
            assert close(parameters[name].grad, gradient, 1e-5, 1e-4), name
        optimizer(model, lr, golden.config["wd"]).step()
        after = {k.split("/", 1)[1]: v for k, v in out.items() if k.startswith(f"after_step_lr{tag}/")}
        assert after
        for key, value in after.items():
            certain = (stored[ours[key]].abs() > 1e-5) | (lr < 1e-3)
            assert close(parameters[ours[key]][certain], value[certain], 1e-6), key
    prefix = "ensemble_after_lr1e-2/"
    ensemble = {k.removeprefix(prefix): v for k, v in out.items() if k.startswith(prefix)}
    check_ensemble(model, ensemble, ours, stored)


def check_ensemble(model: CLIPSelf, expected, ours: dict[str, str], gradients: dict[str, Tensor]) -> None:
    """Weights of the ensemble after a step. Control: the student alone differs if it has moved."""
    ensemble, parameters = dict(model.ensemble().named_parameters()), dict(model.named_parameters())
    differing = 0
    assert expected
    for key, value in expected.items():
        name = ours[key]
        # AdamW takes full steps where the gradient is zero except for rounding
        certain = gradients[name].abs() > 1e-5 if name in gradients else torch.ones_like(value).bool()
        assert close(ensemble[name.removeprefix("student.")][certain], value[certain], 1e-6), key
        differing += not close(parameters[name][certain], value[certain], 1e-6)
    moved = any(gradients[ours[key]].abs().max() > 1e-5 for key in expected if ours[key] in gradients)
    assert differing or model.alpha >= 1 or not moved


@pytest.mark.golden(name="cs_distill_step")
def test_distillation_parts(golden, tmp_path):
    """Region features, the teacher's embeddings, and what the loss depends on."""
    model, batch, _ = distill_model(golden, tmp_path)
    out = golden.part("out")
    f = model.pool_regions(batch, "clipself_raw")
    g = model.teacher.encode_image(torch.cat([sample["crops"] for sample in batch]))
    assert close(f, out["student_roi_raw"], 1e-5)
    assert close(g, out["teacher_crop_raw"], 1e-5)
    swapped = [{**sample, "crops": sample["crops"].flip(0)} for sample in batch]
    moved = max(
        abs(a["crops"] - b["crops"]).max() for a, b in zip(swapped, batch, strict=True) if len(b["crops"])
    )
    if moved > 0.1:  # some image has two different crops
        assert not close(model(swapped)["loss_distillation"], out["loss"], 1e-6)
    model.mode = "plain"
    assert not close(model.pool_regions(batch, "clipself_raw"), out["student_roi_raw"], 1e-5)


@pytest.mark.golden(name="cs_regionclip_loss")
def test_region_concepts(golden, tmp_path):
    inputs, out, config = golden.part("in"), golden.part("out"), golden.config
    state, sampled = golden.part("state"), out["sampled_noun_ids"]
    model = RegionCLIPBaseline(
        clip=load_golden(state, config, tmp_path / "clip.safetensors"),
        mode="clipself",
        weight=config["contrast_weight"],
        concepts=inputs["noun_embeddings"],
        num_concepts=config["num_sampled"],
    )
    on_floats(model)
    images = inputs["images"].requires_grad_()
    valid = inputs["boxes"][..., 5] > 0.5
    batch = [
        {"image": image, "boxes": table[rows, :4], "concepts": table[rows, 4].long()}
        for image, table, rows in zip(images, inputs["boxes"], valid, strict=True)
    ]
    concepts = torch.cat([sample["concepts"] for sample in batch])
    check_sampling(concepts, sampled, len(inputs["noun_embeddings"]), config["num_sampled"])

    features = model.pool_regions(batch, "clipself")
    features.retain_grad()
    loss = model.weight * model.region_loss(features, concepts, sampled)
    loss.backward()
    assert close(loss, out["loss/loss_contrast"], 0.0, 1e-5)
    scale = model.student.logit_scale.exp()
    assert close(scale, out["logit_scale_exp"], 1e-5)
    assert close(features, out["box_features"], 1e-5)
    assert close(scale * features @ model.concepts[sampled].T, out["logits"], 1e-5)
    ours, parameters = names(state), dict(model.named_parameters())
    for key, expected in out.items():
        if key.startswith("grad/"):
            name = key.removeprefix("grad/")
            given = {"images": images, "box_features": features}.get(name)
            gradient = parameters[ours[name]].grad if given is None else given.grad
            assert close(gradient, expected, 1e-5, 1e-4), name

    lengths = inputs["noun_embeddings"][sampled].norm(dim=1)
    if (lengths - 1).abs().max() > 1e-3:  # control: concepts that are not normalised
        logits = scale * features @ inputs["noun_embeddings"][sampled].T
        assert not close(logits, out["logits"], 1e-5)


def check_sampling(concepts, sampled, total: int, count: int) -> None:
    """Our sample has the size of the recorded one, and the same concepts first: those of the regions."""
    drawn, found = sample_concepts(concepts, total, count), len(concepts.unique())
    assert torch.equal(drawn[:found], sampled[:found])
    assert len(drawn.unique()) == len(drawn) == len(sampled) == len(sampled.unique())
