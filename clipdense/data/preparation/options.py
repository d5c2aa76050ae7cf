"""Command-line options that the scripts `datasets/prepare_*.py` share."""

import argparse
from collections.abc import Sequence

from clipdense.data.datasets.registration import dataset_root

__all__ = ["preparation_parser"]


def preparation_parser(
    description: str | None, splits: Sequence[str] = (), choices: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Create a parser with the option ``--root`` and, if there are splits, ``--split``.

    Args:
        description: of the script, usually its docstring.
        splits: the default of ``--split``.
        choices: the permitted splits; None for any.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = dataset_root()
    parser.add_argument(
        "--root", type=type(root), default=root, help="root folder of the datasets (default: %(default)s)"
    )
    if splits:
        parser.add_argument(
            "--split",
            nargs="+",
            default=list(splits),
            choices=choices,
            help=f"splits to convert (default: {' '.join(splits)})",
        )
    return parser
