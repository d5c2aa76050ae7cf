"""The boundary of the tools: one line for what a user can cause, a traceback for faults of ours."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from clipdense.checkpoint import CheckpointError
from clipdense.data.image import read_image
from clipdense.engine.options import ConfigError
from clipdense.files import write_text
from clipdense.run.boundary import describe_error, tool_errors

ROOT = Path(__file__).resolve().parents[2]


class Unreadable(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return read_image(self.path)


class Faulty(Unreadable):
    def __getitem__(self, index):
        return {}[self.path]


def caught(function, *args):
    with pytest.raises(Exception) as info:  # noqa: PT011 (any)
        function(*args)
    return info.value


def status(error, capsys):
    def run():
        raise error

    with pytest.raises(SystemExit) as end, tool_errors("interrupted; --resume continues"):
        run()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("SOLVER.X: bad"), "error: SOLVER.X: bad\n"),
        (CheckpointError("a.pth: damaged"), "error: a.pth: damaged\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), "error: a.json: No such file\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.json"),
            "error: a.json: No space left on device; free some space, or choose another folder\n",
        ),
        (
            OSError(errno.EIO, "Input/output error", "a.json"),
            "error: a.json: Input/output error; the disk may be damaged; choose another one\n",
        ),
        (
            ModuleNotFoundError("No module named 'spacy'", name="spacy"),
            "error: the Python package 'spacy' is not installed; install it with pip\n",
        ),
        (
            MemoryError(),
            "error: not enough memory (out of memory); use smaller images (INPUT.MIN_SIZE_TEST, "
            "INPUT.MIN_SIZE_TRAIN) or a smaller SOLVER.IMS_PER_BATCH\n",
        ),
        (
            RuntimeError("[/src/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer\nmore"),
            "error: the connection to another process of this run is lost, and the output of that process "
            "tells why ([/src/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer). "
            "--resume continues from the last checkpoint\n",
        ),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, expected, capsys):
    assert status(error, capsys) == (1, expected)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("by a library"), AssertionError("x")])
def test_other_errors_keep_their_traceback(error, capsys):
    code, text = status(error, capsys)
    assert code == 1 and "Traceback" in text and "Please report it" in text


def test_ctrl_c_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as end, tool_errors("interrupted; --resume continues"):
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted; --resume continues\n"


def test_success_and_exit_statuses_pass():
    with tool_errors():
        pass
    with pytest.raises(SystemExit, match="7"), tool_errors():
        sys.exit(7)


def test_a_value_error_counts_only_if_our_code_raised_it():
    from clipdense.clip.vocabulary import Vocabulary

    assert "are the same" in (describe_error(caught(Vocabulary.parse, "cat, Cat")) or "")
    assert describe_error(caught(int, "x")) is None
    assert describe_error(caught(torch.zeros(2).view, 3)) is None


def test_a_key_error_of_ours_is_its_message():
    from clipdense.data.object_crops import ObjectCropMapper

    mapper = ObjectCropMapper.__new__(ObjectCropMapper)
    text = describe_error(caught(mapper, {"file_name": "a.jpg"}))
    assert text is not None and text.startswith("a.jpg: INPUT.MAPPER ObjectCropMapper reads objects")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_data_loading_processes_are_those_of_this_one(tmp_path, workers):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    text = describe_error(caught(list, DataLoader(Unreadable(path), num_workers=workers)))
    assert text is not None and "broken.png" in text and "Traceback" not in text and "Caught" not in text
    assert describe_error(caught(list, DataLoader(Faulty(path), num_workers=workers))) is None


def test_an_error_of_a_started_process_is_printed_once(tmp_path):
    """As with ``--num-gpus 2``: the process prints its error, its parent only ends with the same status."""
    script = tmp_path / "tool.py"
    script.write_text(
        "from torch.multiprocessing.spawn import spawn\n"
        "from clipdense.engine.options import ConfigError\n"
        "from clipdense.run.boundary import tool_errors\n"
        "def process(rank):\n"
        "    with tool_errors():\n"
        "        raise ConfigError('SEED: bad')\n"
        "if __name__ == '__main__':\n"
        "    with tool_errors():\n"
        "        spawn(process)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: SEED: bad\n")


PRINT = """
from clipdense.run.boundary import tool_errors
with tool_errors():
    for i in range(10**5): print(i)
"""


def run_light(source, **options):
    """Run Python code on the boundary alone: importing the package takes seconds."""
    light = "import sys, types; sys.modules['clipdense'] = m = types.ModuleType('clipdense'); "
    light += f"m.__path__ = [{str(ROOT / 'clipdense')!r}]\n"
    command = [sys.executable, "-c", light + source]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_closed_pipe_is_silent():
    process = run_light(PRINT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = run_light(PRINT, stdout=full)
        assert process.stderr is not None
        text = process.stderr.read()
    assert process.wait(60) == 1
    assert text.startswith("error: ") and "No space left" in text and len(text.splitlines()) == 1


LOG = """
import atexit, logging
from clipdense.run.boundary import tool_errors
with tool_errors():
    stream = open("/dev/full", "w")
    atexit.register(stream.close)  # as Detectron2 does
    logging.getLogger("clipdense").addHandler(logging.StreamHandler(stream))
    logging.getLogger("clipdense").warning("a line")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_below_the_log_is_no_traceback():
    process = run_light(LOG)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 0


def test_a_folder_that_cannot_be_written_names_the_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, text = status(caught(write_text, tmp_path / "file" / "a.json", "x"), capsys)
    assert code == 1 and text.startswith("error: cannot write") and "a.json" in text


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "datasets").glob("*.py")]), ids=lambda p: p.name
)
def test_every_tool_uses_the_boundary(path):
    head, _, main = path.read_text().rpartition('if __name__ == "__main__":\n')
    command = "from clipdense.run.cli import main\n" in head and main.startswith(
        "    main("
    )  # it has the boundary
    assert command or main.startswith("    with tool_errors(")
