"""Ctrl-C, full disks, frozen and orphaned processes: each ends soon and with a sentence."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability.processes import ROOT, Job, call_as_main
from tests.reliability.world import World

__all__ = ["EVENTS"]

Notes = list[str]


# ---- Ctrl-C


def interrupt_tools(world: World) -> Iterator[tuple[str, Notes]]:
    """Interrupt each tool while it works; yields the tool and what is wrong."""
    out = world.folder / "interrupted"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    test = f"tiny_val:{world.shapes24}/annotations/instances_closed_val_24.json:{world.shapes24}/val"
    train = f"tiny_train:{world.shapes24}/annotations/instances_closed_val_24.json:{world.shapes24}/val"
    both = str([train, test])
    long = world.training_words(out / "long", SOLVER__MAX_ITER=50)
    short = world.training_words(out / "short", SOLVER__MAX_ITER=2, DATASETS__COCO_JSON=both)
    evaluation = world.training_words(out / "evaluation", "--eval-only", DATASETS__COCO_JSON=both)
    names = ",".join(f"thing {i}" for i in range(300))
    table = [
        out / "table.safetensors",
        "--model",
        "shapes-vit",
        "--vocabulary",
        names,
        "--templates",
        "vild_63",
    ]
    shapes = ["--split", "lvis_val", "--images", "200", "--workers", "1", "--root", out / "shapes"]
    jobs: list[tuple[str, str, list[object], str, float]] = [
        ("training", "train_net.py", [*long], "iter 3/", 0.0),
        ("final evaluation", "train_net.py", [*short], "Evaluating tiny_val", 0.2),
        ("evaluation", "train_net.py", [*evaluation], "Evaluating tiny_val", 0.2),
        ("mining", "mine_masks.py", world.mining_words(out / "mining"), "Mining", 0.3),
        ("text table", "make_text_table.py", [*table, "--no-cache"], "", 0.8),
        ("drawing", "make_shapes.py", shapes, "", 1.0),
    ]
    for what, tool, words, text, delay in jobs:
        job = Job([ROOT / "tools" / tool, *words], out / f"{what.replace(' ', '_')}.log")
        job.wait_for(text)
        time.sleep(delay)
        job.send(signal.SIGINT)
        ended = job.wait(60.0)
        notes = [f"exit status {ended.code}"] if ended.code in (None, 0) else []
        notes += ["a traceback"] if "Traceback" in ended.text else []
        notes += (
            ["no sentence"]
            if not re.search("interrupt|Stopped by|stopped", ended.text, re.IGNORECASE)
            else []
        )
        yield what, notes


# ---- full disks


def fill_disks(world: World) -> Iterator[tuple[str, Notes]]:
    """Train on file systems that are too small (needs root); yields the size and what is wrong."""
    mount = world.folder / "small_disk"
    mount.mkdir(exist_ok=True)
    for size in ("64k", "1m", "50m"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)
        try:
            log = world.folder / f"disk_{size}.log"
            words = world.training_words(mount / "run", SOLVER__MAX_ITER=8, SOLVER__CHECKPOINT_PERIOD=4)
            ended = Job([ROOT / "tools/train_net.py", *words], log).wait()
            notes = [f"exit status {ended.code}"] if ended.code != 1 else []
            notes += ["a traceback"] if "Traceback" in ended.text else []
            notes += ["the file is not named"] if str(mount) not in ended.text.rpartition("error:")[2] else []
            yield f"training with {size}B", notes
        finally:
            subprocess.run(["umount", str(mount)], check=True)


# ---- ranks


def lose_ranks(world: World) -> Iterator[tuple[str, Notes]]:
    """Kill and freeze one of two processes of a training, and kill their launcher."""
    losses: dict[str, tuple[Callable[[int, list[int]], None], float]] = {
        "killed rank": (lambda launcher, ranks: os.kill(ranks[1], signal.SIGKILL), 60.0),
        "frozen rank": (lambda launcher, ranks: os.kill(ranks[1], signal.SIGSTOP), 60.0),
        "killed launcher": (lambda launcher, ranks: os.kill(launcher, signal.SIGKILL), 20.0),
    }
    for what, (lose, limit) in losses.items():
        yield what, _lose(world, what, lose, limit)


def _lose(world: World, what: str, lose: Callable[[int, list[int]], None], limit: float) -> Notes:
    """Start two processes, lose some, and return what is wrong if not all have ended in time."""
    output, log = world.folder / "ranks", world.folder / f"{what.replace(' ', '_')}.log"
    lost_rank = what.endswith("rank")
    shutil.rmtree(output, ignore_errors=True)
    log.unlink(missing_ok=True)
    words = world.training_words(output, SOLVER__MAX_ITER=4000, SOLVER__CHECKPOINT_PERIOD=1000)
    numbers = world.folder / "ranks.json"
    launcher = Job(lambda: _launch([ROOT / "tools/train_net.py", *words], numbers), log)
    try:
        launcher.wait_for("iter 8/", timeout=900.0)
        lose(launcher.pid, json.loads(numbers.read_text()))
        start = time.monotonic()
        while (left := launcher.remaining()) and time.monotonic() - start < limit:
            time.sleep(0.1)
        notes = [f"{len(left)} processes after {limit:g} s"] if left else []
        # data workers of a killed process may print tracebacks; processes that are left must know the reason
        notes += ["no sentence"] * (lost_rank and "error: " not in launcher.text)
        return notes + ["an unexpected error"] * ("Please report" in launcher.text)
    finally:
        launcher.send(signal.SIGCONT)
        launcher.send(signal.SIGKILL)
        launcher.wait()


def _launch(command: list[object], numbers: Path) -> None:
    """Start two ranks of a run as torchrun does, write their process numbers, and wait for their ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        process = os.fork()
        if process == 0:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os._exit(call_as_main(command) & 0xFF)
        ranks.append(process)
    numbers.write_text(json.dumps(ranks))
    for process in ranks:
        os.waitpid(process, 0)


# Name of the event -> its function.
EVENTS: dict[str, Callable[[World], Iterator[tuple[str, Notes]]]] = {
    "Ctrl-C": interrupt_tools,
    "full disk": fill_disks,
    "ranks": lose_ranks,
}
