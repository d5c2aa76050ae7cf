"""Configuration keys: the shared ones here, each room's own in its ``config.py``."""

from detectron2.config import CfgNode as CN


def add_clipdense_config(cfg: CN) -> None:
    """Add every clipdense key, with its default, to a Detectron2 config (in place).

    Call it once, after ``detectron2.config.get_cfg()`` and the ``add_..._config`` of other projects: what
    they have set (Panoptic-DeepLab's SOLVER.OPTIMIZER) stays. A config that already has the keys is left as
    it is.
    """
    if "CLIP" in cfg.MODEL:
        return
    before = cfg.clone()
    # Allow pickled weight files, of any part of the model. A pickle can run code: set it only for files from
    # a source that you trust.
    cfg.MODEL.ALLOW_PICKLE = False

    cfg.MODEL.CLIP = CN()
    # A model name that `clipdense.clip.load_clip` knows: any open_clip model, or "shapes-rn", "shapes-vit",
    # "shapes-eva".
    cfg.MODEL.CLIP.NAME = "shapes-rn"
    # Its weights: an open_clip tag, a hub id, a local file, "random", or "" for the weights shipped with the
    # package.
    cfg.MODEL.CLIP.PRETRAINED = ""
    # How its position table is fitted to other grids than its own: "bicubic", "bilinear", or "crop" (the
    # top-left window; published DenseCLIP detectors).
    cfg.MODEL.CLIP.POSITION_RULE = "bicubic"
    # Side of the grid that the table is resized to, bilinearly, when the model is built; 0 keeps its own.
    cfg.MODEL.CLIP.POSITION_GRID = 0
    # An architecture without a name, as open_clip's model_cfg (embed_dim, vision_cfg, text_cfg, quick_gelu);
    # it takes the place of NAME's.
    cfg.MODEL.CLIP.CONFIG = CN(new_allowed=True)

    from clipdense.backbone.config import add_backbone_config
    from clipdense.data.config import add_data_config
    from clipdense.data.shapes.pretraining import add_shapes_pretraining_config
    from clipdense.engine.config import add_engine_config
    from clipdense.evaluation.config import add_evaluation_config
    from clipdense.maskformer.config import add_maskformer_config
    from clipdense.systems import add_systems_config

    add_data_config(cfg)
    add_shapes_pretraining_config(cfg)
    add_backbone_config(cfg)
    add_engine_config(cfg)
    add_evaluation_config(cfg)
    add_maskformer_config(cfg)
    add_systems_config(cfg)
    _restore(cfg, before)


def _restore(cfg: CN, before: CN) -> None:
    """Set every key of ``before`` in ``cfg`` as it was."""
    for key, value in before.items():
        if isinstance(value, CN) and isinstance(cfg.get(key), CN):
            _restore(cfg[key], value)
        else:
            cfg[key] = value
