"""The console command ``clipdense``: a table of commands, each of which is imported when it is called.

``clipdense --help`` needs a fraction of a second. `import clipdense` imports neither torch nor detectron2
(`clipdense.registration`), and the table below holds the help lines, so that no command has to be imported.
A module of `clipdense.run.commands` imports only typer at its top, and everything else inside its function:
then ``clipdense COMMAND --help`` is as fast.

To add a command, write ``clipdense/run/commands/<name>.py`` and add a row to `COMMANDS`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer

import clipdense
from clipdense.run.boundary import tool_errors

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """A row of the command table.

    Attributes:
        target: "module:name" of a function with typer's annotations, or of a `typer.Typer` for a command with
            subcommands or with settings of its own. Its return value, if it is a number, is the exit status.
        help: the line in ``clipdense --help``.
        interrupted: what a user should know after Ctrl-C.
    """

    target: str
    help: str
    interrupted: str = "interrupted"


_TRAINING = "interrupted; --resume continues a training from its last checkpoint"
_KEPT = "interrupted; results so far are kept"
_COMMANDS = "clipdense.run.commands"

COMMANDS: dict[str, Command] = {
    "segment": Command(f"{_COMMANDS}.segment:segment", "Segment images into the classes of words.", _KEPT),
    "detect": Command(f"{_COMMANDS}.detect:detect", "Find the objects of words in images.", _KEPT),
    "panoptic": Command(f"{_COMMANDS}.panoptic:panoptic", "Segment objects and ground together.", _KEPT),
    "predict": Command(
        f"{_COMMANDS}.predict:predict",
        "Predict on many images: resumable, on one machine or a Ray cluster.",
        "interrupted; finished parts are kept, and the same command continues",
    ),
    "train": Command(f"{_COMMANDS}.train:app", "Train a model from a config.", _TRAINING),
    "evaluate": Command(f"{_COMMANDS}.evaluate:app", "Evaluate a trained model on its test datasets."),
    "convert": Command(
        f"{_COMMANDS}.convert:convert",
        "Convert published weights to safetensors.",
        "interrupted; nothing was written",
    ),
    "export": Command(
        f"{_COMMANDS}.export:app",
        "Write a model as an ONNX or .pt2 file.",
        "interrupted; do not use the file",
    ),
    "push": Command(f"{_COMMANDS}.push:push", "Share a trained model: on the hub, or as a folder."),
    "pull": Command(f"{_COMMANDS}.pull:pull", "Copy a shared model from the hub into a folder."),
    "data": Command(f"{_COMMANDS}.data:app", "Check your own data before training, and split them."),
    "models": Command(f"{_COMMANDS}.models:models", "List the models that clipdense runs."),
    "reproduce": Command(
        f"{_COMMANDS}.reproduce:reproduce",
        "Check published results with published weights.",
        "interrupted; the same command continues",
    ),
    "report": Command(f"{_COMMANDS}.report:report", "Write one HTML file on a run, or on two side by side."),
    "serve": Command(
        f"{_COMMANDS}.serve:serve", "Serve a web page: drop images, type words.", "the page is closed"
    ),
    "doctor": Command(
        f"{_COMMANDS}.doctor:doctor", "Print versions, devices, caches, and what is not installed."
    ),
}
"""Name of a command -> its row, in the order of the help page."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console command.

    Args:
        arguments: the words after ``clipdense``; default: those of the process.

    Raises:
        SystemExit: With the exit status: 0, 1 after an error, 2 after wrong arguments, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with tool_errors():
        if words and words[0] in COMMANDS:
            name = words.pop(0)
            program, app = f"clipdense {name}", _application(COMMANDS[name])
        else:
            program, app = "clipdense", _overview()
        typer.main.get_command(app)(args=words, prog_name=program)


def _application(row: Command) -> typer.Typer:
    """Import a command, and run its functions inside `tool_errors`."""
    module, _, name = row.target.partition(":")
    target: Any = getattr(importlib.import_module(module), name)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(target)
        target = app
    for command in target.registered_commands:
        assert command.callback is not None
        # typer would print "Aborted." after Ctrl-C
        command.callback = _guarded(command.callback, row.interrupted)
    target._add_completion = False
    return target


def _guarded(function: Callable[..., Any], interrupted: str) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        wrong: typer.BadParameter | None = None
        with tool_errors(interrupted):
            try:
                status = function(*args, **kwargs)
            except typer.BadParameter as error:
                wrong, status = error, None
            if isinstance(status, int) and status:
                raise SystemExit(status)
        if wrong is not None:  # typer prints the usage, and exits with status 2
            raise wrong

    return run


def _overview() -> typer.Typer:
    """Return the application that prints the help page, the version, and what is wrong with a command."""
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, help=(clipdense.__doc__ or "").splitlines()[0]
    )
    app.callback()(_options)
    for name, row in COMMANDS.items():
        app.command(name, help=row.help)(_never_called)
    return app


def _print_version(requested: bool) -> None:
    if requested:
        print(f"clipdense {clipdense.__version__}")
        raise typer.Exit()


def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Declare the options of the command itself."""


def _never_called() -> None:
    """Stand for a command on the help page; `main` calls commands without this application."""
