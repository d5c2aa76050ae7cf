"""Convert published weights to safetensors that contain the config keys which they need.

python tools/convert_checkpoint.py denseclip_retinanet_r50.pth retinanet.safetensors --dataset coco_2017_val
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS retinanet.safetensors

MODEL.WEIGHTS also accepts the published file itself. The file of a CLIP (OpenAI, EVA-CLIP, CLIPSelf) is
converted to one for MODEL.CLIP.NAME:

python tools/convert_checkpoint.py eva_vitb16_coco_clipself_proposals.pt clipself_b16.safetensors
"""

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="the published file")
    parser.add_argument("output", help="the safetensors file to write")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--dataset", help="registered dataset whose classes the file must have")
    names.add_argument(
        "--classes",
        help="class names that the file must have: a .txt or .json file, or comma-separated names",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="config key that the tensors do not determine, if it differs from the released models, e.g. "
        "MODEL.CLIP.CONFIG.text_cfg.heads=4",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open a pickle; it can run code, so use trusted sources only",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from clipdense.run.boundary import tool_errors
from clipdense.run.conversion import convert_and_describe


def main() -> None:
    arguments = parse_arguments()
    lines = convert_and_describe(
        arguments.input,
        arguments.output,
        dataset=arguments.dataset,
        classes=arguments.classes,
        options=arguments.option,
        allow_pickle=arguments.allow_pickle,
    )
    print("\n".join(lines))


if __name__ == "__main__":
    with tool_errors("interrupted; nothing was written"):
        main()
