"""What imports what: all of detectron2 after clipdense, and the CLIP rooms without detectron2."""

import importlib
import json
import pkgutil
from types import ModuleType

import detectron2

_IMPORT_ROOMS = """
import importlib, json, pkgutil
import clipdense
names = []
needing_detectron2 = ("clipdense.data.shapes.datasets", "clipdense.data.shapes.pretraining")
for room in ("clipdense.clip", "clipdense.regions", "clipdense.checkpoint", "clipdense.data.shapes"):
    package = importlib.import_module(room)
    names.append(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        if not module.name.startswith(needing_detectron2):
            importlib.import_module(module.name)
            names.append(module.name)
assert not any(name.partition(".")[0] == "detectron2" for name in sys.modules)
print(json.dumps(names))
"""


def _import_all(package: ModuleType) -> dict[str, str]:
    """Import every module of a package; returns the errors of those that failed."""
    failed = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        try:
            loaded = importlib.import_module(module.name)
        except Exception as error:
            failed[module.name] = f"{type(error).__name__}: {error}"
        else:
            failed.update(_import_all(loaded) if module.ispkg else {})
    return failed


def test_every_detectron2_module_imports():
    """`import clipdense` first (tests/conftest.py) is enough.

    Export of 0.6 to Caffe2, which torch has dropped, and to ONNX is out of reach. Whatever else fails to
    import is ours to supply.
    """
    failed = {
        name: error
        for name, error in _import_all(detectron2).items()
        if not (name.startswith("detectron2.export.") and ("caffe2" in error or "onnx" in error))
    }
    assert not failed


def test_clip_rooms_do_without_detectron2(run_python):
    names = json.loads(run_python(_IMPORT_ROOMS, without="detectron2").splitlines()[-1])
    assert {"clipdense.clip.model", "clipdense.data.shapes.world"} <= set(names)


def test_what_needs_detectron2_says_so(run_python):
    """Negative control: without detectron2 the other rooms fail, and name it."""
    source = """
import clipdense
try:
    import clipdense.run.config
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run_python(source, without="detectron2").strip() == "detectron2"
