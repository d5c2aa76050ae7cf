"""Models that the web page offers: the embedded CLIPs, CLIPs of the command line, and a trained model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.options import ConfigError
from clipdense.open_vocabulary import OpenVocabularyModel
from clipdense.run.predictor import Predictor
from clipdense.run.web.limits import RequestError
from clipdense.run.zero_shot import default_background, zero_shot_config

__all__ = ["EMBEDDED", "ServedModel", "served_models"]

EMBEDDED = {
    "shapes-rn (MaskCLIP)": "shapes/zero_shot_maskclip_rn.yaml",
    "shapes-vit (SCLIP)": "shapes/zero_shot_sclip_vit.yaml",
    "shapes-eva (ClearCLIP)": "shapes/zero_shot_clearclip_eva.yaml",
}
"""Name on the page -> config of the package, for the CLIPs that come with it."""


class ServedModel:
    """Model of the page, which is loaded when it is first used.

    Args:
        name: name on the page.
        load: loads the model.
        own_classes: whether the model has classes of its own, which it predicts if no words are typed.
        background: suggested background words.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Predictor],
        *,
        own_classes: bool = False,
        background: str = "",
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
        method: training-free method of ``clips``; default: see `zero_shot_config`.
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
    for clip in clips:
        load, background = (
            partial(_zero_shot, clip, method, device),
            default_background(_parts(clip)[0]) or "",
        )
        models.append(ServedModel(clip, load, background=background))
    for name, file in EMBEDDED.items():
        load = partial(Predictor, f"configs/{file}", device=device)
        models.append(ServedModel(name, load, background=default_background("shapes-rn") or ""))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"two models have the same name: {', '.join(names)}")
    return models


def _zero_shot(clip: str, method: str, device: str | None) -> Predictor:
    """Load a CLIP with a training-free method. Its one class only stands until words are typed."""
    cfg = zero_shot_config(*_parts(clip), method)
    return Predictor(cfg, device=device, vocabulary=["object"])


def _parts(clip: str) -> tuple[str, str]:
    """Return model name and tag or weight file of NAME:PRETRAINED."""
    if clip.startswith(("hf-hub:", "local-dir:")):
        return clip, ""
    name, _, pretrained = clip.partition(":")
    return name, pretrained
