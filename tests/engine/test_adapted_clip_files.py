"""CLIPs that OVSeg's published training saves: {epoch, name, state_dict {module.*}}, with mask prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdense.clip import ClipModel, load_clip
from clipdense.clip.layouts import MASK_PROMPTS
from clipdense.clip.mask_prompts import load_mask_prompts
from clipdense.clip.model import build_clip
from clipdense.run.conversion import convert_weights

PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.fixture(scope="module")
def tuned() -> ClipModel:
    vision = {"layers": 2, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 32, "mlp_ratio": 4.0}
    text = {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
    model = {"embed_dim": 32, "quick_gelu": True, "custom_text": True}
    torch.manual_seed(0)
    config = {"model_cfg": model | {"vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": PIXELS}
    return build_clip("tuned", config).eval()


def published(clip: ClipModel, prompts: Tensor | None) -> dict[str, Any]:
    """As the training saves it, from several processes."""
    state = {f"module.{key.removeprefix('text.')}": value for key, value in clip.state_dict().items()}
    if prompts is not None:
        state[f"module.{MASK_PROMPTS}"] = prompts
    return {"epoch": 5, "name": "ft", "state_dict": state, "optimizer": {}, "scaler": {}}


@torch.no_grad()
def test_it_needs_no_name(tuned: ClipModel, tmp_path: Path) -> None:
    """Its prompts tell whose it is, and so the activation; they survive a conversion."""
    prompts = torch.randn(3, 16, 64)
    files = [tmp_path / "tuned.pt", tmp_path / "tuned.safetensors"]
    torch.save(published(tuned, prompts), files[0])
    conversion = convert_weights(*files)
    assert conversion.layout == "openai_clip" and "not part of the model" in conversion.dropped
    images = torch.randn(2, 3, 32, 32)
    for file in files:
        clip = load_clip(file)
        torch.testing.assert_close(clip.encode_image(images), tuned.encode_image(images))
        assert torch.equal(load_mask_prompts(file).prompts, prompts)
    other = load_clip(files[0], quick_gelu=False)
    assert not torch.allclose(other.encode_image(images), tuned.encode_image(images), atol=1e-4)


@torch.no_grad()
def test_without_prompts_it_does_not_tell_its_activation(tuned: ClipModel, tmp_path: Path) -> None:
    file = tmp_path / "tuned.pt"
    torch.save(published(tuned, None), file)
    with pytest.raises(ValueError, match="does not tell its activation"):
        load_clip(file)
    images = torch.randn(2, 3, 32, 32)
    clip = load_clip(file, quick_gelu=True)
    torch.testing.assert_close(clip.encode_image(images), tuned.encode_image(images))
    assert load_mask_prompts(file) is None
    torch.save(published(tuned, torch.zeros(0, 16, 64)), file)  # trained without, by a code that has them
    assert load_mask_prompts(file) is None and load_clip(file).config["model_cfg"]["quick_gelu"]
