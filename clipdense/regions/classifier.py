"""Region classification by cosine similarity to class-name embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TextClassifier"]


class TextClassifier(nn.Module):
    """Classifier of region features x by text embeddings (ViLD-text, Gu et al., ICLR 2022, section 3.2).

    z = W x + b, logit_k = cos(z, t_k) / tau, with the frozen class embeddings t_1 .. t_K and t_bg.

    Attributes:
        text: (K, D) class embeddings, unit length.
        background: (1, D), a parameter if it is learned; None if the background's logit is 0.
    """

    text: Tensor
    background: Tensor | None
    log_scale: Tensor

    def __init__(
        self,
        in_features: int,
        text: Tensor,
        *,
        background: str | Tensor = "learned",
        temperature: float = 0.02,
        learn_temperature: bool = True,
        relu: bool = False,
    ) -> None:
        """
        Args:
            in_features: Channels of x.
            text: (K, D) class embeddings, normalised here.
            background: "learned" (an embedding), "zero" (a logit of 0), or a frozen embedding (1, D),
                normalised here.
            temperature: Initial tau, above 0.
            learn_temperature: Train tau as log(1 / tau). A fixed tau is not stored in checkpoints.
            relu: z = ReLU(W x + b), so that embeddings are not negative (published F-ViT).

        Raises:
            ValueError: If the background is unknown or the temperature is not above 0.
        """
        super().__init__()
        if isinstance(background, str) and background not in ("learned", "zero"):
            raise ValueError(f"the background must be learned or zero, not {background!r}")
        if temperature <= 0:
            raise ValueError(f"the temperature must be above 0, not {temperature}")
        self.register_buffer("text", F.normalize(text.float(), dim=1))
        self.project = nn.Linear(in_features, text.shape[1])
        nn.init.normal_(self.project.weight, std=0.01)
        nn.init.zeros_(self.project.bias)
        if isinstance(background, Tensor):
            self.register_buffer("background", F.normalize(background.float(), dim=1))
        elif background == "learned":
            self.background = nn.Parameter(torch.randn(1, text.shape[1]))
        else:
            self.background = None
        log_scale = torch.tensor(-math.log(temperature))
        if learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)
        self.relu = relu

    def embed(self, x: Tensor) -> Tensor:
        """Project region features (R, C) to unit embeddings z (R, D), zero if the ReLU leaves none."""
        z = self.project(x)
        return F.normalize(z.relu() if self.relu else z, dim=1)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """Classify region features.

        Args:
            x: (R, C) region features.
            text: (K, D) unit embeddings to use instead of the attribute `text`.

        Returns:
            Logits (R, K + 1), background last.
        """
        z = self.embed(x)
        text = self.text if text is None else text
        if self.background is None:
            return F.pad(z @ text.T * self.log_scale.exp(), (0, 1))
        background = self.background
        if isinstance(background, nn.Parameter):
            background = F.normalize(background, dim=1)
        return z @ torch.cat([text, background]).T * self.log_scale.exp()
