"""Hooks of the documentation site: pages from READMEs, and pages generated from the code.

Nothing is copied by hand: the README of the repository is the first page, those of the projects are the pages
of the systems, and the reference of config keys, commands and published results is made from the code.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Page of the site -> file of the repository.
PAGES = {"index.md": "README.md", "datasets.md": "datasets/README.md", "changelog.md": "CHANGELOG.md"}
_IMAGES = (".jpg", ".png", ".svg")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def pages() -> dict[str, str]:
    """Return the pages that are files of the repository outside of docs/: page -> file."""
    projects = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("projects/*/README.md"))
    return {**PAGES, **{name: name for name in projects}}


def convert_links(text: str, source: str, page: str) -> tuple[str, set[str]]:
    """Turn the links of a file of the repository into links of the site.

    Links to files that are no pages (code, configs) become their text, as the site does not hold them.

    Args:
        text: Markdown.
        source: the file, from the root of the repository.
        page: its page, from the root of the site.

    Returns:
        The new text, and the images that it shows (files of the repository).
    """
    known = {file: name for name, file in pages().items()}
    images: set[str] = set()

    def convert(link: re.Match[str]) -> str:
        mark, label, target = link.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        path, hash_mark, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file.endswith(_IMAGES) and (ROOT / file).is_file():
            images.add(file)
            target_page = file.removeprefix("docs/")
        elif file in known:
            target_page = known[file]
        elif file.startswith("docs/") and file.endswith(".md"):
            target_page = file.removeprefix("docs/")
        elif f"{file}/README.md" in known:
            target_page = known[f"{file}/README.md"]
        else:
            return label if label.startswith("`") else f"{label} (`{file}`)"
        relative = posixpath.relpath(target_page, posixpath.dirname(page) or ".")
        return f"{mark}[{label}]({relative}{hash_mark}{anchor})"

    blocks = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.M | re.S)
    done = [block if block.startswith("```") else _LINK.sub(convert, block) for block in blocks]
    return "".join(done), images


def on_config(config: Any) -> Any:
    """Leave out pages of the navigation that do not exist, and add pages that it lacks."""
    existing = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    existing |= {page for page, file in pages().items() if (ROOT / file).is_file()} | set(generated())
    existing |= {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    config.nav = _existing(config.nav, existing)
    further = sorted(existing - set(_files(config.nav)))
    systems = next(entry["Systems"] for entry in config.nav if "Systems" in entry)
    systems += [{name.split("/")[1]: name} for name in further if name.startswith("projects/")]
    if others := [name for name in further if not name.startswith("projects/")]:
        config.nav.append({"Further pages": others})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the READMEs, their images, the notebooks and the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    images: set[str] = set()
    for page, source in pages().items():
        if (ROOT / source).is_file():
            text, shown = convert_links((ROOT / source).read_text("utf-8"), source, page)
            images |= shown
            files.append(File.generated(config, page, content=text))
    for page, make in generated().items():
        files.append(File.generated(config, page, content=make()))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = _module().notebook_markdown(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for image in sorted(images):
        if not image.startswith("docs/"):
            files.append(File.generated(config, image, abs_src_path=str(ROOT / image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Convert the links of pages in docs/, which are valid in the repository, to those of the site."""
    uri = page.file.src_uri
    if page.file.generated_by is not None or not (ROOT / "docs" / uri).is_file():
        return markdown
    return convert_links(markdown, f"docs/{uri}", uri)[0]


def generated() -> dict[str, Any]:
    """Return the pages that are made from the code: page -> function that returns its text."""
    made = _module()
    return {
        "reference/config.md": made.config_page,
        "reference/commands.md": made.commands_page,
        "reference/models.md": made.models_page,
        "reference/published.md": made.published_page,
    }


@cache
def _module() -> Any:
    """Import docs_pages.py of this folder; mkdocs resets the module path after it has loaded a hook."""
    sys.path.insert(0, str(ROOT))
    specification = importlib.util.spec_from_file_location(
        "docs_pages", Path(__file__).with_name("docs_pages.py")
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _existing(nav: list[Any], existing: set[str]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            if part := _existing(value, existing):
                kept.append({title: part})
        elif value in existing:
            kept.append(entry)
    return kept


def _files(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from _files(value)
        else:
            yield value
