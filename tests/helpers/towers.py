"""Small image towers of every family, with random weights."""

from collections.abc import Callable

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from clipdense.clip.towers import Tower, build_tower

DIM = 24
EVA = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (3, 3),
}


def timm_model(trunk: nn.Module, head: nn.Module | None = None) -> TimmModel:
    visual = TimmModel.__new__(TimmModel)  # its constructor takes registered, full-size trunks only
    nn.Module.__init__(visual)
    visual.trunk, visual.head, visual.image_size = trunk, head or nn.Sequential(), (64, 64)
    return visual


def vit_model(**kwargs: object) -> VisionTransformer:
    sizes = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(**{**sizes, "output_dim": DIM, **kwargs})


def _convnext(head: nn.Module) -> TimmModel:
    return timm_model(ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0), head)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ModifiedResNet([1, 2, 1, 1], DIM, 4, image_size=96, width=8),
    "vit": vit_model,
    "vit_clipa": lambda: vit_model(
        no_ln_pre=True, pool_type="avg", final_ln_after_pool=True, ls_init_value=0.1
    ),
    "vit_rectangular": lambda: vit_model(image_size=(48, 80)),
    "eva02": lambda: timm_model(
        Eva(
            **EVA,
            num_classes=DIM,
            global_pool="token",
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
        )
    ),
    "eva01": lambda: timm_model(
        Eva(**{**EVA, "use_rot_pos_emb": False}, num_classes=DIM, global_pool="token", init_values=0.1)
    ),
    "eva_post_norm": lambda: timm_model(Eva(**EVA, num_classes=DIM, global_pool="token", use_post_norm=True)),
    "pe": lambda: timm_model(
        Eva(
            **EVA,
            num_classes=DIM,
            global_pool="map",
            attn_type="rope",
            use_pre_transformer_norm=True,
            rope_grid_offset=1.0,
            rope_grid_indexing="xy",
        )
    ),
    "siglip": lambda: timm_model(
        TimmVisionTransformer(
            img_size=64,
            patch_size=16,
            embed_dim=DIM,
            depth=3,
            num_heads=2,
            class_token=False,
            global_pool="map",
            num_classes=0,
        )
    ),
    "timm_gap": lambda: timm_model(
        TimmVisionTransformer(
            img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2, global_pool="avg", num_classes=0
        ),
        nn.Sequential(nn.Linear(32, DIM, bias=False)),
    ),
    "timm_no_class": lambda: timm_model(
        TimmVisionTransformer(
            img_size=64,
            patch_size=16,
            embed_dim=32,
            depth=3,
            num_heads=2,
            class_token=False,
            global_pool="avg",
            num_classes=0,
        ),
        nn.Sequential(nn.Linear(32, DIM, bias=False)),
    ),
    "convnext": lambda: _convnext(nn.Sequential(nn.Linear(32, DIM, bias=False))),
    "convnext_mlp": lambda: _convnext(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, DIM))),
}


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that shows when it is skipped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                positive = name.endswith("running_var") or tensor.dim() == 1
                tensor.copy_(
                    0.2 * noise.abs() + 0.6 if positive else noise * 0.6 / max(tensor[0].numel(), 9) ** 0.5
                )
    return module.eval()


def tower_pair(family: str, position_rule: str = "bicubic") -> tuple[nn.Module, Tower]:
    visual = randomise(FAMILIES[family]())
    return visual, build_tower(visual, position_rule).eval()


def random_images(tower: Tower, size: tuple[int, int] | None = None, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(size or tower.image_size), generator=torch.Generator().manual_seed(1))
