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
# # Segment your own photos by words
#
# No training: a CLIP compares every position of a picture with the words that you name. This notebook uses the small CLIP that
# ships with clipdense, which knows coloured shapes. For photographs, use `MODEL.CLIP.NAME ViT-B-16-quickgelu` and
# `MODEL.CLIP.PRETRAINED openai` as shown at the end; nothing else changes.

# %%
import logging
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
while not Path("projects").is_dir():  # the root of the repository
    os.chdir("..")

import numpy as np
from PIL import Image

import clipdense

PHOTOS = sorted(Path("projects/ShapesWorld/scenes").glob("*.jpg"))
print(len(PHOTOS), "photos")

# %% [markdown]
# ## Words, and the background
#
# A semantic model chooses one of its classes everywhere. What you are not looking for goes into `background`: where it wins, nothing
# is marked.

# %%
predict = clipdense.Predictor(
    "configs/shapes/zero_shot_maskclip_rn.yaml",
    vocabulary="red heart, blue star, green star, yellow arrow, cyan cross",
    background="grass, sand, water, bricks, tiles",
    device="cpu",
)
scores = predict(PHOTOS[0])["sem_seg"]
print("scores:", tuple(scores.shape))

# %% [markdown]
# ## The picture
#
# `scores` holds a map for each word, 0 where the background wins. The highest one colours a pixel.

# %%
COLORS = np.array([[228, 26, 28], [55, 126, 184], [77, 175, 74], [255, 220, 40], [0, 200, 200]], np.uint8)


def draw(photo: Path) -> Image.Image:
    """Mark the best class of every pixel in its colour, and print the share of each class."""
    maps = predict(photo)["sem_seg"]
    best, found = maps.argmax(0).numpy(), (maps.amax(0) > 0).numpy()
    names = predict.metadata.stuff_classes
    shares = {name: float((found & (best == i)).mean()) for i, name in enumerate(names)}
    print({name: f"{share:.0%}" for name, share in shares.items() if share > 0.005})
    pixels = np.asarray(Image.open(photo).convert("RGB")).copy()
    pixels[found] = (0.4 * pixels[found] + 0.6 * COLORS[best[found] % len(COLORS)]).astype(np.uint8)
    pair = np.concatenate([np.asarray(Image.open(photo).convert("RGB")), pixels], axis=1)
    return Image.fromarray(pair)


draw(PHOTOS[0])

# %% [markdown]
# ## Other words
#
# The vocabulary changes without building the model again; only new words are encoded. Bars separate synonyms.

# %%
predict.set_vocabulary(
    "star|pointed star, circle|disc|ball, square|box", background="grass, sand, water, bricks, tiles"
)
draw(PHOTOS[1])

# %% [markdown]
# ## Your photographs
#
# ```python
# predict = clipdense.Predictor(
#     "projects/ZeroShot/configs/voc20.yaml",           # OpenAI's ViT-B/16; its weights are downloaded once
#     vocabulary="dog, sofa|couch, person",
#     background="wall, floor, sky, grass, road",
# )
# maps = predict("photo.jpg")["sem_seg"]
# ```
