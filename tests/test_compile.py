"""torch.compile: forward and backward in one graph, the eager numbers, no graph made anew when a basis is due."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import q_galore_torch as qg
from q_galore_torch.integrations import distributed
from q_galore_torch.nn import backward, leaf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from pretrain.model import LlamaConfig, LlamaForCausalLM  # noqa: E402

WIDTH, STEPS = 32, 30


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Blocks of two layers; tall, wide and square ones."""

    def __init__(self, depth: int = 2, ways: int = 1) -> None:
        super().__init__()
        pairs = [(WIDTH, 48 if index % 2 else WIDTH) for index in range(depth)]
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, a, bias=False)) for a, b in pairs
        )
        self.ways = ways

    def forward(self, x: Tensor) -> Tensor:
        for block in self.mlp:
            if self.ways == 2:
                x = x + checkpoint(block, x, use_reentrant=False)
            else:
                x = x + block(x)
        return x.float().square().mean()


def made(depth: int = 2, ways: int = 1, rank: int = 8, gap: int = 4, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = qg.prepare_model(Net(depth, ways), rank, ["mlp"], **options)
    return model, qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=gap), lr=0.01)


def data(step: int, tokens: int = 64) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(step))


def train(model: Any, opt: Any, steps: range, autocast: bool = False, micro: int = 1) -> list[Tensor]:
    """The loss of every micro-batch."""
    losses = []
    for step in steps:
        for part in range(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(data(micro * step + part))
            loss.backward()
            losses.append(loss.detach())
        opt.step()
        opt.zero_grad()
    return losses


def everything(model: nn.Module, opt: Any) -> list[Any]:
    """Weights, moments, projectors and dates after a run."""
    states = [opt.state[p] for group in opt.param_groups for p in group["params"]]
    return [*model.state_dict().values(), *(value for state in states for value in state.values())]


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


WAYS: dict[str, dict[str, Any]] = {
    "int8": {},
    "float": {"weight_bits": None},
    "right": {"proj_type": "right"},
    "full projection": {"proj_type": "full"},
    "full gradient": {"grad_mode": "full"},
    "G is cheaper": {"rank": 24},
    "bfloat16 R": {"grad_dtype": "bfloat16"},
    "autocast": {"autocast": True},
    "autocast, float": {"autocast": True, "weight_bits": None},
    "micro-batches": {"micro": 3},
    "checkpointed": {"ways": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_thirty_steps_are_the_eager_ones(way: str) -> None:
    """Bit for bit, with a refresh in nearly every step; one graph, made in the first."""
    options = dict(WAYS[way])
    ran = {key: options.pop(key) for key in ("autocast", "micro") if key in options}
    model, opt = made(**options)
    eager = train(model, opt, range(STEPS), **ran)
    assert all(entry["refreshes"] > 3 for entry in opt.telemetry() if "refreshes" in entry)
    twin, twin_opt = made(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    losses = train(compiled, twin_opt, range(1), **ran)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(compiled, twin_opt, range(1, STEPS), **ran)
    assert counter.frame_count == 1
    assert same(losses, eager) and same(everything(twin, twin_opt), everything(model, opt))


def test_a_llama_trains_compiled() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        llama = qg.prepare_model(LlamaForCausalLM(LlamaConfig(40, 32, 48, 2, 2)), 8)
        opt = qg.QGaLoreAdamW8bit(qg.param_groups(llama, update_proj_gap=4), lr=0.01)
        run = torch.compile(llama, fullgraph=True, backend="aot_eager") if compiled else llama
        losses = []
        for step in range(STEPS):
            tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step % 3))
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                logits = run(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        results.append(losses)
    assert results[1] == results[0]
    assert results[1][-1] < 0.9 * results[1][0]


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_like_eager() -> None:
    """Its sums differ in the last bit; more tokens than basis vectors keep the bases from being arbitrary."""
    model, opt = made(1)
    eager = train(model, opt, range(STEPS))
    twin, twin_opt = made(1)
    compiled = torch.compile(twin, fullgraph=True)
    losses = train(compiled, twin_opt, range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(compiled, twin_opt, range(1, STEPS))
    torch.testing.assert_close(torch.stack(losses), torch.stack(eager), rtol=1e-5, atol=0.0)
    counts = [[e["refreshes"] for e in o.telemetry() if "refreshes" in e] for o in (opt, twin_opt)]
    assert counts[0] == counts[1]


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    """More of them than dynamo would compile anew."""
    depth = torch._dynamo.config.recompile_limit + 2
    model, opt = made(2 * depth)
    eager = train(model, opt, range(3))
    twin, twin_opt = made(2 * depth)
    counter = CompileCounterWithBackend("aot_eager")
    for block in twin.mlp:
        block.compile(fullgraph=True, backend=counter)
    assert same(train(twin, twin_opt, range(3)), eager)
    assert counter.frame_count == 5  # kinds of layer: by shape, bias, and the first, whose input needs no gradient


@pytest.mark.parametrize("whole", [False, True])
def test_per_layer_updates_of_a_compiled_model(whole: bool) -> None:
    model, opt = made(2)
    eager = train(model, opt, range(12))
    twin, twin_opt = made(2)
    handle = qg.enable_per_layer(twin_opt)
    compiled = twin
    if whole:
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    else:
        for block in twin.mlp:
            block.compile(fullgraph=True, backend="aot_eager")
    losses = train(compiled, twin_opt, range(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(compiled, twin_opt, range(2, 12))
    handle.remove()
    assert same(losses, eager) and same(everything(twin, twin_opt), everything(model, opt))


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inside", [False, True])
def test_ddp_around_a_compiled_model_and_the_other_way_round(inside: bool) -> None:
    model, opt = made(2)
    eager = train(model, opt, range(8))
    twin, twin_opt = made(2)
    distributed.prepare(twin)
    if inside:
        twin.compile(fullgraph=True, backend="aot_eager")
    wrapped = nn.parallel.DistributedDataParallel(twin)
    compiled = wrapped if inside else torch.compile(wrapped, backend="aot_eager")
    losses = train(compiled, twin_opt, range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(compiled, twin_opt, range(1, 8))
    assert same(losses, eager) and same(everything(twin, twin_opt), everything(model, opt))


def test_no_decoded_weight_is_kept() -> None:
    model, opt = made(2, gap=1000)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, opt, range(5))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]  # a graph that held its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compiled(data(0, 6))
    foreign = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert foreign and max(t.untyped_storage().nbytes() for t in foreign) <= 4 * 6 * 48  # one activation, not a weight


def test_batches_of_any_size_take_one_more_graph() -> None:
    model, opt = made(1, gap=3)
    twin, twin_opt = made(1, gap=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for step, tokens in enumerate((4, 6, 8, 11, 5)):
        losses = []
        for run, optimizer in ((model, opt), (compiled, twin_opt)):
            loss = run(data(step, tokens))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        assert torch.equal(*losses)
    assert counter.frame_count == 2


def test_a_copied_model_is_compiled_with_layers_of_its_own() -> None:
    model, opt = made(1)
    train(torch.compile(model, fullgraph=True, backend="aot_eager"), opt, range(2))
    twin = copy.deepcopy(model)
    own = qg.QGaLoreAdamW8bit(qg.param_groups(twin, update_proj_gap=4), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    numbers = [int(block[0]._number) for m in (model, twin) for block in m.mlp]
    assert len(set(numbers)) == 2 and leaf.numbered(numbers[1]) is twin.mlp[0][0]
    train(torch.compile(twin, fullgraph=True, backend="aot_eager"), own, range(3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(layer.leaf.grad is None for layer in (model.mlp[0][0], model.mlp[0][2]))


def test_a_compiled_backward_without_an_optimizer_says_what_is_missing() -> None:
    torch.manual_seed(0)
    model = qg.prepare_model(Net(1), 8, ["mlp"])
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(data(0))
    with pytest.raises(RuntimeError, match="the low-rank backward of mlp.0.2 needs the optimizer's projector"):
        loss.backward()


def test_a_layer_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeError, match="^layer 0 of a compiled model is gone: keep the model alive$"):
        leaf.numbered(0)


@pytest.mark.parametrize("wants_x", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
def test_the_operator_is_what_the_compiler_is_told(wants_x: bool, kept: bool, mode: str) -> None:
    """No CUDA graph may replay it either: whether a step is due is asked when it runs."""
    model, _ = made(1, grad_mode=mode)
    layer = model.mlp[0][0]
    if mode == "low_rank":
        layer.leaf.binding.mark(False)  # G belongs to a running backward
    operator = torch.ops.q_galore.linear_backward.default
    assert torch.Tag.cudagraph_unsafe in operator.tags
    grad, x = torch.randn(3, 2, WIDTH), torch.randn(3, 2, WIDTH)
    weight = (layer.qweight, layer.scales, layer.zeros)
    leaf_of = (layer._number, list(layer.leaf.shape), layer.leaf.dtype)
    torch.library.opcheck(backward._traced, (grad, x if kept else None, *weight, *leaf_of, wants_x))
