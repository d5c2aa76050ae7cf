"""What an installed clipdense holds, and what the requirement files promise."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import clipdense

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "shapes/some/deep.yaml"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package is built from, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("clipdense", "configs", "projects", "requirements", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    (copy / "configs" / CONFIG).parent.mkdir(parents=True)
    (copy / "configs" / CONFIG).write_text("VERSION: 2\n")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=checkout, check=True, capture_output=True)
    return next(out.glob("clipdense-*.whl"))


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_wheel_holds_code_weights_and_configs(checkout, wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert _files(checkout / "clipdense") <= {name.removeprefix("clipdense/") for name in shipped}
    assert _files(checkout / "configs") <= {name.removeprefix("clipdense/configs/") for name in shipped}
    assert not any(name.startswith(("configs/", "projects/", "tests/", "tools/")) for name in shipped)
    for pattern in ("tools/**/*.py", "projects/*/configs/**/*.yaml", "projects/*/configs/**/*.py"):
        files = [path.relative_to(checkout).as_posix() for path in checkout.glob(pattern)]
        assert files and {f"clipdense/{name}" for name in files} <= shipped
    assert "clipdense/projects/headline_rows.yaml" in shipped
    assert "[console_scripts]\nclipdense = clipdense.run.cli:main" in _entry_points(wheel)


def _entry_points(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/entry_points.txt")]
        return file.read(name).decode()


@pytest.mark.slow
def test_an_installed_wheel_segments_in_another_folder(wheel, tmp_path):
    """In an environment of its own, which sees the libraries of this one; the first picture in 30 seconds."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    python = tmp_path / "venv/bin/python"
    entry = "import sys; from clipdense.run.cli import main; sys.exit(main())"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(ROOT / "projects/ShapesWorld/scenes/1.jpg", folder / "scene.jpg")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [python, "-c", entry, *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = os.times()
    assert "scene.jpg: " in run("segment", "scene.jpg", "--words", "red heart, blue star")
    after = os.times()
    assert after.children_user - before.children_user < 30
    assert (folder / "output/predictions/scene.jpg").is_file()
    assert str(site / "clipdense") in run("doctor")
    assert "| catseg_b_a150 " in run("reproduce", "--dry-run")
    config = "projects/ZeroShot/configs/voc21.yaml"
    # a table of one's own, whose config is one of the package
    row = f"{{name: mine, system: SCLIP, clip: 'shapes-vit:', data: d, config: {config}"
    value = "{metric: sem_seg/mIoU, paper: 1, tolerance: 1, evidence: M}"
    data = "data: {d: {needs: nothing, paths: [missing]}}"
    (folder / "own.yaml").write_text(f"{data}\nrows: [{row}, values: [{value}]}}]\n")
    assert "| mine " in run("reproduce", "--table", "own.yaml", "--dry-run")
    path = subprocess.run(
        [python, "-c", f"import clipdense; print(clipdense.config_path({config!r}))"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(path.stdout.strip()) == site / "clipdense" / config


def test_wheel_metadata_agree_with_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    path = next(name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(path))
    assert metadata["Name"] == "clipdense" and metadata["Version"] == clipdense.__version__
    assert metadata["License"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert "docs" in metadata.get_all("Provides-Extra")
    required = {
        re.split(r"[^\w.-]", line)[0] for line in metadata.get_all("Requires-Dist") if ";" not in line
    }
    assert {name.lower().replace("_", "-") for name in required} == _names(ROOT / "requirements/base.txt")
    assert {"clipdense/py.typed", f"clipdense-{clipdense.__version__}.dist-info/licenses/LICENSE"} <= set(
        names
    )


def test_nano_weights_are_small(wheel):
    weights = [file for file in zipfile.ZipFile(wheel).infolist() if file.filename.endswith(".safetensors")]
    assert sum(file.file_size for file in weights) <= 25 * 2**20


@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_config_path(checkout, wheel, installed, tmp_path, run_python):
    if installed:
        zipfile.ZipFile(wheel).extractall(tmp_path)
    root = tmp_path if installed else checkout
    source = "import sys, clipdense; print(clipdense.config_path(sys.argv[1]))"
    # Without detectron2 `import clipdense` takes no time.
    path = run_python(source, CONFIG, without="detectron2", cwd=tmp_path, PYTHONPATH=str(root)).strip()
    assert Path(path) == root / ("clipdense/configs" if installed else "configs") / CONFIG


def test_config_path_names_what_there_is(checkout, monkeypatch):
    monkeypatch.setattr("clipdense.paths._PACKAGE", checkout / "clipdense")
    with pytest.raises(FileNotFoundError, match=re.escape(CONFIG)):
        clipdense.config_path(CONFIG.replace("deep", "high"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        clipdense.config_path("no/such.yaml")


def _names(file: Path) -> set[str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines}


def test_requirements_are_pinned_and_hold_no_urls():
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert files
    for file in files:
        assert "://" not in file.read_text(), file.name
    lock = ROOT / "requirements/lock.txt"
    for line in lock.read_text().splitlines():
        assert re.match(r"[\w.-]+(\[\w+\])?==\S+", line), line
    for file in files:
        assert _names(file) <= _names(lock), f"{file.name}: run `make lock`"


def test_what_the_package_imports_is_required():
    """Every third-party import of clipdense is in base.txt, or comes with detectron2 and its evaluators."""
    modules = set()
    files = list((ROOT / "clipdense").rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add((node.module or "").partition(".")[0])
    modules -= {"clipdense", "detectron2", "fvcore", "iopath", "omegaconf"} | sys.stdlib_module_names
    # the runner of exported files imports the files beside it by their bare names
    modules -= {file.stem for file in files if file.parent.name == "export"}
    modules -= {"fiftyone"}  # its own requirements contradict the lock file; results.to_fiftyone() says so
    distributions = packages_distributions()
    folder = ROOT / "requirements"
    known = set.union(
        *(
            _names(folder / f"{name}.txt")
            for name in (
                "base",
                "detectron2",
                "export",
                "mining",
                "sam",
                "scale",
                "supervision",
                "track",
                "web",
            )
        )
    )
    unknown = {
        module
        for module in modules
        if not any(name.lower().replace("_", "-") in known for name in distributions.get(module, [module]))
    }
    assert not unknown, f"add to requirements/base.txt: {sorted(unknown)}"
