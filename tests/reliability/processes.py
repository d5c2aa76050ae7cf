"""Jobs as forks of one Python that has imported everything: a start takes milliseconds instead of seconds.

A fork has only the thread that calls it. A lock that another thread holds at that moment, such as one of the
thread pools of hotcoco or torch, stays locked in the child for ever. Jobs are therefore started by a process
that has a single thread, and that does nothing but start them.
"""

import atexit
import gc
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdense.engine.processes import end_with_parent
from tests.conftest import ROOT

__all__ = ["ROOT", "Ended", "Job", "call_as_main", "require_single_thread", "run_tool", "warm_up"]


def warm_up() -> None:
    """Import what the jobs need, and keep the children from copying it at a garbage collection."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    Image.init()
    for name in (
        "engine.trainer",
        "evaluation",
        "run.predictor",
        "run.setup",
        "systems",
        "visualization.panels",
    ):
        importlib.import_module(f"clipdense.{name}")
    for name in ("hotcoco", "torch.utils.cpp_extension", "torch.utils.tensorboard", "tqdm.contrib.logging"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: exit status, negative for a signal; None if it took too long.
        seconds: how long it ran.
        text: what it printed.
    """

    code: int | None
    seconds: float
    text: str


def require_single_thread() -> None:
    """Raise an error if this process has more than one thread, and cannot be forked safely (on Linux)."""
    tasks = Path("/proc/self/task")
    names = [task.joinpath("comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
    if len(names) > 1:
        raise RuntimeError(f"jobs are forks of a process with one thread, but it has {len(names)}: {names}")


class Job:
    """Process of its own session that runs a tool as ``__main__``, or a function.

    It ends with this process, however that ends.

    Args:
        work: command line of a tool (its path first), or a function.
        log: file to which its output is appended.
        environment: additional environment variables.

    Raises:
        RuntimeError: If this process has several threads.
    """

    def __init__(
        self,
        work: Sequence[Any] | Callable[[], object],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log, self._start = log, time.monotonic()
        self._before = log.stat().st_size if log.exists() else 0
        require_single_thread()
        sys.stdout.flush()
        sys.stderr.flush()
        ending = end_with_parent()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if ending is not None:
                    ending()
                os.setsid()
                _redirect(log)
                os.chdir(ROOT)
                os.environ.update(environment or {})
                code = _call(work) if callable(work) else call_as_main(work)
            finally:
                os._exit(code & 0xFF)

    @property
    def text(self) -> str:
        """Output of this job so far."""
        return self.log.read_bytes()[self._before :].decode(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str, timeout: float = 200.0) -> None:
        """Wait until the job has printed a text; fail if it ends before."""
        end = time.monotonic() + timeout
        while text not in self.text:
            assert time.monotonic() < end and not self.has_ended(), f"no {text!r} in: {self.text[-2000:]}"
            time.sleep(0.01)

    def has_ended(self) -> bool:
        """Return whether the job has ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, number: int, group: bool = True) -> None:
        """Send a signal to the job's process group, or to its process alone."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def remaining(self) -> list[int]:
        """Return the processes of the job's group that run, once the job itself has ended."""
        running = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ends meanwhile
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state not in "ZX":
                    running.append(int(path.parent.name))
        return running

    def wait(self, timeout: float = 600.0) -> Ended:
        """Wait for the end; a job that takes too long is killed."""
        end = time.monotonic() + timeout
        while not self.has_ended():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(None, time.monotonic() - self._start, self.text)
            time.sleep(0.005)
        status = os.waitpid(self.pid, 0)[1]
        return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - self._start, self.text)


def run_tool(name: str, *words: Any, log: Path, timeout: float = 600.0, **environment: str) -> Ended:
    """Run a tool of ``tools/`` to its end."""
    return Job([ROOT / "tools" / name, *words], log, environment).wait(timeout)


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, number)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115


def call_as_main(command: Sequence[Any]) -> int:
    """Run a tool as Python itself would; return the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        sys.argv = [str(word) for word in command]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as e:
        traceback.print_exc()
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
    try:
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def _call(work: Callable[[], object]) -> int:
    try:
        work()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
