"""The training-free methods by name: what each of them sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clipdense.systems.training_free.features import Output

__all__ = ["METHODS", "Method"]

Kind = Literal["mode", "resclip", "corrclip", "trident", "lposs"]


@dataclass(frozen=True)
class Method:
    """A training-free method.

    Attributes:
        mode: last-block mode of the ViT.
        source: paper.
        kind: "mode", if the dense map of windows is all there is; or the further steps.
        options: options of the mode.
        features: features of the second model that the method reads; "" if it has none.
        padding: windows are padded to multiples of it; 0 for none, -1 for the patch size.
        resnet: whether the method also exists for CLIP's ResNets.
        embedder: whether the patches go through a trained `PatchEmbedder`, which also sets the mode.
    """

    mode: str
    source: str
    kind: Kind = "mode"
    options: Mapping[str, Any] = field(default_factory=dict)
    features: Output | Literal[""] = ""
    padding: int = 0
    resnet: bool = False
    embedder: bool = False


METHODS: dict[str, Method] = {
    "clip": Method("plain", "CLIP (Radford et al., ICML 2021)", resnet=True),
    "maskclip": Method("value", "MaskCLIP (Zhou et al., ECCV 2022)", resnet=True),
    "sclip": Method("sclip", "SCLIP (Wang et al., ECCV 2024)"),
    "clearclip": Method("clearclip", "ClearCLIP (Lan et al., ECCV 2024)", padding=-1),
    "gem": Method("gem", "GEM (Bousselham et al., CVPR 2024)"),
    "naclip": Method("naclip", "NACLIP (Hajimiri et al., WACV 2025)"),
    "resclip": Method("resclip", "ResCLIP (Yang et al., CVPR 2025)", kind="resclip"),
    "scclip": Method("scclip", "SC-CLIP (Bai et al., TIP 2025)"),
    "sfp": Method("sfp", "SFP (ICCV 2025)"),
    "radseg": Method("radseg", "RADSeg, on CLIP"),
    "proxyclip": Method("proxyclip", "ProxyCLIP (Lan et al., ECCV 2024)", features="tokens", padding=56),
    "trident": Method("proxyclip", "Trident (Shi et al., ICCV 2025)", kind="trident", features="tokens"),
    "corrclip": Method(
        "plain",
        "CorrCLIP (Zhang et al., ICCV 2025)",
        kind="corrclip",
        features="queries_keys",
        padding=56,
    ),
    "pacl": Method("plain", "PACL (Mukhoti et al., CVPR 2023)", padding=-1, resnet=True, embedder=True),
    "lposs": Method("value", "LPOSS (Stojnic et al., CVPR 2025)", kind="lposs", features="values"),
}
