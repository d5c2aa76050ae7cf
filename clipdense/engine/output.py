"""Output folder of a run."""

import itertools
import shutil
from pathlib import Path

from clipdense.engine.lock import FolderLock, FolderLockedError
from clipdense.engine.options import ConfigError

__all__ = ["prepare_output_dir"]

# Files that a run writes into its output folder.
_OWN_FILES = (
    "*.pth",
    ".model_*.pth.*",
    "*.shards",
    ".model_*.shards.partial",
    "*.safetensors",
    "config.yaml",
    "environment.txt",
    "events.out.tfevents.*",
    "inference",
    "last_checkpoint",
    "log.txt*",
    "metrics.json",
    "model_best.json",
    "results.json",
    "predictions_*.png",
    "scores_*.png",
    "run_id.txt",
    "wandb",
    "curve.png",
)


def prepare_output_dir(output_dir: str, keep: bool, weights: str = "") -> Path | None:
    """Create and lock the folder; move the files of an earlier run to its subfolder ``old_1``, ``old_2``, ...

    The lock (see `clipdense.engine.lock.FolderLock`) ends with the process or with `Trainer.train`.

    Args:
        output_dir: path of the folder.
        keep: whether to leave the files of an earlier run in place, to resume or evaluate it.
        weights: weight file of the new run.

    Returns:
        Folder to which the files of an earlier run were moved; None if there were none.

    Raises:
        ConfigError: If the folder cannot be created or written, another process uses it, or ``weights``
            would be moved away.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        FolderLock(folder, "OUTPUT_DIR").acquire()
    except FolderLockedError as e:
        raise ConfigError(str(e)) from e
    except OSError as e:
        raise ConfigError(f"OUTPUT_DIR {output_dir} cannot be written: {e.strerror}") from e
    if keep or not any((folder / name).exists() for name in ("last_checkpoint", "metrics.json")):
        return None
    earlier = [path for pattern in _OWN_FILES for path in folder.glob(pattern)]
    if weights and Path(weights).resolve() in [path.resolve() for path in earlier]:
        raise ConfigError(
            f"MODEL.WEIGHTS {weights} belongs to the run in OUTPUT_DIR, whose files a new run moves away. "
            "Choose another OUTPUT_DIR, or continue that run with --resume."
        )
    target = next(p for n in itertools.count(1) if not (p := folder / f"old_{n}").exists())
    target.mkdir()
    for path in earlier:
        shutil.move(path, target / path.name)
    return target
