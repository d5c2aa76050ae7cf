"""Precision of inference, memory format, compilation, and copies of images to the device."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdense.data.loader import build_train_loader
from clipdense.engine.device import images_to_device, prepare_model, run_model
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from tests.helpers.engine_toy import ToyMapper, records, toy_config
from tests.helpers.small_models import small_ovseg_config

from detectron2.structures import Boxes, Instances


class Net(nn.Module):
    """Convolution whose outputs have every form of Detectron2's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        maps = self.conv(torch.stack([sample["image"] for sample in batch]))
        found = [
            Instances((4, 4), scores=x.flatten()[:1], pred_boxes=Boxes(torch.ones(1, 4)), pred_classes=[3])
            for x in maps
        ]
        return [
            {"sem_seg": x, "instances": i, "panoptic_seg": (x[0].long(), [{"id": 1}]), "dtype": x.dtype}
            for x, i in zip(maps, found, strict=True)
        ]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_outputs_of_half_precision_are_float32(precision: str) -> None:
    torch.manual_seed(0)
    net, batch = Net().eval(), [{"image": torch.randn(3, 6, 6)} for _ in range(2)]
    with torch.no_grad():
        exact, found = run_model(net, batch), run_model(net, batch, precision)
    assert exact[0]["dtype"] == torch.float32 and found[0]["dtype"] == getattr(torch, precision)
    for a, b in zip(exact, found, strict=True):
        assert b["sem_seg"].dtype == b["instances"].scores.dtype == torch.float32
        assert 0 < (a["sem_seg"] - b["sem_seg"]).abs().max() < 0.05
        assert b["instances"].pred_classes == [3] and b["instances"].image_size == (4, 4)
        assert torch.equal(b["instances"].pred_boxes.tensor, torch.ones(1, 4))
        assert b["panoptic_seg"][0].dtype == torch.int64 and b["panoptic_seg"][1] == [{"id": 1}]


def test_only_pixels_go_to_the_device() -> None:
    batch = [
        {"image": torch.ones(3, 4, 4), "crops": torch.ones(2, 3, 4, 4), "boxes": torch.ones(2, 4), "n": 1}
    ]
    (moved,) = images_to_device(batch, torch.device("meta"))
    devices = {key: value.device.type for key, value in moved.items() if isinstance(value, Tensor)}
    assert devices == {"image": "meta", "crops": "meta", "boxes": "cpu"} and moved["n"] == 1
    assert batch[0]["image"].device.type == "cpu" and images_to_device(batch, torch.device("cpu")) is batch


def test_the_training_loader_pins_memory_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def pins(device: str) -> bool:
        cfg = toy_config("", "MODEL.DEVICE", device)
        return build_train_loader(cfg, seed=1, mapper=ToyMapper(), dataset=records()).pin_memory

    assert not pins("cuda:0") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pins("cuda:0") and not pins("cpu")


def test_an_unknown_submodule_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"MODEL.COMPILE.MODULES: Net has no submodule 'trunk'; it has conv"
    ):
        prepare_model(Net(), compiled=["trunk"])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let torch.compile trace, but not generate code; returns the options of its calls."""
    calls, compile = [], torch.compile

    def trace(function: Any, **options: Any) -> Any:
        calls.append(options)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    return calls


def test_keys_prepare_the_model(eager: list[dict[str, Any]], tmp_path: Path) -> None:
    cfg = small_ovseg_config()
    plain = run_config(cfg).build_model()
    keys = ["MODEL.CHANNELS_LAST", True, "MODEL.COMPILE.MODULES", ("backbone",)]
    cfg.merge_from_list([*keys, "MODEL.COMPILE.MODE", "reduce-overhead"])
    model: Any = run_config(cfg).build_model()
    assert eager == [{"mode": "reduce-overhead"}]
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())  # which keeps the format
    weight = model.backbone.res2[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain.eval().backbone(x)
        for net in (model.eval(), deepcopy(model)):  # a copy (EMA, ensembles) is not compiled, and as good
            found = net.backbone(x)
            for name, maps in expected.items():
                torch.testing.assert_close(found[name], maps, rtol=1e-4, atol=1e-4)
    assert found["res4"].is_contiguous(memory_format=torch.channels_last)
