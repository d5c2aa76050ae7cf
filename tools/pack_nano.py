"""Put a pre-trained nano CLIP into the package, from where load_clip takes it.

python tools/train_net.py --config-file configs/shapes/clip_text.yaml OUTPUT_DIR output/clip_text
python tools/pack_nano.py output/clip_text/export.safetensors --text
python tools/train_net.py --config-file configs/shapes/clip_rn.yaml OUTPUT_DIR output/clip_rn
python tools/pack_nano.py output/clip_rn/export.safetensors
"""

import argparse
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, help="export.safetensors of a ContrastiveCLIP training")
    parser.add_argument(
        "--text",
        action="store_true",
        help="replace the text tower that all nano CLIPs share instead of the image tower; all image towers "
        "must then be trained again",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from clipdense.checkpoint import read_checkpoint, save_checkpoint
from clipdense.clip.nano import NANO_MODELS, nano_path
from clipdense.run.boundary import tool_errors


def main() -> None:
    arguments = parse_arguments()
    checkpoint = read_checkpoint(arguments.export)
    name = checkpoint.metadata.get("options", {}).get("name")
    if name not in NANO_MODELS:
        raise ValueError(f"{arguments.export} holds {name!r}, not one of {', '.join(NANO_MODELS)}")
    path = nano_path("shapes-text" if arguments.text else name)
    state = {k: v for k, v in checkpoint.state.items() if k.startswith("text.") == arguments.text}
    save_checkpoint(path, state, {"layout": "open_clip", "options": {"name": name}})
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with tool_errors():
        main()
