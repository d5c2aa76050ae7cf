"""Damaged files that a run keeps for itself, when the run is resumed: checkpoints, metrics, cells, shards."""

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.reliability.mutations import damage_bytes
from tests.reliability.outcomes import Case, WrongResultError
from tests.reliability.world import CONFIG, World

CHECKPOINT = "model_0000001.pth"
CHANGES: dict[str, Any] = {"MAX_ITER": 3, "CHECKPOINT_PERIOD": 2, "IMS_PER_BATCH": 2}
TEXTS: dict[str, tuple[bytes, ...]] = {
    "last_checkpoint": (
        b"",
        b"model_9999999.pth",
        b"\xff\xfe",
        b".",
        b"/etc/passwd",
        b"../../etc/passwd",
        b"a\0b",
    ),
    "metrics.json": (b"", b"\xff\xfe\n", b"null\n", b"[1]\n", b'{"iteration": "x"}\n', bytes(100)),
    "model_best.json": (b"", b"null", b"[]", b"{}", b'{"metric":"segm/AP50","value":"x"}', b"\xff"),
    "config.yaml": (b"", b"\xff\xfe", b"[1]", b"SEED: !!python/object/apply:os.system ['touch WITNESS']"),
}
CELL_TEXTS = (b"", b"null", b"[]", b"5", b"\xff\xfe", b'{"command":null}', b"[" * 100_000)


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield hand-made contents of each file, then damaged checkpoints."""
    rng, folder = random.Random(seed), world.folder / "state"
    folder.mkdir(exist_ok=True)
    run, witness = _finished_run(world), folder / "witness"
    whole = (run / CHECKPOINT).read_bytes()

    def resume(name: str, damage: Callable[[Path], object], *names: str) -> Case:
        names = (*names, CHECKPOINT, str(folder / "run"))
        return Case(name, lambda: _resume(world, run, folder / "run", damage), names, witness=witness)

    for file, texts in TEXTS.items():
        for i, text in enumerate(texts):
            data = text.replace(b"WITNESS", str(witness).encode())
            yield resume(
                f"{file}_{i}", lambda path, f=file, d=data: (path / f).write_bytes(d), file, "/etc/passwd"
            )
    for name, change in _checkpoint_changes().items():
        yield resume(f"checkpoint_{name}", lambda path, change=change: _change(path / CHECKPOINT, change))
    for file, text in itertools.product(
        ("cell.json", "metrics.json", "results.json", "command.json"), CELL_TEXTS
    ):
        name = f"cell_{file}_{CELL_TEXTS.index(text)}"
        yield Case(name, lambda f=file, t=text: _collect(folder / "table", f, t), (file,))
    for i in itertools.count():
        kind, data = damage_bytes(whole, rng)
        yield resume(f"random_{i:04d}_{kind}", lambda path, data=data: (path / CHECKPOINT).write_bytes(data))


def _options(world: World, output: Path) -> list[str]:
    changes = {f"SOLVER__{key}": value for key, value in CHANGES.items()}
    return world.training_options(
        output, **changes, DATALOADER__NUM_WORKERS=0, TEST__EVAL_PERIOD=2, TEST__BEST_METRIC="segm/AP50"
    )


def _finished_run(world: World) -> Path:
    """Return the folder of a run that is to be resumed from its periodic checkpoint."""
    output = world.folder / "state_run"
    if not (output / "results.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        changes = {f"SOLVER__{key}": value for key, value in CHANGES.items()}
        ended = world.train(
            output, **changes, DATALOADER__NUM_WORKERS=0, TEST__EVAL_PERIOD=2, TEST__BEST_METRIC="segm/AP50"
        )
        assert ended.code == 0, ended.text
    return output


def _checkpoint_changes() -> dict[str, Callable[[dict[str, Any]], object]]:
    def spoil(content: dict[str, Any]) -> None:
        name = next(key for key, value in content["model"].items() if value.is_floating_point())
        content["model"][name] = content["model"][name] * float("nan")

    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        f"{key}_{type(value).__name__}": lambda content, key=key, value=value: content.update({key: value})
        for key, value in (
            *(("optimizer", None), ("optimizer", {}), ("iteration", "x"), ("iteration", -5)),
            *(("random_states", [{}]), ("random_states", None), ("history", 5), ("online", 5)),
            *(("scaler", 5), ("scalars", 5), ("elapsed", float("nan"))),
        )
    }
    for key in ("optimizer", "iteration", "random_states"):
        changes[f"without_{key}"] = lambda content, key=key: content.pop(key)
    return {**changes, "nan": spoil}


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def _resume(world: World, run: Path, output: Path, damage: Callable[[Path], object]) -> str:
    """Resume the run for an iteration; its evaluation and report, which read no state, are left out."""
    from clipdense.engine import trainer as module
    from clipdense.run.setup import setup

    module.write_report = lambda *arguments: None  # in this process only

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for name in ("config.yaml", "metrics.json", CHECKPOINT, "model_best.json", "model_best.pth"):
        shutil.copy(run / name, output / name)
    (output / "last_checkpoint").write_text(CHECKPOINT)
    damage(output)
    options = _options(world, output)
    loaded = setup(argparse.Namespace(config_file=CONFIG, opts=options, resume=True, eval_only=False))
    trainer = module.Trainer(loaded.cfg)
    trainer.evaluate = lambda model, final: {"segm": {"AP50": 1.0}}
    trainer.resume_or_load(True, loaded.weights)
    start = trainer.start_iter
    trainer.train()
    if start != CHANGES["CHECKPOINT_PERIOD"]:
        raise WrongResultError(f"resumed at iteration {start} without an error")
    return f"resumed at {start}"


def _collect(folder: Path, file: str, text: bytes) -> str:
    from clipdense.run.table import load_table, markdown

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [{"name": "r", "config": "c.yaml"}]
    content = {"output": str(folder / "runs"), "seeds": [1], "metrics": {"AP": "bbox/AP"}, "rows": rows}
    (folder / "table.yaml").write_text(yaml.safe_dump(content))
    table = load_table(folder / "table.yaml")
    cell = table.cells()[0]
    cell.folder.mkdir(parents=True)
    done = {"status": "done", "command": cell.command("tool"), "results": {"bbox/AP": 1.0}}
    (cell.folder / "cell.json").write_text(json.dumps(done))
    (cell.folder / file).write_bytes(text)
    return markdown(table, "command")[-200:]
