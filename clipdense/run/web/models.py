"""Models that the web page offers: the embedded CLIPs, CLIPs of the command line, and a trained model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.options import ConfigError
from clipdense.open_vocabulary import OpenVocabularyModel
from clipdense.run.config import add_clipdense_config
from clipdense.run.predictor import Predictor
from clipdense.run.web.limits import RequestError

from detectron2.config import get_cfg

__all__ = ["EMBEDDED", "GROUNDS", "ServedModel", "served_models"]

EMBEDDED = {
    "shapes-rn (MaskCLIP)": "shapes/zero_shot_maskclip_rn.yaml",
    "shapes-vit (SCLIP)": "shapes/zero_shot_sclip_vit.yaml",
    "shapes-eva (ClearCLIP)": "shapes/zero_shot_clearclip_eva.yaml",
}
"""Name on the page -> config of the package, for the CLIPs that come with it."""

GROUNDS = "grass, sand, water, brick, wood, gravel, snow, tiles"
"""Grounds of the `shapes` world: the background words of the embedded CLIPs."""


class ServedModel:
    """Model of the page, which is loaded when it is first used.

    Args:
        name: name on the page.
        load: loads the model.
        own_classes: whether the model has classes of its own, which it predicts if no words are typed.
        background: suggested background words.
    """

    def __init__(
        self, name: str, load: Callable[[], Predictor], *, own_classes: bool = False, background: str = ""
    ) -> None:
        self.name, self.own_classes, self.background = name, own_classes, background
        self._load = load
        self._lock = threading.Lock()
        self._predictor: Predictor | None = None
        self._own: Vocabulary | None = None

    def predictor(self) -> Predictor:
        """Return the model; the first call loads it.

        Raises:
            Exception: See `Predictor`; the next call tries again.
        """
        with self._lock:
            if self._predictor is None:
                self._predictor = self._load()
                if isinstance(self._predictor.model, OpenVocabularyModel):
                    self._own = self._predictor.model.vocabulary
            return self._predictor

    def set_vocabulary(self, vocabulary: Vocabulary | None) -> Predictor:
        """Set the classes to predict, and return the model.

        Args:
            vocabulary: the classes; None for the model's own.

        Raises:
            RequestError: If the model has no classes of its own, or cannot predict others.
        """
        predictor = self.predictor()
        if vocabulary is None:
            if not self.own_classes:
                raise RequestError("Type at least one word, such as: red heart, blue star")
            if self._own is not None:
                predictor.set_vocabulary(self._own)
            return predictor
        try:
            predictor.set_vocabulary(vocabulary)
        except ConfigError as error:
            raise RequestError(
                f"{self.name} predicts the classes that it was trained on: leave the words empty."
            ) from error
        except ValueError as error:  # a name that the text encoder cannot read
            raise RequestError(str(error)) from error
        return predictor


def served_models(
    clips: Iterable[str] = (),
    config: str = "",
    weights: str = "",
    method: str = "",
    device: str | None = None,
) -> list[ServedModel]:
    """List the models of the page: a trained model, CLIPs of the command line, then the embedded ones.

    Args:
        clips: open_clip models as NAME:PRETRAINED, see `clipdense.clip.load_clip`.
        config: config file of a trained model.
        weights: its weight file; by default the one that the config names.
        method: training-free method of ``clips``; by default SCLIP, or MaskCLIP where there is no ViT.
        device: device of all models; by default that of the config, for ``clips`` the GPU if there is one.

    Raises:
        ValueError: If weights are given without a config, or two models have the same name.
    """
    if weights and not config:
        raise ValueError("--weights needs the --config of the model")
    models = []
    if config:
        load = partial(Predictor, config, weights or None, device=device)
        models.append(ServedModel(config, load, own_classes=True))
    models += [ServedModel(clip, partial(_zero_shot, clip, method, device)) for clip in clips]
    for name, file in EMBEDDED.items():
        load = partial(Predictor, f"configs/{file}", device=device)
        models.append(ServedModel(name, load, background=GROUNDS))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"two models have the same name: {', '.join(names)}")
    return models


def _zero_shot(clip: str, method: str, device: str | None) -> Predictor:
    """Load a CLIP with a training-free method. Its one class only stands until words are typed."""
    load = partial(Predictor, device=device, vocabulary=["object"])
    if method:
        return load(_zero_shot_config(clip, method))
    try:
        return load(_zero_shot_config(clip, "sclip"))
    except ValueError as error:
        if "needs a ViT" not in str(error) and "does not fit" not in str(error):
            raise
        return load(_zero_shot_config(clip, "maskclip"))


def _zero_shot_config(clip: str, method: str) -> Any:
    """Return the config of a CLIP with the settings of SCLIP's paper: short side 336, windows of 224."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ZeroShotSegmentor"
    repository = clip.startswith(("hf-hub:", "local-dir:"))
    cfg.MODEL.CLIP.NAME, _, cfg.MODEL.CLIP.PRETRAINED = (clip, "", "") if repository else clip.partition(":")
    cfg.MODEL.ZERO_SHOT.METHOD = method
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 336, 2048
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg
