"""Weight files are read without running what they hold, and never half written."""

import io
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipdense.checkpoint import CheckpointError, read_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:FutureWarning")

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2)}


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_safetensors_with_metadata(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    save_checkpoint(path, STATE, {"layout": "open_clip", "options": {"tau": 0.07}})
    read = read_checkpoint(path)
    assert _equal(read.state, STATE)
    assert (read.format, read.metadata) == ("safetensors", {"layout": "open_clip", "options": {"tau": 0.07}})


def test_safetensors_under_another_name(tmp_path):
    save_file(STATE, tmp_path / "weights.bin")
    assert _equal(read_checkpoint(tmp_path / "weights.bin").state, STATE)


def test_tied_tensors_can_be_saved(tmp_path):
    tied = torch.ones(2)
    save_checkpoint(tmp_path / "x.safetensors", {"a": tied, "b": tied, "c": tied[:1]}, {"layout": "x"})
    assert read_checkpoint(tmp_path / "x.safetensors").state["c"].shape == (1,)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_are_unwrapped(tmp_path, wrapper, prefix):
    state = {f"{prefix}{k}": v for k, v in STATE.items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")
    assert _equal(read.state, STATE)
    assert (read.format, read.extras) == ("torch", {"epoch": 3} if wrapper else {})


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_lazily(tmp_path, zipped):
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert _equal(read_checkpoint(tmp_path / "x.pt", lazy=True).state, STATE)
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="x.pt"):
        read_checkpoint(tmp_path / "x.pt", lazy=True)


def test_a_prefix_of_some_keys_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert set(read_checkpoint(tmp_path / "x.pt").state) == {"module.a", "b"}


def test_pickles_need_a_flag(tmp_path):
    made = tmp_path / "made"
    torch.save({"state_dict": STATE, "meta": Trap(str(made))}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        read_checkpoint(tmp_path / "x.pt")
    assert not made.exists()
    assert _equal(read_checkpoint(tmp_path / "x.pt", allow_pickle=True).state, STATE)
    assert made.exists()


def _torchscript(names: list[str], path) -> None:
    module = nn.Module()
    for name in names:
        if name in ("positional_embedding", "text_projection", "logit_scale"):
            module.register_parameter(name, nn.Parameter(torch.ones(2)))
        else:
            module.add_module(name, nn.LayerNorm(2))
    torch.jit.save(torch.jit.script(module), str(path))


def test_torchscript_of_openais_layout(tmp_path):
    names = [
        "visual",
        "transformer",
        "token_embedding",
        "ln_final",
        "positional_embedding",
        "text_projection",
    ]
    _torchscript([*names, "logit_scale"], tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")
    assert read.format == "torchscript" and "visual.weight" in read.state and "logit_scale" in read.state


def test_other_torchscript_needs_a_flag(tmp_path, monkeypatch):
    _torchscript(["visual", "head"], tmp_path / "x.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
        with pytest.raises(CheckpointError, match="TorchScript file of unknown layout.*allow_pickle=True"):
            read_checkpoint(tmp_path / "x.pt")
    assert "head.bias" in read_checkpoint(tmp_path / "x.pt", allow_pickle=True).state


def _bytes(kind: str) -> bytes:
    if kind == "safetensors":
        from safetensors.torch import save

        return save({"a": torch.zeros(1000)})
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_are_named(tmp_path, kind, share):
    whole = _bytes(kind)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    path.write_bytes(whole)
    assert read_checkpoint(path).state["a"].shape == (1000,)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin"])
def test_files_that_are_no_weights_are_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / name)


def test_files_without_tensors_are_named(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds no tensors; its entries are \['epoch'\]"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_checkpoint(tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", a=np.zeros(2))
    with pytest.raises(CheckpointError, match="c.npz"):
        read_checkpoint(tmp_path / "c.npz")
    with pytest.raises(FileNotFoundError, match="no weight file .*d.pt"):
        read_checkpoint(tmp_path / "d.pt")


def test_a_saved_file_is_as_readable_as_others(tmp_path):
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "x.safetensors", STATE, {"layout": "x"})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
