#!/usr/bin/env python
"""Write the learned prompts of a trained model to a small file for MODEL.PROMPT.WEIGHTS of other systems.

    tools/export_prompts.py prompts.safetensors --config-file configs/shapes/denseclip_semantic_fpn_rn.yaml \\
        --weights output/shapes/denseclip_semantic_fpn_rn/model_final.pth

PromptedCLIP writes such a file at the end of its training; this one is for models on a language backbone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--config-file", required=True, help="config of the training")
    parser.add_argument("--weights", default="", help="checkpoint of the training (default: the config's)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the config")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from clipdense.clip.prompt_files import find_prompts, save_prompts
from clipdense.run.boundary import tool_errors
from clipdense.run.predictor import Predictor


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    predictor = Predictor(arguments.config_file, arguments.weights or None, arguments.opts)
    found = find_prompts(predictor.model)
    save_prompts(arguments.output, found.text, found.visual, predictor.cfg.MODEL.CLIP.NAME)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
