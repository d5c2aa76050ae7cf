"""Convert published weights to safetensors that contain the config keys which they need.

python tools/convert_checkpoint.py denseclip_retinanet_r50.pth retinanet.safetensors --dataset coco_2017_val
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS retinanet.safetensors

MODEL.WEIGHTS also accepts the published file itself. The file of a CLIP (OpenAI, EVA-CLIP, CLIPSelf) is
converted to one for MODEL.CLIP.NAME:

python tools/convert_checkpoint.py eva_vitb16_coco_clipself_proposals.pt clipself_b16.safetensors
"""

import argparse
from typing import Any


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

import yaml

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import check_dataset_names, dataset_classes
from clipdense.engine.options import ConfigError
from clipdense.run.boundary import tool_errors
from clipdense.run.conversion import convert_weights

from detectron2.data import MetadataCatalog


def main() -> None:
    arguments = parse_arguments()
    done = convert_weights(
        arguments.input,
        arguments.output,
        classes=class_names(arguments),
        options=dict(map(option, arguments.option)),
        allow_pickle=arguments.allow_pickle,
    )
    print(f"{arguments.input} has layout {done.layout}; {done.num_tensors} tensors written")
    for rule, keys in done.dropped.items():
        print(f"left out, {rule}: {', '.join(keys)}")
    print(f"classes: {len(done.classes)}, as listed" if done.classes else "classes: none listed in the file")
    if done.options:
        lines = (f"  {key}: {value}" for key, value in done.options.items())
        print("config keys in the file:", *lines, sep="\n")
    print(f"written to {arguments.output}")
    if done.licence:
        print(f"licence of the published weights: {done.licence}")


def class_names(arguments: argparse.Namespace) -> list[str] | None:
    if arguments.dataset is None:
        return None if arguments.classes is None else list(Vocabulary.parse(arguments.classes).names)
    name = arguments.dataset
    check_dataset_names([name])
    detection = MetadataCatalog.get(name).get("evaluator_type") in ("coco", "lvis")
    for kind in ("thing", "stuff") if detection else ("stuff", "thing"):
        if classes := dataset_classes(name, kind):
            return classes
    raise ConfigError(f"dataset {name} names no classes; give them with --classes")


def option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--option takes KEY=VALUE, not {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"--option {key}: {value!r} is not a YAML value") from e


if __name__ == "__main__":
    with tool_errors("interrupted; nothing was written"):
        main()
