"""DDP and FSDP in several processes equal one process on the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdense.engine.clipping import build_clipper, gradient_norms
from clipdense.engine.distributed import local_part
from clipdense.engine.options import ConfigError, TrainerOptions
from clipdense.engine.parallel import Shards, build_parallel
from tests.helpers import shares
from tests.helpers.processes import run_processes

from detectron2.utils import comm

MODELS = {"Mask R-CNN": shares.mask_rcnn, "CLIPSelf": shares.clipself, "MaskAdaptedCLIP": shares.mask_adapted}


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=0.1))


def all_models(kind: str) -> dict[str, dict[str, Tensor]]:
    return {name: model(kind) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return all_models("ddp")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_equal_one(tmp_path: Path, expected: Any, kind: str, size: int) -> None:
    for found in run_processes(all_models, size, tmp_path / "run", kind):
        for name, values in expected.items():
            assert found[name].keys() == values.keys()
            for key, value in values.items():
                assert difference(found[name][key], value) <= 1e-5, (name, key)


OPTIONS: list[dict[str, Any]] = [
    {"activation_checkpointing": True},
    {"accumulation_steps": 2},
    {"shard_processes": 2},
    {"find_unused_parameters": True},
]


def with_options(options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Gradients of DDP and of FSDP with options; parts of a batch change CLIPSelf's mean over regions."""
    parts = {k: v for k, v in options.items() if k == "accumulation_steps"}
    return [shares.clipself("ddp", **parts), shares.clipself("fsdp", **options)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_of_fsdp_change_no_gradient(tmp_path: Path, options: dict[str, Any]) -> None:
    size = 4 if "shard_processes" in options else 2
    for expected, found in run_processes(with_options, size, tmp_path / "run", options):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert difference(found[key], value) <= 1e-5, key


def in_half_precision() -> list[dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        return [shares.clipself("ddp"), shares.clipself("fsdp")]


def test_autocast_rounds_with_fsdp_as_with_ddp(tmp_path: Path, expected: Any) -> None:
    exact = expected["CLIPSelf"]
    for results in run_processes(in_half_precision, 2, tmp_path / "run"):
        ddp, fsdp = (max(difference(found[k], v) for k, v in exact.items()) for found in results)
        assert 1e-4 < fsdp < 2 * ddp < 0.2
        assert all(value.dtype == torch.float32 for value in results[1].values())


def memory(kind: str) -> tuple[list[int], list[int], list[str]]:
    """Values of parameters and of AdamW's state in this process, and the names of the whole parameters."""
    from clipdense.clip import load_clip
    from clipdense.systems.clipself import CLIPSelf

    torch.manual_seed(comm.get_rank())  # the weights of the first process count
    model = CLIPSelf(clip=load_clip("shapes-vit", "random"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    parallel = build_parallel(model, optimizer, TrainerOptions("", 1, parallel=kind))
    trained = {n: p for n, p in parallel.model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    local = [local_part(p).numel() for p in trained.values()]
    state = [local_part(s["exp_avg"]).numel() for s in optimizer.state.values()]
    whole = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.requires_grad)
    with parallel.whole_model():
        first = next(p for p in model.parameters() if p.requires_grad).sum().item()
    return [sum(local), whole], [sum(state)], [str(first)]


def test_fsdp_divides_parameters_and_optimizer_states(tmp_path: Path) -> None:
    whole = run_processes(memory, 2, tmp_path / "ddp", "ddp")
    parts = run_processes(memory, 2, tmp_path / "fsdp", "fsdp")
    for values in (0, 1):
        assert sum(rank[values][0] for rank in parts) == whole[0][values][0]
        assert max(rank[values][0] for rank in parts) < 0.55 * whole[0][values][0]
    assert all(rank[0][1] == 0 for rank in parts)  # the evaluated model takes no memory
    assert len({rank[2][0] for rank in (*whole, *parts)}) == 1


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.scalar = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.tensor(2.0))


def clipped(kind: str, norm_type: float) -> list[list[Tensor]]:
    """Gradients after clipping: of a divided matrix, and of a whole scalar."""
    found = []
    for parallel in ("ddp", "fsdp"):
        model = Mixed()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        spread = build_parallel(model, optimizer, TrainerOptions("", 1, parallel=parallel))
        assert isinstance(spread, Shards) == (parallel == "fsdp")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for p in trained:
            p.grad = torch.full_like(p, 3.0 if p.ndim else -4.0)
        build_clipper(kind, 1.0, norm_type)(trained, gradient_norms(trained))
        named = dict(spread.model.named_parameters())
        matrix: Any = named["matrix"].grad
        found.append([matrix.full_tensor() if parallel == "fsdp" else matrix, named["scalar"].grad])
    return found


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_of_shards(tmp_path: Path, kind: str, norm_type: float) -> None:
    # three rows in four processes: one has none
    for whole, sharded in run_processes(clipped, 4, tmp_path / "run", kind, norm_type):
        assert whole[0].abs().max() <= 1.0
        for a, b in zip(whole, sharded, strict=True):
            torch.testing.assert_close(a, b)


def refused(precision: str, shard_processes: int) -> str:
    try:
        model = Mixed()
        options = TrainerOptions("", 1, parallel="fsdp", precision=precision, shard_processes=shard_processes)
        build_parallel(model, torch.optim.SGD(model.parameters(), 1.0), options)
    except ConfigError as e:
        return str(e)
    return ""


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    assert "set SOLVER.AMP.DTYPE bfloat16" in refused("float16", 0)
    assert (
        "SHARD_PROCESSES is 3, which does not divide the 2 processes"
        in run_processes(refused, 2, tmp_path / "run", "float32", 3)[0]
    )
    with pytest.raises(ConfigError, match="must be ddp or fsdp, got 'zero'"):
        TrainerOptions("", 1, parallel="zero")
    with pytest.raises(ConfigError, match="Mixed has none: set it False"):
        options = TrainerOptions("", 1, activation_checkpointing=True)
        build_parallel(Mixed(), torch.optim.SGD(Mixed().parameters(), 1.0), options)
