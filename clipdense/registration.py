"""Registration of clipdense's models and datasets with Detectron2, without importing either in advance.

`import clipdense` takes a fraction of a second: it only installs a hook into Python's import system. When
Detectron2 is imported later, the hook

- supplies the names that the installed Detectron2 misses (`clipdense.compat`), before Detectron2 runs;
- registers the datasets, as soon as Detectron2's catalogs exist;
- makes every registry of Detectron2 import clipdense's models at its first lookup, e.g. in ``build_model``.

If Detectron2 has been imported before clipdense, all of this happens at once.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from clipdense import compat

__all__ = ["install", "register_models"]

MODEL_ROOMS = (
    "clipdense.backbone",
    "clipdense.data.mappers",
    "clipdense.data.shapes.pretraining",
    "clipdense.evaluation",
    "clipdense.maskformer",
    "clipdense.systems",
)
"""Packages whose import registers backbones, meta-architectures, heads, mappers and evaluators."""

DATASETS = (
    "clipdense.data.datasets.standard",
    "clipdense.data.datasets.open_semantic",
    "clipdense.data.datasets.open_vocabulary",
    "clipdense.data.shapes.datasets",
)
"""Modules whose import registers the datasets. One that is being imported registers them when it ends."""

_unregistered = list(MODEL_ROOMS)


def install() -> None:
    """Install the import hook; what Detectron2 has imported already is dealt with immediately."""
    if any(isinstance(finder, _ImportHook) for finder in sys.meta_path):
        return
    # torch warns about every scripted function of the libraries below; users can do nothing about it
    warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
    if "detectron2" in sys.modules:
        compat.apply()
    hook = _ImportHook()
    sys.meta_path.insert(0, hook)
    if "detectron2.utils.registry" in sys.modules:
        hook.pending.discard("detectron2.utils.registry")
        register_models()
    if "detectron2.data" in sys.modules:
        hook.pending.discard("detectron2.data")
        _register_datasets()


def register_models() -> None:
    """Import the packages that register models, mappers and evaluators. Later calls do nothing."""
    rooms = _unregistered.copy()
    _unregistered.clear()  # before the imports, which may look up names themselves
    try:
        for room in rooms:
            importlib.import_module(room)
    except BaseException:
        _unregistered[:] = rooms
        raise


def _register_datasets() -> None:
    for name in DATASETS:
        importlib.import_module(name)


class _ImportHook(MetaPathFinder):
    """Finder that runs an action around the first import of some modules of Detectron2."""

    def __init__(self) -> None:
        self.pending = {"detectron2", "detectron2.utils.registry", "detectron2.data"}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in self.pending:
            return None
        self.pending.discard(fullname)  # the other finders find it
        try:
            spec = find_spec(fullname)
        finally:
            self.pending.add(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, lambda: self.pending.discard(fullname))
        return spec


class _ActingLoader(Loader):
    """Loader that runs the action of a module before or after the module itself."""

    def __init__(self, loader: Loader, started: Callable[[], None]) -> None:
        self._loader, self._started = loader, started

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._started()
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if module.__name__ == "detectron2":
            compat.apply()
        self._loader.exec_module(module)
        if module.__name__ == "detectron2.utils.registry":
            _look_up_lazily(module)
        if module.__name__ == "detectron2.data":
            _register_datasets()


def _look_up_lazily(module: Any) -> None:
    """Replace the class ``Registry`` of a module by a subclass that registers the models at a lookup."""

    class Registry(module.Registry):
        """Registry of Detectron2 that also knows the models of clipdense."""

        def get(self, name: str) -> Any:
            register_models()
            return super().get(name)

        def __contains__(self, name: str) -> bool:
            register_models()
            return super().__contains__(name)

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            register_models()
            return super().__iter__()

        def __repr__(self) -> str:
            register_models()
            return super().__repr__()

        __str__ = __repr__

    module.Registry = Registry
