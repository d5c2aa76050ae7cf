"""Pages of the documentation made from the code: config keys, commands, published results, notebooks."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def config_page() -> str:
    """Return the reference of the config keys that clipdense adds to Detectron2's, with default and range."""
    from clipdense.run.config import add_clipdense_config
    from clipdense.run.config_table import CHECKS
    from clipdense.run.keys import config_keys, config_value

    from detectron2.config import get_cfg

    before, cfg = get_cfg(), get_cfg()
    add_clipdense_config(cfg)
    known, comments = set(config_keys(before)), key_comments()
    groups: dict[str, list[str]] = {}
    for key in sorted(config_keys(cfg)):
        if key not in known:
            parts = key.split(".")
            groups.setdefault(".".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(key)
    lines = [
        "# Config keys",
        "",
        "The keys that clipdense adds to those of Detectron2. `clipdense train CONFIG KEY VALUE` sets one; a "
        "wrong key or value is an error before anything runs. A key without a range keeps the type of its "
        "default.",
    ]
    for group, keys in sorted(groups.items()):
        lines += ["", f"## {group}", "", "| key | default | range | meaning |", "| --- | --- | --- | --- |"]
        for key in keys:
            check = CHECKS.get(key)
            allowed = _cell(_expected(check)) if check is not None else ""
            default = _cell(f"`{_short(config_value(cfg, key))}`")
            lines.append(f"| `{key}` | {default} | {allowed} | {_cell(comments.get(key, ''))} |")
    return "\n".join(lines) + "\n"


def _expected(check: Any) -> str:
    """Return what a check expects, in its own words."""
    try:
        return str(check(_Nothing()) or "")
    except (TypeError, ValueError, AttributeError):
        return ""


class _Nothing:
    """A value that no check accepts."""

    def __repr__(self) -> str:
        return "nothing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def key_comments() -> dict[str, str]:
    """Return the comment of each config key: full name -> the comment lines above its default."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "clipdense").rglob("config.py")):
        source = path.read_text("utf-8")
        lines = source.splitlines()
        for function in ast.walk(ast.parse(source)):
            if isinstance(function, ast.FunctionDef):
                found |= dict(_function_comments(function, lines))
    return found


def _function_comments(function: ast.FunctionDef, lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield key and comment of every default that a function sets; a comment holds for the lines below it."""
    names = {"cfg": ""}
    comment, last = "", -1
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        keys = [_full_name(target, names) for target in node.targets]
        for target, key in zip(node.targets, keys, strict=True):
            if isinstance(target, ast.Name):  # a name for a node of the config
                value = _full_name(node.value, names) or next((k for k in keys if k), None)
                if value is not None:
                    names[target.id] = value
            elif key:
                above = _comment_above(lines, node.lineno - 1)
                comment = above or (comment if node.lineno - 1 <= last else "")
                last = node.end_lineno or node.lineno
                yield key, comment


def _full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([*filter(None, [names[node.id]]), *reversed(parts)])


def _comment_above(lines: list[str], index: int) -> str:
    comment: list[str] = []
    while index > 0 and lines[index - 1].strip().startswith("#"):
        index -= 1
        comment.insert(0, lines[index].strip().lstrip("# "))
    return " ".join(comment)


def commands_page() -> str:
    """Return the reference of the console command, as its help pages have it."""
    import typer
    from click import Context

    from clipdense.run.cli import COMMANDS, _application

    lines = [
        "# Commands",
        "",
        "`clipdense --help` lists these; `clipdense COMMAND --help` describes one.",
        "",
    ]
    lines += ["| command | what it does |", "| --- | --- |"]
    lines += [f"| [`{name}`](#{name}) | {_cell(row.help)} |" for name, row in COMMANDS.items()]
    for name, row in COMMANDS.items():
        command: Any = typer.main.get_command(_application(row))
        context = Context(command, info_name=f"clipdense {name}")
        usage = command.get_usage(context).removeprefix("Usage: ")
        lines += ["", f"## {name}", "", f"`{_cell(usage)}`", "", command.help or row.help, ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        for parameter in command.params:
            text = _cell(getattr(parameter, "help", None) or "")
            words = [word for word in parameter.opts if word.startswith("-")]
            words = words or [parameter.metavar or parameter.name.upper()]
            lines.append(f"| {', '.join(f'`{word}`' for word in words).replace('|', '&#124;')} | {text} |")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def published_page() -> str:
    """Return the table of published results that `clipdense reproduce` checks."""
    from clipdense.run.headline_rows import EVIDENCE, read_rows

    rows = read_rows(ROOT / "projects" / "headline_rows.yaml")
    lines = [
        "# Published results",
        "",
        "Results of the papers that published weights, or a CLIP without training, can be checked against. "
        "`clipdense reproduce ROW` evaluates a row, see [Share and reproduce](../share.md). None of these "
        "numbers is ours. Rows that cannot be run are listed with the reason. The mark says where a value "
        "was found:",
        "",
        *(f"- {mark}: {text}" for mark, text in EVIDENCE.items()),
    ]
    for system in dict.fromkeys(row.system for row in rows):
        lines += ["", f"## {system}", "", "| row | weights | data | published |", "| --- | --- | --- | --- |"]
        for row in (row for row in rows if row.system == system):
            weights = f"[{row.weights.local_name}]({row.weights.page})" if row.weights else f"`{row.clip}`"
            weights = f"not run: {row.not_run}" if row.not_run else weights
            needs = row.data.needs if row.data else ""
            values = ", ".join(f"{value.metric} {value.paper:g} ({value.evidence})" for value in row.values)
            lines.append(f"| `{row.name}` | {_cell(weights)} | {_cell(needs)} | {_cell(values)} |")
    return "\n".join(lines) + "\n"


def models_page() -> str:
    """Return the table of `clipdense models`: models and published files, with size, licence and source."""
    from clipdense.run.zoo import ZOO

    lines = [
        "# Models and checkpoints",
        "",
        "The rows of `clipdense models`. A system's row is a config in `projects/SYSTEM/configs`; its page "
        "says how the published file is converted. Sizes are those of the parameters in float32 (for the "
        "package, of the files); a published file may be in half precision, or also hold the state of its "
        "optimizer. Results are those that the papers' repositories list.",
    ]
    header = ["", "| model | image encoder | published result | size | licence | source |"]
    header.append("| --- | --- | --- | ---: | --- | --- |")
    for system in dict.fromkeys(entry.system for entry in ZOO):
        lines += ["", f"## {system}", *header]
        for e in (entry for entry in ZOO if entry.system == system):
            source = (
                f"[{e.page.removeprefix('https://github.com/')}]({e.page})" if e.page else "in the package"
            )
            cells = (f"`{e.name}`", e.backbone, e.numbers, e.size, e.licence, source)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def notebook_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """Convert an executed notebook to Markdown; returns it and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                parts += _output(output, path.stem, pictures)
    return "\n\n".join(parts) + "\n", pictures


def _output(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    if "text" in output:
        yield f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    for kind, suffix in (("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data:
            name = f"{stem}_{len(pictures)}.{suffix}"
            pictures[name] = base64.b64decode("".join(data[kind]))
            yield f"![Output of the cell above]({name})"
            return
    if "text/plain" in data:
        yield f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
