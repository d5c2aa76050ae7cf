# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Train on your own data
#
# A detector on a CLIP backbone, from a file in COCO's format. The images here are drawn, so that the notebook runs without a
# download; replace the first cell by the paths of your images and your JSON file.

# %%
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
while not Path("projects").is_dir():  # the root of the repository
    os.chdir("..")

from PIL import Image, ImageDraw

FOLDER = Path(tempfile.mkdtemp())
CLASSES = {1: ("red ball", (200, 30, 30)), 2: ("blue box", (30, 60, 200))}


def make_split(name: str, count: int, seed: int) -> Path:
    """Draw images with one ball or box each, and write their boxes and polygons in COCO's format."""
    draw_random, images, objects = random.Random(seed), [], []
    (FOLDER / name).mkdir()
    for i in range(count):
        image = Image.new("RGB", (128, 128), (90, 140, 70))
        kind = draw_random.choice(list(CLASSES))
        x, y, side = draw_random.randint(4, 70), draw_random.randint(4, 70), draw_random.randint(30, 50)
        shape = ImageDraw.Draw(image).ellipse if kind == 1 else ImageDraw.Draw(image).rectangle
        shape((x, y, x + side, y + side), fill=CLASSES[kind][1])
        image.save(FOLDER / name / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 128, "height": 128})
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        objects.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": kind,
                "bbox": [x, y, side, side],
                "segmentation": [corners],
                "area": side * side,
                "iscrowd": 0,
            }
        )
    categories = [{"id": kind, "name": label} for kind, (label, _) in CLASSES.items()]
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return path


make_split("train", 40, seed=0), make_split("val", 8, seed=1)
Image.open(FOLDER / "train" / "0.png")

# %% [markdown]
# ## Check the data
#
# Every training does this first; on its own it lists all faults at once.


# %%
def run(*words: object) -> str:
    """Run a tool of the repository, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


report = run("tools/check_data.py", FOLDER / "train.json", "--images", FOLDER / "train")
print(report.replace(str(FOLDER), "FOLDER"))

# %% [markdown]
# ## Train
#
# The config of a small model, the two datasets under names of our choice, and the number of classes. A minute on a CPU is enough
# here; a real training takes more iterations, a larger CLIP and a GPU.

# %%
DATA = [f"toys_{split}:{FOLDER / split}.json:{FOLDER / split}" for split in ("train", "val")]
OPTIONS = [
    *("DATASETS.COCO_JSON", DATA),
    *("DATASETS.TRAIN", "('toys_train',)", "DATASETS.TEST", "('toys_val',)"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0),
    *("SOLVER.MAX_ITER", os.environ.get("NOTEBOOK_ITERATIONS", 200), "SOLVER.IMS_PER_BATCH", 4),
    *("SOLVER.WARMUP_ITERS", 20, "MODEL.BACKBONE.FREEZE_AT", 0),
    *("TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", FOLDER / "run"),
]
run("tools/train_net.py", "--config-file", "configs/shapes/denseclip_mask_rcnn_rn.yaml", *OPTIONS)
results = json.loads((FOLDER / "run" / "results.json").read_text())
print({name: round(value, 1) for name, value in results.items() if name in ("bbox/AP50", "segm/AP50")})

# %% [markdown]
# ## Use the model

# %%
import clipdense

predict = clipdense.Predictor(
    FOLDER / "run" / "config.yaml", FOLDER / "run" / "model_final.pth", score_threshold=0.5
)
photo = FOLDER / "val" / "0.png"
found = predict(photo)["instances"]
picture = Image.open(photo).convert("RGB")
for box, label, score in zip(
    found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), found.scores.tolist(), strict=True
):
    ImageDraw.Draw(picture).rectangle(box, outline="white", width=2)
    print(predict.metadata.thing_classes[label], f"{score:.2f}", [round(side) for side in box])
picture

# %% [markdown]
# ## Share it
#
# `clipdense push FOLDER anna/toys --licence apache-2.0` sends the model to the Hugging Face hub; a path in place of `anna/toys`
# writes a folder.
