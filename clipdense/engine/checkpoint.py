"""Training checkpoints with atomic writes, and loading of weight files with strict accounting of keys."""

import fnmatch
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.checkpoint import LAYOUTS, Checkpoint, CheckpointError, convert_model, read_checkpoint
from clipdense.checkpoint.io import refuse_nonfinite_save, require_finite
from clipdense.checkpoint.shards import write_shards
from clipdense.files import WriteError, remove_leftovers, write_atomically, write_text
from clipdense.open_vocabulary import CheckpointMetadata, LoadHook, move_vocabulary_buffer

from detectron2.checkpoint import DetectionCheckpointer

__all__ = ["TrainingCheckpointer", "check_training_state", "model_metadata"]

_PERIODIC = re.compile(r"model_\d+\.pth")


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """Return what a model stores in checkpoints beside its tensors; empty for most models."""
    return model.checkpoint_metadata() if isinstance(model, CheckpointMetadata) else {}


# Entries of a training checkpoint that must have a type if they are there.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "optimizer": dict,
    "iteration": int,
    "data_order": dict,
    "elapsed": (int, float),
    "history": dict,
    "scalars": dict,
    "online": dict,
    "scaler": dict,
    "random_states": list,
    "shards": str,
}


def check_training_state(state: Mapping[str, Any], path: str) -> None:
    """Check the entries of a checkpoint from which a training is to be resumed.

    Raises:
        CheckpointError: If an entry is missing or cannot be used; the message names the file and the entry.
    """
    wrong = [key for key, kind in _ENTRIES.items() if key in state and not isinstance(state[key], kind)]
    needed = ("iteration",) if "shards" in state else ("optimizer", "iteration")
    wrong += [key for key in needed if key not in state]
    if not wrong:
        states = state.get("random_states", [])
        if not all(isinstance(s, dict) and {"python", "numpy", "torch", "cuda"} <= s.keys() for s in states):
            wrong.append("random_states")
        if state["iteration"] < 0:
            wrong.append("iteration")
        if not 0 <= state.get("elapsed", 0.0) < math.inf:
            wrong.append("elapsed")
    if wrong:
        raise CheckpointError(
            f"cannot resume from {path}: its entry {wrong[0]!r} is missing or damaged. Resume from an "
            "earlier checkpoint (write its name into last_checkpoint), or start from it with MODEL.WEIGHTS."
        )


class TrainingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with atomic writes and strict accounting of keys.

    A checkpoint gets its name, and `last_checkpoint` names it, only after it has been written completely, so
    that a run can always be resumed. A weight file is read without executing code. Unexpected and mismatched
    tensors are errors.

    A model that implements `CheckpointMetadata` stores its metadata in every checkpoint and gets the file's
    metadata before its tensors are loaded; one that implements `LoadHook` may then adapt the tensors.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        save_dir: folder of the checkpoints.
        skip: glob patterns of parameters that may be missing, mismatched or unexpected in a weight file.
        allow_pickle: whether a weight file may be a pickle.
        keep: number of periodic checkpoints (``model_0001999.pth``) to keep, the newest ones; 0 for all.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        skip: Sequence[str] = (),
        allow_pickle: bool = False,
        keep: int = 0,
    ) -> None:
        super().__init__(model, save_dir)
        self.skip, self.allow_pickle, self.keep = tuple(skip), allow_pickle, keep
        self.logger = logging.getLogger(__name__)
        self._path, self._complete = "", False
        self._optional: str | None = None
        self._content: Checkpoint | None = None

    def save(
        self, name: str, *, tag: bool = True, shards: Mapping[str, Tensor] | None = None, **data: Any
    ) -> None:
        """Write ``<name>.pth`` with the model's state (unless ``data`` has a ``model``) and ``data``.

        Args:
            tag: whether a resumed run starts from it.
            shards: tensors to write to the folder ``<name>.shards`` instead of the model's state, which they
                hold as ``model.<key>``. Every process must call this method.
            data: other entries; ``metadata`` is a dict, to which that of the model is added.

        Raises:
            CheckpointError: If it cannot be written, or a tensor of the model is not finite; the previous
                checkpoint is untouched.
        """
        if not self.save_dir:
            return
        basename = f"{name}.pth"
        if shards is None:
            data = {"model": self.model.state_dict(), **data}
            # in every process, so that all of them end
            refuse_nonfinite_save(data["model"], Path(self.save_dir, basename))
        else:
            data = {"shards": f"{name}.shards", **data}
        data["metadata"] = {**data.get("metadata", {}), **model_metadata(self.model)}
        try:
            if shards is not None:
                write_shards(Path(self.save_dir, data["shards"]), shards)
            if not self.save_to_disk:
                return
            write_atomically(Path(self.save_dir, basename), lambda file: torch.save(data, file))
            if tag:
                self.tag_last_checkpoint(basename)
        except WriteError as e:
            last = self.get_checkpoint_file() if self.has_checkpoint() else "none yet"
            raise CheckpointError(f"{e}\nThe last good checkpoint is {last}") from e
        self.logger.info("Saved %s", os.path.join(self.save_dir, basename))
        if self.keep:
            self._remove_old(basename)

    def _remove_old(self, saved: str) -> None:
        """Delete periodic checkpoints except the newest ones, which include the one just saved.

        The time of writing decides: a killed run may have left a higher number than its resumed run writes.
        """
        periodic = [p for p in Path(self.save_dir).iterdir() if _PERIODIC.fullmatch(p.name)]
        periodic.sort(key=lambda p: (p.name == saved, p.stat().st_mtime_ns, p.name))
        for old in periodic[: -self.keep]:
            old.unlink()
            shutil.rmtree(old.with_suffix(".shards"), ignore_errors=True)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint to ``last_checkpoint``."""
        write_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """Return the path of the last checkpoint; "" if there is none.

        Raises:
            CheckpointError: If ``last_checkpoint`` does not hold the name of a file.
        """
        record = Path(self.save_dir, "last_checkpoint")
        try:
            name = record.read_text().strip()
        except OSError:
            return ""
        except UnicodeDecodeError:
            name = ""
        if not name.endswith(".pth") or Path(name).name != name or "\0" in name:
            raise CheckpointError(
                f"{record} is damaged: it must hold the name of a checkpoint in its folder. "
                "Write the name of the newest model_*.pth into it."
            )
        return str(record.with_name(name))

    def remove_leftovers(self) -> None:
        """Delete incomplete files of a killed process."""
        if self.save_dir:
            remove_leftovers(self.save_dir, "model_*.pth")
            for path in Path(self.save_dir).glob(".model_*.shards.partial"):
                shutil.rmtree(path, ignore_errors=True)

    def load_weights(
        self, path: str, complete: bool = False, file: Checkpoint | None = None
    ) -> dict[str, Any]:
        """Load the model's weights; returns what else the file holds.

        Args:
            path: a .pth, .safetensors or model-zoo file, a published model's of a known layout, or a URL that
                Detectron2's path manager knows; "" loads nothing.
            complete: whether the file must hold every parameter (evaluation, resuming). Otherwise parameters
                that it lacks keep their initial values, and are listed in the log.
            file: content of the weight file under the keys of clipdense, if it has been read already.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: it cannot be read, or does not fit; with the full list of what does not.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"weight file {path} does not exist (MODEL.WEIGHTS, or the checkpoint to resume from)"
            )
        self._path, self._complete, self._optional, self._content = path, complete, None, file
        try:
            return self.load(path, checkpointables=[])
        finally:
            self._content = None

    def _load_file(self, f: str) -> dict[str, Any]:
        if not f.endswith((".pkl", ".pyth")):
            file = self._content or convert_model(read_checkpoint(f, allow_pickle=self.allow_pickle))
            source = LAYOUTS.get(file.metadata.get("source", ""))
            if source is not None:  # a published model is there whole, or is not that model
                self._complete, self._optional = True, source.optional
            stored = file.extras.get("metadata")
            stored_metadata = stored if isinstance(stored, dict) else {}  # of a training checkpoint
            state, metadata = move_vocabulary_buffer(file.state, {**file.metadata, **stored_metadata})
            return {"model": state, **file.extras, "metadata": metadata}
        if not self.allow_pickle:  # the layouts of Detectron2's model zoo
            raise CheckpointError(
                f"{f} is a pickle, which can run code when opened: "
                "set MODEL.ALLOW_PICKLE True if you trust it"
            )
        return super()._load_file(f)

    def _load_model(self, checkpoint: Any) -> Any:
        arrays = {k: torch.as_tensor(v) for k, v in checkpoint["model"].items() if hasattr(v, "shape")}
        require_finite(arrays, self._path)
        self._zoo = bool(checkpoint.get("matching_heuristics"))
        self._offered = len(checkpoint["model"])
        if isinstance(self.model, CheckpointMetadata):
            self.model.load_checkpoint_metadata(checkpoint.get("metadata", {}))
        if isinstance(self.model, LoadHook):
            self.model.prepare_state(checkpoint["model"])
        for key in [k for k in checkpoint["model"] if self._skipped(k)]:
            own = self.model.state_dict().get(key)
            value = checkpoint["model"][key]
            if own is None or tuple(own.shape) != tuple(value.shape):
                self.logger.warning("Not loaded, as MODEL.WEIGHTS_SKIP says: %s %s", key, tuple(value.shape))
                del checkpoint["model"][key]
        if self._offered and not checkpoint["model"]:
            raise CheckpointError(f"MODEL.WEIGHTS_SKIP leaves nothing of {self._path} to load")
        return super()._load_model(checkpoint)

    def _skipped(self, key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.skip)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        elsewhere = re.compile(self._optional or r"(?!)")
        missing = [
            k for k in incompatible.missing_keys if not self._skipped(k) and not elsewhere.fullmatch(k)
        ]
        unexpected, shapes = list(incompatible.unexpected_keys), incompatible.incorrect_shapes
        if self._zoo and len(unexpected) < self._offered:
            unexpected = []  # a model-zoo trunk comes with the classifier it was trained with
        problems = [f"  {k}: {tuple(a)} in the file, {tuple(b)} in the model" for k, a, b in shapes]
        problems += [f"  {k}: not in the model" for k in unexpected]
        if self._complete:
            problems += [f"  {k}: not in the file" for k in missing]
        if problems:
            raise CheckpointError(
                f"{self._path} does not fit the model:\n" + "\n".join(problems) + "\n"
                "Give the config it was made with, or name what may differ in MODEL.WEIGHTS_SKIP, "
                'e.g. ("roi_heads.box_predictor.*",) for another list of classes.'
            )
        if missing:
            self.logger.warning("Not in %s, left at their initial values:\n%s", self._path, _lines(missing))


def _lines(keys: Iterable[str]) -> str:
    return "\n".join(f"  {key}" for key in keys)
