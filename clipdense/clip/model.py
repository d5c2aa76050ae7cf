"""`load_clip`: one entry point for CLIPs of any tower family, file or tag."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import _build_text_tower, _build_vision_tower
from PIL import Image
from torch import Tensor, nn

from clipdense.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointMismatch,
    DropRule,
    Layout,
    ModelLayout,
    account,
    detect_layout,
    load_strict,
    read_checkpoint,
    save_checkpoint,
)
from clipdense.clip.convnext import CONVNEXT_CLIP, ConvNeXtModel
from clipdense.clip.eva import EVA02_CLIP, EVA02Model
from clipdense.clip.layouts import EVA_CLIP, JIT_ENTRIES, MASK_PROMPTS, OPENAI_CLIP, config_from_tensors
from clipdense.clip.pixels import normalize_pixels, preprocess
from clipdense.clip.sources import Source, resolve
from clipdense.clip.stored import stored_config, stored_text
from clipdense.clip.text_aligned import (
    AlignedTower,
    aligned_text,
    aligned_visual,
    is_aligned,
    published_state,
)
from clipdense.clip.tokenizer import CLIP_VOCABULARY, build_tokenizer, token_counts
from clipdense.clip.towers import TextTower, Tower, TowerOutput, TowerRequest, build_tower

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ClipModel(nn.Module):
    """CLIP model: image tower, text tower, tokenizer and pixel statistics.

    The state dict has open_clip's layout for `custom_text` models: `visual.*`, `text.*`, `logit_scale`,
    `logit_bias`.

    Attributes:
        name: model name, or the stem of the file name.
        config: open_clip's hub config (`model_cfg`, `preprocess_cfg`); `model_cfg` is empty for a module that
            was built elsewhere.
        embed_dim: D of the joint space.
        image_size: native (H, W) in pixels.
        pixel_mean: RGB, of images in 0..1.
        pixel_std: RGB, of images in 0..1.
        visual: the image tower.
        text: the text tower; None if it was not loaded.
        logit_scale: logarithm of the inverse temperature.
        logit_bias: bias of SigLIP's logits; None for other models.
    """

    def __init__(
        self,
        name: str,
        visual: Tower,
        text: TextTower | None,
        logit_scale: nn.Parameter,
        logit_bias: nn.Parameter | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        if text is not None and text.embed_dim != visual.embed_dim:
            raise ValueError(
                f"'{name}': image tower of {visual.embed_dim} and text tower of {text.embed_dim} dimensions"
            )
        self.name, self.config = name, config
        self.visual, self.text = visual, text
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.embed_dim = visual.embed_dim
        self.image_size = visual.image_size
        self.pixel_mean: tuple[float, ...] = tuple(config["preprocess_cfg"]["mean"])
        self.pixel_std: tuple[float, ...] = tuple(config["preprocess_cfg"]["std"])

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise RGB images (..., 3, H, W), 0..255, with the model's statistics, on the model's device."""
        images = images.to(self.logit_scale.device, non_blocking=True)
        return normalize_pixels(images, self.pixel_mean, self.pixel_std)

    def preprocess(self, image: Image.Image, *, crop: bool = True, size: int | None = None) -> Tensor:
        """Convert a PIL image to a normalised tensor (3, H, W); see `clipdense.clip.pixels.preprocess`."""
        settings = self.config["preprocess_cfg"]
        return preprocess(image, self.image_size, settings, crop=crop, size=size)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D), not L2-normalised."""
        out: TowerOutput = self.visual(images, TowerRequest(pooled=True))
        return out.pooled

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed token ids (n, L) as (n, D), not L2-normalised.

        Raises:
            ValueError: If the model was loaded without its text tower, or L does not fit the tower.
        """
        if self.text is None:
            raise ValueError(f"'{self.name}' was loaded without its text tower: load it with text=True")
        embeddings: Tensor = self.text(tokens)
        return embeddings

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer, from texts to ids (n, context_length).

        It truncates long texts without a warning; `tokenize` does not.

        Raises:
            ValueError: See `build_tokenizer`.
            ConnectionError: See `build_tokenizer`.
            ImportError: See `build_tokenizer`.
        """
        text_cfg: dict[str, Any] = self.config["model_cfg"].get("text_cfg", {})
        vocabulary, length = text_cfg.get("vocab_size", CLIP_VOCABULARY), text_cfg.get("context_length", 77)
        if self.text is not None:
            vocabulary, length = self.text.token_embedding.num_embeddings, self.text.context_length
        return build_tokenizer(self.name, text_cfg, vocabulary, length)

    def tokenize(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenize texts as ids (n, L).

        Args:
            texts: n texts.
            context_length: L, the length that rows are padded to; by default that of the text tower.

        Raises:
            ValueError: If texts are longer than L tokens; the message lists them.
        """
        tokenizer: Any = self.tokenizer
        length = context_length or tokenizer.context_length
        counts = zip(texts, token_counts(tokenizer, texts), strict=True)
        long = [f"'{text}' ({count})" for text, count in counts if count > length]
        if long:
            raise ValueError(f"texts longer than {length} tokens: {', '.join(long)}")
        ids: Tensor = tokenizer(list(texts), context_length=length)
        return ids

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load_clip(path)` reads without a model name.

        Raises:
            ValueError: If the config of the model is unknown, because it wraps a module built elsewhere.
            WriteError: If the file cannot be written.
        """
        save_checkpoint(path, self.state_dict(), self.file_metadata())

    def file_metadata(self) -> dict[str, Any]:
        """Return the metadata with which `load_clip` reads a file of this state dict (see `save_checkpoint`).

        Raises:
            ValueError: If the config of the model is unknown, because it wraps a module built elsewhere.
        """
        if not self.config["model_cfg"]:
            raise ValueError(
                f"'{self.name}' wraps a module of unknown config, so its file could not be read back"
            )
        options = {"name": self.name, "config": self.config, "text": self.text is not None}
        return {"layout": "open_clip", "options": options}


def load_clip(
    model: str | Path | nn.Module = "",
    pretrained: str | Path | None = None,
    *,
    allow_pickle: bool = False,
    precision: str = "fp32",
    quick_gelu: bool | None = None,
    text_heads: int | None = None,
    head_width: int | None = None,
    image_size: int | None = None,
    text: bool = True,
    position_rule: str = "bicubic",
    cache_dir: str | None = None,
) -> ClipModel:
    """Load a CLIP with any ResNet, ViT, EVA, SigLIP or ConvNeXt tower of open_clip, in eval mode.

    Args:
        model: open_clip model name, nano CLIP (`clipdense.clip.nano.NANO_MODELS`: "shapes-rn", ...),
            "hf-hub:organisation/name", "local-dir:folder", a weight file, or "" with a weight file as
            ``pretrained``; a text-aligned DINO (`clipdense.clip.aligned_configs`), with the folder of its
            published files as ``pretrained``; or an open_clip module, whose parameters the result shares.
        pretrained: tag, "hf-hub:organisation/name", weight file in the layout of OpenAI (also TorchScript),
            EVA-CLIP (also CLIPSelf), open_clip or clipdense, "random", or "random:" and a tag (random weights
            in the model of that tag). None or "": the weights that come with a nano, hub or local-dir model.
        allow_pickle: see `clipdense.checkpoint.read_checkpoint`.
        precision: "fp32", "fp16" or "bf16" for all weights except logit scale and bias.
        quick_gelu: use x sigmoid(1.702 x) instead of GELU in open_clip's own towers. None: as the model name,
            the tag or OpenAI's TorchScript layout says; required for a file without this information.
        text_heads: number of heads of the text tower, which tensors do not show. None: from the model's
            config, or heads of width 64 as in OpenAI's models.
        head_width: width of a head of an open_clip image tower. None: from the model's config, or 64.
        image_size: native size in pixels, if it differs from the config, e.g. for a file with a larger
            position table.
        text: build the text tower, unless a file written by clipdense has none.
        position_rule: rule for grids other than the native one, see `clipdense.clip.position`.
        cache_dir: folder for downloads.

    Raises:
        ValueError: If a name, tag, precision or rule is unknown, the file does not determine a setting, or
            the tower is not supported.
        FileNotFoundError: If the weight file does not exist.
        ConnectionError: If the weights cannot be downloaded.
        CheckpointError: If the file cannot be read, or keys or shapes do not fit; the message lists all.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
    if isinstance(model, nn.Module):
        if pretrained:
            raise ValueError("a module has its own weights: remove pretrained")
        return _finish(_wrap(model, text, position_rule), precision)
    source = resolve(str(model), str(pretrained or ""), cache_dir)
    files = [read_checkpoint(path, allow_pickle=allow_pickle) for path in source.files]
    if source.config is not None and is_aligned(source.config) and not all(map(stored_config, files)):
        return _finish(_load_published_dino(source, files, text), precision)
    states = [(_layout(file), file) for file in files]
    config = _config(source, states, quick_gelu, text_heads, head_width)
    if image_size is not None:
        config["model_cfg"]["vision_cfg"]["image_size"] = image_size
    text = text and all(map(stored_text, files))
    if source.config is None:
        _check_sizes(source.name, config, text, states)
    clip = build_clip(source.name, config, text=text, position_rule=position_rule)
    if files:
        _load(clip, states)
    return _finish(clip, precision)


def pixel_statistics(
    model: str | Path = "", pretrained: str | Path | None = None, *, allow_pickle: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return `ClipModel.pixel_mean` and `pixel_std` of a model without building it.

    Same arguments and errors as `load_clip`.
    """
    source = resolve(str(model), str(pretrained or ""))
    config = source.config
    if config is None and source.files:
        file = read_checkpoint(source.files[0], allow_pickle=allow_pickle, lazy=True)
        config = stored_config(file)
    pixels = (config or {}).get("preprocess_cfg", {})
    return tuple(pixels.get("mean", OPENAI_DATASET_MEAN)), tuple(pixels.get("std", OPENAI_DATASET_STD))


def _layout(file: Checkpoint) -> Layout | None:
    """Detect the layout of a file; None for a single tower of a model (nano files), which has our keys."""
    towers = {key.split(".")[0] for key in file.state} - {"logit_scale", "logit_bias"}
    one = towers in ({"visual"}, {"text"}) and not EVA_CLIP.matches(file.state)
    layout = None if one else detect_layout(file.state, str(file.path))
    if isinstance(layout, ModelLayout):
        raise CheckpointError(f"{file.path} is not a CLIP but {layout.about}: set it as MODEL.WEIGHTS")
    return layout


def _config(
    source: Source,
    states: list[tuple[Layout | None, Checkpoint]],
    quick_gelu: bool | None,
    text_heads: int | None,
    head_width: int | None,
) -> dict[str, Any]:
    """Return the model config. Precedence of what tensors do not show: caller, weights, model name."""
    layout, file = states[0] if states else (None, None)
    stored = stored_config(file) if file is not None else None
    trained = source.quick_gelu if stored is None else stored["model_cfg"].get("quick_gelu")
    if file is not None and layout is OPENAI_CLIP:
        # OpenAI's TorchScript files alone have these entries, and OVSeg's CLIPs alone mask prompts
        known = all(key in file.state for key in JIT_ENTRIES) or MASK_PROMPTS in file.state
        trained = True if known else trained
    if layout is EVA_CLIP:
        trained = False  # EVA's text towers have the exact GELU
    if source.config is None and stored is None:
        assert file is not None
        if trained is None and quick_gelu is None:
            raise ValueError(
                f"{file.path} does not tell its activation: pass quick_gelu (True for OpenAI's weights), "
                f"or name the model"
            )
        config = _config_from_file(file, layout, trained is not None, text_heads, head_width)
    else:
        config = deepcopy(source.config or stored or {})
        vision_cfg, text_cfg = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
        if head_width is not None and vision_cfg.get("timm_model_name", EVA02_CLIP) != EVA02_CLIP:
            raise ValueError(
                f"'{source.name}' is a timm tower, whose config sets its heads: remove head_width"
            )
        vision_cfg.update({} if head_width is None else {"head_width": head_width})
        text_cfg.update({} if text_heads is None else {"heads": text_heads})
    named = config["model_cfg"].get("quick_gelu", False)
    if quick_gelu is None and trained is not None and trained != named:
        activation = "QuickGELU" if trained else "exact GELU"
        logger.info("'%s': using %s, with which its weights were trained", source.name, activation)
    if quick_gelu is not None and trained is not None and trained != quick_gelu:
        logger.warning(
            "'%s': quick_gelu=%s, but its weights were trained with %s", source.name, quick_gelu, trained
        )
    decided = [choice for choice in (quick_gelu, trained, named) if choice is not None]
    config["model_cfg"]["quick_gelu"] = decided[0]
    return config


def _config_from_file(
    file: Checkpoint, layout: Layout | None, released: bool, text_heads: int | None, head_width: int | None
) -> dict[str, Any]:
    """Return the config that the tensors of a file show, without a model name."""
    if layout is None:
        raise ValueError(f"{file.path} holds one tower of a CLIP: name the model")
    if head_width is None or text_heads is None:
        message = "%s: assuming heads of width 64, as in OpenAI's CLIP (head_width, text_heads)"
        logger.log(logging.INFO if released else logging.WARNING, message, file.path)
    converted = layout.convert(file.state)
    model_cfg = config_from_tensors(converted, head_width=head_width or 64, text_heads=text_heads)
    pixels = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    return {"model_cfg": model_cfg, "preprocess_cfg": pixels}


def build_clip(
    name: str, config: dict[str, Any], *, text: bool = True, position_rule: str = "bicubic"
) -> ClipModel:
    """Build a CLIP with random weights from open_clip's hub config (`model_cfg`, `preprocess_cfg`).

    Args:
        name: name of the model, for errors.
        config: the hub config.
        text: build the text tower.
        position_rule: see `load_clip`.

    Raises:
        ValueError: If a tower is not supported.
    """
    cfg = deepcopy(config["model_cfg"])
    if "multimodal_cfg" in cfg:
        raise ValueError(
            f"'{name}' is a CoCa, whose pooler leaves no per-patch image-text space: not supported"
        )
    if text and cfg["text_cfg"].get("hf_model_name"):
        raise ValueError(
            f"'{name}' has a Hugging Face text tower, which is not supported: load it with text=False and "
            f"give its text embeddings as a precomputed table"
        )
    if is_aligned(config):
        scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        side = aligned_text(config) if text else None
        return ClipModel(name, aligned_visual(config), side, scale, None, config)
    cfg["vision_cfg"]["timm_model_pretrained"] = False
    if cfg["vision_cfg"].get("timm_model_name") == EVA02_CLIP:
        visual: nn.Module = EVA02Model(cfg["embed_dim"], cfg["vision_cfg"])
    elif cfg["vision_cfg"].get("timm_model_name") == CONVNEXT_CLIP:
        visual = ConvNeXtModel(cfg["embed_dim"], cfg["vision_cfg"])
    else:
        visual = _build_vision_tower(cfg["embed_dim"], cfg["vision_cfg"], cfg.get("quick_gelu", False))
    _set_native_size(visual, cfg["vision_cfg"]["image_size"])
    text_tower = None
    if text:
        module = _build_text_tower(cfg["embed_dim"], cfg["text_cfg"], cfg.get("quick_gelu", False))
        text_tower = TextTower(module)
    bias = cfg.get("init_logit_bias")
    return ClipModel(
        name,
        build_tower(visual, position_rule),
        text_tower,
        nn.Parameter(torch.tensor(cfg.get("init_logit_scale", math.log(1 / 0.07)))),
        None if bias is None else nn.Parameter(torch.tensor(float(bias))),
        config,
    )


def _wrap(module: nn.Module, text: bool, position_rule: str) -> ClipModel:
    """Wrap an open_clip CLIP or CustomTextCLIP; parameters are shared."""
    visual: Any = getattr(module, "visual", None)
    if visual is None or not hasattr(module, "logit_scale"):
        raise ValueError(f"{type(module).__name__} is not an open_clip model")
    preprocess = {
        "mean": getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN,
        "std": getattr(visual, "image_std", None) or OPENAI_DATASET_STD,
    }
    return ClipModel(
        type(module).__name__,
        build_tower(visual, position_rule),
        TextTower(getattr(module, "text", module)) if text else None,
        module.logit_scale,  # type: ignore[arg-type]
        module.logit_bias,  # type: ignore[arg-type]
        {"model_cfg": {}, "preprocess_cfg": preprocess},
    )


def _check_sizes(
    name: str, config: dict[str, Any], text: bool, states: list[tuple[Layout | None, Checkpoint]]
) -> None:
    """Compare a file with the model of its own config, before memory is allocated for that model.

    Raises:
        CheckpointError: If no model can be built from the config, or the file does not fit it.
    """
    try:
        with torch.device("meta"):
            model = build_clip(name, config, text=text)
    except Exception as e:  # open_clip and timm raise what their constructors meet
        path = states[0][1].path
        raise CheckpointError(
            f"{path}: no model can be built from its config ({type(e).__name__}: {e})"
        ) from e
    _load(model, states, account_only=True)


def _load(
    clip: ClipModel, states: list[tuple[Layout | None, Checkpoint]], account_only: bool = False
) -> None:
    state: dict[str, Tensor] = {}
    drops: list[DropRule] = []
    optional = None
    for layout, file in states:
        state.update(layout.convert(file.state) if layout else file.state)
        drops.extend(layout.drops if layout else ())
        optional = layout.optional if layout else optional
    if clip.text is None:
        drops.append(DropRule("text tower", r"text\..*", "loaded with text=False"))
    source = " and ".join(str(file.path) for _, file in states)
    remedy = "choose the model, the native size (image_size) or the file that fits"
    if account_only:
        report = account(clip.state_dict(), state, drops=drops, optional=optional)
        if not report.complete:
            raise CheckpointMismatch(source, report, remedy)
        return
    report = load_strict(clip, state, source=source, drops=drops, optional=optional, remedy=remedy)
    for rule, keys in report.dropped.items():
        logger.info("%s: ignored %d keys (%s)", source, len(keys), rule)


def _load_published_dino(source: Source, files: Sequence[Checkpoint], text: bool) -> ClipModel:
    """Build a text-aligned DINO and load its published files."""
    assert source.config is not None
    clip = build_clip(source.name, source.config, text=text)
    assert isinstance(clip.visual, AlignedTower)
    state = published_state([file.state for file in files], clip.visual)
    drops = [] if text else [DropRule("text tower", r"text\..*", "loaded with text=False")]
    load_strict(
        clip,
        state,
        source=" and ".join(str(file.path) for file in files),
        drops=drops,
        optional="logit_scale",
        remedy="give the folder with all files: DINO's weights, and dino.txt's head and text tower, or "
        "Talk2DINO's projection and OpenAI's CLIP",
    )
    return clip


def _finish(clip: ClipModel, precision: str) -> ClipModel:
    clip.visual.to(PRECISIONS[precision])
    if clip.text is not None:
        clip.text.to(PRECISIONS[precision])
    return clip.eval()


def _set_native_size(visual: Any, size: int | Sequence[int]) -> None:
    """Set the native size of a timm transformer to the config's; open_clip builds it at timm's own size."""
    native = (size, size) if isinstance(size, int) else tuple(size)
    patches = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    if patches is not None and patches.img_size is not None and tuple(patches.img_size) != native:
        visual.set_input_size(native)
