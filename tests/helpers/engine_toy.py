"""A world that trains in milliseconds. As a program: tools/train_net.py with this world registered."""

import os
import runpy
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdense.data.loader import build_test_loader, build_train_loader
from clipdense.data.mappers import MAPPER_REGISTRY
from clipdense.evaluation import EVALUATOR_REGISTRY, Probes
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm

ROOT = Path(__file__).resolve().parents[2]
SIZE = 12


def records() -> list[dict[str, Any]]:
    return [
        {"file_name": f"toy/{i:02d}.png", "image_id": i, "height": 8, "width": 8, "poison": ""}
        for i in range(SIZE)
    ]


def poisoned() -> list[dict[str, Any]]:
    return [{**r, "poison": "nan" if r["image_id"] == 7 else ""} for r in records()]


def steep() -> list[dict[str, Any]]:
    return [{**r, "poison": "gradient" if r["image_id"] == 7 else ""} for r in records()]


for name, function in {"toy": records, "toy_poisoned": poisoned, "toy_steep": steep}.items():
    DatasetCatalog.register(name, function)
    MetadataCatalog.get(name).set(evaluator_type="toy", thing_classes=["thing"])


@MAPPER_REGISTRY.register()
class ToyMapper:
    """An image that the record determines, plus noise (the augmentation)."""

    def __init__(self, cfg: CfgNode | None = None, is_train: bool = True) -> None:
        self.is_train = is_train

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        image = np.random.RandomState(record["image_id"]).rand(3, 8, 8).astype(np.float32)
        if self.is_train:
            image += 0.1 * torch.randn(3, 8, 8).numpy()
        return {**record, "image": torch.from_numpy(image), "target": float(record["image_id"] % 3)}


@META_ARCH_REGISTRY.register()
class ToyNet(nn.Module):
    """Convolution, norm, dropout, linear; two losses that are means over images."""

    def __init__(self, cfg: CfgNode | None = None, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        if cfg is not None and "TOY" in cfg.MODEL:
            dropout, norm = cfg.MODEL.TOY.DROPOUT, cfg.MODEL.TOY.NORM
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 1)
        self.seen: list[list[int]] = []

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        x = torch.stack([sample["image"] for sample in batch])
        y = self.head(self.dropout(self.trunk(x).relu().mean((2, 3))))[:, 0]
        if not self.training:
            return [{"value": float(v)} for v in y]
        self.seen.append([sample["image_id"] for sample in batch])
        error = (y - y.new_tensor([sample["target"] for sample in batch])).square().mean()
        if any(sample["poison"] == "nan" for sample in batch):
            error = error * float("nan")
        size = y.square().mean()
        if any(sample["poison"] == "gradient" for sample in batch):
            size = size + (y - y.detach()).abs().sum().sqrt()  # 0, with an infinite slope
        return {"loss_error": error, "loss_size": 0.1 * size}

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {"head": self.head.weight}, {"model": "toy"}


@META_ARCH_REGISTRY.register()
class ToyNetWithoutDropout(ToyNet):
    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(dropout=0.0)


class ToyEvaluator(DatasetEvaluator):
    def __init__(self) -> None:
        self.errors: list[float] = []

    def reset(self) -> None:
        self.errors = []

    def process(self, inputs: Iterable[Any], outputs: Iterable[Any]) -> None:
        self.errors += [abs(o["value"] - i["target"]) for i, o in zip(inputs, outputs, strict=True)]

    def evaluate(self) -> dict[str, dict[str, float]]:
        torch.rand(3)  # evaluation may draw random numbers
        errors = [e for part in comm.gather(self.errors) for e in part]
        return {"toy": {"error": sum(errors) / len(errors)}} if errors else {}


@EVALUATOR_REGISTRY.register()
def toy(cfg: CfgNode, name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    return ToyEvaluator()


def toy_config(output_dir: str | Path, *overrides: Any) -> CfgNode:
    """Config of a run of 8 iterations that takes milliseconds."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.TOY = CfgNode({"DROPOUT": 0.2, "NORM": True})
    settings = {
        "MODEL.META_ARCHITECTURE": "ToyNet",
        "MODEL.DEVICE": "cpu",
        "INPUT.MAPPER": "ToyMapper",
        "DATASETS.TRAIN": ("toy",),
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.ASPECT_RATIO_GROUPING": False,
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 8,
        "SOLVER.CHECKPOINT_PERIOD": 100,
        "SOLVER.LOG_PERIOD": 1,
        "SEED": 1,
        "OUTPUT_DIR": str(output_dir),
    }
    cfg.merge_from_list([word for pair in settings.items() for word in pair] + list(overrides))
    return cfg


def lazy_train_loader(batch_size: int, seed: int, start_iter: int = 0) -> Any:
    cfg = toy_config("", "SOLVER.IMS_PER_BATCH", batch_size)
    return build_train_loader(cfg, start_iter, seed=seed)


def lazy_test_loader() -> Any:
    return build_test_loader(toy_config(""), "toy")


if __name__ == "__main__":
    # --kill-at N: the process kills itself, as kill -9 does, when it begins iteration N
    if "--kill-at" in sys.argv:
        from clipdense.engine.trainer import Trainer

        at = sys.argv.index("--kill-at")
        last, step = int(sys.argv[at + 1]), Trainer.run_step
        del sys.argv[at : at + 2]

        def run_step(self: Trainer) -> None:
            if self.iter == last:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self)

        Trainer.run_step = run_step  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "tools" / "train_net.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
