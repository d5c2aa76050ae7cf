"""TorchScript archives give their tensors and run nothing."""

import pickle
import zipfile

import pytest
import torch
from torch import Tensor, nn

from clipdense.checkpoint.torchscript import read_torchscript_tensors
from tests.helpers.torchscript import Writes


class Small(nn.Module):
    """Parameters, buffers, a shared weight, half precision and attributes that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(nn.Linear(4, 4).half(), nn.Identity())
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("index", torch.arange(6).view(2, 3).t())
        self.size = 7
        self.names = ["a", "b"]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.scale


def save(module, path):
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def test_tensors_are_those_of_the_loaded_module(tmp_path):
    path = save(Small(), tmp_path / "small.pt")
    expected = torch.jit.load(str(path)).state_dict()
    found = read_torchscript_tensors(path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_nothing_of_the_archive_runs(tmp_path):
    mark = tmp_path / "written"
    path = save(nn.Sequential(Writes(str(mark)), nn.Linear(2, 3)), tmp_path / "writes.pt")
    mark.unlink(missing_ok=True)
    assert set(read_torchscript_tensors(path)) == {"1.weight", "1.bias"}
    assert not mark.exists()
    torch.jit.load(str(path))  # the control: torch's own loader does run it
    assert mark.exists()


def repacked(path, target, change):
    """Copy a zip with records changed by name -> bytes."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


class Bomb:
    def __reduce__(self):
        return open, ("bomb", "w")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda name, data: pickle.dumps(Bomb()) if name.endswith("/data.pkl") else data, "refers to"),
        (lambda name, data: b"\x80\x02)." if name.endswith("/data.pkl") else data, None),
        (lambda name, data: b"\xff\xff" if name.endswith("/data.pkl") else data, "archive"),
        (lambda name, data: data[:4] if "/data/" in name else data, "cut short"),
    ],
    ids=["foreign class", "no module", "no pickle", "short storage"],
)
def test_damaged_archives(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    path = repacked(save(Small(), tmp_path / "small.pt"), tmp_path / "changed.pt", change)
    if message is None:
        assert read_torchscript_tensors(path) == {}
    else:
        with pytest.raises(ValueError, match=f"changed.pt.*{message}"):
            read_torchscript_tensors(path)
    assert not (tmp_path / "bomb").exists()


def test_other_files(tmp_path):
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.pt: not a TorchScript archive"):
        read_torchscript_tensors(tmp_path / "text.pt")
