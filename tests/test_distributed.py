"""Many processes: replicas under DistributedDataParallel stay equal bit for bit, and send R and due G, no codes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

import distributed_program as program
from test_state import differences

NAMES = {2: list(program.SCENARIOS), 3: ["replicas", "joint"]}


class Results:
    """Each process's result of a scenario in a world of 2 or 3 processes, which is spawned once for all scenarios."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self.make_folder = make_folder
        self.folders: dict[int, Path] = {}

    def __call__(self, world: int, name: str) -> list[Any]:
        if world not in self.folders:
            folder = self.folders[world] = self.make_folder(f"world{world}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")
                torch.multiprocessing.spawn(program.run, (world, str(folder), NAMES[world]), nprocs=world)
            (folder / "complete").touch()
        assert (self.folders[world] / "complete").exists(), "the processes failed, as an earlier test shows"
        return [torch.load(self.folders[world] / f"{name}.{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp)


def assert_equal_replicas(ranks: list[dict[str, Any]]) -> None:
    first, *others = (
        {"model": rank["model"], "optimizer": rank["optimizer"], "telemetry": [told(e) for e in rank["telemetry"]]}
        for rank in ranks
    )
    for other in others:
        assert differences(first, other) == []


def told(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "seconds"}


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_are_bit_identical(results: Results, world: int) -> None:
    """Codes, scales, zero points, moments, projectors and schedule, 50 updates on different data, with no_sync()."""
    ranks = results(world, "replicas")
    assert_equal_replicas(ranks)
    assert min(entry.get("refreshes", 99) for entry in ranks[0]["telemetry"]) >= 5
    assert any(entry["groups_shifted"] for entry in ranks[0]["telemetry"])


@pytest.mark.parametrize(("world", "name"), [(2, "replicas"), (3, "replicas"), (2, "broadcasting")])
def test_only_gradients_are_sent(results: Results, world: int, name: str) -> None:
    """Each update reduces R, the gradients of the rest, and the full gradients of the due layers, once.

    Codes go out in prepare() and never again. The optimizers are compared at the first step, and DDP agrees on its
    buckets in the second forward.
    """
    for rank in results(world, name):
        stored = [value for key, value in rank["model"].items() if key.endswith((".qweight", ".scales", ".zeros"))]
        assert rank["at_start"]["prepare"]["broadcast_"] == sum(value.nbytes for value in stored) > 0
        # DDP's own: parameters, the zeros of leaves included, and their shapes.
        assert 0 <= rank["at_start"]["wrapping"]["broadcast_"] - min(rank["expected"]) < 500
        assert [sent["allreduce_"] for sent in rank["sent"]] == rank["expected"]
        assert len(set(rank["expected"])) > 2
        assert [set(sent) - {"allreduce_"} for sent in rank["sent"][:3]] == [{"allgather_"}, {"broadcast_"}, set()]
        assert rank["sent"][1]["broadcast_"] < 200
        assert all(set(sent) == {"allreduce_"} for sent in rank["sent"][2:])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one_on_the_joint_batch(results: Results, world: int) -> None:
    ranks = results(world, "joint")
    assert_equal_replicas(ranks)
    model = program.network(**program.FLOATS)
    opt = program.float_optimizer(model)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(12):
        batches = [program.batch_of(step, micro, rank) for micro in range(2) for rank in range(world)]
        program.loss_of(model, torch.cat(batches)).backward()
        opt.step()
        opt.zero_grad()
    for key, value in model.state_dict().items():
        moved = (value - start[key]).norm()
        assert moved > 0
        assert (value - ranks[0]["model"][key]).norm() <= 1e-4 * moved, key
    assert min(entry.get("refreshes", 99) for entry in opt.telemetry()) >= 2


def test_default_buffer_broadcast_changes_nothing(results: Results) -> None:
    assert_equal_replicas(results(2, "broadcasting"))


def test_a_full_gradient_that_is_broken_in_one_process_is_used_by_none(results: Results) -> None:
    ranks = results(2, "broken")
    assert_equal_replicas(ranks)
    refreshes = ranks[1]["refreshes"]
    assert refreshes[1] == refreshes[4]  # the layers stayed due
    assert refreshes[4] < refreshes[5]


def test_a_process_without_a_gradient_sends_zeros(results: Results) -> None:
    ranks = results(2, "unused")
    assert_equal_replicas(ranks)
    assert any(any(due) for due in ranks[0]["due"][1::2])


def test_an_overflow_in_one_process_skips_the_update_of_all(results: Results) -> None:
    ranks = results(2, "scaled")
    assert_equal_replicas(ranks)
    for rank in ranks:
        assert rank["scales"] == [1024.0] * 3 + [512.0] * 2 + [256.0] * 5
        assert {state["step"] for state in rank["optimizer"]["state"].values()} == {8}


def test_a_checkpoint_goes_on_with_the_same_bits(results: Results) -> None:
    ranks = results(2, "resumed")
    for rank in ranks:
        for part in ("model", "optimizer"):
            assert differences(rank["straight"][part], rank["resumed"][part]) == []
    assert_equal_replicas([rank["resumed"] for rank in ranks])
    assert differences(ranks[0]["saved"]["model"], ranks[0]["resumed"]["model"]) != []


def test_the_documented_loop_keeps_replicas_equal(results: Results) -> None:
    ranks = results(2, "documented")
    assert_equal_replicas(ranks)
    assert all(state["step"] == 3 for state in ranks[0]["optimizer"]["state"].values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_loads_into_one(results: Results) -> None:
    saved = results(2, "resumed")[0]["saved"]
    model = program.network(seed=3)
    opt = program.optimizer_of(model)
    program.load_checkpoint(results.folders[2] / "checkpoint", model, opt)
    assert differences(saved["model"], model.state_dict()) == []
    assert differences(saved["optimizer"]["state"], opt.state_dict()["state"]) == []


REFUSED = {
    "other_format": r"^ValueError: prepare: the prepared layers must be the same in every process, but process 0 has: "
    r"1 is .*rank=6.*; process 1 has: 1 is .*rank=7",
    "other_ids": r"^RuntimeError: the optimizers must be the same in every process, but process 0 has: 0.weight with "
    r"id 0.*; process 1 has: 1.coordinates with id 0",
    "other_seed": r"^RuntimeError: the optimizers must be .*'seed': 0.*; process 1 has: .*'seed': 1",
    "mixed_precision": r"^RuntimeError: DistributedDataParallel\(mixed_precision=...\) is not supported for 1: use "
    r"torch.autocast$",
    "fsdp1": r"^RuntimeError: .*FSDP and fully_shard are not supported, use DistributedDataParallel$",
    "fsdp1_kept": r"^RuntimeError: FullyShardedDataParallel is not supported for 0: use DistributedDataParallel$",
    "fully_shard": r"^RuntimeError: the zero leaf coordinates of 0 cannot be replaced by a DTensor; FSDP",
    "fully_shard_full": r"^RuntimeError: the zero leaf weight of 0 cannot be replaced by a DTensor; FSDP",
    "fully_shard_float": r"^ValueError: parameter 0 of group 0 .* is a DTensor: sharded parameters are not supported",
    "unprepared": r"^RuntimeError: Invalid scalar type",
    "unprepared_floats": r"^RuntimeError: 0.coordinates is in a DistributedDataParallel: call .*prepare",
    "no_group": r"^ValueError: process_group must be one that this process belongs to, got ",
    "per_layer": r"^RuntimeError: the model is in a DistributedDataParallel: give it to enable_per_layer as ddp=$",
    "nothing_to_prepare": r"^ValueError: prepare: the model has no QGaLoreLinear: call prepare_model first$",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_every_process(results: Results, name: str) -> None:
    messages = [rank[name] for rank in results(2, "refusals")]
    assert messages[0].count("\n") == 0
    for message in messages:
        assert re.search(REFUSED[name], message), message


def test_layers_that_nothing_has_prepared_are_reported_once(results: Results) -> None:
    """Without DDP nobody knows whether the processes' models are replicas."""
    for records in results(2, "warned"):
        assert len(records) == 1
        assert re.match(r"1\.coordinates is in one of 2 processes: .* call .*prepare\(model\)", records[0])


def test_per_layer_updates_are_the_ordinary_ones(results: Results) -> None:
    """DDP's buckets keep all gradients anyway, so everything is updated in step(): the same bits and norms."""
    ranks = results(2, "per_layer")
    for rank in ranks:
        ordinary, per_layer = rank["ordinary"], rank["per_layer"]
        assert differences(ordinary["model"], per_layer["model"]) == []
        assert differences(ordinary["optimizer"]["state"], per_layer["optimizer"]["state"]) == []
        assert ordinary["norms"] == pytest.approx(per_layer["norms"], rel=1e-6)
        assert min(ordinary["norms"]) > 0.2
    assert_equal_replicas([rank["per_layer"] for rank in ranks])


def test_prepare_needs_a_process_group() -> None:
    from q_galore_torch.integrations.distributed import prepare

    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group before it"):
        prepare(program.network())
