"""Shape of the code: sizes of files and functions, absolute imports, order of the rooms, wording."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("clipdense", "tools", "tests", "datasets", "projects")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = FILES + sorted(p for folder in ("configs", "projects") for p in (ROOT / folder).rglob("*.yaml"))
MAX_FILE_LINES, MAX_BODY_LINES = 500, 60

# The order of the rooms, top first; rooms of one row may import each other. import-linter checks the same
# order for all imports, see pyproject.toml; here, a room may not even name a higher one within a function.
ROWS = (
    ("run",),
    ("systems",),
    ("maskformer", "inference", "open_vocabulary", "backbone"),
    ("regions",),
    ("clip",),
    ("checkpoint",),
    ("paths", "files", "compat"),
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function's body, without its signature and its docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def declares_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function only declares command-line arguments or config keys."""
    return bool(re.search(r"argument|parse|^add_\w+_config$", function.name))


def test_there_are_files() -> None:
    """So that the other tests cannot pass on nothing."""
    assert len(FILES) > 300


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_fits(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=name)
def test_functions_fit(path: Path) -> None:
    """Signature and docstring do not count; functions that declare arguments or config keys are exempt."""
    found = functions(ast.parse(path.read_text()))
    assert [f.name for f in found if body_lines(f) > MAX_BODY_LINES and not declares_arguments(f)] == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_are_absolute(path: Path) -> None:
    imports = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    assert [node.lineno for node in imports if node.level] == []


@pytest.mark.parametrize("path", [p for p in FILES if name(p).startswith("clipdense/")], ids=name)
def test_no_room_imports_a_higher_one(path: Path) -> None:
    """Imports inside functions count as well."""
    room = path.relative_to(ROOT / "clipdense").parts[0].removesuffix(".py")
    row = next((i for i, rooms in enumerate(ROWS) if room in rooms), None)
    if row is None:
        return  # data, evaluation, engine and visualization stand beside; import-linter checks them
    higher = {other for rooms in ROWS[:row] for other in rooms}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    rooms = {m.split(".")[1] for m in imported if m.startswith("clipdense.")}
    assert rooms & higher == set()


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_wording(path: Path) -> None:
    """Papers are cited by name and section; the word is "dataset"."""
    text = path.read_text()
    lines = [
        f"{i}: {line.strip()}"
        for i, line in enumerate(text.splitlines(), 1)
        if re.search(r"\bspecs/|\bdata sets?\b", line, re.IGNORECASE)
    ]
    assert path == Path(__file__) or lines == []
