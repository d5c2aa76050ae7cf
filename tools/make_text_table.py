#!/usr/bin/env python
"""Write the text embeddings of a vocabulary, so that a model needs no text tower.

    tools/make_text_table.py coco.safetensors --model ViT-B-32 --pretrained openai \
        --vocabulary coco_names.json --templates vild_63
    tools/make_text_table.py pets.safetensors --model shapes-rn --vocabulary "cat|kitten, dog"

The table holds a row a name; `clipdense.clip.tables.TextTable.load` reads it, and names, synonyms, model and
templates stand in its metadata. Rows that earlier runs computed come from the cache (CLIPDENSE_CACHE).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clipdense.clip.templates import TEMPLATE_SETS


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    sets = "\n".join(f"  {s.name:14}{len(s):3}  {s.source}" for s in TEMPLATE_SETS.values())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"template sets:\n{sets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument(
        "--model", required=True, help="open_clip model name, shapes-*, hub id or weight file"
    )
    parser.add_argument("--pretrained", help="tag, hub id or weight file (default: the model's own weights)")
    parser.add_argument("--allow-pickle", action="store_true", help="load a weight file that is a pickle")
    parser.add_argument("--precision", default="fp32", help="of the tower: fp32 (default), fp16, bf16")
    parser.add_argument(
        "--vocabulary",
        required=True,
        help='class-list file (.json, .txt), or words: "cat|kitten, red car" (bars part synonyms)',
    )
    parser.add_argument(
        "--templates",
        nargs="+",
        default=["single"],
        metavar="TEMPLATE",
        help="a set's name, or templates with one {} each (default: single)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts a forward (default: 256)")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep rows in the cache")
    args = parser.parse_args(argv)
    if args.output.suffix != ".safetensors":
        parser.error(f"the table is written as .safetensors, not '{args.output.name}'")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from clipdense.clip import load_clip
from clipdense.clip.tables import save_table
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.boundary import tool_errors


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    vocabulary = Vocabulary.parse(args.vocabulary)
    clip = load_clip(
        args.model, args.pretrained, allow_pickle=args.allow_pickle, precision=args.precision
    ).to(args.device)
    bank = TextBank(
        clip,
        args.templates[0] if len(args.templates) == 1 else args.templates,
        cache_dir=None if args.no_cache else "auto",
        batch_size=args.batch_size,
    )
    save_table(args.output, bank, vocabulary)
    names = sum(map(len, vocabulary.synonyms))
    print(
        f"{args.output}: {names} names of {len(vocabulary)} classes x {clip.embed_dim}, {bank.templates.name}"
    )
    return 0


if __name__ == "__main__":
    with tool_errors("interrupted; computed embeddings stay in the cache, and the same command continues"):
        sys.exit(main())
