"""Every key is loaded, dropped by a named rule, allowed to be missing, or an error."""

import pytest
import torch
from torch import nn

from clipdense.checkpoint import (
    LAYOUTS,
    CheckpointError,
    CheckpointMismatch,
    DropRule,
    Layout,
    account,
    detect_layout,
    load_strict,
    register_layout,
)

RULE = DropRule("optimiser", r"optim\..*", "training only")


def _module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_all_or_nothing():
    module, state = _module(), _module().state_dict()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    del state["0.bias"], state["1.num_batches_tracked"]
    state["0.weight"] = torch.zeros(5, 2)
    state["extra"], state["optim.step"] = torch.zeros(1), torch.zeros(1)
    with pytest.raises(CheckpointMismatch) as caught:
        load_strict(
            module, state, source="x.pt", drops=[RULE], optional=r".*num_batches_tracked", remedy="try y"
        )
    report = caught.value.report
    assert (report.missing, report.unexpected) == (["0.bias"], ["extra"])
    assert report.mismatched == {"0.weight": (torch.Size([5, 2]), torch.Size([3, 2]))}
    assert (report.dropped, report.defaulted) == ({"optimiser": ["optim.step"]}, ["1.num_batches_tracked"])
    message = str(caught.value)
    for part in (
        "x.pt",
        "try y",
        "missing in the file: 0.bias",
        "unknown to the model: extra",
        "file (5, 2), model (3, 2)",
    ):
        assert part in message
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_file_that_fits_is_loaded():
    module, other = _module(), _module()
    report = load_strict(module, {**other.state_dict(), "optim.m": torch.ones(1)}, source="x", drops=[RULE])
    assert report.complete and len(report.loaded) == len(other.state_dict())
    assert torch.equal(module[0].weight, other[0].weight)


def test_half_precision_files_load_into_full_precision():
    module, other = _module(), _module().half()
    load_strict(module, other.state_dict(), source="x")
    assert module[0].weight.dtype == torch.float32 and torch.equal(module[0].weight, other[0].weight.float())


def test_a_rule_drops_no_key_of_the_model():
    everything = DropRule("everything", ".*", "no reason")
    module = _module()
    report = account(module.state_dict(), module.state_dict(), drops=[everything])
    assert report.complete and not report.dropped


@pytest.fixture
def layouts(monkeypatch):
    monkeypatch.setattr("clipdense.checkpoint.layouts.LAYOUTS", {})
    for name in ("a", "ab"):
        register_layout(Layout(name, f"keys {name}", lambda s, n=name: all(k[0] in n for k in s), dict))


def test_layouts_are_told_apart(layouts):
    x = torch.zeros(1)
    assert detect_layout({"b.x": x}, "f").name == "ab"
    with pytest.raises(CheckpointError, match=r"f fits several layouts \(a, ab\)"):
        detect_layout({"a.x": x}, "f")
    with pytest.raises(
        CheckpointError, match=r"f is of no known layout. Known: a \(keys a\).*Its first keys: c.x"
    ):
        detect_layout({"c.x": x}, "f")
    with pytest.raises(ValueError, match="registered twice"):
        register_layout(Layout("a", "", lambda s: True, dict))


def test_clip_layouts_exclude_each_other():
    import clipdense.clip.layouts  # noqa: F401

    x = torch.zeros(1)
    openai = {"visual.conv1.weight": x, "token_embedding.weight": x, "transformer.resblocks.0.ln_1.bias": x}
    custom = {"visual.conv1.weight": x, "text.token_embedding.weight": x, "logit_scale": x}
    assert detect_layout(openai, "f").name == "openai_clip"
    assert detect_layout(custom, "f").name == "open_clip"
    assert {"openai_clip", "open_clip"} <= set(LAYOUTS)
