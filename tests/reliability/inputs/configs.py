"""Configs: values out of range, of another type, unknown names, and YAML files that are none."""

import argparse
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.mutations import damage_bytes
from tests.reliability.outcomes import Case
from tests.reliability.processes import ROOT
from tests.reliability.world import CONFIG, World

# Key -> values, as the command line gives them.
VALUES = {
    "SOLVER.IMS_PER_BATCH": ("0", "-1", "1.5", "'x'", "None", "3000000000000"),
    "SOLVER.MAX_ITER": ("0", "-1", "1.5", "'x'", "None"),
    "SOLVER.BASE_LR": ("-1.0", "float('nan')", "1e400", "'x'", "None"),
    "SOLVER.BASE_LR_END": ("-1.0",),
    "SOLVER.CHECKPOINT_PERIOD": ("0", "-5"),
    "SOLVER.LOG_PERIOD": ("0", "-1"),
    "SOLVER.OPTIMIZER": ("'Adam'", "''", "3"),
    "SOLVER.BETAS": ("(0.9,)", "(2.0, 0.9)", "('a','b')", "()"),
    "SOLVER.EPS": ("-1.0",),
    "SOLVER.WEIGHT_DECAY": ("-1.0", "'x'"),
    "SOLVER.LR_SCHEDULER_NAME": ("'x'",),
    "SOLVER.WARMUP_METHOD": ("'x'",),
    "SOLVER.WARMUP_ITERS": ("-5", "'x'"),
    "SOLVER.ACCUMULATION_STEPS": ("0", "-1"),
    "SOLVER.EMA_DECAY": ("1.0", "-0.1"),
    "SOLVER.MAX_SECONDS": ("-1.0",),
    "SOLVER.PARAM_GROUPS": (
        "[5]",
        "[{}]",
        "[{'MATCH':'('}]",
        "[{'MATCH':'.','LR':'x'}]",
        "[{'MATCH':'.','LRR':1}]",
        "'x'",
    ),
    "SOLVER.CHECKPOINT_KEEP": ("-1",),
    "SOLVER.AMP.DTYPE": ("'int8'",),
    "SEED": ("'x'", "2**70", "1.5"),
    "TEST.EVAL_PERIOD": ("-1", "'x'"),
    "TEST.BEST_MODE": ("'x'",),
    "TEST.METRIC_BACKEND": ("'x'",),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("0", "-1", "79", "'x'", "10**12"),
    "MODEL.META_ARCHITECTURE": ("'Nope'", "''"),
    "MODEL.BACKBONE.NAME": ("'x'",),
    "MODEL.BACKBONE.FREEZE_AT": ("-1", "99", "'x'"),
    "MODEL.TRUNK.NAME": ("'x'", "''"),
    "MODEL.CLIP.NAME": ("'nope'", "''", "'/nothere.pt'", "'shapes-rm'"),
    "MODEL.CLIP.PRETRAINED": ("'nope'", "'/nothere.pt'"),
    "MODEL.DEVICE": ("'gpu'", "'cuda:7'", "''"),
    "MODEL.WEIGHTS": ("'/nothere.pth'", "'/etc/passwd'", "'/'"),
    "MODEL.PIXEL_MEAN": ("[1.0]", "[]", "['a','b','c']"),
    "MODEL.PIXEL_STD": ("[0.0,0.0,0.0]", "[1.0]", "[-1.0,1.0,1.0]"),
    "MODEL.FPN.OUT_CHANNELS": ("0", "-1"),
    "MODEL.FPN.IN_FEATURES": ("[]", "['x']"),
    "MODEL.FPN.NORM": ("'XX'",),
    "MODEL.ANCHOR_GENERATOR.SIZES": ("[]", "[[0]]", "[['a']]"),
    "MODEL.RPN.IN_FEATURES": ("['p9']", "[]"),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": ("0", "-1"),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": ("0", "-1"),
    "MODEL.RPN.POSITIVE_FRACTION": ("2.0", "-1.0"),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": ("0", "-1"),
    "MODEL.ROI_HEADS.IN_FEATURES": ("['p9']", "[]"),
    "MODEL.ROI_HEADS.NAME": ("'x'",),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": ("0", "-1"),
    "MODEL.ROI_BOX_HEAD.FC_DIM": ("0", "-1"),
    "DATASETS.TRAIN": ("[]", "['nope']", "['shapes_closed_mini_trian']", "[5]"),
    "DATASETS.TEST": ("['nope']",),
    "DATASETS.COCO_JSON": ("'x'", "['a']", "['a:b']", "[5]", "['a:/nothere.json:/tmp']", "['a:b:c:d']"),
    "DATASETS.IMAGES": ("['a']", "['a:/nothere']", "[None]"),
    "DATALOADER.NUM_WORKERS": ("-1", "'x'"),
    "DATALOADER.SAMPLER_TRAIN": ("'x'",),
    "INPUT.MAPPER": ("'x'",),
    "INPUT.FORMAT": ("'x'",),
    "INPUT.MASK_FORMAT": ("'x'",),
    "INPUT.MIN_SIZE_TRAIN": ("()", "(0,)", "(-5,)", "('a',)"),
    "INPUT.MAX_SIZE_TRAIN": ("0", "-1"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("'x'",),
    "INPUT.RANDOM_FLIP": ("'x'",),
    "OUTPUT_DIR": ("'/proc/x'", "'/dev/null'", "'/etc/passwd/x'"),
}

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "list": b"- 1\n- 2\n",
    "scalar": b"hello",
    "tab": b"MODEL:\n\tDEVICE: cpu\n",
    "unclosed": b"MODEL: {DEVICE: cpu",
    "not_utf8": b"MODEL: \xff\xfe",
    "zeros": bytes(2),
    "unknown": b"MODLE:\n  DEVICE: cpu\n",
    "unknown_below": b"MODEL:\n  DEVISE: cpu\n",
    "node_scalar": b"MODEL: 5\n",
    "scalar_node": b"OUTPUT_DIR:\n  a: 1\n",
    "number_key": b"5: 6\n",
    "deep": b"[" * 20_000,
    "cycle": b"DATASETS: &a\n  TRAIN: *a\n",
    "python_call": b"OUTPUT_DIR: !!python/object/apply:os.system ['touch WITNESS']\n",
    "python_name": b"OUTPUT_DIR: !!python/name:os.system\n",
    "python_new": b"OUTPUT_DIR: !!python/object/new:os.system ['touch WITNESS']\n",
    "unknown_tag": b"OUTPUT_DIR: !foo bar\n",
    "base_of_itself": b"_BASE_: SELF\n",
    "base_missing": b"_BASE_: nothere.yaml\n",
    "base_number": b"_BASE_: 5\n",
    "base_folder": b"_BASE_: /tmp\n",
    "base_url": b"_BASE_: http://127.0.0.1:9/x.yaml\n",
    "version": b"VERSION: 3\n",
    "large_number": b"SEED: " + b"9" * 5000 + b"\n",
    "nan": b"SOLVER:\n  BASE_LR: .nan\n",
}


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield config files, then one bad value after the other, then damaged config files."""
    rng, folder = random.Random(seed), world.folder / "configs"
    folder.mkdir(exist_ok=True)
    witness = folder / "witness"

    def case(name: str, text: bytes) -> Case:
        path = folder / f"{name}.yaml"
        text = text.replace(b"WITNESS", str(witness).encode()).replace(b"SELF", path.name.encode())
        path.write_bytes(text)
        names = (path.name, "nothere.yaml", "_BASE_", "SOLVER.BASE_LR", str(folder))
        return Case(name, lambda: _read(path), names, witness=witness)

    for name, text in TEXTS.items():
        yield case(name, text)
    for key, values in VALUES.items():
        for value in values:
            last = key.rpartition(".")[2]
            names = (key, last, last.lower(), "/nothere.json", value.strip("'[]") if len(value) > 4 else key)
            yield Case(f"{key} {value}", lambda k=key, v=value: _train(world, k, v), names)
    whole = (ROOT / CONFIG).read_bytes()
    for i in itertools.count():
        kind, data = damage_bytes(whole, rng)
        yield case(f"random_{i:04d}_{kind.replace(' ', '')}", data)


def _read(path: Path) -> str:
    from clipdense.run.setup import read_config

    read_config(str(path))
    return "read"


def _train(world: World, key: str, value: str) -> str:
    """Train one iteration on four images with a bad value; no pictures and no evaluation."""
    from clipdense.engine.trainer import Trainer
    from clipdense.run.setup import setup

    output = world.folder / "configs_output"
    shutil.rmtree(output, ignore_errors=True)
    entry = f"own:{world.shapes4}/annotations/instances_closed_val_4.json:{world.shapes4}/val"
    settings = {
        "DATASETS__COCO_JSON": str([entry]),
        "DATASETS__TRAIN": "['own']",
        "DATASETS__TEST": "[]",
        "SOLVER__MAX_ITER": 1,
        "DATALOADER__NUM_WORKERS": 0,
        key.replace(".", "__"): value,
    }
    if key == "SOLVER.AMP.DTYPE":
        settings["SOLVER__AMP__ENABLED"] = True
    options = world.training_options(output, **settings)
    loaded = setup(argparse.Namespace(config_file=CONFIG, opts=options, resume=False, eval_only=False))
    trainer = Trainer(loaded.cfg)
    trainer.resume_or_load(False, loaded.weights)
    trainer.train()
    return "trained"
