"""Half precision and channels-last order change the outputs of whole models by rounding errors only."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clipdense.engine.device import run_model
from tests.helpers.nano_models import nano_model, noise_image

_SEMANTIC = ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False)
SYSTEMS = {
    "ovseg": _SEMANTIC,
    "fcclip_rn": (*_SEMANTIC, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True),
    "catseg_vit": (),
    "fvlm_vit": ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
}


def scores(model: Any, precision: str) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        (output,) = run_model(model, [noise_image(64, 96)], precision)
    found = output["instances"].scores if "instances" in output else output["sem_seg"]
    assert found.dtype == torch.float32 and bool(found.isfinite().all()) and found.numel()
    return found.sort().values if "instances" in output else found


@pytest.mark.parametrize("config", SYSTEMS)
def test_outputs_differ_by_rounding(config: str) -> None:
    model = nano_model(config, 6, *SYSTEMS[config])
    exact, rounded = scores(model, "float32"), scores(model, "bfloat16")
    reordered = scores(nano_model(config, 6, "MODEL.CHANNELS_LAST", True, *SYSTEMS[config]), "float32")
    torch.testing.assert_close(reordered, exact, rtol=1e-3, atol=1e-4)
    difference = (rounded - exact).abs() / exact.abs().max()
    assert difference.max() > 0 and difference.mean() < 0.05
