"""The documentation: pages, links, generated reference, notebooks, and the files of a release."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import clipdense
from clipdense.run.zoo import ZOO

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("own_*.py"))
PAGES = sorted(
    [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("projects/*/README.md"), ROOT / "datasets/README.md"]
)


@pytest.fixture(scope="module")
def hooks() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("hooks")
    sys.path[:] = before


def nav_files(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values()))
        if isinstance(value, list):
            yield from nav_files(value)
        else:
            yield value


def site_pages(hooks: ModuleType) -> set[str]:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(hooks.generated())
    pages |= {page for page, file in hooks.pages().items() if (ROOT / file).is_file()}
    return pages | {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as the site and code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.M | re.S)
    found = re.findall(r"\]\(([^()\s]+)\)", text)
    return [link for link in found if "://" not in link and not link.startswith("mailto:")]


def test_the_navigation_names_pages_that_exist(hooks: ModuleType) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = list(nav_files(config["nav"]))
    assert len(named) > 40 and len(set(named)) == len(named)
    assert [name for name in named if name not in site_pages(hooks)] == []


def test_nothing_is_fetched_and_links_are_strict() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False and config["strict"] is True
    assert "extra_javascript" not in config and "extra_css" not in config
    assert config["validation"]["links"] == dict.fromkeys(
        ("not_found", "anchors", "absolute_links", "unrecognized_links"), "warn"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path, hooks: ModuleType) -> None:
    """To a file of the repository, or to a page that the site generates; with an anchor, to a heading."""
    made = {DOCS / name for name in hooks.generated()}
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target in made:
            continue
        found = target.exists() and (
            not anchor or target.suffix != ".md" or anchor in anchors(target.read_text("utf-8"))
        )
        if not found:
            broken.append(link)
    assert broken == []


def test_links_of_readmes_become_links_of_the_site(hooks: ModuleType) -> None:
    text = (
        "[a](../OVSeg/README.md#results) [b](../../datasets/README.md) [`c`](../../clipdense/paths.py) "
        "![d](panel.jpg) [e](https://example.org) [f](configs) `[g](x.md)`\n```\n[h](../y.md)\n```\n"
    )
    done, images = hooks.convert_links(
        text, "projects/ShapesWorld/README.md", "projects/ShapesWorld/README.md"
    )
    assert "[a](../OVSeg/README.md#results)" in done and "[b](../../datasets.md)" in done
    assert "`c` " in done and "paths.py" not in done and "f (`projects/ShapesWorld/configs`)" in done
    assert "![d](panel.jpg)" in done and images == {"projects/ShapesWorld/panel.jpg"}
    assert "[e](https://example.org)" in done and "[h](../y.md)" in done


def test_every_config_key_is_in_the_reference(hooks: ModuleType) -> None:
    from clipdense.run.config import add_clipdense_config
    from clipdense.run.keys import config_keys

    from detectron2.config import get_cfg

    pages = importlib.import_module("docs_pages")
    cfg, plain = get_cfg(), set(config_keys(get_cfg()))
    add_clipdense_config(cfg)
    ours = [key for key in config_keys(cfg) if key not in plain]
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `([\w.]+)` \|.*$", pages.config_page(), re.M)}
    assert set(ours) == set(rows) and len(ours) > 300
    assert "one of" in rows["MODEL.CLIP.POSITION_RULE"] and "bicubic" in rows["MODEL.CLIP.POSITION_RULE"]
    assert "Resizing of the position table" in rows["MODEL.CLIP.POSITION_RULE"]
    bare = [key for key, row in rows.items() if re.search(r"\|\s*\|$", row)]
    assert len(bare) < 0.1 * len(ours), bare


def test_every_model_is_in_the_reference(hooks: ModuleType) -> None:
    page = importlib.import_module("docs_pages").models_page()
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", page, re.M)}
    assert set(rows) == {entry.name for entry in ZOO}
    assert (
        "| 435 MB | code MIT; weights not stated | [raoyongming/DenseCLIP](https" in rows["semantic_fpn_rn50"]
    )


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_executed_and_small(source: Path) -> None:
    import jupytext

    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < 2**20
    cells = json.loads(path.read_text("utf-8"))["cells"]
    written = [cell.source for cell in jupytext.read(source).cells]
    assert ["".join(cell["source"]) for cell in cells] == written, "run docs/notebooks/execute.py"
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(rf"/home/|/root/|/Users/|{re.escape(str(ROOT))}", path.read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTEBOOK_ITERATIONS", "3")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [
        sys.executable,
        str(DOCS / "notebooks" / "execute.py"),
        source.stem,
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / f"{source.stem}.ipynb").is_file()


def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site/reference/config/index.html").is_file()
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)\b[^>]*(?:src|href)="(https?://[^"]*)"', page.read_text("utf-8")
        )
        assert [url for url in fetched if not url.startswith("https://squidfunk.github.io")] == [], page


def test_the_version_stands_in_one_place() -> None:
    """CITATION.cff and the changelog follow `clipdense.__version__`."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == clipdense.__version__ and citation["license"] == "Apache-2.0"
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == "Unreleased" and versions[1] == clipdense.__version__
    assert "__version__" in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= form.keys()
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert {part["type"] for part in form["body"]} <= kinds
    labels = [part["attributes"]["label"] for part in form["body"] if part["type"] != "markdown"]
    assert len(labels) == len(set(labels)) > 1
