"""Configuration keys of `clipdense.engine`.

Detectron2's own ``SOLVER`` and ``TEST`` keys keep their meaning. An iteration is one optimizer step on
``SOLVER.IMS_PER_BATCH`` images, regardless of the number of processes and accumulation steps.
"""

from detectron2.config import CfgNode as CN


def add_engine_config(cfg: CN) -> None:
    """Add the keys of `clipdense.engine` to ``cfg`` (in place)."""
    # Optimizer: "SGD" (with MOMENTUM, NESTEROV) or "AdamW" (with BETAS, EPS).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # AdamW: decay rates of the two moments.
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # AdamW: constant added to the denominator.
    cfg.SOLVER.EPS = 1e-8
    # Weight decay of vectors and scalars that are neither norms nor biases (class tokens, layer scale,
    # temperatures); None: WEIGHT_DECAY.
    cfg.SOLVER.WEIGHT_DECAY_VECTORS = None
    # Rules for parameters by name: a list of dicts with MATCH (regular expression, searched in the full name)
    # and any of LR (multiplier of BASE_LR), WEIGHT_DECAY, LAYER_DECAY (factor per ViT block, counted from the
    # last one), FREEZE (bool). A later rule overrides an earlier one.
    cfg.SOLVER.PARAM_GROUPS = []

    # Final learning rate of WarmupCosineLR and WarmupPolyLR; absolute, like BASE_LR.
    cfg.SOLVER.BASE_LR_END = 0.0
    # Learning rate at which every parameter group ends, whatever its multiplier:
    # (lr - MIN_LR) * decay + MIN_LR (mmcv's min_lr). It also trains a group with multiplier 0, as published
    # DenseCLIP segmentors train their text encoder. Absolute; not together with BASE_LR_END. (WARMUP_METHOD
    # also accepts "scaled_linear": the scheduled learning rate times a factor that rises from WARMUP_FACTOR
    # to 1, as in mmcv.)
    cfg.SOLVER.MIN_LR = 0.0
    # Exponent of WarmupPolyLR: the learning rate is BASE_LR * (1 - progress) ** POLY_LR_POWER.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Wall-clock limit of training in seconds, including evaluation during training; 0: no limit. Training
    # ends at MAX_ITER or MAX_SECONDS, whichever comes first, and the learning-rate schedule follows the one
    # that is closer to its end. A MAX_ITER on the command line lifts the limit of a config file.
    cfg.SOLVER.MAX_SECONDS = 0.0

    # Data type of autocast if AMP.ENABLED: "float16" (with loss scaling) or "bfloat16".
    # (CLIP_GRADIENTS.CLIP_TYPE also accepts "full_model": one norm over all gradients.)
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Data type of autocast in evaluation and prediction: "float32" (no autocast), "float16" or "bfloat16".
    # Outputs are float32 in any case. (Key of training: SOLVER.AMP.)
    cfg.TEST.PRECISION = "float32"
    # Whether convolutions work in channels-last order, for which GPUs have faster kernels. Results change by
    # rounding errors.
    cfg.MODEL.CHANNELS_LAST = False
    cfg.MODEL.COMPILE = CN()
    # Names of submodules that torch.compile compiles when they run first, e.g. ("backbone",). It takes
    # minutes and pays in long runs. ("MODEL.TWO_STAGE.COMPILE" compiles CLIP on crops.)
    cfg.MODEL.COMPILE.MODULES = ()
    # Mode of torch.compile: "default", "reduce-overhead" (with CUDA graphs, for inputs of fixed shapes),
    # "max-autotune" or "max-autotune-no-cudagraphs".
    cfg.MODEL.COMPILE.MODE = "default"
    # Number of parts of each process's batch: one forward and backward pass per part, one optimizer step for
    # all of them.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Value of DistributedDataParallel(find_unused_parameters=...): True for models whose forward does not use
    # every parameter.
    cfg.SOLVER.FIND_UNUSED_PARAMETERS = False
    # How several processes share the model: "ddp" (each has all of it) or "fsdp" (FSDP2: each has a part of
    # the trained parameters, gradients and optimizer states; for towers that do not fit into one GPU). With
    # "fsdp", FIND_UNUSED_PARAMETERS is for models whose processes do not use the same parameters.
    cfg.SOLVER.PARALLEL = "ddp"
    # fsdp: number of neighbouring processes that share one copy of the model, e.g. the GPUs of a machine; it
    # divides the number of processes. 0: all processes share one copy.
    cfg.SOLVER.SHARD_PROCESSES = 0
    # Whether transformer blocks recompute their activations in the backward pass: less memory, about a third
    # more time.
    cfg.SOLVER.ACTIVATION_CHECKPOINTING = False
    # Decay of the exponential moving average of the weights, e.g. 0.9998; 0: no average. The averaged weights
    # are evaluated and exported.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Number of periodic checkpoints to keep; 0: all. The final and the best one are always kept.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # Seconds after which a run of several processes ends because one of them is stopped or its machine is
    # gone; 0: never. Slow steps of a process that is alive do not count.
    cfg.SOLVER.RANK_TIMEOUT = 20.0
    # Period of log lines and rows of metrics.json, in iterations.
    cfg.SOLVER.LOG_PERIOD = 20
    # Services that get the metrics and the pictures of the predictions, beside metrics.json (JSON lines),
    # which is always written: any of "tensorboard", "wandb" (WANDB_MODE=offline keeps the data in OUTPUT_DIR)
    # and "trackio". The last two need pip install "clipdense[track]".
    cfg.SOLVER.LOGGERS = ("tensorboard",)
    # Name under which wandb and trackio group runs; a run has the name of its output folder.
    cfg.SOLVER.LOGGER_PROJECT = "clipdense"

    # Metric that selects model_best.pth, e.g. "bbox/AP50" ("dataset/bbox/AP50" with several test datasets),
    # or "validation/total_loss" (with BEST_MODE "min" and TEST.LOSS.PERIOD); "": no best checkpoint.
    cfg.TEST.BEST_METRIC = ""
    # Whether the best value is the "max" or the "min".
    cfg.TEST.BEST_MODE = "max"

    # Loss on validation data, logged as validation/total_loss and validation/<loss>. Norms use their running
    # statistics, nothing is dropped out, and order, augmentation and random regions are the same each time;
    # the training is not affected.
    cfg.TEST.LOSS = CN()
    # Iterations between two measurements; 0: none.
    cfg.TEST.LOSS.PERIOD = 0
    # Datasets with annotations and the classes of the training datasets; empty: DATASETS.TEST.
    cfg.TEST.LOSS.DATASETS = ()
    # Largest number of batches of SOLVER.IMS_PER_BATCH images; 0: all images.
    cfg.TEST.LOSS.MAX_BATCHES = 0
    cfg.TEST.EARLY_STOPPING = CN()
    # Number of evaluations without a better TEST.BEST_METRIC after which training ends; 0: never.
    cfg.TEST.EARLY_STOPPING.PATIENCE = 0

    # Whether batch norms compute their statistics over all processes (on CPU and GPU).
    cfg.MODEL.SYNC_BN = False
    # Glob patterns of parameters that may be missing, mismatched or unexpected in MODEL.WEIGHTS, e.g.
    # "roi_heads.box_predictor.*" for another list of classes. All other differences are errors.
    cfg.MODEL.WEIGHTS_SKIP = ()
