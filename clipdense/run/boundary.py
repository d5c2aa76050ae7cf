"""The one place where the tools turn exceptions into messages and exit statuses.

It imports nothing heavy, so that it also covers the imports that a tool makes in its ``main``.
"""

from __future__ import annotations

import dis
import errno
import logging
import os
import re
import select
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["announce_imports", "describe_error", "tool_errors"]

_PACKAGE = Path(__file__).resolve().parents[1]
_OWN_CODE = (_PACKAGE, *(_PACKAGE.parent / folder for folder in ("tools", "datasets", "projects")))
# Types that our code raises for what a user can cause, besides its own exception classes.
_RAISED_FOR_USERS = ("ValueError", "KeyError", "FloatingPointError", "ImportError", "NotImplementedError")
_REPORT = (
    "This is an unexpected error, probably a fault of clipdense. Please report it with the text above, the "
    "command, and the output of: python -m detectron2.utils.collect_env"
)


@contextmanager
def tool_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn exceptions into a message on stderr and an exit status.

    - What a user can cause (`describe_error`): ``error: ...`` without a traceback, status 1.
    - Ctrl-C: the sentence ``interrupted``, status 130.
    - A closed pipe (``tool | head``): nothing, status 1.
    - A process that a launcher started and that has already printed its error: its status.
    - Anything else: the traceback and a request for a report, status 1.

    Args:
        interrupted: what a user should know after Ctrl-C, e.g. which command continues.

    Raises:
        SystemExit: With the status, after an exception.
    """
    before = logging.raiseExceptions, threading.excepthook
    logging.raiseExceptions = False  # a log file on a full disk is not worth a traceback for each line
    threading.excepthook = _thread_error
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()  # here, and not at exit, where a full disk would be a traceback
            raise
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say(interrupted)
        code = 130
    except Exception as error:
        code = _tell(error)
    else:
        return
    finally:
        logging.raiseExceptions, threading.excepthook = before
        _close_failed_logs()
    _discard_closed_output()
    raise SystemExit(code)


def announce_imports() -> None:
    """Say on stderr that the libraries are being loaded, which takes seconds, unless they are there."""
    if not {"torch", "detectron2"} <= sys.modules.keys():
        _say("Loading PyTorch and Detectron2 ...")


def describe_error(error: BaseException) -> str | None:
    """Describe an error that a user can cause, in one or two lines; None for any other error.

    These are the exceptions of clipdense, errors of the operating system, a missing package, too little
    memory, and the built-in exceptions that clipdense itself raises (not those of a library that it calls).
    """
    text, own = str(error), _raised_here(error.__traceback__)
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    if (original := _from_process(error)) is not None:
        kind, text, own = original
    if kind.startswith("clipdense.") or (own and kind in _RAISED_FOR_USERS):
        return text[1:-1] if kind == "KeyError" else text  # its text is its message in quotes
    if kind.rpartition(".")[2] in ("MemoryError", "OutOfMemoryError") or "can't allocate mem" in text:
        return f"not enough memory ({text.splitlines()[0] if text else 'out of memory'}); " + (
            "use smaller images (INPUT.MIN_SIZE_TEST, INPUT.MIN_SIZE_TRAIN) or a smaller SOLVER.IMS_PER_BATCH"
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("clipdense"):
        return f"the Python package {error.name!r} is not installed; install it with pip"
    if isinstance(error, OSError):
        return _describe_os_error(error, text)
    if kind.startswith("torch.distributed.Dist") or re.match(
        r"\[.*gloo/transport.*(peer|[Tt]imed out)", text
    ):
        return (
            "the connection to another process of this run is lost, and the output of that process tells why "
            f"({text.splitlines()[0]}). --resume continues from the last checkpoint"
        )
    return None


def _tell(error: Exception) -> int:
    """Print what is known about an error; return the exit status."""
    if isinstance(error, BrokenPipeError) and _closed_outputs():
        return 1
    if type(error).__name__ == "ProcessExitedException":  # of torch: the process has printed its error
        code: Any = getattr(error, "exit_code", 1)
        if (name := getattr(error, "signal_name", None)) is not None:
            _say(f"error: a process of this run was ended by {name}")
        return code if isinstance(code, int) and 0 < code < 256 else 1
    text = describe_error(error)
    if text is not None:
        rank = os.environ.get("RANK", "0")
        _say(f"error: {text}" if rank == "0" else f"error: process {rank}: {text}")
    else:
        with suppress(OSError):
            traceback.print_exception(error)
        _say(_REPORT)
    return 1


def _say(text: str) -> None:
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _describe_os_error(error: OSError, text: str) -> str:
    """Describe an error of the operating system: the file first, then the reason and a remedy."""
    remedies = {
        errno.ENOSPC: "free some space, or choose another folder",
        errno.EDQUOT: "free some space, or choose another folder",
        errno.EIO: "the disk may be damaged; choose another one",
        errno.EROFS: "choose another folder",
        errno.EACCES: "change its permissions, or choose another folder",
    }
    if error.errno is None or error.strerror is None:
        return " ".join(text.split())
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    remedy = remedies.get(error.errno, "")
    return ": ".join([*names, error.strerror]) + (f"; {remedy}" if remedy else "")


def _raised_here(trace: TracebackType | None) -> bool:
    """Return whether an exception comes from a ``raise`` statement in our code."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and _is_own(code.co_filename)


def _is_own(file: str) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in _OWN_CODE)


def _from_process(error: BaseException) -> tuple[str, str, bool] | None:
    """Take apart an exception that torch passes on from another process as text.

    Returns:
        Full name of the original type, its message, and whether our code raised it; None for other
        exceptions.
    """
    text = str(error)
    if not re.match(r"Caught \w+ in .* process|\s*-- Process \d+ terminated with the following error", text):
        return None
    frames = list(re.finditer(r'^ *File "(.*)", line \d+, in .*\n *(.*)\n(?: .*\n)*', text, re.MULTILINE))
    if not frames:
        return None
    file, statement = frames[-1].groups()
    kind, _, message = text[frames[-1].end() :].partition(":")
    return kind.strip(), message.strip(), statement.startswith("raise ") and _is_own(file)


def _closed_outputs() -> list[int]:
    """Return which of stdout and stderr is a pipe whose reader has gone."""
    closed = []
    for number in (1, 2):
        poll = select.poll()
        with suppress(OSError):
            poll.register(number, select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
                closed.append(number)
    return closed


def _discard_closed_output() -> None:
    """Send further output to nowhere if it cannot be written, as Python flushes it again at exit."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


def _close_failed_logs() -> None:
    """Close the log files that cannot be written: closing them at exit would print a traceback."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in [handler for logger in (logging.root, *loggers) for handler in logger.handlers]:
        stream = getattr(handler, "stream", None)
        if stream is None or stream in (sys.stdout, sys.stderr):
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                stream.close()


def _thread_error(args: Any) -> None:
    """Print an exception of a thread: one line for what a user can cause, such as a full disk."""
    text = None if args.exc_value is None else describe_error(args.exc_value)
    if text is None:
        threading.__excepthook__(args)
    else:
        _say(f"warning: {text}")
