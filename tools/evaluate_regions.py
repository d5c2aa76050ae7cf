"""Name the regions of a data set by image crops and by pooled dense features, and print both accuracies.

python tools/evaluate_regions.py --model shapes-rn shapes-vit shapes-eva
python tools/evaluate_regions.py --model ViT-B-16 --pretrained openai --dataset coco_2017_val_panoptic
--image-size 512
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

import clipdense  # noqa: F401
from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.evaluation.regions import RegionAccuracy, evaluate_regions

from detectron2.data import DatasetCatalog, MetadataCatalog


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["shapes-rn"], help="names that load_clip takes")
    parser.add_argument("--pretrained", default=None, help="tag, hub id or file (one model)")
    parser.add_argument("--dataset", default="shapes_ov_panoptic_val", help="a panoptic data set")
    parser.add_argument("--modes", nargs="+", help="dense modes (default: all that the tower has)")
    parser.add_argument("--templates", default="single", help="prompt template set")
    parser.add_argument("--min-visible", type=float, default=0.5, help="least visible share of a thing, 0..1")
    parser.add_argument("--images", type=int, help="only the first N images")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def evaluate(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    clip = load_clip(name, arguments.pretrained)
    metadata = MetadataCatalog.get(arguments.dataset)
    records = DatasetCatalog.get(arguments.dataset)[: arguments.images]
    ids = {
        True: sorted(metadata.thing_dataset_id_to_contiguous_id.values()),
        False: sorted(
            set(metadata.stuff_dataset_id_to_contiguous_id.values())
            - set(metadata.thing_dataset_id_to_contiguous_id.values())
        ),
    }
    names = {kind: [metadata.stuff_classes[i] for i in kind_ids] for kind, kind_ids in ids.items()}
    bank = TextBank(clip, templates=arguments.templates)
    novel = frozenset(names[True].index(n) for n in metadata.get("novel_classes", []))
    groups = {}
    if novel:
        groups = {"base": frozenset(range(len(names[True]))) - novel, "novel": novel}
        for kind, members in metadata.get("novel_kinds", {}).items():
            groups[kind] = frozenset(names[True].index(n) for n in members)
    return evaluate_regions(
        clip,
        records,
        bank(names[True]),
        bank(names[False]),
        ids[True],
        ids[False],
        {
            True: RegionAccuracy(names[True], groups, metadata.get("class_attributes", {})),
            False: RegionAccuracy(names[False]),
        },
        modes=arguments.modes or clip.visual.dense_modes,
        min_visible=arguments.min_visible,
    )


def main() -> None:
    arguments = parse_arguments()
    if arguments.pretrained and len(arguments.model) > 1:
        sys.exit("error: --pretrained goes with one --model")
    results = {name: evaluate(name, arguments) for name in arguments.model}
    for kind in ("things", "stuff"):
        rows: list[dict[str, Any]] = [
            {"model": name, "from": source} | kinds[kind]
            for name, sources in results.items()
            for source, kinds in sources.items()
        ]
        print(f"\n{kind} of {arguments.dataset} (accuracy in percent)")
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
