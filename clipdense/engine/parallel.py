"""Data parallelism of the trainer: one process, DistributedDataParallel or FSDP2."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdense.clip.towers.transformer import TransformerTower
from clipdense.engine.options import ConfigError, TrainerOptions

from detectron2.utils import comm

__all__ = ["Replicas", "Shards", "build_parallel", "distribute", "recompute_activations"]

# Name under which a block runs a function with all its parameters; see `Shards`.
_RUN = "run_with_parameters"


def build_parallel(model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainerOptions) -> "Replicas":
    """Distribute a model as ``options.parallel`` says; a single process has all of it in any case."""
    if options.activation_checkpointing:
        recompute_activations(model)
    if options.parallel == "fsdp" and comm.get_world_size() > 1:
        return Shards(model, optimizer, options)
    return Replicas(model, options.find_unused_parameters)


class Replicas:
    """Copies of a model in all processes, whose gradients are averaged.

    Attributes:
        model: the module that is trained; its parameters are those of the optimizer.
        wrapped: the module to call in training.
    """

    model: nn.Module
    wrapped: nn.Module

    def __init__(self, model: nn.Module, find_unused_parameters: bool = False) -> None:
        self.model, self.wrapped = model, distribute(model, find_unused_parameters)

    def sync(self, enabled: bool) -> Any:
        """Return the context of a forward and backward pass, with or without exchange of gradients."""
        if enabled or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def whole_model(self) -> Any:
        """Return the context within which the model that the trainer evaluates has the trained weights."""
        return nullcontext()


class Shards(Replicas):
    """A model whose trained parameters, gradients and optimizer states are divided among processes (FSDP2).

    Trained are the shards of a copy of the model. The blocks of its transformer towers are gathered one by
    one, and the other trained parameters at the start of an iteration, in float32: autocast rounds them where
    an operation has a lower precision, so that losses equal those of `Replicas`. Frozen
    parameters and scalars (temperatures) stay whole in every process: a frozen tower may be run a different
    number of times in each process, and a temperature may be changed in a forward.

    The model itself is evaluated and exported. Between evaluations its trained parameters take no memory.

    Args:
        model: with the initial weights; those of the first process are used.
        optimizer: of the model's parameters, without state. It gets the parameters of the copy; a group with
            whole and sharded parameters is split.
        options: reads ``shard_processes`` and ``find_unused_parameters``.

    Raises:
        ConfigError: If torch has no FSDP2, or ``shard_processes`` does not divide the number of processes.

    Source: Zhao et al., PyTorch FSDP, VLDB 2023; Rajbhandari et al., ZeRO, SC 2020, stage 3.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainerOptions) -> None:
        for value in [*model.parameters(), *model.buffers()]:
            dist.broadcast(value.detach(), 0)
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.whole, self.model = model, copy.deepcopy(model, frozen)  # frozen parameters are shared
        self.wrapped = self.model
        names = {p: name for name, p in model.named_parameters()}
        _shard(self.model, options)
        parameters = dict(self.model.named_parameters())
        _split_groups(optimizer, {p: parameters[name] for p, name in names.items()})
        self._trained = [(p, parameters[name]) for p, name in names.items() if p.requires_grad]
        self._scalars = [new for _, new in self._trained if not hasattr(new, "to_local")]
        self._sync = True
        self._release()

    @contextmanager
    def sync(self, enabled: bool) -> Iterator[None]:
        """See `Replicas.sync`."""
        if enabled != self._sync:
            self.model.set_requires_gradient_sync(enabled)  # type: ignore[operator]
            self._sync = enabled
        yield
        if enabled:
            for scalar in self._scalars:
                if scalar.grad is None:
                    scalar.grad = torch.zeros_like(scalar)
                dist.all_reduce(scalar.grad)
                scalar.grad /= dist.get_world_size()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """See `Replicas.whole_model`; every process must enter it, and gathers all parameters."""
        with torch.no_grad():
            for whole, own in self._trained:
                storage = whole.untyped_storage()
                storage.resize_(whole.numel() * whole.element_size())
                full_tensor: Any = getattr(own, "full_tensor", None)  # of a DTensor
                whole.copy_(own if full_tensor is None else full_tensor())
            buffers = dict(self.model.named_buffers())
            for name, buffer in self.whole.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        """Free the memory of the whole trained parameters."""
        for whole, _ in self._trained:
            whole.untyped_storage().resize_(0)


def distribute(model: nn.Module, find_unused_parameters: bool = False) -> nn.Module:
    """Wrap a model so that gradients are averaged over processes; a single process needs no wrapper."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    sync_buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        **sync_buffers,
    )


def recompute_activations(model: nn.Module) -> None:
    """Let the transformer blocks of a model recompute their activations in the backward pass.

    Those of CLIP towers, and of timm's models that implement ``set_grad_checkpointing``.

    Raises:
        ConfigError: If the model has none.
    """
    found = [m for m in model.modules() if callable(getattr(m, "set_grad_checkpointing", None))]
    for module in found:
        module.set_grad_checkpointing(True)  # type: ignore[operator]
    if not found:
        raise ConfigError(
            "SOLVER.ACTIVATION_CHECKPOINTING needs a transformer tower or a timm model, and "
            f"{type(model).__name__} has none: set it False"
        )


def _shard(model: nn.Module, options: TrainerOptions) -> None:
    """Divide the trained parameters of a model among the processes, in place."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as e:
        raise ConfigError(
            f"SOLVER.PARALLEL fsdp needs torch 2.6 or later, found {torch.__version__}: set it to ddp"
        ) from e
    size = dist.get_world_size()
    group = options.shard_processes or size
    if size % group:
        raise ConfigError(
            f"SOLVER.SHARD_PROCESSES is {group}, which does not divide the {size} processes: set 0 to divide "
            "the model among all of them"
        )
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (size // group, group), mesh_dim_names=("replicate", "shard"))
    ignored = {p for p in model.parameters() if not p.requires_grad or p.ndim == 0}
    settings: dict[str, Any] = {"mesh": mesh if group < size else mesh["shard"], "ignored_params": ignored}
    units: list[Any] = []
    for tower in model.modules():
        blocks = tower.blocks if isinstance(tower, TransformerTower) else ()
        for block in (b for b in blocks if not ignored.issuperset(b.parameters())):
            setattr(block, _RUN, _call)
            units.append(fully_shard(block, **settings))
            register_fsdp_forward_method(block, _RUN)
            tower.block_runner = _run_block  # type: ignore[assignment]
    units.append(fully_shard(model, **settings))
    for unit in units:
        if device == "cpu":  # gloo has no average
            unit.set_force_sum_reduction_for_comms(True)
    if options.find_unused_parameters:
        units[-1].set_reduce_scatter_unused_params(True)


def _call(function: Any, x: Tensor) -> Tensor:
    result: Tensor = function(x)
    return result


def _run_block(block: nn.Module, function: Any, x: Tensor) -> Tensor:
    """Run a function of a block's parameters; see `clipdense.clip.towers.transformer.BlockRunner`."""
    run = getattr(block, _RUN, _call)  # a frozen block is whole
    result: Tensor = run(function, x)
    return result


def _split_groups(optimizer: torch.optim.Optimizer, new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Replace the parameters of an optimizer, so that no group has both sharded and whole ones."""
    for group in list(optimizer.param_groups):
        parameters = [new[p] for p in group["params"]]
        sharded = [p for p in parameters if hasattr(p, "to_local")]
        whole = [p for p in parameters if not hasattr(p, "to_local")]
        group["params"] = sharded or whole
        if sharded and whole:
            optimizer.param_groups.append({**group, "params": whole})
