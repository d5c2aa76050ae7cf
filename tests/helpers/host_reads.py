"""Count the places at which Python waits for the device, without a device."""

import os
import sys
from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HostReads"]

# Operators whose result has a size, or is a number, that the host must know before it goes on.
_OPERATORS = {
    *(
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "bincount",
        "repeat_interleave",
    ),
    *("unique_dim", "_unique2", "_unique", "unique_consecutive", "unique_dim_consecutive", "equal"),
}
# Methods that copy to the host. On CPU tensors, they reach no operator.
_METHODS = {"cpu", "tolist", "numpy", "__array__"}


class HostReads:
    """Counter of the calls inside its ``with`` block for which the host would wait for a GPU.

    These are values that become numbers of Python (``item()``, ``int()``, ``bool()``, ``if tensor:``),
    results whose size depends on values (``nonzero()``, ``unique()``, indices that are masks), and copies to
    the host (``cpu()``, ``tolist()``, ``numpy()``). On the CPU, all tensors count, also those that would be
    on the host in any case; ``host`` names the functions that work on such tensors.

    Args:
        host: names of functions; what happens inside them does not count.

    Attributes:
        places: number of calls by "operation file:line function".
    """

    def __init__(self, *host: str) -> None:
        self.places: Counter[str] = Counter()
        self._host = host
        self._modes = [_Operators(self), _Methods(self)]

    @property
    def total(self) -> int:
        """Number of calls."""
        return sum(self.places.values())

    def add(self, operation: str) -> None:
        """Count a call at the place in clipdense or Detectron2 from which it comes."""
        frame: Any = sys._getframe(2)
        stack = []
        while frame:
            stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        if any(name in self._host for _, _, name in stack):
            return
        own = (x for x in stack if "/clipdense/" in x[0] or "/detectron2/" in x[0])
        path, line, name = next(own, stack[-1])
        self.places[f"{operation} {os.path.basename(path)}:{line} {name}"] += 1

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "repeat_interleave" and (
            func._overloadname == "self_int" or "output_size" in (kwargs or {})
        ):
            return func(*args, **(kwargs or {}))  # of a known size
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])
        )
        if name in _OPERATORS or masks:
            self.reads.add(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS and isinstance(args[0], Tensor):
            self.reads.add(name)
        return func(*args, **(kwargs or {}))
