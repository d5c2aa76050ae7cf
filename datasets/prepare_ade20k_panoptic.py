"""Convert the semantic and instance label maps of ADE20K to panoptic and instance annotations.

Reads ADEChallengeData2016/annotations/ and annotations_instance/ (a separate download:
annotations_instance.tar), writes ade20k_panoptic_{train,val}/, ade20k_panoptic_{train,val}.json and
ade20k_instance_{train,val}.json beside them.
"""

from clipdense.data.datasets.standard import ADE20K_CLASSES, ADE20K_THINGS
from clipdense.data.preparation.ade20k import ade20k_panoptic
from clipdense.data.preparation.options import preparation_parser
from clipdense.run.boundary import tool_errors


def main() -> None:
    root = preparation_parser(__doc__).parse_args().root / "ADEChallengeData2016"
    for folder, split in (("training", "train"), ("validation", "val")):
        ade20k_panoptic(root, folder, split, ADE20K_THINGS, ADE20K_CLASSES)
        print(f"{root / f'ade20k_panoptic_{split}.json'}: done")


if __name__ == "__main__":
    with tool_errors("interrupted; the same command continues"):
        main()
