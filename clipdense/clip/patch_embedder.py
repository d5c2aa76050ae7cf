"""PACL's vision embedder: a small network that maps the patches of a frozen CLIP to its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError, CheckpointMismatch, account, read_checkpoint
from clipdense.clip.towers import ResNetTower, Tower, TowerRequest, TransformerTower
from clipdense.clip.towers.resnet import value_map

__all__ = ["LAYOUT", "PatchEmbedder", "load_patch_embedder", "patch_channels"]

LAYOUT = "pacl_embedder"
"""Name of the layout in the metadata of a file."""


class PatchEmbedder(nn.Module):
    """e(v) = W_r v + W_2 relu(W_1 v), with biases; a residual block whose shortcut is linear.

    v is a patch of CLIP's image tower after the final norm and before the projection; e(v) is in the joint
    space. For ViT-B/16 (768 to 512 channels) it has 1.05 million parameters.

    Args:
        in_channels: C, channels of v.
        embed_dim: D, dimension of the joint space, and of the hidden layer.
        mode: last-block mode of the image tower whose patches it embeds.

    Source: Mukhoti et al., Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning,
        CVPR 2023, section 4.
    """

    def __init__(self, in_channels: int, embed_dim: int, mode: str = "plain") -> None:
        super().__init__()
        self.in_channels, self.embed_dim, self.mode = in_channels, embed_dim, mode
        self.shortcut = nn.Linear(in_channels, embed_dim)
        self.hidden = nn.Linear(in_channels, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)

    @torch.no_grad()
    def start_from_projection(self, tower: Tower) -> None:
        """Set the weights so that e(v) is CLIP's own dense map at the start of training.

        The shortcut becomes CLIP's linear projection of patches (ResNets: value and output projection of the
        attention pool), and the last layer of the other branch becomes 0. The paper starts from random
        weights, which takes many more image-text pairs.

        Args:
            tower: the image tower.

        Raises:
            ValueError: If the tower has no linear projection of patches.
        """
        vectors = torch.cat([torch.zeros(1, self.in_channels), torch.eye(self.in_channels)])
        projected = _project(tower, vectors.to(next(tower.parameters())))
        self.shortcut.bias.copy_(projected[0])
        self.shortcut.weight.copy_((projected[1:] - projected[0]).T)
        self.output.weight.zero_()
        self.output.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Embed a map (B, C, h, w) as (B, D, h, w), not L2-normalised."""
        v = features.movedim(1, -1)
        e: Tensor = self.shortcut(v) + self.output(F.relu(self.hidden(v)))
        return e.movedim(-1, 1)

    def file_metadata(self, clip: str) -> dict[str, Any]:
        """Return the metadata with which `load_patch_embedder` reads a file of this state dict.

        Args:
            clip: name of the CLIP whose patches it was trained on.
        """
        options = {
            "in_channels": self.in_channels,
            "embed_dim": self.embed_dim,
            "clip": clip,
            "mode": self.mode,
        }
        return {"layout": LAYOUT, "options": options}


def load_patch_embedder(path: str | Path) -> PatchEmbedder:
    """Load an embedder that a training of PACL exported (``export.safetensors``).

    Returns:
        The embedder, frozen and in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is another kind of file, or is damaged.
    """
    file = read_checkpoint(path)
    options = file.metadata.get("options", {})
    sizes = (options.get("in_channels"), options.get("embed_dim"))
    if file.metadata.get("layout") != LAYOUT or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise CheckpointError(
            f"{path} is not a patch embedder: expected the export.safetensors of a training with "
            "MODEL.META_ARCHITECTURE PACL"
        )
    embedder = PatchEmbedder(*sizes, str(options.get("mode", "plain")))
    report = account(embedder.state_dict(), file.state)
    if not report.complete:
        raise CheckpointMismatch(str(path), report, "the file is damaged: export it again")
    embedder.load_state_dict(file.state)
    return embedder.eval().requires_grad_(False)


def _project(tower: Tower, vectors: Tensor) -> Tensor:
    """Project patch vectors (n, C) linearly to the joint space (n, D), as the tower's dense map does."""
    if isinstance(tower, TransformerTower) and not tower.pools_regions:
        return tower.project(vectors[None])[0]
    if isinstance(tower, ResNetTower) and tower.attnpool is not None:
        return value_map(tower.attnpool, vectors.T[None, :, :, None])[0, :, :, 0].T
    raise tower.cannot("a linear projection of patches", "set MODEL.PACL.INIT random")


@torch.no_grad()
def patch_channels(tower: Tower) -> int:
    """Return the channels of a tower's patches before the projection, which a small image shows."""
    side, device = tower.smallest_side, next(tower.parameters()).device
    return int(tower(torch.zeros(1, 3, side, side, device=device), TowerRequest(pre=True)).pre.shape[1])
