#!/usr/bin/env python
"""Predict on many images: the command ``clipdense predict``, from a checkout.

python tools/predict.py projects/ShapesWorld/scenes --words "red star, blue ring" --output output/bulk
"""

import sys

from clipdense.run.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
