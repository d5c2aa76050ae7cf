"""DenseCLIP's golden files as published files, and the models that they convert to."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from clipdense.checkpoint import model_layout, rename
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.run.conversion import convert_weights
from clipdense.run.setup import load_config

FULL_VOCABULARY = 49408

# Images come normalised and unpadded, and gradients reach every parameter.
AS_GIVEN = {
    "MODEL.PIXEL_MEAN": [0.0] * 3,
    "MODEL.PIXEL_STD": [1.0] * 3,
    "MODEL.FPN.PAD": False,
    "MODEL.LANGUAGE.FREEZE_TEXT": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
}


def published(golden: Any) -> dict[str, Any]:
    """The file as it would be released: the token table of the full vocabulary, wrapped with meta."""
    state, ids = golden.part("state"), golden.part("in")["vocab_ids"]
    if len(ids):
        table = torch.zeros(FULL_VOCABULARY, state["text_encoder.token_embedding.weight"].shape[1])
        table[ids] = state["text_encoder.token_embedding.weight"]
        state["text_encoder.token_embedding.weight"] = table
    return {"meta": {"CLASSES": tuple(golden.args["class_names"]), "epoch": 12}, "state_dict": state}


def language_options(golden: Any) -> dict[str, Any]:
    """Options of the language backbone that tensors do not show, from the file's settings."""
    args = golden.args
    return {
        **AS_GIVEN,
        "MODEL.CLIP.CONFIG.text_cfg.heads": args["text_heads"],
        "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": args["dec_heads"],
        "MODEL.LANGUAGE.TAU": args["tau"],
    }


def build_published(content: dict[str, Any], options: dict[str, Any], folder: Path) -> Any:
    """Convert a published file with these options, build the model that the result names, load it."""
    torch.save(content, folder / "published.pth")
    target = folder / "converted.safetensors"
    convert_weights(folder / "published.pth", target, options=options)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target), "DEVICE": "cpu"}})
    )
    model = build_model(load_config(str(folder / "config.yaml"))).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    return model


def gradients(model: nn.Module, golden: Any, loss: Tensor, prefix: str = "grad.") -> dict[str, Tensor]:
    """Gradients by recorded name, which is ``prefix`` and the published key."""
    model.zero_grad()
    loss.backward()
    layout = model_layout(golden.part("state"))
    assert layout is not None
    prefixes = layout.prefixes(golden.part("state"))
    parameters = dict(model.named_parameters())
    recorded = [name for name in golden.part("out") if name.startswith(prefix)]
    found = {}
    for name in recorded:
        gradient = parameters[rename(name.removeprefix(prefix), prefixes)].grad
        assert gradient is not None, name
        found[name] = gradient
    return found
