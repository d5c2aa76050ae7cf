"""Files of prompt learners: a few tensors that any system with text loads, and CoOp's published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError, load_strict, read_checkpoint, save_checkpoint
from clipdense.clip.image_prompts import ConditionalPrompts, InstancePrompts, PreModelPrompts
from clipdense.clip.prompts import ClassPrompts, ContextPrompts
from clipdense.clip.visual_prompts import VisualPrompts

__all__ = [
    "LAYOUT",
    "PromptFile",
    "convert_coop",
    "find_prompts",
    "load_prompts",
    "load_visual_prompts",
    "prompt_state",
    "save_prompts",
]

LAYOUT = "clipdense_prompts"
"""Value of ``layout`` in the metadata of a file of prompts."""

_TEXT, _IMAGE = "text_prompts.", "visual_prompts."
_PUBLISHED = "prompt_learner."
_DROPPED = ("token_prefix", "token_suffix")  # token embeddings of the class names, which the tower gives


@dataclass
class PromptFile:
    """Prompts of one training.

    Attributes:
        text: contexts of class names; None if there are none.
        visual: tokens of the image tower; None if there are none.
        clip: name of the CLIP that they were trained with; "" if the file does not say.
    """

    text: ClassPrompts | None = None
    visual: VisualPrompts | None = None
    clip: str = ""


def prompt_state(
    text: ClassPrompts | None, visual: VisualPrompts | None, clip: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file of prompts, see `load_prompts`.

    Args:
        text: contexts of class names, if any.
        visual: tokens of an image tower, if any.
        clip: name of the CLIP.
    """
    state = {
        f"{prefix}{key}": value
        for prefix, module in ((_TEXT, text), (_IMAGE, visual))
        if module is not None
        for key, value in module.state_dict().items()
    }
    options: dict[str, Any] = {"clip": clip}
    if text is not None:
        options["text"] = {
            "kind": _kind(text),
            "position": text.position,
            "full_stop": bool(text.tail),
            "classes": list(text.classes),
        }
        if isinstance(text, PreModelPrompts):
            options["text"]["heads"] = text.decoder.heads
    return state, {"layout": LAYOUT, "options": options}


def save_prompts(
    path: str | Path, text: ClassPrompts | None, visual: VisualPrompts | None = None, clip: str = ""
) -> None:
    """Write a safetensors file of prompts; arguments as of `prompt_state`.

    Raises:
        WriteError: If the file cannot be written.
    """
    save_checkpoint(path, *prompt_state(text, visual, clip))


def find_prompts(model: nn.Module) -> PromptFile:
    """Find the learned prompts inside a model, such as one on a language backbone.

    Raises:
        ValueError: If it has none.
    """
    text = next((m for m in model.modules() if isinstance(m, ClassPrompts)), None)
    visual = next((m for m in model.modules() if isinstance(m, VisualPrompts)), None)
    if text is None and visual is None:
        raise ValueError(
            f"this {type(model).__name__} has no learned prompts: name the config and the checkpoint "
            "(export.safetensors has class embeddings instead) of a training with MODEL.LANGUAGE.N_CONTEXTS, "
            "MODEL.PROMPT.METHOD or MODEL.PROMPT.VISUAL.N_TOKENS"
        )
    return PromptFile(text, visual)


def load_prompts(
    path: str | Path, *, position: str = "end", classes: Sequence[str] = (), allow_pickle: bool = False
) -> PromptFile:
    """Load prompts from a file of `save_prompts`, an export of a training, or a file of CoOp or CoCoOp.

    Args:
        path: the file. Sizes are read from its tensors.
        position: place of the class name; read only for a published file, which does not say.
        classes: names of the classes of class-specific contexts; read only for a published file.
        allow_pickle: see `clipdense.checkpoint.read_checkpoint`, whose errors this raises.

    Raises:
        CheckpointError: If the file holds no prompts, or tensors that do not fit.
    """
    file = read_checkpoint(path, allow_pickle=allow_pickle)
    options = file.metadata.get("options", {})
    if file.metadata.get("layout") != LAYOUT:
        prompts = convert_coop(file.state, position=position, classes=classes, source=str(path))
        return PromptFile(text=prompts)
    described = options.get("text", {})
    if not isinstance(described, Mapping):
        raise CheckpointError(f"{path}: its description of the prompts is damaged: export the prompts again")
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in file.state.items() if k.startswith(prefix)}
        for prefix in (_TEXT, _IMAGE)
    }
    if unknown := [key for key in file.state if not key.startswith((_TEXT, _IMAGE))]:
        raise CheckpointError(f"{path}: {unknown[:5]} are not tensors of prompts: export the prompts again")
    text = None
    if parts[_TEXT]:
        text = _build_text(parts[_TEXT], described, str(path))
        load_strict(text, parts[_TEXT], source=str(path))
    visual = _build_visual(parts[_IMAGE], str(path)) if parts[_IMAGE] else None
    return PromptFile(text, visual, str(options.get("clip", "")))


def load_visual_prompts(path: str | Path, *, allow_pickle: bool = False) -> VisualPrompts | None:
    """Load the visual prompts of a file alone; None if it has none.

    Arguments and errors as of `load_prompts`.
    """
    file = read_checkpoint(path, allow_pickle=allow_pickle)
    state = {k.removeprefix(_IMAGE): v for k, v in file.state.items() if k.startswith(_IMAGE)}
    return _build_visual(state, str(path)) if state and file.metadata.get("layout") == LAYOUT else None


def convert_coop(
    state: Mapping[str, Tensor],
    *,
    position: str = "end",
    classes: Sequence[str] = (),
    source: str = "the file",
) -> ClassPrompts:
    """Convert the prompt learner of CoOp's or CoCoOp's published code.

    Args:
        state: its tensors (``ctx``, ``token_prefix``, ``token_suffix``, ``meta_net.*``), or those of the
            whole model, which has them below ``prompt_learner.``.
        position: place of the class name, CoOp's ``CLASS_TOKEN_POSITION``.
        classes: names of the K classes of class-specific contexts, which the file does not hold.
        source: name of the file, for errors.

    Raises:
        CheckpointError: If there is no prompt learner, or its contexts are class-specific and the number of
            classes differs.
    """
    learner = {k.removeprefix(_PUBLISHED): v for k, v in state.items() if k.startswith(_PUBLISHED)} or state
    tensors = {k: v for k, v in learner.items() if k not in _DROPPED}
    if "ctx" not in tensors:
        raise CheckpointError(
            f"{source} holds no prompts: expected an exported file of prompts, or a prompt learner of CoOp "
            f"with the tensor ctx; its first keys: {', '.join(list(state)[:5])}"
        )
    contexts = tensors.pop("ctx")
    if contexts.dim() == 2:
        contexts, classes = contexts[None], ()
    elif len(classes) != len(contexts):
        raise CheckpointError(
            f"{source} holds contexts of {len(contexts)} classes, but {len(classes)} class names are given: "
            "give the class names of their training"
        )
    n_ctx, width = contexts.shape[1:]
    prompts: ClassPrompts
    if "meta_net.linear1.weight" in tensors:
        hidden, dim = tensors["meta_net.linear1.weight"].shape
        prompts = ConditionalPrompts(n_ctx, width, dim, 0.0, hidden=hidden, position=position)
    else:
        prompts = ContextPrompts(n_ctx, width, 0.0, position=position, full_stop=True, classes=classes)
    load_strict(prompts, {"contexts": contexts, **tensors}, source=source)
    return prompts


_KINDS: dict[str, type[ClassPrompts]] = {
    "contexts": ContextPrompts,
    "cocoop": ConditionalPrompts,
    "pre_model": PreModelPrompts,
    "icpc": InstancePrompts,
}


def _kind(prompts: ClassPrompts) -> str:
    for name, kind in _KINDS.items():
        if type(prompts) is kind:
            return name
    raise ValueError(f"{type(prompts).__name__} cannot be stored as a file of prompts")


def _build_text(state: Mapping[str, Tensor], options: Mapping[str, Any], source: str) -> ClassPrompts:
    """Build the learner of a file, with the sizes of its tensors."""
    kind = options.get("kind", "contexts")
    shared: dict[str, Any] = {
        "position": options.get("position", "end"),
        "full_stop": bool(options.get("full_stop", False)),
    }
    try:
        if kind == "pre_model":
            width, dim = state["decoder.out_proj.1.weight"].shape[0], state["queries"].shape[1]
            layers = len({key.split(".")[2] for key in state if key.startswith("decoder.decoder.")})
            shared |= {"decoder_width": state["decoder.out_proj.1.weight"].shape[1], "layers": layers}
            heads = int(options.get("heads", 4))
            return PreModelPrompts(len(state["queries"]), width, dim, heads=heads, **shared)
        classes, n_ctx, width = state["contexts"].shape
        if kind == "cocoop":
            hidden, dim = state["meta_net.linear1.weight"].shape
            return ConditionalPrompts(n_ctx, width, dim, 0.0, hidden=hidden, **shared)
        if kind == "icpc":
            rows, dim = state["projection.weight"].shape
            return InstancePrompts(n_ctx, width, dim, 0.0, instance_tokens=rows // width, **shared)
        names = options.get("classes", ())
        if kind == "contexts" and len(names) in (classes, 0):
            return ContextPrompts(n_ctx, width, 0.0, classes=names, **shared)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source}: the prompts of kind {kind!r} are incomplete ({error})") from error
    raise CheckpointError(
        f"{source}: unknown prompts of kind {kind!r} with {classes} sets for {len(names)} classes; known "
        f"kinds: {', '.join(_KINDS)}"
    )


def _build_visual(state: Mapping[str, Tensor], source: str) -> VisualPrompts:
    """Build and load the visual prompts of a file, with the sizes of its tensors."""
    tokens, deep = state.get("prompt_embeddings"), state.get("deep_prompt_embeddings")
    projection = state.get("prompt_proj.weight")
    if tokens is None:
        raise CheckpointError(f"{source}: the visual prompts lack prompt_embeddings")
    width, project = (tokens.shape[2], 0) if projection is None else (len(projection), tokens.shape[2])
    blocks = 1 if deep is None else len(deep) + 1
    prompts = VisualPrompts(tokens.shape[1], width, blocks, deep=deep is not None, project=project)
    load_strict(prompts, state, source=source)
    return prompts
