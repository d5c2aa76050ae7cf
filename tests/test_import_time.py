"""Modules that importing clipdense, and `--help` of a tool, must not import: each takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted((ROOT / "tools").glob("*.py"), key=lambda path: path.name)
HEAVY = {
    "cityscapesscripts", "cv2", "detectron2", "hotcoco", "matplotlib", "open_clip", "pandas", "pyarrow",
    "ray", "scipy", "sklearn", "spacy", "timm", "torch", "torchvision", "transformers", "webdataset",
}  # fmt: skip

_MODULES = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


@pytest.mark.parametrize("room", ["clipdense", "clipdense.clip", "clipdense.data", "clipdense.files"])
def test_import_is_light(room, run_python):
    loaded = set(json.loads(run_python(f"import {room}; {_MODULES}")))
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_help_is_light(tool):
    """Python lists every import on stderr; `make_shapes` names the default folder, which needs OpenCV."""
    command = [sys.executable, "-X", "importtime", str(tool), "--help"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert "usage:" in done.stdout.lower()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert loaded & {"argparse", "typer"}  # the list is there
    assert loaded & HEAVY <= ({"cv2"} if tool.stem == "make_shapes" else set())


def test_what_detectron2_finds(run_python):
    """Models, mappers and datasets are registered although nothing of Detectron2 is imported yet."""
    source = """
import clipdense
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
assert "clipdense.systems" not in sys.modules
assert "shapes_closed_train" in DatasetCatalog.list()
assert len(MetadataCatalog.get("shapes_closed_train").thing_classes) == 80
assert "OVSeg" in META_ARCH_REGISTRY
assert BACKBONE_REGISTRY.get("LanguageTrunk").__module__ == "clipdense.backbone.language"
assert {"TextROIHeads", "StandardROIHeads"} <= dict(ROI_HEADS_REGISTRY).keys()
assert "DenseCLIPRCNN" in repr(META_ARCH_REGISTRY)
"""
    run_python("import sys\n" + source)


def test_detectron2_may_come_first(run_python):
    """An intact Detectron2 can be imported before clipdense; then everything is registered at once."""
    source = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compat", sys.argv[1])
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
compat.apply()
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
assert "OVSeg" not in META_ARCH_REGISTRY
import clipdense
assert "OVSeg" in META_ARCH_REGISTRY and "shapes_closed_train" in DatasetCatalog.list()
"""
    run_python(source, str(ROOT / "clipdense/compat.py"))


@pytest.mark.parametrize(
    "first", ["clipdense.data.mask_pairs", "clipdense.data.shapes.datasets", "clipdense.systems.denseclip"]
)
def test_any_room_may_come_first(first, run_python):
    """The hook imports rooms while another room is being imported; neither may depend on the order."""
    source = f"""
import {first}
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
assert "OVSeg" in META_ARCH_REGISTRY and "shapes_closed_train" in DatasetCatalog.list()
"""
    run_python(source)


def test_an_unknown_name_is_an_error(run_python):
    source = """
import clipdense
from detectron2.modeling import META_ARCH_REGISTRY
assert "NoSuchModel" not in META_ARCH_REGISTRY
try:
    META_ARCH_REGISTRY.get("NoSuchModel")
except KeyError as error:
    print(error)
"""
    assert "NoSuchModel" in run_python(source)
