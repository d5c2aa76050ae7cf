"""Registry of the config keys that count the classes of closed-vocabulary heads."""

from dataclasses import dataclass
from typing import Any, Literal

from detectron2.config import CfgNode

__all__ = ["HeadClasses", "config_value", "head_classes", "register_head_classes", "registered_heads"]


@dataclass(frozen=True)
class HeadClasses:
    """Number of classes of one closed-vocabulary head.

    Attributes:
        key: full config key of the number, such as ``MODEL.ROI_HEADS.NUM_CLASSES``.
        kind: the classes that it counts: ``thing_classes`` or ``stuff_classes`` of the dataset's metadata.
    """

    key: str
    kind: Literal["thing", "stuff"]


@dataclass(frozen=True)
class _Entry:
    heads: tuple[HeadClasses, ...]
    base: str
    base_key: str


_ENTRIES: dict[str, _Entry] = {}


def register_head_classes(
    meta_architecture: str, *heads: HeadClasses, base: str = "", base_key: str = ""
) -> None:
    """Register the closed-vocabulary heads of a meta-architecture, so that `check_classes` compares them with
    the datasets.

    A meta-architecture whose vocabulary can change is not registered.

    Args:
        meta_architecture: its name in ``META_ARCH_REGISTRY``.
        heads: one entry for each head.
        base: instead of heads: a registered meta-architecture with the same heads.
        base_key: instead of heads: the config key that names the wrapped meta-architecture.

    Raises:
        ValueError: If not exactly one of heads, base and base_key is given, or if the name is registered with
            other heads.
    """
    if sum(map(bool, (heads, base, base_key))) != 1:
        raise ValueError(f"{meta_architecture}: give exactly one of heads, base and base_key")
    entry = _Entry(heads, base, base_key)
    if _ENTRIES.setdefault(meta_architecture, entry) != entry:
        raise ValueError(f"the heads of {meta_architecture} are already registered, with other config keys")


def registered_heads(meta_architecture: str) -> tuple[HeadClasses, ...] | None:
    """Return the closed-vocabulary heads of a meta-architecture; None if it is not registered, or wraps one
    that only its config names."""
    entry = _ENTRIES.get(meta_architecture)
    while entry is not None and entry.base:
        entry = _ENTRIES.get(entry.base)
    return entry.heads if entry is not None and entry.heads else None


def head_classes(cfg: CfgNode) -> tuple[HeadClasses, ...]:
    """Return the closed-vocabulary heads of the configured meta-architecture; empty if it has none."""
    name = cfg.MODEL.META_ARCHITECTURE
    while (entry := _ENTRIES.get(name)) is not None:
        if entry.heads:
            return entry.heads
        name = entry.base or config_value(cfg, entry.base_key)
    return ()


def config_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a full config key, such as ``MODEL.ROI_HEADS.NUM_CLASSES``."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


_BOXES = HeadClasses("MODEL.ROI_HEADS.NUM_CLASSES", "thing")
_SEMANTIC = HeadClasses("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff")
register_head_classes("GeneralizedRCNN", _BOXES)
register_head_classes("RetinaNet", HeadClasses("MODEL.RETINANET.NUM_CLASSES", "thing"))
register_head_classes("SemanticSegmentor", _SEMANTIC)
register_head_classes("PanopticFPN", _BOXES, _SEMANTIC)
