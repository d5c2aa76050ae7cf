"""CAT-Seg: towers, fine-tuning, views, vocabularies that change, early rejection, chunks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.run.predictor import Predictor
from clipdense.run.setup import load_config
from clipdense.systems.catseg import AggregationSettings, CostAggregator, WindowSettings
from clipdense.systems.catseg.aggregation import ClassAggregation, SpatialAggregation
from clipdense.systems.catseg.cost import ABSENT_LOGIT, keep_top_classes
from clipdense.systems.catseg.loss import class_map_loss
from clipdense.systems.catseg.views import merge_windows, square_view, window_views

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).parents[2]
CLASSES, NOVEL = ["red star", "blue star", "green ring", "red ring"], ["green ring"]


@pytest.fixture(scope="module")
def dataset() -> str:
    name = "catseg_test"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(stuff_classes=CLASSES, novel_classes=NOVEL)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def model(dataset: str):
    """Build a model of a nano tower: ``model("vit", KEY, VALUE, ...)``."""

    def build(tower: str = "vit", *overrides: object):
        resolution = 192 if tower == "rn" else 64
        keys = ["DATASETS.TRAIN", [dataset], "DATASETS.TEST", [], "MODEL.CAT_SEG.RESOLUTION", resolution]
        keys += ["MODEL.CAT_SEG.WINDOW", 4, "MODEL.CAT_SEG.TEST.WINDOWS.IMAGE_SIZE", 96]
        keys += ["MODEL.CAT_SEG.TEST.WINDOWS.SIZE", 64, "MODEL.CAT_SEG.TEST.WINDOWS.STRIDE", 32]
        options = [str(x) for x in [*keys, *overrides]]
        cfg: CfgNode = load_config(str(ROOT / f"configs/shapes/catseg_{tower}.yaml"), options)
        torch.manual_seed(0)
        model = build_model(cfg)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # padding tokens start at zero
            for parameter in model.aggregator.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return model

    return build


def batch(training: bool = True) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    samples: list[dict[str, object]] = []
    for height, width in ((80, 112), (96, 72)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 4, (height, width), generator=generator)
        labels[:20] = 255
        samples.append({"image": image} | ({"sem_seg": labels} if training else {}))
    return samples


@pytest.mark.parametrize("tower", ["vit", "eva", "rn"])
def test_every_trainable_parameter_learns(model, tower: str) -> None:
    segmentor = model(tower).train()
    losses = segmentor(batch())
    assert set(losses) == {"loss_sem_seg"} | {f"loss_rejection_{i}" for i in range(3 * (tower == "eva"))}
    sum(losses.values()).backward()
    trained = {name: p for name, p in segmentor.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in trained.values())
    clip = {name for name in trained if name.startswith("clip.")}
    assert clip and all(word not in name for name in clip for word in ("bias", "mlp", "ln_", "norm", "pos"))
    assert any(name.startswith("clip.visual.") for name in clip) and any(
        "clip.text." in name for name in clip
    )


@pytest.mark.parametrize(("finetune", "expected"), [("none", 0.0), ("full", 0.9)])
def test_what_else_can_learn(model, finetune: str, expected: float) -> None:
    segmentor = model("vit", "MODEL.CAT_SEG.FINETUNE", finetune)
    trained = sum(p.numel() for p in segmentor.clip.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in segmentor.clip.parameters())
    assert trained / everything >= expected and (trained > 0) == (expected > 0)
    assert not segmentor.clip.visual.positional_embedding.requires_grad
    sum(segmentor.train()(batch()).values()).backward()


def test_towers_are_refused_with_a_reason(model) -> None:
    with pytest.raises(ValueError, match=r"DENSE 'clipself'.*plain, value"):
        model("rn", "MODEL.CAT_SEG.DENSE", "clipself")
    with pytest.raises(ValueError, match="stride 4.*choose tap 4"):
        model("rn", "MODEL.CAT_SEG.GUIDANCE", [2, 2])
    with pytest.raises(ValueError, match=r"GUIDANCE \[1, 9\]"):
        model("vit", "MODEL.CAT_SEG.GUIDANCE", [1, 9])
    with pytest.raises(ValueError, match="RESOLUTION 60 is not a multiple"):
        model("vit", "MODEL.CAT_SEG.RESOLUTION", 60)
    with pytest.raises(ValueError, match="STRIDE <= SIZE"):
        model("vit", "MODEL.CAT_SEG.TEST.WINDOWS.STRIDE", 90)


@pytest.mark.parametrize("windows", [False, True])
@torch.no_grad()
def test_a_batch_equals_its_images_alone(model, windows: bool) -> None:
    segmentor = model("vit", "MODEL.CAT_SEG.TEST.WINDOWS.ENABLED", windows).eval()
    samples = batch(training=False)
    samples[1] |= {"height": 50, "width": 40}
    outputs = segmentor(samples)
    assert [o["sem_seg"].shape for o in outputs] == [(4, 80, 112), (4, 50, 40)]
    segmentor.views_per_forward, segmentor.evaluation = 1, replace(segmentor.evaluation, max_maps=1)
    for sample, output in zip(samples, outputs, strict=True):
        alone = segmentor([sample])[0]["sem_seg"]
        torch.testing.assert_close(alone, output["sem_seg"], atol=1e-5, rtol=0)
    segmentor.max_dense_classes = 3
    for sample, output in zip(samples, outputs, strict=True):
        labels = segmentor([sample])[0]["sem_seg_labels"]
        assert (labels == output["sem_seg"].argmax(0)).float().mean() > 0.999


def test_windows_average_with_the_whole_image() -> None:
    settings = WindowSettings(True, image_size=96, size=64, stride=32)
    image = torch.rand(3, 50, 70)
    views = window_views(image, settings)
    assert views.shape == (5, 3, 64, 64)
    square = F.interpolate(image[None], (96, 96), mode="bilinear")[0]
    torch.testing.assert_close(views[3], square[:, 32:, 32:])
    torch.testing.assert_close(views[4], F.interpolate(image[None], (64, 64), mode="bilinear")[0])

    scores = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])  # constant in each view
    merged = merge_windows(scores.logit().view(5, 1, 1, 1).expand(5, 1, 4, 4), settings, (96, 96))[0]
    assert merged[0, 0] == pytest.approx((0.1 + 0.9) / 2)
    assert merged[0, 48] == pytest.approx(((0.1 + 0.3) / 2 + 0.9) / 2)
    assert merged[48, 48] == pytest.approx((0.4 + 0.9) / 2)
    assert merged[95, 95] == pytest.approx((0.7 + 0.9) / 2)
    assert merge_windows(torch.zeros(5, 2, 4, 4), settings, (30, 20)).shape == (2, 30, 20)


def test_the_vocabulary_changes_without_a_trace(model) -> None:
    """The scores of a vocabulary do not depend on the one before, nor on outdated weights."""
    segmentor, sample = model().eval(), batch(training=False)[:1]
    few, many = Vocabulary.parse("sun, moon"), Vocabulary.parse([f"thing {i}" for i in range(150)])
    with torch.no_grad():
        segmentor.set_vocabulary(few)
        first = segmentor(sample)[0]["sem_seg"]
        segmentor.set_vocabulary(many)
        assert segmentor(sample)[0]["sem_seg"].shape[0] == 150
        segmentor.set_vocabulary(few)
        torch.testing.assert_close(segmentor(sample)[0]["sem_seg"], first)

    before = segmentor.text_embeddings()["prompts"].clone()
    optimizer = torch.optim.SGD([p for p in segmentor.clip.text.parameters() if p.requires_grad], lr=1.0)
    sum(segmentor.train()(batch()).values()).backward()
    optimizer.step()
    after = segmentor.eval().text_embeddings()["prompts"]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, segmentor.prompts(few).detach())


def test_predictor_takes_any_words(model, tmp_path: Path) -> None:
    torch.save({"model": model().state_dict()}, tmp_path / "model.pth")
    overrides = [
        "MODEL.CAT_SEG.RESOLUTION",
        "64",
        "MODEL.CAT_SEG.WINDOW",
        "4",
        "TEST.MAX_DENSE_CLASSES",
        "100",
    ]
    config = load_config(str(ROOT / "configs/shapes/catseg_vit.yaml"), overrides)
    predictor = Predictor(config, tmp_path / "model.pth", vocabulary="red star, sand")
    image = batch(training=False)[0]["image"].permute(1, 2, 0).numpy()
    assert predictor(image)["sem_seg"].shape == (2, 80, 112)
    modules = list(map(id, predictor.model.modules()))
    predictor.set_vocabulary([f"word {i}" for i in range(150)], background="sky")
    labels = predictor(image)["sem_seg_labels"]
    assert labels.shape == (80, 112) and labels.max() < 150
    assert list(map(id, predictor.model.modules())) == modules


def test_given_embeddings_are_used(model) -> None:
    segmentor = model().eval()
    text = F.normalize(torch.randn(3, 1, segmentor.clip.embed_dim), dim=-1)
    segmentor.set_vocabulary(Vocabulary.parse("a, b, c"), {"prompts": text})
    assert torch.equal(segmentor.text_embeddings()["prompts"], text)


@torch.no_grad()
def test_prompts_of_a_class_are_channels_of_the_cost_volume(model) -> None:
    segmentor = model("vit", "MODEL.CAT_SEG.TEMPLATES", "ovseg_14").eval()
    assert segmentor.aggregator.cost_embedding.in_channels == 14
    names = Vocabulary.parse("sun|star, moon")
    text = segmentor.prompts(names)
    assert text.shape == (2, 14, segmentor.clip.embed_dim)
    torch.testing.assert_close(text, segmentor.prompts(Vocabulary.parse("sun, moon")))
    segmentor.prompts.synonyms = "mean"
    mean = segmentor.prompts(names)
    both = segmentor.prompts(Vocabulary.parse("sun, star, moon"))
    torch.testing.assert_close(mean, torch.stack([F.normalize(both[:2].mean(0), dim=-1), both[2]]))
    with pytest.raises(ValueError, match="longer than 77 tokens"):
        segmentor.set_vocabulary(Vocabulary.parse(["word " * 90]))


def test_labels_are_checked(model) -> None:
    segmentor, samples = model().train(), batch()
    samples[0]["sem_seg"] = samples[0]["sem_seg"].clone().fill_(9)
    with pytest.raises(ValueError, match="labels 9 to 9, but DATASETS.TRAIN has 4 classes"):
        segmentor(samples)
    del samples[0]["sem_seg"]
    with pytest.raises(ValueError, match="no semantic label map"):
        segmentor(samples)


# the parts


def aggregator(**changes: object) -> CostAggregator:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 16, "layers": 2, "heads": 2, "window": 4, "max_classes": 8}
    sizes |= {"image_guidance_dim": 8, "text_guidance_dim": 8, "guidance_dims": (8, 4)}
    sizes |= {"decoder_guidance_dims": (4, 2), "decoder_dims": (16, 16)}
    return CostAggregator(12, **{**sizes, **changes}).eval()


def inputs(
    classes: int, grid: tuple[int, int] = (8, 8)
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(classes)
    (h, w), batch = grid, 2
    guidance = [torch.randn(batch, 8, 2 * h, 2 * w), torch.randn(batch, 4, 4 * h, 4 * w)]
    return torch.randn(batch, 12, h, w), torch.randn(classes, 1, 12), guidance


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (3, 3)])
@torch.no_grad()
def test_any_grid(grid: tuple[int, int]) -> None:
    logits = aggregator()(*inputs(5, grid)).logits
    assert logits.shape == (2, 5, 4 * grid[0], 4 * grid[1])


@torch.no_grad()
def test_padded_windows_see_no_padding() -> None:
    """If the window does not divide the map, the last rows do not depend on the padding."""
    layer = SpatialAggregation(8, 4, 2, window=4).eval()
    layer.blocks[1].attn.shift = 0
    x, guidance = torch.randn(1, 1, 8, 6, 8), torch.randn(1, 8, 6, 4)
    aligned = layer(x[:, :, :, 4:6], guidance[:, :, 4:6])
    torch.testing.assert_close(layer(x, guidance)[:, :, :, 4:6], aligned, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_tokens_equal_appended_ones() -> None:
    layer = ClassAggregation(8, 4, 2, pad_length=7).eval()
    for parameter in (layer.padding_tokens, layer.padding_guidance):
        torch.nn.init.normal_(parameter)
    x, guidance = torch.randn(1, 3, 2, 2, 8), torch.randn(1, 3, 4)
    tokens = layer.padding_tokens.view(1, 1, 1, 1, 8).expand(1, 4, 2, 2, 8)
    longer = torch.cat([x, tokens], 1), torch.cat([guidance, layer.padding_guidance.expand(1, 4, 4)], 1)
    torch.testing.assert_close(layer(x, guidance), layer(*longer)[:, :3], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_best_classes_are_selected() -> None:
    model, (dense, text, guidance) = aggregator(), inputs(20)
    logits = model(dense, text, guidance).logits
    present = (logits != ABSENT_LOGIT).flatten(2).any(2)
    assert (present.sum(1) == 8).all()
    best = torch.einsum("bdhw,kd->bkhw", F.normalize(dense, dim=1), F.normalize(text[:, 0], dim=-1))
    expected = best.flatten(2).amax(2).topk(8, dim=1).indices
    assert torch.equal(present, torch.zeros(2, 20, dtype=torch.bool).scatter(1, expected, True))
    for b in range(2):  # they see each other only
        alone = model(dense[b : b + 1], text[present[b]], [g[b : b + 1] for g in guidance]).logits
        torch.testing.assert_close(alone[0], logits[b, present[b]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("classes", [6, 20])
@torch.no_grad()
def test_early_rejection(heads: bool, classes: int) -> None:
    """Rejected classes are absent; the others are scored as if they were the vocabulary; FLOPs are saved."""
    model, (dense, text, guidance) = aggregator(rejection_heads=heads), inputs(classes, (4, 4))
    settings = AggregationSettings(rejection_topk=1)
    with FlopCounterMode(display=False) as without:
        everything = model(dense, text, guidance).logits
    with FlopCounterMode(display=False) as counter:
        logits = model(dense, text, guidance, settings).logits
    present = (logits != ABSENT_LOGIT).flatten(2).any(2)
    assert logits.shape == everything.shape and (present.sum(1) >= 1).all()
    unlimited = model(dense, text, guidance, replace(settings, rejection_topk=classes)).logits
    torch.testing.assert_close(unlimited, everything, atol=1e-5, rtol=1e-5)
    if (present.sum(1) < min(classes, 8)).all():
        assert counter.get_total_flops() < without.get_total_flops()
    if not heads:  # once, before everything
        alone = model(dense[:1], text[present[0]], [g[:1] for g in guidance]).logits
        torch.testing.assert_close(alone[0], logits[0, present[0]], atol=1e-5, rtol=1e-5)


def test_classes_that_are_best_anywhere() -> None:
    scores = torch.tensor([[[3.0, 0.0]], [[2.0, 5.0]], [[1.0, 4.0]], [[0.0, 1.0]]])
    assert keep_top_classes(scores, 1).tolist() == [True, True, False, False]
    assert keep_top_classes(scores, 2).tolist() == [True, True, True, False]
    assert keep_top_classes(scores, 9).all()


def test_the_loss_is_binary_cross_entropy_over_all_classes() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 5, 6, 6), torch.randint(0, 5, (2, 6, 6))
    labels[:, :2] = 255
    target = F.one_hot(labels.where(labels < 255, 0), 5).permute(0, 3, 1, 2) * (labels < 255)[:, None]
    everywhere = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    negative = class_map_loss(logits, labels, 255, "negative")
    torch.testing.assert_close(negative, everywhere.mean())
    excluded = class_map_loss(logits, labels, 255)
    torch.testing.assert_close(excluded, everywhere[:, :, 2:].mean())
    assert class_map_loss(logits, torch.full((2, 6, 6), 255), 255) == 0
    with pytest.raises(ValueError, match="excluded, negative"):
        class_map_loss(logits, labels, 255, "void")


def test_padding_is_squeezed_on_request() -> None:
    image = torch.ones(3, 40, 64)
    assert square_view(image, 32).min() == 1
    padded = square_view(image, 32, padding_multiple=32)
    assert padded[:, :18].min() == 1 and padded[:, 22:].max() == 0
    assert WindowSettings().stride == 256
