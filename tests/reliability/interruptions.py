"""Ctrl-C, full disks, frozen and orphaned processes: each ends soon and with a sentence."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.reliability.processes import ROOT, Job
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
    for what, number in (("killed rank", signal.SIGKILL), ("frozen rank", signal.SIGSTOP)):
        yield what, _lose(world, lambda launcher, ranks, n=number: os.kill(ranks[1], n), 60.0)
    yield "killed launcher", _lose(world, lambda launcher, ranks: os.kill(launcher, signal.SIGKILL), 20.0)


def _lose(world: World, act: Callable[[int, dict[int, int]], None], limit: float) -> Notes:
    """Start two processes, act on them, and return what is wrong if not all have ended in time."""
    output, log = world.folder / "ranks", world.folder / "ranks.log"
    shutil.rmtree(output, ignore_errors=True)
    words = world.training_words(output, SOLVER__MAX_ITER=4000, SOLVER__CHECKPOINT_PERIOD=1000)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", port, str(ROOT / "tools/train_net.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(log, "wb") as file:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        end = time.monotonic() + 300.0
        while "iter 8/" not in log.read_text(errors="replace"):
            if launcher.poll() is not None or time.monotonic() > end:
                return [f"the training did not start: {log.read_text(errors='replace')[-500:]}"]
            time.sleep(0.1)
        ranks = _ranks(str(output))
        act(launcher.pid, ranks)
        start = time.monotonic()
        while _ranks(str(output)) and time.monotonic() - start < limit:
            time.sleep(0.1)
            launcher.poll()
        left = _ranks(str(output))
        return [f"{len(left)} processes after {limit:g} s"] if left else []
    finally:
        for process in [*_ranks(str(output)).values(), launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def _ranks(word: str) -> dict[int, int]:
    """Return rank -> process number of the processes that have a word on their command line."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().split(b"\0") if path.name.isdigit() else []
            if word.encode() not in words or b"torch.distributed.run" in words:
                continue
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", (path / "environ").read_bytes())
        except OSError:
            continue
        if rank:
            found.setdefault(int(rank[1]), int(path.name))
    return found


# Name of the event -> its function.
EVENTS: dict[str, Callable[[World], Iterator[tuple[str, Notes]]]] = {
    "Ctrl-C": interrupt_tools,
    "full disk": fill_disks,
    "ranks": lose_ranks,
}
