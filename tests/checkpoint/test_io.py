"""Weight files are read without running what they hold, and never half written."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipdense.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from clipdense.checkpoint.finite import nonfinite_keys
from tests.helpers.torchscript import Writes

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


# ---- damaged and odd files


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _flip_tensor_bit(content: bytes) -> bytes:
    return (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    )


ODD = {
    "two opcodes": b"\x80\x02" + b"(" * 1000 + b".",
    "deep": b"\x80\x02" + b"(" * 100_000 + b".",
    "passwd": b"root:x:0:0:root:/root:/bin/bash\n",
    "bad tree": _zip({"a/constants.pkl": b"\x80\x02).", "a/data.pkl": b"\xff\xff"}),
    "empty zip": _zip({}),
    "other zip": _zip({"a.txt": b"x"}),
    "header size": struct.pack("<Q", 2**62) + b"{}",
    "flipped bit": _flip_tensor_bit(_bytes("zip")),
    "directory": _bytes("zip").replace(b"PK\x01\x02", b"PK\x01\x03"),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("lazy", [False, True])
def test_odd_files_are_named(tmp_path, content, lazy):
    path = tmp_path / "odd.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="odd.pth") as error:
        read_checkpoint(path, lazy=lazy)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, STATE, {"layout": "x"})

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(CheckpointError, match=r"x.safetensors cannot be read: Permission denied"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[1]", "metadata must be a dictionary"),
        ("null", "metadata must be a dictionary"),
        ('{"layout": 5}', "layout must be a name"),
        ('{"options": [1]}', "options must be a dictionary"),
        ('{"options": {"config": [1]}}', "options.config must be a dictionary"),
        (
            '{"options": {"classes": ["a"]}}',
            "options.classes is where an older version .* convert the published",
        ),
        ('{"thing_classes": ["a", 1]}', "thing_classes must be a list of class names"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_odd_metadata_is_named(tmp_path, text, message):
    save_file(STATE, tmp_path / "x.safetensors", {"clipdense": text})
    with pytest.raises(CheckpointError, match=rf"x.safetensors: .*{message}"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_odd_metadata_of_a_training_checkpoint_is_named(tmp_path):
    torch.save({"model": STATE, "metadata": {"thing_classes": 3}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth: .*thing_classes must be a list"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["sparse", "complex", "quantized"])
def test_tensors_of_another_kind_are_named(tmp_path, kind):
    values = {
        "sparse": torch.eye(2).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    torch.save({"a.b": values[kind]}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"x.pt: tensor a.b is {kind}"):
        read_checkpoint(tmp_path / "x.pt")


# ---- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    state = {"good": torch.ones(3), "bad.weight": torch.tensor([1.0, value], dtype=dtype)}
    with pytest.raises(CheckpointError, match=r"x.safetensors was not written.*bad.weight"):
        save_checkpoint(tmp_path / "x.safetensors", state, {"layout": "x"})
    assert not list(tmp_path.iterdir())
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors holds tensor bad.weight with NaN or infinite"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_large_values_and_masks_are_finite():
    state = {
        "large": torch.full((9,), 3e38),
        "half": torch.full((9,), 6e4, dtype=torch.float16),
        "attn_mask": torch.tensor([0.0, -float("inf")]),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "empty": torch.empty(0),
        "count": torch.tensor(3),
    }
    assert nonfinite_keys(state) == []
    assert nonfinite_keys({"attn_mask": torch.tensor([float("nan")])}) == ["attn_mask"]


# ---- TorchScript


def test_openais_torchscript_runs_nothing(tmp_path):
    """Archives that only look like OpenAI's must not run the code that they contain."""
    mark = tmp_path / "written"
    module = nn.Module()
    for name in ("transformer", "token_embedding", "ln_final"):
        module.add_module(name, nn.LayerNorm(2))
    for name in ("positional_embedding", "text_projection", "logit_scale"):
        module.register_parameter(name, nn.Parameter(torch.ones(2)))
    module.add_module("visual", Writes(str(mark)))
    torch.jit.save(torch.jit.script(module), str(tmp_path / "x.pt"))
    mark.unlink(missing_ok=True)
    for allow_pickle in (False, True):
        assert "ln_final.weight" in read_checkpoint(tmp_path / "x.pt", allow_pickle=allow_pickle).state
    assert not mark.exists()
