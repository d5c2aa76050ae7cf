"""What one process computes on a global batch, or several on their shares of it.

Run by torchrun, ``shares.py OUT`` writes the results of all processes together; imported, `results()` gives
those of one process. They must agree.
"""

import argparse
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.data.shapes.pretraining import ContrastiveCLIP
from clipdense.engine.distributed import SyncBatchNorm, convert_sync_batchnorm
from clipdense.engine.options import TrainerOptions
from clipdense.engine.parallel import build_parallel
from clipdense.engine.trainer import Trainer
from clipdense.regions import RegionEncoder
from clipdense.run.config import add_clipdense_config
from clipdense.systems.clipself import CLIPSelf, RegionCLIPBaseline
from clipdense.systems.mask_adaptation import MaskAdaptedCLIP
from tests.helpers.engine_toy import ROOT, toy_config

from detectron2.config import CfgNode, get_cfg
from detectron2.engine.hooks import CallbackHook
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage


def share(batch: Any, uneven: bool = False) -> Any:
    """This process's part; uneven shares are all but one, and one."""
    rank, world = comm.get_rank(), comm.get_world_size()
    if world == 1 or not uneven:
        return batch[rank::world]
    return batch[:-1] if rank == 0 else batch[-1:]


def total(value: Tensor) -> Tensor:
    """Sum over processes."""
    value = value.detach().clone()
    if comm.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def gradients(model: nn.Module, batch: Any, kind: str = "ddp", **options: Any) -> dict[str, Tensor]:
    """One forward and backward pass; losses averaged over processes, and whole gradients by name.

    Args:
        batch: this process's share.
        kind: "ddp" or "fsdp".
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    parallel = build_parallel(model, optimizer, TrainerOptions("", 1, parallel=kind, **options))
    parallel.wrapped.train()
    half = len(batch) // 2 if options.get("accumulation_steps", 1) > 1 else 0
    found: dict[str, Tensor] = {}
    for part in [batch[:half], batch[half:]] if half else [batch]:
        with EventStorage(), parallel.sync(enabled=part[-1] is batch[-1]):
            losses = {k: v * len(part) / len(batch) for k, v in parallel.wrapped(part).items()}
            sum(losses.values()).backward()
        for name, loss in losses.items():
            mean = total(loss) / comm.get_world_size()
            found[f"loss {name}"] = found.get(f"loss {name}", torch.tensor(0.0)) + mean
    for name, p in parallel.model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
    return found


def norm(layer: str, empty: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of a norm on uneven shares (``empty``: one process has no images)."""
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 5) * torch.tensor([1.0, 30.0, 0.1]).view(3, 1, 1) + 2.0
    if layer == "BatchNorm1d":
        x = x[:, :, 0, 0]
    up = torch.randn_like(x)
    kinds = {"BatchNorm1d": nn.BatchNorm1d, "BatchNorm2d": nn.BatchNorm2d, "BatchNormAct2d": BatchNormAct2d}
    module = kinds[layer](3)
    if comm.get_world_size() > 1:
        module = convert_sync_batchnorm(nn.Sequential(module))[0]
        assert isinstance(module, SyncBatchNorm)
    nn.init.uniform_(module.weight), nn.init.uniform_(module.bias)
    mine = slice(None)
    if comm.get_world_size() > 1:
        cut = 6 if empty else 5
        mine = slice(0, cut) if comm.get_rank() == 0 else slice(cut, 6)
    found = {}
    for _ in range(2):  # twice, so that the statistics are averages
        module.zero_grad()
        part = x[mine].clone().requires_grad_()
        y = module(part)
        (y * up[mine]).sum().backward()
        whole = torch.zeros_like(x), torch.zeros_like(x)
        whole[0][mine], whole[1][mine] = y.detach(), part.grad
        found = {"output": total(whole[0]), "input gradient": total(whole[1])}
    found |= {f"{n} gradient": total(p.grad) for n, p in module.named_parameters()}
    found |= {n: b.clone() for n, b in module.named_buffers()}
    return found | {"evaluation": module.eval()(x).detach()}


def training(folder: str, *overrides: Any) -> dict[str, Tensor]:
    """Losses of four iterations, gradients of the first, weights after the last."""
    Path(folder).mkdir(exist_ok=True)
    torch.manual_seed(0)
    # not AdamW: it takes full steps where the gradient is only rounding (a bias before a norm)
    settings = ("MODEL.TOY.DROPOUT", 0.0, "SOLVER.MAX_ITER", 4, "SOLVER.OPTIMIZER", "SGD")
    trainer = Trainer(toy_config(folder, *settings, *overrides))
    trainer.resume_or_load(False)
    found: dict[str, Tensor] = {}

    def note(t: Trainer) -> None:
        if t.iter == 0:
            found.update({f"{n} gradient": p.grad.clone() for n, p in t.model.named_parameters()})
        for name in ("total_loss", "grad_norm"):
            found[f"{name} {t.iter}"] = torch.tensor(t.storage.history(name).latest())

    trainer.register_hooks([CallbackHook(after_step=note)])
    trainer.train()
    return found | {k: v.clone() for k, v in trainer.model.state_dict().items()}


def fault(folder: str) -> dict[str, Tensor]:
    """A NaN that one process meets ends all of them, and is explained."""
    try:
        training(folder, "DATASETS.TRAIN", ("toy_poisoned",))
    except FloatingPointError as e:
        told = [word in str(e) for word in ("loss_error = nan", "loss_size = nan", "toy/07.png")]
        return {"message": torch.tensor(told)}
    return {}


def interruption(folder: str) -> dict[str, Tensor]:
    """A signal to the last process ends all of them after the next iteration, with a checkpoint."""
    trainer = Trainer(toy_config(folder))
    last = comm.get_rank() == comm.get_world_size() - 1
    send = lambda t: os.kill(os.getpid(), signal.SIGTERM) if t.iter == 1 and last else None  # noqa: E731
    trainer.register_hooks([CallbackHook(before_step=send)])
    try:
        trainer.resume_or_load(False)
        trainer.train()
    except SystemExit as e:
        state = torch.load(trainer.checkpointer.get_checkpoint_file())
        return {"code": torch.tensor(e.code), "iteration": torch.tensor(state["iteration"])}
    return {}


@BACKBONE_REGISTRY.register()
class SmoothNet(Backbone):
    """Without ReLUs, where rounding may decide which side of zero a value is on."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        self.p2 = nn.Sequential(nn.Conv2d(3, 16, 5, 4, 2), nn.BatchNorm2d(16), nn.GELU())
        self.p3 = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.GELU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p2 = self.p2(x)
        return {"p2": p2, "p3": self.p3(p2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=16, stride=stride) for name, stride in (("p2", 4), ("p3", 8))}


def mask_rcnn(kind: str = "ddp") -> dict[str, Tensor]:
    """A small Mask R-CNN whose sampling leaves nothing to chance: everything is sampled."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    model = cfg.MODEL
    model.DEVICE, model.META_ARCHITECTURE, model.MASK_ON = "cpu", "GeneralizedRCNN", True
    model.BACKBONE.NAME = "SmoothNet"
    model.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    model.RPN.IN_FEATURES, model.RPN.BATCH_SIZE_PER_IMAGE = ["p2", "p3"], 1000
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN = 100, 10
    model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3"]
    model.ROI_HEADS.NUM_CLASSES, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 1000
    # regions of interest are the annotated boxes alone: as many on each process
    model.ROI_HEADS.IOU_THRESHOLDS = [0.99]
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC, model.ROI_BOX_HEAD.FC_DIM = (
        "FastRCNNConvFCHead",
        1,
        32,
    )
    model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    model.ROI_MASK_HEAD.CONV_DIM, model.ROI_MASK_HEAD.NORM = 16, "BN"
    torch.manual_seed(0)
    net = build_model(cfg)
    net = convert_sync_batchnorm(net) if comm.get_world_size() > 1 else net
    batch = []
    for i in range(4):
        random = torch.Generator().manual_seed(i)
        corner = torch.rand(2, 2, generator=random) * 20
        side = 16 + torch.rand(2, 2, generator=random) * 20
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], 1))
        instances.gt_classes = torch.randint(3, (2,), generator=random)
        instances.gt_masks = BitMasks(torch.rand(2, 64, 64, generator=random) > 0.5)
        image = (torch.rand(3, 64, 64, generator=random) * 255).byte()
        batch.append({"image": image, "instances": instances, "height": 64, "width": 64})
    return gradients(net, share(batch), kind)


def contrastive() -> dict[str, Tensor]:
    """ContrastiveCLIP, whose loss compares the crops of all processes."""
    torch.manual_seed(0)
    net: nn.Module = ContrastiveCLIP(clip=load_clip("shapes-rn", "random"))
    net = convert_sync_batchnorm(net) if comm.get_world_size() > 1 else net
    batch = []
    for i in range(4):
        random = torch.Generator().manual_seed(i)
        contents = torch.zeros(2, 96, dtype=torch.uint8)
        contents[0, 3], contents[1, 10 * i] = 1, 1  # the first crop of each shows the same
        captions = ["a red star", f"a {('blue', 'green', 'pink', 'grey')[i]} circle on sand"]
        crops = (torch.rand(2, 3, 64, 64, generator=random) * 255).byte()
        batch.append({"crops": crops, "captions": captions, "contents": contents})
    return gradients(net, share(batch))


def mask_adapted(kind: str = "ddp", **options: Any) -> dict[str, Tensor]:
    """MaskAdaptedCLIP, whose loss compares the regions of all processes; two nouns are the same."""
    torch.manual_seed(0)
    encoder = RegionEncoder(load_clip("shapes-vit", "random"), mask_prompts=MaskPrompts(2, 64, 128))
    net = MaskAdaptedCLIP(encoder=encoder, trainable="both")
    random = torch.Generator().manual_seed(0)
    batch = []
    for noun in ("red star", "sand", "blue ring", "sand"):
        mask = torch.zeros(1, 64, 64)
        mask[:, 10:50, :30] = 1
        batch.append({"region": torch.randn(3, 64, 64, generator=random), "region_mask": mask, "noun": noun})
    return gradients(net, share(batch), kind, **options)


def clipself(kind: str = "ddp", **options: Any) -> dict[str, Tensor]:
    """CLIPSelf, whose loss is a mean over regions, of which images have different numbers."""
    torch.manual_seed(0)
    clip = load_clip("shapes-vit", "random")
    net = CLIPSelf(clip=clip, embedding_weight=0.5)
    with torch.no_grad():  # the student is not the teacher any more
        for parameter in clip.visual.parameters():
            parameter.mul_(1.02)
    random = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 0.5, 1], [0.25, 0.25, 1, 1], [0.1, 0.2, 0.4, 0.5]])
    batch = [
        {
            "image": (torch.rand(3, 64, 64, generator=random) * 255).byte(),
            "boxes": boxes[:n],
            "crops": (torch.rand(n, 3, 64, 64, generator=random) * 255).byte(),
        }
        for n in (3, 1, 2, 1)
    ]
    return gradients(net, share(batch), kind, **options)


def region_concepts() -> dict[str, Tensor]:
    """RegionCLIPBaseline on uneven shares; all concepts are compared with."""
    torch.manual_seed(0)
    concepts = torch.randn(3, 128)
    net = RegionCLIPBaseline(clip=load_clip("shapes-vit", "random"), concepts=concepts)
    random = torch.Generator().manual_seed(0)
    batch = [
        {
            "image": (torch.rand(3, 64, 64, generator=random) * 255).byte(),
            "boxes": torch.tensor([[0.0, 0, 0.5, 1], [0.25, 0.25, 1, 1]])[:n],
            "concepts": torch.tensor([2, 0])[:n],
        }
        for n in (2, 1, 2, 0)
    ]
    return gradients(net, share(batch, uneven=True))


def results(folder: str) -> dict[str, dict[str, Tensor]]:
    """Everything, by name."""
    sync = "MODEL.SYNC_BN", True
    return {
        **{layer: norm(layer) for layer in ("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d")},
        "BatchNorm2d, one process idle": norm("BatchNorm2d", empty=True),
        "training": training(f"{folder}/a", *sync),
        "training in parts": training(f"{folder}/b", "SOLVER.ACCUMULATION_STEPS", 2, "MODEL.TOY.NORM", False),
        "training without sync": training(f"{folder}/c"),
        "a NaN on one process": fault(f"{folder}/d"),
        "a signal to one process": interruption(f"{folder}/e"),
        "Mask R-CNN": mask_rcnn(),
        "ContrastiveCLIP": contrastive(),
        "MaskAdaptedCLIP": mask_adapted(),
        "CLIPSelf": clipself(),
        "RegionCLIPBaseline": region_concepts(),
    }


def train_net(folder: str) -> None:
    """tools/train_net.py with evaluation of two datasets; what it writes is compared."""
    config = Path(folder, "toy.yaml")
    if comm.is_main_process():
        config.write_text(
            "MODEL: {META_ARCHITECTURE: ToyNetWithoutDropout, SYNC_BN: True}\nINPUT: {MAPPER: ToyMapper}\n"
            "DATASETS:\n  TRAIN: ('toy',)\n  TEST: ('toy', 'toy_steep')\nVERSION: 2\n"
        )
    comm.synchronize()
    settings = {
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.LOG_PERIOD": 1,
        "SOLVER.EMA_DECAY": 0.5,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "SEED": 5,
        "TEST.EVAL_PERIOD": 3,
        "TEST.BEST_METRIC": "toy/toy/error",
        "TEST.BEST_MODE": "min",
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": f"{folder}/run",
    }
    opts = [str(word) for pair in settings.items() for word in pair]
    main = runpy.run_path(str(ROOT / "tools" / "train_net.py"))["main"]
    main(argparse.Namespace(config_file=str(config), opts=opts, resume=False, eval_only=False))


def main(folder: str) -> None:
    found = results(folder)
    if comm.is_main_process():
        torch.save(found, f"{folder}/shares.pth")
    train_net(folder)


if __name__ == "__main__":
    from clipdense.engine.launch import launch

    torch.set_num_threads(1)
    launch(main, 1, args=(sys.argv[1],))
