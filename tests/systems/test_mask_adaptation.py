"""Adaptation of CLIP to masked crops: its input, its trained parameters and its export."""

import copy
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import load_mask_prompts
from clipdense.clip.model import pixel_statistics
from clipdense.data.mask_pairs import write_pairs
from clipdense.engine.optimizer import build_optimizer
from clipdense.evaluation import model_probes
from clipdense.regions import CropRule, crop_masks
from clipdense.run.config import add_clipdense_config
from clipdense.run.setup import load_config
from clipdense.systems.mask_adaptation import MaskAdaptedCLIP, MaskPairMapper

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
PIXELS = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}


def config(*settings: Any) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "MaskAdaptedCLIP", "cpu"
    cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.PRETRAINED = "shapes-vit", "random"
    cfg.INPUT.MASK_PAIRS.SIZE = 64
    cfg.merge_from_list([str(value) if isinstance(value, Path) else value for value in settings])
    return cfg


def prompted(trainable: str, *settings: Any) -> CfgNode:
    depth = ("MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH", 2)
    return config(*depth, "MODEL.MASK_ADAPTED_CLIP.TRAINABLE", trainable, *settings)


def model(cfg: CfgNode) -> MaskAdaptedCLIP:
    torch.manual_seed(0)
    return build_model(cfg)


def batch(count: int = 4) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, 1, 64, 64)
    masks[:, :, 8:40, :24] = 1
    return [
        {"region": torch.randn(3, 64, 64, generator=random), "region_mask": mask, "noun": f"noun {i}"}
        for i, mask in enumerate(masks)
    ]


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    """An L in noise, whose box is 20 x 20."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[5:25, 10:16] = mask[19:25, 10:30] = 1
    code = mask_util.encode(mask)
    return {
        "file_name": str(tmp_path / "0.png"),
        "image_id": 3,
        "height": 40,
        "width": 60,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        "noun": "red kite",
    }


def whole(**settings: Any) -> MaskPairMapper:
    """A mapper whose random crop is the whole of a square region."""
    return MaskPairMapper(
        rule=CropRule(0.4, **settings), size=64, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **PIXELS
    )


def read(pair: dict[str, Any]) -> tuple[Tensor, Tensor]:
    image = torch.from_numpy(np.array(Image.open(pair["file_name"]))).permute(2, 0, 1)
    return image, torch.from_numpy(mask_util.decode(pair["segmentation"])).bool()


def test_training_sees_what_inference_sees(pair: dict[str, Any]) -> None:
    image, mask = read(pair)
    for settings in ({}, {"masked": False}, {"fill": "zero"}, {"expand": 1.5}):
        sample = whole(**settings)(pair)
        crops = crop_masks(image, mask[None], CropRule(0.4, **settings), size=64, **PIXELS)
        assert torch.equal(sample["region"], crops.regions()[0])
        assert torch.equal(sample["region_mask"], crops.region_masks()[0])
    assert sample["noun"] == "red kite" and sample["image_id"] == 3
    # the mask is the pair's, not what looks like background
    Image.new("RGB", (60, 40), (128, 102, 76)).save(pair["file_name"])
    plain = whole()(pair)
    assert plain["region_mask"].mean() == pytest.approx(204 / 400, abs=0.02)


def test_random_crops_move_image_and_mask_alike(pair: dict[str, Any]) -> None:
    _, mask = read(pair)
    Image.fromarray(np.where(mask[..., None], 255, 0).repeat(3, 2).astype(np.uint8)).save(pair["file_name"])
    mapper = MaskPairMapper(rule=CropRule(0.4, masked=False), size=64, pixel_std=(1.0, 1.0, 1.0))
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        sample = mapper(pair)
        inside = sample["region"][0] > 0.5
        assert (inside == sample["region_mask"][0].bool()).float().mean() > 0.95
        found.append(sample["region_mask"])
        torch.manual_seed(seed)  # torch's randomness decides
        assert torch.equal(mapper(pair)["region"], sample["region"])
    assert len({tuple(mask.flatten().tolist()) for mask in found}) > 1


def test_a_crop_never_loses_all_of_the_mask() -> None:
    mask = torch.zeros(10, 100, dtype=torch.bool)
    mask[:, :3] = mask[:, -3:] = True  # a crop of ratio 4/3 takes the middle
    image = torch.zeros(3, 10, 100, dtype=torch.uint8)
    mapper = MaskPairMapper(rule=CropRule(0.4), size=64)
    assert mapper.crop(image, mask)[1].any()


def test_errors_of_pairs_name_them(pair: dict[str, Any]) -> None:
    empty = mask_util.encode(np.zeros((40, 60), np.uint8, order="F"))
    with pytest.raises(ValueError, match=r"0\.png: the mask of 'red kite' is empty"):
        whole()(pair | {"segmentation": empty})
    other = mask_util.encode(np.ones((40, 50), np.uint8, order="F"))
    with pytest.raises(ValueError, match=r"'red kite' has size \(40, 50\), the image \(40, 60\)"):
        whole()(pair | {"segmentation": other})
    evaluated = MaskPairMapper(False, rule=CropRule())(pair)
    assert evaluated.keys() == {"file_name", "image_id", "image"} and evaluated["image"].shape == (3, 40, 60)
    Path(pair["file_name"]).write_bytes(b"no png")
    with pytest.raises(OSError, match=r"0\.png"):
        whole()(pair)
    assert MaskPairMapper(rule=CropRule(), skip_bad_images=True)(pair) is None


def test_pixel_statistics_are_the_clips(tmp_path: Path) -> None:
    clip = load_clip("shapes-vit", "random")
    clip.save(tmp_path / "clip.safetensors")
    expected = clip.pixel_mean, clip.pixel_std
    for named in (("shapes-vit",), ("shapes-vit", "random"), (tmp_path / "clip.safetensors",)):
        assert pixel_statistics(*named) == expected
    assert pixel_statistics("ViT-B-16-quickgelu", "random")[0] == pytest.approx(
        (0.481, 0.458, 0.408), abs=1e-3
    )
    mapper = MaskPairMapper(config(), True)
    assert (mapper.pixel_mean, mapper.pixel_std) == expected


def test_the_loss_is_clips_and_equal_nouns_are_as_good_as_one_target() -> None:
    net, samples = model(config()), batch(6)
    samples[3]["noun"] = samples[0]["noun"] = "red kite"
    u = F.normalize(embeddings(net, 6), dim=1)
    v = net._bank.embed_names([sample["noun"] for sample in samples])
    logits = net.encoder.clip.logit_scale.exp() * u @ v.T
    published = sum(F.cross_entropy(x, torch.arange(6)) for x in (logits, logits.T)) / 2
    targets = torch.eye(6)
    targets[0, 3] = targets[3, 0] = 1
    targets /= targets.sum(1, keepdim=True)
    shared = sum(F.cross_entropy(x, targets) for x in (logits, logits.T)) / 2
    loss = net(samples)["loss_contrastive"]
    torch.testing.assert_close(loss, published)
    torch.testing.assert_close(loss, shared)
    # what would differ: the noun once
    once = F.cross_entropy(logits[:, [0, 1, 2, 4, 5]], torch.tensor([0, 1, 2, 0, 3, 4]))
    assert not torch.isclose(F.cross_entropy(logits, torch.arange(6)), once)


PARTS = {"image": "encoder.clip.visual.", "prompts": "encoder.mask_prompts."}


@pytest.mark.parametrize("trainable", ["image", "prompts", "both"])
def test_only_what_is_asked_is_trained(trainable: str) -> None:
    cfg = prompted(trainable)
    net = model(cfg)
    before = copy.deepcopy(net.state_dict())
    optimizer = build_optimizer(cfg, net)
    for _ in range(2):
        optimizer.zero_grad()
        net(batch())["loss_contrastive"].backward()
        optimizer.step()
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    for part, prefix in PARTS.items():
        keys = {key for key in before if key.startswith(prefix)}
        assert changed & keys == (keys if trainable in (part, "both") else set()), part
    assert "encoder.clip.logit_scale" in changed
    assert not any(key.startswith("encoder.clip.text.") for key in changed)
    assert not any(module.training for module in net.encoder.clip.text.modules())
    unused = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_prompts_are_seen_only_outside_masks() -> None:
    net = model(prompted("prompts"))
    samples = batch()
    with torch.no_grad():
        loss = net(samples)["loss_contrastive"]
        net.encoder.mask_prompts.prompts.normal_()
        assert not torch.isclose(net(samples)["loss_contrastive"], loss)
        full = [sample | {"region_mask": torch.ones(1, 64, 64)} for sample in samples]
        loss = net(full)["loss_contrastive"]
        net.encoder.mask_prompts.prompts.normal_()
        assert torch.equal(net(full)["loss_contrastive"], loss)


def test_temperature_stays_in_range() -> None:
    net = model(config("MODEL.MASK_ADAPTED_CLIP.MAX_LOGIT_SCALE", 50.0))
    for value, kept in ((9.0, np.log(50)), (-1.0, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(net.encoder.clip.logit_scale, value)
        net(batch())
        assert net.encoder.clip.logit_scale.item() == pytest.approx(kept)


def test_wrong_settings_are_refused() -> None:
    for settings, message in (
        (
            ("MODEL.MASK_ADAPTED_CLIP.TRAINABLE", "text"),
            "TRAINABLE 'text' is not one of image, prompts, both",
        ),
        (("MODEL.MASK_ADAPTED_CLIP.TRAINABLE", "prompts"), r"needs mask prompts: set .*DEPTH"),
        (("INPUT.MASK_PAIRS.SIZE", 224), "SIZE 224: 'shapes-vit' takes crops of 64"),
        (("MODEL.CLIP.POSITION_GRID", 4), "POSITION_GRID"),
        (
            ("MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH", 2),
            r"no effect .*set MODEL\.MASK_ADAPTED_CLIP\.MASK_PROMPTS",
        ),
        (("MODEL.TWO_STAGE.CROP.FILL", "zero"), r"no effect .*set MODEL\.MASK_ADAPTED_CLIP\.CROP"),
        (
            ("MODEL.CLIP.NAME", "shapes-rn", "INPUT.MASK_PAIRS.SIZE", 128)
            + ("MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH", 1),
            "mask prompts",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(config(*settings))
    unused = ("MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.ENABLED", False)
    with pytest.raises(ValueError, match="with ENABLED True"):
        build_model(prompted("both", *unused))


def embeddings(net: MaskAdaptedCLIP, count: int = 4) -> Tensor:
    samples = batch(count)
    regions, masks = (torch.stack([sample[key] for sample in samples]) for key in ("region", "region_mask"))
    with torch.no_grad():
        return net.encoder.encode(regions, masks)


def trained(cfg: CfgNode, path: Path) -> MaskAdaptedCLIP:
    """One large step, then an export."""
    from clipdense.engine.report import export

    net = model(cfg)
    cfg.SOLVER.BASE_LR = 0.1
    optimizer = build_optimizer(cfg, net)
    net(batch())["loss_contrastive"].backward()
    optimizer.step()
    export(net, path)
    return net.eval()


def test_the_exported_file_is_the_model(tmp_path: Path) -> None:
    net = trained(prompted("both"), tmp_path / "both.safetensors")
    clip, prompts = load_clip(tmp_path / "both.safetensors"), load_mask_prompts(tmp_path / "both.safetensors")
    assert prompts is not None and prompts.prompts.shape == (2, 64, 128)
    regions, masks = (torch.stack([sample[key] for sample in batch()]) for key in ("region", "region_mask"))
    with torch.no_grad():
        torch.testing.assert_close(prompts(clip.visual, regions, masks), embeddings(net))
        assert not torch.allclose(clip.encode_image(regions), embeddings(net), atol=1e-3)
    torch.testing.assert_close(clip.logit_scale, net.encoder.clip.logit_scale)
    plain = load_clip("shapes-vit", "random")
    plain.save(tmp_path / "plain.safetensors")
    assert load_mask_prompts(tmp_path / "plain.safetensors") is None


def test_each_run_keeps_what_the_one_before_learned(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    start = ("MODEL.CLIP.PRETRAINED",)
    tuned = trained(config(), files[0])
    image = tuned.encoder.clip.visual.state_dict()
    prompts = trained(prompted("prompts", *start, files[0]), files[1]).encoder
    for key, value in prompts.clip.visual.state_dict().items():
        assert torch.equal(value, image[key])
    # depth 0 takes the file's prompts, which are seen but stay
    again = trained(config(*start, files[1]), files[2]).encoder
    assert again.prompted and torch.equal(again.mask_prompts.prompts, prompts.mask_prompts.prompts)
    assert not torch.equal(again.clip.visual.state_dict()["proj"], image["proj"])
    kept = load_mask_prompts(files[2])
    assert kept is not None and torch.equal(kept.prompts, prompts.mask_prompts.prompts)
    with pytest.raises(ValueError, match=r"DEPTH 3: .*1\.safetensors has mask prompts of depth 2"):
        build_model(config(*start, files[1], "MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH", 3))


def test_evaluation_gives_a_probe_of_the_encoder() -> None:
    net = model(prompted("both")).eval()
    assert net([{"file_name": "a.png"}, {"file_name": "b.png"}]) == [{}, {}]
    image, masks = torch.randint(0, 255, (3, 80, 70)), torch.zeros(2, 80, 70, dtype=torch.bool)
    masks[0, 10:40, 5:50] = True
    vectors, valid = net.encoder(image, masks)
    assert vectors.shape == (1, 128) and valid.tolist() == [True, False]
    probe = model_probes(net).regions
    assert probe is not None and torch.equal(probe.embed_masks(image, masks[:1]), vectors)


def train(*settings: object, resume: bool = False) -> None:
    name = str(ROOT / "configs" / "shapes" / "adapt_joint_gt.yaml")
    arguments = ["--config-file", name, *(["--resume"] if resume else []), *map(str, settings)]
    main = runpy.run_path(str(ROOT / "tools" / "train_net.py"))["main"]
    main(default_argument_parser().parse_args(arguments))


def test_a_run_on_a_pair_file_resumes_exactly(tmp_path: Path, pair: dict[str, Any], catalogs: None) -> None:
    write_pairs(tmp_path / "pairs.jsonl", [pair | {"noun": noun} for noun in ("kite", "tree", "red kite")])
    settings = {
        "DATASETS.MASK_PAIRS": [f"own:{tmp_path / 'pairs.jsonl'}"],
        "DATASETS.TRAIN": ["own"],
        "DATASETS.TEST": [],
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.CLIP.PRETRAINED": "random",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.WARMUP_ITERS": 0,
        "SEED": 1,
        "OUTPUT_DIR": tmp_path / "out",
    }
    words = [word for item in settings.items() for word in item]
    train(*words)
    whole = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    train(*words, resume=True)
    resumed = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    assert all(torch.equal(whole[key], value) for key, value in resumed.items())
    prompts = load_mask_prompts(tmp_path / "out" / "export.safetensors")
    assert prompts is not None and torch.equal(prompts.prompts, whole["encoder.mask_prompts.prompts"])


def test_shipped_configs_decay_what_is_published() -> None:
    """Weight decay 0.2, but none for what has fewer than two axes, and for mask prompts."""
    for name, trainable in (("ft", "image"), ("mpt", "prompts"), ("joint", "both")):
        cfg = load_config(
            str(ROOT / f"configs/shapes/adapt_{name}_gt.yaml"), ["MODEL.CLIP.PRETRAINED", "random"]
        )
        assert trainable == cfg.MODEL.MASK_ADAPTED_CLIP.TRAINABLE
        net = model(cfg)
        decays = {
            id(p): group["weight_decay"]
            for group in build_optimizer(cfg, net).param_groups
            for p in group["params"]
        }
        for key, parameter in net.named_parameters():
            if parameter.requires_grad:
                expected = 0.0 if parameter.ndim < 2 or "mask_prompts" in key else 0.2
                assert decays[id(parameter)] == expected, key
