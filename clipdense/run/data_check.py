"""Check and split of datasets, as the command line runs them: lines of text and contact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdense.data.datasets.own import register_from_config
from clipdense.data.datasets.recognise import NO_HINTS, Found, Hints, recognise
from clipdense.data.datasets.splitting import split_dataset
from clipdense.data.validation import (
    CocoKind,
    Report,
    check_dataset,
    check_image_files,
    read_coco,
)
from clipdense.data.validation.summary import summarise
from clipdense.run.setup import load_config

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["CheckResult", "check_path", "check_registered", "split_path"]

_SHEET_IMAGES = 24


@dataclass
class CheckResult:
    """Result of a check.

    Attributes:
        lines: what to print.
        faulty: whether something is refused.
        sheets: contact sheets that were written.
    """

    lines: list[str]
    faulty: bool = False
    sheets: tuple[Path, ...] = ()


def check_path(
    path: Path,
    hints: Hints = NO_HINTS,
    *,
    kind: CocoKind | None = None,
    thorough: bool = False,
    sheet: Path | None = None,
) -> CheckResult:
    """Recognise the data in a file or folder, check and count them, and draw contact sheets.

    Args:
        path: file or folder, see `recognise`.
        hints: what cannot be seen from the path.
        kind: layout of a COCO file, which is then only read and checked; None recognises it.
        thorough: open every image and label map; else some hundreds.
        sheet: PNG to write, with the dataset's name added if there are several; None draws nothing.

    Raises:
        DataError: If the data are of no known format.
        FileNotFoundError: If the path does not exist.
    """
    if kind is not None:
        return _check_json(path, kind, hints, thorough)
    result = CheckResult([])
    found = recognise(path, hints)
    for one in found:
        if not one.key:
            part = _check_json(Path(one.fields[0]), one.kind, hints, thorough)  # type: ignore[arg-type]
        else:
            target = sheet
            if sheet is not None and len(found) > 1:
                target = sheet.with_name(f"{sheet.stem}_{one.name}{sheet.suffix}")
            part = _check_found(one, thorough, target)
        result.lines += part.lines
        result.faulty |= part.faulty
        result.sheets += part.sheets
    return result


def _check_json(path: Path, kind: CocoKind, hints: Hints, thorough: bool) -> CheckResult:
    """Check an annotation file without registering it."""
    content, report = read_coco(path, kind, hints.images)
    if hints.images is not None:
        records = [{**row, "file_name": str(hints.images / row["file_name"])} for row in content["images"]]
        check_image_files(records, report, headers=-1 if thorough else 500)
    return CheckResult(report.lines(), bool(report.errors))


def _check_found(found: Found, thorough: bool, sheet: Path | None) -> CheckResult:
    title = f"{': '.join(found.fields)} ({found.kind})"
    try:
        with found.registered() as (name, metadata):
            result = _check_registered(name, metadata, thorough, sheet)
    except (ValueError, FileNotFoundError) as error:
        return CheckResult([title, f"  refused: {error}"], faulty=True)
    usage = [] if result.faulty else _usage(found, metadata)
    return CheckResult([title, *result.lines, *usage], result.faulty, result.sheets)


def _check_registered(
    name: str, metadata: Mapping[str, Any], thorough: bool, sheet: Path | None
) -> CheckResult:
    """Check, count and draw a registered dataset."""
    report = check_dataset(name, thorough=thorough, use_cache=False) or Report(name)
    if report.errors:
        return CheckResult(report.lines(), faulty=True)
    records = DatasetCatalog.get(name)
    summary = summarise(records, metadata, report, limit=-1 if thorough else 500)
    counts, *findings = report.lines()
    lines = [f"  {counts}", *summary.lines(), *findings]
    if sheet is None or not records:
        return CheckResult(lines)
    _draw(records, name, sheet)
    return CheckResult([*lines, f"  contact sheet: {sheet}"], sheets=(sheet,))


def _draw(records: Sequence[Any], name: str, path: Path) -> None:
    from clipdense.visualization.panels import draw_sheet  # matplotlib takes a second to import

    step = max(1, len(records) // _SHEET_IMAGES)
    draw_sheet(records[::step][:_SHEET_IMAGES], MetadataCatalog.get(name), path)


def _usage(found: Found, metadata: Mapping[str, Any]) -> list[str]:
    """Say how a config names the dataset, and how many classes a closed-vocabulary head needs."""
    lines = [f"  to train: DATASETS.{found.key} \"['{found.entry}']\" DATASETS.TRAIN \"['{found.name}']\""]
    kind = metadata.get("evaluator_type")
    if kind == "coco":
        lines.append(f"  classes: MODEL.ROI_HEADS.NUM_CLASSES {len(metadata['thing_classes'])}")
    elif metadata.get("stuff_classes"):
        lines.append(f"  classes: MODEL.SEM_SEG_HEAD.NUM_CLASSES {len(metadata['stuff_classes'])}")
    return lines


def check_registered(
    names: Iterable[str] = (), config_file: str = "", overrides: Iterable[str] = (), *, thorough: bool = False
) -> CheckResult:
    """Check registered datasets, and those that a config names.

    Args:
        names: registered names.
        config_file: yacs config whose DATASETS.TRAIN and DATASETS.TEST are checked, too; "" for none.
        overrides: ``KEY VALUE`` pairs for the config.
        thorough: open every image and label map; else some hundreds.
    """
    names = list(names)
    if config_file:
        cfg = load_config(config_file, overrides)
        register_from_config(cfg)
        names += [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    result = CheckResult([])
    for name in dict.fromkeys(names):
        report = check_dataset(name, thorough=thorough, use_cache=False)
        if report is None:
            result.lines.append(f"{name}: no files to check yet (drawn or prepared at its first use)")
        else:
            result.lines += report.lines()
            result.faulty |= bool(report.errors)
    return result


def split_path(
    path: Path, hints: Hints = NO_HINTS, *, fraction: float = 0.8, seed: int = 0, output: Path | None = None
) -> list[str]:
    """Split the data in a file or folder into training and validation; return what to print.

    Args:
        path: file or folder with one dataset, or with several, of which the first of each format is split.
        hints: what cannot be seen from the path.
        fraction: share of the training images, in 0..1.
        seed: of the choice.
        output: folder to write, see `split_dataset`.
    """
    lines = []
    for found in {one.kind: one for one in reversed(recognise(path, hints))}.values():
        parts = split_dataset(found, fraction, seed, output)
        if found.key:
            entries = ", ".join(f"'{part.entry}'" for part in parts)
            lines.append(f'DATASETS.{found.key} "[{entries}]"')
        else:
            lines += [part.fields[0] for part in parts]
    return lines
