import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError
from clipdense.engine.checkpoint import TrainingCheckpointer


class Model(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 4)
        self.head = nn.Linear(4, classes)


def weights(**changes: Any) -> dict[str, Tensor]:
    return {**Model().state_dict(), **changes}


def write(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


# ---- writing


def test_a_real_limit_of_the_file_system(tmp_path: Path) -> None:
    checkpointer = TrainingCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    before = (tmp_path / "model_0000001.pth").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(
            CheckpointError, match="cannot write.*too large(.|\n)*last good.*model_0000001.pth"
        ):
            checkpointer.save("model_0000002", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert torch.load(checkpointer.get_checkpoint_file())["iteration"] == 1


def test_pointer_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = TrainingCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model_0000001")
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "last_checkpoint":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000002")
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


def test_keeps_the_latest(tmp_path: Path) -> None:
    checkpointer = TrainingCheckpointer(Model(), str(tmp_path), keep=2)
    for name in ("model_0000001", "model_0000002", "model_best", "model_0000003", "model_final"):
        checkpointer.save(name, tag=name != "model_best")
    kept = sorted(p.stem for p in tmp_path.glob("*.pth"))
    assert kept == ["model_0000002", "model_0000003", "model_best", "model_final"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    (tmp_path / ".model_0000004.pth.12345678").mkdir()
    (tmp_path / ".model_0000004.pth.12345678" / "model_0000004.pth").write_bytes(b"half")
    checkpointer.remove_leftovers()
    assert not list(tmp_path.glob(".*"))


def test_keeps_the_newest_not_the_highest_number(tmp_path: Path) -> None:
    """A killed run may leave a higher number than its resumed run writes, perhaps with a later time."""
    (tmp_path / "model_0000009.pth").write_bytes(b"left")
    (tmp_path / "model_0000005.pth").write_bytes(b"old")
    os.utime(tmp_path / "model_0000009.pth", (2e9, 2e9))
    os.utime(tmp_path / "model_0000005.pth", (1e9, 1e9))
    TrainingCheckpointer(Model(), str(tmp_path), keep=2).save("model_0000007")
    assert sorted(p.stem for p in tmp_path.glob("*.pth")) == ["model_0000007", "model_0000009"]
    TrainingCheckpointer(Model(), str(tmp_path), keep=1).save("model_0000008")
    assert [p.stem for p in tmp_path.glob("*.pth")] == ["model_0000008"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000008.pth"


# ---- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_not_saved(tmp_path: Path, value: float) -> None:
    model = Model()
    checkpointer = TrainingCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    with torch.no_grad():
        model.head.weight[1, 2] = value
    with pytest.raises(CheckpointError, match="model_0000002.pth was not written.*head.weight.*diverged"):
        checkpointer.save("model_0000002")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.pkl"])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path, name: str) -> None:
    bad = weights()
    bad["trunk.bias"][0] = float("nan")
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(bad, path)
    elif name == "w.pkl":
        arrays = {k: v.numpy() for k, v in bad.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    else:
        torch.save({"model": bad}, path)
    with pytest.raises(CheckpointError, match=f"{name} holds tensor trunk.bias with NaN"):
        TrainingCheckpointer(Model(), allow_pickle=True).load_weights(str(path))


# ---- reading


@pytest.mark.parametrize("layout", ["model", "plain", "ddp", "safetensors"])
def test_loads(tmp_path: Path, layout: str) -> None:
    state = weights()
    path = str(tmp_path / "w.pth")
    if layout == "safetensors":
        save_file(state, path := str(tmp_path / "w.safetensors"))
    else:
        ddp = {f"module.{k}": v for k, v in state.items()}
        write(Path(path), {"model": {"model": state, "iteration": 7}, "plain": state, "ddp": ddp}[layout])
    model = Model()
    extra = TrainingCheckpointer(model).load_weights(path, complete=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert extra == {"metadata": {}, **({"iteration": 7} if layout == "model" else {})}


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = weights(
        **{"head.weight": torch.zeros(5, 4), "head.bias": torch.zeros(5), "neck.weight": torch.zeros(1)}
    )
    del state["trunk.bias"]
    path = write(tmp_path / "w.pth", state)
    with pytest.raises(CheckpointError) as e:
        TrainingCheckpointer(Model()).load_weights(path)
    for line in (
        "w.pth does not fit the model",
        "head.weight: (5, 4) in the file, (3, 4) in the model",
        "head.bias: (5,) in the file, (3,) in the model",
        "neck.weight: not in the model",
        "MODEL.WEIGHTS_SKIP",
    ):
        assert line in str(e.value)
    assert "trunk.bias" not in str(e.value)  # what a file lacks is an error where all is wanted, only

    model = Model()
    before = model.head.weight.clone()
    skipping = TrainingCheckpointer(model, skip=("head.*", "neck.*"))
    skipping.load_weights(path)
    assert torch.equal(model.trunk.weight, state["trunk.weight"]) and torch.equal(model.head.weight, before)
    with pytest.raises(CheckpointError, match="trunk.bias: not in the file"):
        skipping.load_weights(path, complete=True)


def test_a_file_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="a: not in the model\n  b: not in the model"):
        TrainingCheckpointer(Model()).load_weights(path)
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS_SKIP leaves nothing"):
        TrainingCheckpointer(Model(), skip=("*",)).load_weights(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(weights(), path) if name.endswith("safetensors") else torch.save(weights(), path)
    for size in (path.stat().st_size * 2 // 3, 10, 0):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"{name} (is|holds) (?!pickle)"):
            TrainingCheckpointer(Model()).load_weights(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TrainingCheckpointer(Model()).load_weights(str(path))


class _Unsafe:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran-code",)


def test_no_code_runs_from_a_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": weights(), "extra": _Unsafe()}
    write(tmp_path / "w.pth", content)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {}, "extra": _Unsafe()}))
    for name in ("w.pth", "w.pkl"):
        with pytest.raises(CheckpointError, match=f"{name} .*pickle(.|\n)*MODEL.ALLOW_PICKLE"):
            TrainingCheckpointer(Model()).load_weights(str(tmp_path / name))
        assert not Path("ran-code").exists()
    TrainingCheckpointer(Model(), allow_pickle=True).load_weights(str(tmp_path / "w.pth"), complete=True)
    assert Path("ran-code").exists()


def test_model_zoo_layout(tmp_path: Path) -> None:
    """A Caffe2-style trunk: matched by name heuristics; the ImageNet classifier it came with is left over."""
    state = {k: v.numpy() for k, v in weights().items()} | {"fc1000_w": torch.zeros(7, 3).numpy()}
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps({"model": state, "__author__": "torchvision", "matching_heuristics": True})
    )
    model = Model()
    TrainingCheckpointer(model, allow_pickle=True).load_weights(str(tmp_path / "w.pkl"))
    assert torch.equal(model.trunk.weight, torch.from_numpy(state["trunk.weight"]))
