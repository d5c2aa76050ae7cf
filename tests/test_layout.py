"""Shape of the code: sizes of files and functions, absolute imports, order of the rooms, wording."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("clipdense", "tools", "tests", "datasets", "projects")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = FILES + sorted(p for folder in ("configs", "projects") for p in (ROOT / folder).rglob("*.yaml"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
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


def imports(tree: ast.AST) -> set[str]:
    """Return the absolute modules that a file imports, anywhere."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def rooms_above(path: Path) -> set[str]:
    """Return the rooms above a file's; empty for rooms that stand beside the rows."""
    room = path.relative_to(ROOT / "clipdense").parts[0].removesuffix(".py")
    row = next((i for i, rooms in enumerate(ROWS) if room in rooms), 0)
    return {other for rooms in ROWS[:row] for other in rooms}


def declares_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function only declares command-line arguments or config keys."""
    return bool(re.search(r"argument|parse|^add_\w+_config$", function.name))


def test_there_are_files() -> None:
    """So that the other tests cannot pass on nothing."""
    assert len(FILES) > 300


def test_files_fit() -> None:
    assert [name(p) for p in FILES if len(p.read_text().splitlines()) > MAX_FILE_LINES] == []


def test_functions_fit() -> None:
    """Signature and docstring do not count; functions that declare arguments or config keys are exempt."""
    long = [
        f"{name(path)}: {function.name}"
        for path in FILES
        for function in functions(TREES[path])
        if body_lines(function) > MAX_BODY_LINES and not declares_arguments(function)
    ]
    assert long == []


def test_imports_are_absolute() -> None:
    relative = [
        f"{name(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_no_room_imports_a_higher_one() -> None:
    """Imports inside functions count as well."""
    upward = [
        f"{name(path)} imports {module}"
        for path in FILES
        if name(path).startswith("clipdense/")
        for module in imports(TREES[path])
        if module.startswith("clipdense.") and module.split(".")[1] in rooms_above(path)
    ]
    assert upward == []


def test_wording() -> None:
    """Papers are cited by name and section; the word is "dataset"."""
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in TEXTS
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bspecs/|\bdata sets?\b", line, re.IGNORECASE)
    ]
    assert found == []
