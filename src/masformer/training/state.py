"""A run's state as files, the same for one process and for many: weights, optimizer, schedule.

Weights are a masformer checkpoint in `model/` (or, with adapters, the trained tensors in adapter.safetensors), and the
optimizer's state is whole tensors by parameter name in safetensors. Sharded tensors are gathered on the first process
when they are written and cut again when they are read, so a run may go on with another number of processes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from masformer.errors import MasformerError
from masformer.models import adapters
from masformer.models.bridge import NAME, apply_plan
from masformer.models.saving import save_model
from masformer.models.weights import load_weights
from masformer.training.model import ADAPTER, Prepared

OPTIMIZER, SCHEDULE, RANDOM = "optimizer.safetensors", "schedule.json", "random.safetensors"


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; where it is sharded, every process must call this."""
    full = tensor.detach()
    return (full.full_tensor() if isinstance(full, DTensor) else full).cpu().contiguous()


def reshard(model: Any) -> None:
    """After a pass without a backward, FSDP2 leaves some weights whole; the optimizer knows their shards alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: Any) -> bool:
    """Whether this process holds a part of the weights alone."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def trained_weights(model: Any, names: tuple[str, ...], keep: bool) -> dict[str, Tensor]:
    """Name -> whole tensor of the trained parameters; empty unless `keep`, on processes that only take part."""
    reshard(model)
    wanted, found = set(names), {}
    for name, weight in model.named_parameters():
        if name in wanted:
            tensor = whole(weight)
            if keep:
                found[name] = tensor
    return found


def whole_model(prepared: Prepared, weights: dict[str, Tensor]) -> Any:
    """The causal language model with whole tensors: itself, or a copy where it is sharded."""
    if not is_sharded(prepared.causal):
        return prepared.causal
    config = copy.deepcopy(prepared.causal.config)
    options = {"attn_implementation": NAME} if config.model_type == adapters.GPT_NEO else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(iter(weights.values())).dtype, **options)
    load_weights(model, weights, "the gathered state")
    return apply_plan(model, prepared.plan)


def write_weights(prepared: Prepared, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes `model/`, or the adapters alone."""
    if prepared.model is prepared.causal:
        save_model(whole_model(prepared, weights), folder / "model", prepared.tokenizer)
    else:
        save_file(weights, folder / ADAPTER)


def optimizer_state(model: Any, optimizer: Any, names: tuple[str, ...], keep: bool) -> dict[str, Tensor]:
    """`name/moment` -> whole tensor; empty unless `keep`, on processes that only take part."""
    reshard(model)
    found = {}
    for name, weight in _named(model, names):
        for moment, value in optimizer.state.get(weight, {}).items():
            tensor = whole(torch.as_tensor(value))
            if keep:
                found[f"{name}/{moment}"] = tensor
    return found


def read_optimizer(model: Any, optimizer: Any, names: tuple[str, ...], folder: Path) -> None:
    """Puts the state that `optimizer_state` gave into a new optimizer.

    Raises:
        MasformerError: it is of other parameters.
    """
    weights = dict(_named(model, names))
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            name, _, moment = key.rpartition("/")
            if name not in weights:
                raise MasformerError(f"{folder} holds the optimizer's state of {name}, which is not trained here")
            weight, value = weights[name], file.get_tensor(key)
            if value.shape == weight.shape and value.ndim:
                if isinstance(weight, DTensor):
                    value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
                value = value.to(weight.device)
            optimizer.state[weight][moment] = value


def _named(model: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    wanted = set(names)
    return ((name, weight) for name, weight in model.named_parameters() if name in wanted)


def write_schedule(scheduler: Any, path: Path) -> None:
    """The learning-rate schedule's place, as plain numbers."""
    state = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    path.write_text(json.dumps(state))


def read_schedule(scheduler: Any, optimizer: Any, path: Path) -> None:
    """Puts a schedule back to its step; the rates are those of that step by the recipe as it is now."""
    state = json.loads(path.read_text())
    step = state["last_epoch"]
    rates = [rate * at(step) for rate, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    now = {"base_lrs": scheduler.base_lrs, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | state | now)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def random_states(world: int, rank: int) -> dict[str, Tensor]:
    """`process/device` -> the state of its random numbers, of every process; they all must call this."""
    mine = {f"{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine[f"{rank}/cuda"] = torch.cuda.get_rng_state()
    if world == 1:
        return mine
    each: list[Any] = [None] * world
    dist.all_gather_object(each, mine)
    return {name: value for states in each for name, value in states.items()}


def read_random(folder: Path, rank: int) -> None:
    """Puts the random numbers of a process back; one that was not there before keeps its own."""
    with safe_open(folder / RANDOM, framework="pt") as file:
        names = set(file.keys())
        if f"{rank}/cpu" in names:
            torch.set_rng_state(file.get_tensor(f"{rank}/cpu"))
        if f"{rank}/cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor(f"{rank}/cuda"))
