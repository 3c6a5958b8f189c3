"""What each process of test_distributed.py does; the results are written for the test to compare."""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import q_galore_torch as qg
from q_galore_torch.integrations.dcp import LoadPlanner
from q_galore_torch.integrations.distributed import prepare

TOKENS, BATCH, LENGTH = 30, 2, 9
LOW_RANK = ["1", "3", "5"]


class Sent(TorchDispatchMode):
    """Counts the bytes of every collective operation, DDP's own and others, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            name = func.overloadpacket.__name__
            self.bytes[name] = self.bytes.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def network(seed: int = 0, **options: Any) -> nn.Module:
    """Low-rank layers of both sides, a full-mode layer, and an embedding, norm, biases and head as they are."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Embedding(TOKENS, 24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.LayerNorm(24)),
        *(nn.Linear(24, 24, bias=False), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, TOKENS)),
    )
    options = {"rank": 6, **options}
    qg.prepare_model(model, target_modules=LOW_RANK, **options)
    return qg.prepare_model(model, target_modules=["6"], grad_mode="full", **options)


def optimizer_of(model: nn.Module, **options: Any) -> qg.QGaLoreAdamW8bit:
    """Gap 6, so that 50 steps hold many refreshes."""
    groups = qg.param_groups(model, update_proj_gap=6, queue_size=2, scale=1.0, weight_decay=0.1)
    return qg.QGaLoreAdamW8bit(groups, **{"lr": 0.01, "min_8bit_size": 64, "seed": 3, **options})


def batch_of(step: int, micro: int, rank: int) -> Tensor:
    """Tokens [BATCH, LENGTH + 1] that no other step, micro-batch or process has."""
    seed = 1000 * step + 10 * micro + rank
    return torch.randint(TOKENS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def backward(model: Any, step: int, rank: int, micros: int) -> None:
    """The micro-batches of one update; only the last one is reduced."""
    for micro in range(micros):
        with model.no_sync() if micro < micros - 1 else contextlib.nullcontext():
            (loss_of(model, batch_of(step, micro, rank)) / micros).backward()


def due_bytes(model: nn.Module) -> int:
    """Of the full gradients that the next step reads in float32."""
    layers = [model.get_submodule(name) for name in LOW_RANK]
    return sum(4 * layer.in_features * layer.out_features for layer in layers if layer.leaf.binding.due)


def everything(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": opt.state_dict(), "telemetry": opt.telemetry()}


# ---------------------------------------------------------------- scenarios


def replicas(rank: int, broadcast_buffers: bool = False, steps: int = 50) -> dict[str, Any]:
    """Other initial weights and data in every process; every third update has three micro-batches."""
    model = network(seed=rank)
    with Sent() as once:
        prepare(model)
    with Sent() as wrapping:
        wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    opt = optimizer_of(model)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    sent, expected = [], []
    for step in range(steps):
        expected.append(trained + due_bytes(model))
        with Sent() as counted:
            backward(wrapped, step, rank, 3 if step % 3 == 0 else 1)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        sent.append(counted.bytes)
    at_start = {"prepare": once.bytes, "wrapping": wrapping.bytes}
    return {**everything(model, opt), "sent": sent, "expected": expected, "at_start": at_start}


FLOATS: dict[str, Any] = {"weight_bits": None}


def float_optimizer(model: nn.Module) -> qg.QGaLoreAdamW8bit:
    """Nothing is rounded to codes, so that only the order of sums differs."""
    groups = qg.param_groups(model, update_proj_gap=6, scale=1.0, proj_format="float32")
    return qg.QGaLoreAdamW8bit(groups, lr=0.003, eps=1e-4, moments_dtype="float32")


def joint(rank: int) -> dict[str, Any]:
    """In a group of its own."""
    group = dist.new_group()
    model = prepare(network(**FLOATS), group)
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    opt = float_optimizer(model)
    for step in range(12):
        backward(wrapped, step, rank, 2)
        opt.step()
        opt.zero_grad()
    return everything(model, opt)


def broken(rank: int) -> dict[str, Any]:
    """Rank 0's full gradients are not finite for some steps: no process may use its own."""
    model = network()
    wrapped = DistributedDataParallel(prepare(model), broadcast_buffers=False)
    opt = optimizer_of(model)
    refreshes = []
    for step in range(8):
        backward(wrapped, step, rank, 1)
        for parameter in model.parameters():
            binding = getattr(parameter, "binding", None)
            if rank == 0 and 2 <= step < 5 and binding is not None and binding.stash is not None:
                binding.stash[0, 0] = float("nan")
        opt.step()
        opt.zero_grad()
        refreshes.append(sum(entry.get("refreshes", 0) for entry in opt.telemetry() if entry["name"][0] in "135"))
    return {**everything(model, opt), "refreshes": refreshes}


class Skipping(nn.Module):
    """Leaves out its middle in one process."""

    def __init__(self, model: nn.Module, skips: bool) -> None:
        super().__init__()
        self.model, self.skips = model, skips

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model[0](tokens)
        return self.model[4:](x) if self.skips else self.model(tokens)


def unused(rank: int) -> dict[str, Any]:
    """A layer without a gradient in one process, also while it is due: zeros are sent for it."""
    model = network()
    skipping = Skipping(model, skips=False)
    wrapped = DistributedDataParallel(prepare(skipping), broadcast_buffers=False, find_unused_parameters=True)
    opt = optimizer_of(model)
    due = []
    for step in range(14):
        skipping.skips = rank == 1 and step % 2 == 1 or step == 4
        backward(wrapped, step, rank, 1)
        due.append([model.get_submodule(name).leaf.binding.due for name in LOW_RANK[:2]])
        opt.step()
        opt.zero_grad()
    return {**everything(model, opt), "due": due}


def scaled(rank: int) -> dict[str, Any]:
    """float16 with a GradScaler; rank 1 overflows in two updates, which every process skips."""
    model = network()
    wrapped = DistributedDataParallel(prepare(model), broadcast_buffers=False)
    opt = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(10):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(wrapped, batch_of(step, 0, rank))
        scaler.scale(loss * (1e30 if rank == 1 and step in (3, 5) else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return {**everything(model, opt), "scales": scales}


def load_checkpoint(folder: Path, model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> None:
    state = checkpoint_of(model, opt)
    dcp.load(state, checkpoint_id=folder, planner=LoadPlanner())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optimizer"])


def checkpoint_of(model: nn.Module, opt: qg.QGaLoreAdamW8bit) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}


def resumed(rank: int) -> dict[str, Any]:
    """A checkpoint that all processes write, and what follows with and without an interruption."""
    results: dict[str, Any] = {}
    for name, first in (("straight", 0), ("resumed", 7)):
        model = network(seed=first)
        wrapped = DistributedDataParallel(prepare(model))
        opt = optimizer_of(model)
        if first:
            load_checkpoint(Path("checkpoint"), model, opt)
        for step in range(first, 12):
            if step == 7 and not first:
                dcp.save(checkpoint_of(model, opt), checkpoint_id=Path("checkpoint"))
                results["saved"] = copy.deepcopy(everything(model, opt))
            backward(wrapped, step, rank, 1)
            opt.step()
            opt.zero_grad()
        results[name] = everything(model, opt)
    return results


def documented(rank: int) -> dict[str, Any]:
    """The loop of docs/distributed.md as it stands there."""
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    loop = page.read_text().split("```python\n")[2].split("```")[0]
    windows = [[batch_of(step, micro, rank) for micro in range(2)] for step in range(3)]
    names: dict[str, Any] = {"model": network(seed=rank), "windows": windows, "loss_of": loss_of, "qg": qg}
    exec(loop, {**globals(), **names}, names)
    return everything(names["model"], names["opt"])


def message_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(rank: int) -> dict[str, str]:
    """Messages of what cannot work."""

    def other_format() -> None:
        prepare(network(rank=6 + rank))

    def other_ids() -> None:
        model = network()
        wrapped = DistributedDataParallel(prepare(model))
        groups = qg.param_groups(model)
        opt = qg.QGaLoreAdamW8bit(groups if rank == 0 else groups[::-1])
        backward(wrapped, 0, rank, 1)
        opt.step()

    def other_seed() -> None:
        model = network()
        wrapped = DistributedDataParallel(prepare(model))
        opt = optimizer_of(model, seed=rank)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        backward(wrapped, 0, rank, 1)
        try:
            opt.step()
        finally:
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def mixed_precision() -> None:
        dtypes = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), torch.bfloat16)
        DistributedDataParallel(prepare(network()), mixed_precision=_MixedPrecision(**dtypes))

    def fsdp1(keep: bool) -> Callable[[], Any]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = nn.Sequential(nn.Linear(8, 8))
        qg.prepare_model(model, 2, ["0"])
        return lambda: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=keep)

    def sharded(grad_mode: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = nn.Sequential(nn.Linear(8, 8))
        qg.prepare_model(model, 2, ["0"], grad_mode=grad_mode)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def sharded_float() -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = nn.Sequential(nn.Linear(8, 8))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        qg.QGaLoreAdamW8bit(model.parameters())

    def unprepared() -> None:
        DistributedDataParallel(network())

    def no_group() -> None:
        prepare(network(), process_group=dist.GroupMember.NON_GROUP_MEMBER)

    def unprepared_floats() -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        qg.prepare_model(model, 2, ["0"], weight_bits=None)
        wrapped, opt = DistributedDataParallel(model), optimizer_of(model)
        wrapped(torch.ones(2, 8)).sum().backward()
        opt.step()

    def per_layer_without_wrapper() -> None:
        model = network()
        wrapped = DistributedDataParallel(prepare(model))
        qg.enable_per_layer(optimizer_of(wrapped))

    def nothing_to_prepare() -> None:
        prepare(nn.Linear(2, 2))

    attempts = {
        **{"other_format": other_format, "other_ids": other_ids, "other_seed": other_seed},
        **{"mixed_precision": mixed_precision, "fsdp1": fsdp1(False), "fsdp1_kept": fsdp1(True)},
        **{"fully_shard": lambda: sharded("low_rank"), "fully_shard_float": sharded_float, "unprepared": unprepared},
        **{"fully_shard_full": lambda: sharded("full")},
        **{"unprepared_floats": unprepared_floats, "nothing_to_prepare": nothing_to_prepare},
        **{"no_group": no_group, "per_layer": per_layer_without_wrapper},
    }
    return {name: message_of(attempt) for name, attempt in attempts.items()}


def warned(rank: int) -> list[str]:
    """Log records of low-rank layers that neither prepare() nor DDP has seen."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("q_galore_torch").addHandler(handler)
    model = network()
    opt = optimizer_of(model)
    for step in range(2):
        backward(model, step, rank, 1)
        opt.step()
    logging.getLogger("q_galore_torch").removeHandler(handler)
    return records


def per_layer(rank: int) -> dict[str, Any]:
    """The ordinary mode and per-layer updates, from the same start on the same data."""
    results: dict[str, Any] = {}
    for mode in ("ordinary", "per_layer"):
        model = network()
        wrapped = DistributedDataParallel(prepare(model), broadcast_buffers=False)
        opt = optimizer_of(model)
        norms = []
        with contextlib.ExitStack() as stack:
            if mode == "per_layer":
                handle = qg.enable_per_layer(opt, accumulation_steps=2, max_grad_norm=0.2, ddp=wrapped)
                stack.callback(handle.remove)
            for step in range(14):
                backward(wrapped, step, rank, 2)
                if mode == "ordinary":
                    norms.append(qg.clip_grad_norm_(opt, 0.2).item())
                opt.step()
                opt.zero_grad()
                if mode == "per_layer":
                    norms.append(handle.grad_norm)
        results[mode] = {**everything(model, opt), "norms": norms}
    return results


def run(rank: int, world: int, folder: str, names: list[str]) -> None:
    """One process: every scenario in turn, its result to a file."""
    torch.set_num_threads(1)
    where = Path(folder)
    os.chdir(where)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{where / 'meet'}", rank=rank, world_size=world, timeout=limit)
    for name in names:
        result = SCENARIOS[name](rank)
        torch.save(result, where / f"{name}.{rank}.pt")
        dist.barrier()
    gc.collect()  # as the fixture process_group does
    dist.destroy_process_group()


SCENARIOS: dict[str, Callable[[int], Any]] = {
    "replicas": replicas,
    "broadcasting": lambda rank: replicas(rank, broadcast_buffers=True, steps=8),
    "joint": joint,
    "broken": broken,
    "unused": unused,
    "scaled": scaled,
    "resumed": resumed,
    "documented": documented,
    "per_layer": per_layer,
    "refusals": refusals,
    "warned": warned,
}
