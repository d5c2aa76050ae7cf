"""Small datasets and trainings that the harness damages and kills."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.reliability.processes import ROOT, Ended, run_tool

__all__ = ["CONFIG", "World"]

CONFIG = "configs/shapes/mask_rcnn_clip_rn.yaml"


@dataclass(frozen=True)
class World:
    """Working folder with datasets of the shapes world, made on first use.

    Attributes:
        folder: the folder; reused if it exists.
    """

    folder: Path

    @cached_property
    def shapes4(self) -> Path:
        """Root of the validation split with 4 images."""
        return self._shapes("val", 4)

    @cached_property
    def shapes24(self) -> Path:
        """Root of the validation split with 24 images."""
        return self._shapes("val", 24)

    @cached_property
    def lvis8(self) -> Path:
        """Root of the LVIS-like validation split with 8 images."""
        root = self._shapes("lvis_val", 8)
        (root / "shapes").mkdir(exist_ok=True)  # coco_url names the images below "shapes"
        if not (root / "shapes/lvis_val").exists():
            (root / "shapes/lvis_val").symlink_to("../lvis_val")
        return root

    def prepare(self) -> None:
        """Make what several parts of a run share."""
        for root in (self.shapes4, self.shapes24, self.lvis8):
            assert root.exists()
        self.mining_words(self.folder / "mining")

    @property
    def log(self) -> Path:
        """Log of the jobs."""
        return self.folder / "jobs.log"

    def _shapes(self, split: str, images: int) -> Path:
        root = self.folder / f"{split}_{images}"
        if not (root / "parts" / split / f"{images}.done").exists():
            words = ("--split", split, "--images", images, "--root", root, "--workers", 1)
            ended = run_tool("make_shapes.py", *words, log=self.log)
            assert ended.code == 0, ended.text
        return root

    def training_options(self, output: Path, **changes: Any) -> list[str]:
        """Return ``KEY VALUE`` pairs of a training of 12 iterations on 24 small images; "__" is "."."""

        def entry(name: str, root: Path, images: int) -> str:
            return f"{name}:{root}/annotations/instances_closed_val_{images}.json:{root}/val"

        settings = {
            "DATASETS.COCO_JSON": str(
                [entry("tiny_train", self.shapes24, 24), entry("tiny_val", self.shapes4, 4)]
            ),
            "DATASETS.TRAIN": "['tiny_train']",
            "DATASETS.TEST": "['tiny_val']",
            "INPUT.MIN_SIZE_TRAIN": "(96,)",
            "INPUT.MIN_SIZE_TEST": 96,
            "SOLVER.MAX_ITER": 12,
            "SOLVER.MAX_SECONDS": 0.0,
            "SOLVER.CHECKPOINT_PERIOD": 3,
            "SOLVER.LOG_PERIOD": 1,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.WARMUP_ITERS": 4,
            "SEED": 7,
            "DATALOADER.NUM_WORKERS": 1,
            "OUTPUT_DIR": output,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [str(word) for pair in settings.items() for word in pair]

    def train(self, output: Path, *arguments: str, **changes: Any) -> Ended:
        """Run ``tools/train_net.py`` to its end."""
        return run_tool("train_net.py", *self.training_words(output, *arguments, **changes), log=self.log)

    def training_words(self, output: Path, *arguments: str, **changes: Any) -> list[str]:
        """Return the words after ``tools/train_net.py``."""
        return ["--config-file", CONFIG, *arguments, *self.training_options(output, **changes)]

    def mining_words(self, output: Path, jobs: int = 1) -> list[Any]:
        """Return the words after ``tools/mine_masks.py``: masks of the ground truth, parts of two images."""
        proposals = self.folder / "proposals.json"
        if not proposals.exists():
            content = json.loads((self.shapes24 / "annotations/instances_closed_val_24.json").read_text())
            masks = [{key: a[key] for key in ("image_id", "segmentation")} for a in content["annotations"]]
            proposals.write_text(json.dumps(masks))
        return [
            *("--config-file", ROOT / "configs/shapes/ovseg.yaml", "--image-root", self.shapes24 / "val"),
            *("--data", self.shapes24 / "annotations/captions_val_24.json", "--captions", "3"),
            *("--output", output, "--proposals", proposals, "--part-size", "2", "--jobs", str(jobs)),
        ]
