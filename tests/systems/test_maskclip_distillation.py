"""The distillation variant of MaskCLIP+: its distance, its losses, its gradients, and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.engine.build import build_model
from clipdense.inference import DenseMap
from clipdense.run.setup import load_config
from clipdense.systems.maskclip_plus.distillation import feature_distance

from detectron2.utils.events import EventStorage

CONFIG = "configs/shapes/maskclip_plus_rn.yaml"
DISTIL = ["MODEL.MASKCLIP_PLUS.DISTILLATION", "1.0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))


def batch(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)} for size in sizes
    ]


def losses_of(plus: Any, samples: list[dict[str, Any]], iteration: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)  # dropout
    with EventStorage(iteration):
        losses: dict[str, Tensor] = plus(samples)
    return losses


def test_distance_by_hand() -> None:
    """The student's features count as they are, CLIP's as directions; padding does not count."""
    features = torch.tensor([3.0, 4.0])[None, :, None, None].expand(1, 2, 2, 2)
    found = [DenseMap(features, None, (64, 64), (64, 64))]
    student = torch.tensor([0.6, 0.8])[None, :, None, None].repeat(1, 1, 8, 8)
    assert feature_distance(student, found, (64, 64)) < 1e-6
    torch.testing.assert_close(feature_distance(2 * student, found, (64, 64)), torch.tensor(0.7))
    padded = torch.cat([student, torch.full((1, 2, 8, 4), 9.0)], 3)
    assert feature_distance(padded, found, (64, 96)) < 1e-6
    assert feature_distance(padded, found, (64, 64)) > 1
    two = feature_distance(torch.cat([student, 2 * student]), found * 2, (64, 64))
    torch.testing.assert_close(two, torch.tensor(0.35))
    batched = [DenseMap(features.expand(2, -1, -1, -1), None, (64, 64), (64, 64))]
    torch.testing.assert_close(feature_distance(torch.cat([student, 2 * student]), batched, (64, 64)), two)


def test_resized_features_are_compared() -> None:
    """A coarse map is resized before it is normalised."""
    features = torch.randn(1, 3, 2, 3)
    student = F.normalize(F.interpolate(features, (8, 12), mode="bilinear", align_corners=False), dim=1)
    found = [DenseMap(features, None, (64, 96), (64, 96))]
    assert feature_distance(student, found, (64, 96)) < 1e-6
    early = F.interpolate(F.normalize(features, dim=1), (8, 12), mode="bilinear", align_corners=False)
    assert feature_distance(early, found, (64, 96)) > 1e-3


@pytest.mark.parametrize("head", ["DeepLabV3PlusTextHead", "DeepLabV2TextHead"])
def test_losses(head: str) -> None:
    """One forward gives the loss of the labels, as without distillation, and the distance."""
    options = ["MODEL.SEM_SEG_HEAD.NAME", head, "MODEL.SEM_SEG_HEAD.DROPOUT", "0.0"]
    samples = batch((64, 96), (64, 96))
    plus: Any = build_model(load_config(CONFIG, [*options, *DISTIL]))
    losses = losses_of(plus, samples)
    assert set(losses) == {"loss_sem_seg", "loss_distillation"}
    plus.distillation = 0.5
    halved = losses_of(plus, samples)
    torch.testing.assert_close(2 * halved["loss_distillation"], losses["loss_distillation"])
    plus.distillation = 0.0
    plain = losses_of(plus, samples)
    assert set(plain) == {"loss_sem_seg"}
    torch.testing.assert_close(plain["loss_sem_seg"], losses["loss_sem_seg"])
    losses["loss_distillation"].backward()
    assert plus.clip.logit_scale.grad is None
    unused = [n for n, p in plus.segmentor.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in unused if "classifier" not in name], unused


def test_distance_shrinks_in_training() -> None:
    """Without influence of the labels, a few steps bring the features closer to CLIP's, also with padding."""
    options = [*DISTIL, "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", "0.0"]
    plus: Any = build_model(load_config(CONFIG, options))
    samples = batch((64, 96), (70, 64))
    optimizer = torch.optim.Adam(plus.segmentor.parameters(), 1e-3)
    found = []
    for _ in range(6):
        losses = losses_of(plus, samples)
        assert losses["loss_sem_seg"] == 0
        total = losses["loss_sem_seg"] + losses["loss_distillation"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(losses["loss_distillation"].item())
    assert found[-1] < 0.8 * found[0]


def test_self_training_does_not_distil() -> None:
    plus: Any = build_model(load_config(CONFIG, [*DISTIL, "MODEL.MASKCLIP_PLUS.SELF_TRAINING_FROM", "2"]))
    samples = batch((64, 64), (64, 64))
    assert "loss_distillation" in losses_of(plus, samples, iteration=0)
    assert set(losses_of(plus, samples, iteration=1)) == {"loss_sem_seg"}


def test_other_heads_are_refused() -> None:
    head = ["MODEL.SEM_SEG_HEAD.NAME", "SemanticFPNHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3']"]
    with pytest.raises(ValueError, match=r"DISTILLATION needs features .* DeepLabV3PlusTextHead"):
        build_model(load_config(CONFIG, [*head, *DISTIL]))
