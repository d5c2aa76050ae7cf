"""Select the annotations of OV-COCO: the 48 base classes for training, all 65 classes for validation.

Reads coco/annotations/instances_{train,val}2017.json, writes beside them instances_train2017_seen_2.json (48
categories), instances_train2017_seen_2_65_cat.json (the same annotations, 65 categories) and
instances_val2017_all_2.json. Images without an annotation of these classes are dropped.
"""

from clipdense.data.datasets.open_vocabulary import OV_COCO, OV_COCO_BASE
from clipdense.data.preparation.categories import select_categories
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors


def main() -> None:
    folder = preparation_parser(__doc__).parse_args().root / "coco" / "annotations"
    base = {k for k, name in OV_COCO.items() if name in OV_COCO_BASE}
    for split, suffix, annotated, listed in (
        ("train", "seen_2", base, base),
        ("train", "seen_2_65_cat", base, OV_COCO),
        ("val", "all_2", OV_COCO, OV_COCO),
    ):
        target = folder / f"instances_{split}2017_{suffix}.json"
        counts = select_categories(folder / f"instances_{split}2017.json", target, annotated, listed)
        print(f"{target}: " + ("{} images, {} annotations".format(*counts) if counts else "exists already"))


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
