"""SIGKILL at random times. Afterwards the job goes on, and must end like one that nobody killed."""

import filecmp
import hashlib
import json
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.reliability.processes import ROOT, Job, run_tool
from tests.reliability.world import World

__all__ = ["JOBS", "compare_trainings"]

VOLATILE = {"time", "data_time", "eta_seconds", "rank_data_time"}
TRAINING: dict[str, Any] = {
    "TEST__EVAL_PERIOD": 6,
    "TEST__BEST_METRIC": "segm/AP50",
    "SOLVER__EMA_DECAY": 0.9,
    "SOLVER__CHECKPOINT_KEEP": 2,
}
# Stand-in for train_net.py: ten steps with a state file each, and a log of which process did which step.
STEPS = """
import json, os, pathlib, sys, time
values = dict(zip(sys.argv[1:], sys.argv[2:]))
out = pathlib.Path(values["OUTPUT_DIR"]); state = out / "state.json"
def record(*event):
    with open(out.parents[1] / "events.txt", "a") as file:
        file.write(json.dumps([str(out), os.getpid(), time.time(), *event]) + "\\n")
record("start")
done = json.loads(state.read_text()) if "--resume" in sys.argv and state.exists() else 0
for step in range(done, 10):
    time.sleep(0.1)
    record("step", step)
    part = out / f"state.{os.getpid()}"; part.write_text(str(step + 1)); part.replace(state)
    (out / "last_checkpoint").write_text("model.pth")
(out / "results.json").write_text(json.dumps({"bbox": {"AP": float(values["SEED"])}}))
record("end")
"""


# ---- comparison


def compare_trainings(expected: Path, found: Path) -> list[str]:
    """Compare the folders of two trainings; return the differences, empty if they are equal."""
    rows = [_rows(folder / "metrics.json") for folder in (expected, found)]
    notes = (
        [f"rows {a} and {b}"]
        if (a := [r["iteration"] for r in rows[0]]) != (b := [r["iteration"] for r in rows[1]])
        else []
    )
    for one, two in zip(*rows, strict=False):
        for key in (one.keys() | two.keys()) - VOLATILE:
            if not _close(one.get(key), two.get(key)):
                notes.append(f"iteration {one['iteration']}: {key} {one.get(key)} and {two.get(key)}")
    for name in ("model_final.pth", "model_best.pth", "results.json", "model_best.json"):
        paths = expected / name, found / name
        if paths[0].exists() != paths[1].exists():
            notes.append(f"{name} is {'missing' if paths[0].exists() else 'new'}")
        elif paths[0].exists():
            notes += _compare_files(*paths)
    hidden = [p.name for p in found.rglob("*") if p.name.startswith(".")]
    return notes[:5] + [f"left behind: {name}" for name in hidden]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, float) or not isinstance(b, float):
        return bool(a == b)
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-5 * max(1.0, abs(a))


def _compare_files(expected: Path, found: Path) -> list[str]:
    if expected.suffix == ".json":
        return [] if json.loads(expected.read_text()) == json.loads(found.read_text()) else [expected.name]
    a, b = (torch.load(path, weights_only=True)["model"] for path in (expected, found))
    largest = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    return [f"{expected.name} differs by {largest:.3g}"] if largest > 1e-6 else []


def _compare_trees(expected: Path, found: Path) -> list[str]:
    a, b = _tree(expected), _tree(found)
    return [
        f"{name}: {'missing' if name not in b else 'new' if name not in a else 'differs'}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ][:5]


def _tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


# ---- jobs


def _chains(
    world: World,
    name: str,
    kills: int,
    rng: random.Random,
    words: Callable[[Path, bool], list[Any]],
    compare: Callable[[Path, Path], list[str]],
) -> Iterator[tuple[int, list[str]]]:
    """Kill a job up to three times and let it end, until there have been enough kills.

    Args:
        world: working folder.
        name: name of the job.
        kills: number of kills.
        rng: random generator.
        words: (output folder, whether it goes on) -> tool and arguments.
        compare: (folder of the reference, folder) -> differences.

    Yields:
        Number of kills of the chain, and what differs.
    """
    expected, found = world.folder / f"{name}_expected", world.folder / f"{name}_found"
    seconds = world.folder / f"{name}_seconds"
    if not seconds.exists():
        shutil.rmtree(expected, ignore_errors=True)
        tool, *arguments = words(expected, False)
        ended = run_tool(tool, *arguments, log=world.log)
        assert ended.code == 0, ended.text
        seconds.write_text(str(ended.seconds))
    span, total = float(seconds.read_text()), 0
    while total < kills:
        shutil.rmtree(found, ignore_errors=True)
        done, wanted = 0, min(3, kills - total)
        while True:
            tool, *arguments = words(found, done > 0)
            job = Job([ROOT / "tools" / tool, *arguments], world.log)
            if done < wanted:
                end = time.monotonic() + rng.uniform(0.02, 0.8 * span)
                while time.monotonic() < end and not job.has_ended():
                    time.sleep(0.005)
                if not job.has_ended():
                    job.send(signal.SIGKILL, group=rng.random() < 0.6)
            ended = job.wait()
            if ended.code != -signal.SIGKILL:
                break
            done += 1
        notes = [f"exit status {ended.code}: {ended.text[-300:]}"] if ended.code else []
        total += done
        if not done:  # the machine is faster than it was at first
            span = min(span, ended.seconds)
        yield done, notes + compare(expected, found)


def kill_trainings(world: World, kills: int, rng: random.Random) -> Iterator[tuple[int, list[str]]]:
    """Kill trainings with evaluation, best checkpoint and averaged weights."""

    def words(output: Path, again: bool) -> list[Any]:
        return ["train_net.py", *world.training_words(output, *["--resume"] * again, **TRAINING)]

    return _chains(world, "training", kills, rng, words, compare_trainings)


def kill_drawings(world: World, kills: int, rng: random.Random) -> Iterator[tuple[int, list[str]]]:
    """Kill the drawing of a dataset by two processes."""

    def words(output: Path, again: bool) -> list[Any]:
        return ["make_shapes.py", "--split", "lvis_val", "--images", 130, "--workers", 2, "--root", output]

    return _chains(world, "drawing", kills, rng, words, _compare_trees)


def kill_minings(world: World, kills: int, rng: random.Random) -> Iterator[tuple[int, list[str]]]:
    """Kill the mining of mask pairs."""

    def words(output: Path, again: bool) -> list[Any]:
        return ["mine_masks.py", *world.mining_words(output)]

    return _chains(world, "mining", kills, rng, words, _compare_trees)


def kill_conversions(world: World, kills: int, rng: random.Random) -> Iterator[tuple[int, list[str]]]:
    """Kill conversions; the output must be whole, old or new, and the next call removes leftovers."""
    source, expected = world.folder / "clip_rn50.pt", world.folder / "converted/rn50.safetensors"
    words = ["convert_checkpoint.py", source, "OUTPUT", "--option", "MODEL.CLIP.NAME=RN50"]
    if not source.exists():
        assert Job(lambda: _save_clip(source), world.log).wait().code == 0
    seconds = world.folder / "conversion_seconds"
    if not seconds.exists():
        ended = run_tool(*_with_output(words, expected), log=world.log)
        assert ended.code == 0, ended.text
        seconds.write_text(str(ended.seconds))
    output, span = world.folder / "converted_found/rn50.safetensors", float(seconds.read_text())
    done = 0
    while done < kills:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        old = b"old file" if rng.random() < 0.5 else None
        if old:
            output.write_bytes(old)
        tool, *arguments = _with_output(words, output)
        job = Job([ROOT / "tools" / tool, *arguments], world.log)
        time.sleep(rng.uniform(0.05, 0.9 * span))
        job.send(signal.SIGKILL)
        first = job.wait()
        killed = first.code == -signal.SIGKILL
        done += killed
        if not killed:  # the machine is faster than it was at first
            span = min(span, first.seconds)
        whole = output.exists() and filecmp.cmp(output, expected, shallow=False)
        state = output.read_bytes() if output.exists() and output.stat().st_size < 100 else None
        notes = [] if whole or state == old else ["the output is torn"]
        ended = run_tool(*_with_output(words, output), log=world.log)
        if ended.code or not filecmp.cmp(output, expected, shallow=False):
            notes.append(f"the next call: exit status {ended.code}, another result")
        notes += [f"left behind: {path.name}" for path in output.parent.iterdir() if path != output]
        yield int(killed), notes


def _with_output(words: list[Any], output: Path) -> list[Any]:
    return [output if word == "OUTPUT" else word for word in words]


def _save_clip(path: Path) -> None:
    from clipdense.clip import load_clip

    clip = load_clip("RN50", "random")
    torch.save({key.removeprefix("text."): value for key, value in clip.state_dict().items()}, path)


def kill_tables(world: World, kills: int, rng: random.Random) -> Iterator[tuple[int, list[str]]]:
    """Kill run_table; no cell may be run by two processes at once, and no step done twice."""
    folder = world.folder / "table"
    shutil.rmtree(folder, ignore_errors=True)
    runs, events = folder / "runs", folder / "runs/events.txt"
    runs.mkdir(parents=True)
    (folder / "steps.py").write_text(STEPS)
    rows = [{"name": "a", "config": "c.yaml"}]
    seeds = list(range(1, 3 + 2 * kills))  # more cells than can be done between the kills
    content = {"output": str(runs), "seeds": seeds, "metrics": {"AP": "bbox/AP"}, "rows": rows}
    (folder / "table.yaml").write_text(yaml.safe_dump(content))
    words = [ROOT / "tools/run_table.py", folder / "table.yaml", "--tool", folder / "steps.py", "--jobs", "2"]

    def starts() -> int:
        return events.read_text().count('"start"') if events.exists() else 0

    done = 0
    while done < kills:
        before, job = starts(), Job(words, world.log)
        while not job.has_ended() and starts() <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0))
        job.send(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL, f"not killed: {job.text}"
        done += 1
        time.sleep(0.1)
    ended = Job(words, world.log).wait()
    cells = [json.loads(path.read_text())["status"] for path in sorted(runs.glob("*/*/cell.json"))]
    notes = [] if cells == ["done"] * len(seeds) else [f"cells {cells}, exit status {ended.code}"]
    yield done, notes + _doubled(events)


def _doubled(events: Path) -> list[str]:
    """Return the cells on which two processes worked at the same time, and the steps that were done twice."""
    spans: dict[tuple[str, int], list[float]] = {}
    steps: dict[tuple[str, int], int] = {}
    for folder, process, when, what, *rest in map(json.loads, events.read_text().splitlines()):
        span = spans.setdefault((folder, process), [when, when])
        span[1] = when
        if what == "step":
            steps[folder, rest[0]] = steps.get((folder, rest[0]), 0) + 1
    notes = []
    for (folder, a), one in spans.items():
        for (other, b), two in spans.items():
            if folder == other and a < b and one[0] < two[1] and two[0] < one[1]:
                notes.append(f"{Path(folder).name}: processes {a} and {b} at once")
    # a step that was done but not yet recorded when its process was killed is done again
    return notes + [
        f"{Path(folder).name}: step {step} done {n} times" for (folder, step), n in steps.items() if n > 2
    ]


# Name of the job -> (function, share of the kills of a full run).
JOBS: dict[str, tuple[Callable[[World, int, random.Random], Iterator[tuple[int, list[str]]]], float]] = {
    "training": (kill_trainings, 0.3),
    "drawing": (kill_drawings, 0.2),
    "mining": (kill_minings, 0.2),
    "conversion": (kill_conversions, 0.15),
    "tables": (kill_tables, 0.15),
}
