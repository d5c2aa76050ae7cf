"""`load_clip`: one CLIP, whatever tower, file or tag it comes from."""

from __future__ import annotations

from typing import Any, cast

import torch
from open_clip import get_tokenizer
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from .nano import NANO_MODELS, nano_config, nano_files


class ClipModel(nn.Module):
    """A CLIP: image tower, text tower, tokenizer and pixel statistics.

    The state dict has open_clip's layout for `custom_text` models: `visual.*`, `text.*`, `logit_scale`.
    """

    def __init__(self, name: str, clip: CustomTextCLIP, config: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        self.embed_dim: int = config["model_cfg"]["embed_dim"]
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        self.image_size: tuple[int, int] = (size, size)
        self.pixel_mean = tuple(config["preprocess_cfg"]["mean"])
        self.pixel_std = tuple(config["preprocess_cfg"]["std"])
        self.visual, self.text = clip.visual, clip.text
        self.logit_scale = clip.logit_scale
        self.logit_bias = clip.logit_bias
        self.tokenizer = get_tokenizer("ViT-B-32")

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> pooled embeddings (B, D), not L2-normalised."""
        return cast(Tensor, self.visual(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (n, 77) -> embeddings (n, D), not L2-normalised."""
        return cast(Tensor, self.text(tokens))


def load_clip(model: str, pretrained: str | None = None) -> ClipModel:
    """Load a CLIP by name; `pretrained="random"` asks for random weights."""
    if model not in NANO_MODELS:
        raise ValueError(f"unknown model '{model}'; known: {NANO_MODELS}")
    config = nano_config(model)
    settings = {k: v for k, v in config["model_cfg"].items() if k != "custom_text"}
    clip = ClipModel(model, CustomTextCLIP(**settings), config)
    if pretrained != "random":
        from safetensors.torch import load_file

        state: dict[str, torch.Tensor] = {}
        for file in nano_files(model):
            state.update(load_file(file))
        clip.load_state_dict(state)
    return clip
