"""What low-rank layers keep of their inputs: how many bytes, and that no number depends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import q_galore_torch as qg
from q_galore_torch.nn import activations, backward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from pretrain.model import LlamaBody, LlamaConfig  # noqa: E402

HIDDEN, INNER, BATCH, LENGTH = 256, 688, 2, 32


class Block(nn.Module):
    """One LLaMA layer with the rotary angles it is given, between a trainable vector and the loss."""

    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        config = LlamaConfig(8, hidden, inner, 1, 4)
        body = LlamaBody(config)
        self.layer, self.shift = body.layers[0], nn.Parameter(torch.zeros(hidden))
        self.angles = body._angles(LENGTH, torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.shift, *self.angles).float().square().mean()


class Reader(nn.Module):
    """Layers of the widths given, all of which read the same input."""

    def __init__(self, *widths: int, views: bool = False) -> None:
        super().__init__()
        self.readers = nn.ModuleList(nn.Linear(64, width) for width in widths)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1.0
        outputs = [reader(x.view(-1, 64) if self.views else x) for reader in self.readers]
        return sum((y.square().mean() for y in outputs), torch.zeros(()))


def made(rank: int = HIDDEN // 4, *, model: Callable[[], nn.Module] = Block, gap: int = 1000, **options: Any) -> Any:
    """A prepared model and its optimizer."""
    torch.manual_seed(0)
    prepared = qg.prepare_model(model(), rank, r".*(readers|attn|mlp)\..*", **options)
    return prepared, qg.QGaLoreAdamW8bit(qg.param_groups(prepared, update_proj_gap=gap), lr=0.01)


def layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, qg.QGaLoreLinear)]


def data(step: int, *size: int) -> Tensor:
    return torch.randn(*(size or (BATCH, LENGTH, HIDDEN)), generator=torch.Generator().manual_seed(step))


def train(model: Any, opt: Any, steps: int, run: Any = None, micro: int = 1) -> list[Tensor]:
    """The losses and, of each step, every R."""
    seen = []
    for step in range(steps):
        for part in range(micro):
            loss = (run or model)(data(step * micro + part))
            loss.backward()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in opt.param_groups[1]["params"] if p.grad is not None]
        opt.step()
        opt.zero_grad()
    return seen


class Kept:
    """The memory that autograd keeps for a backward, each storage once; parameters, buffers and constants left out."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.linear: set[int] = set()
        own = [*model.parameters(), *model.buffers(), *getattr(model, "angles", ())]
        self.known = {t.untyped_storage().data_ptr() for t in own}
        self.inside = 0
        for module in model.modules():
            if isinstance(module, (qg.QGaLoreLinear, nn.Linear)):
                module.register_forward_pre_hook(lambda *_: self._enter(1))
                module.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, change: int) -> None:
        self.inside += change

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # a graph that held its own output would never be freed
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.alive.append(tensor)
            self.sizes[pointer] = tensor.untyped_storage().nbytes()
            if self.inside:
                self.linear.add(pointer)
        return tensor

    def measure(self, run: Callable[[], Any]) -> tuple[int, int]:
        """Bytes of the linear layers and of everything, of one forward."""
        with torch.autograd.graph.saved_tensors_hooks(self, lambda x: x):
            run()
        return sum(self.sizes[pointer] for pointer in self.linear), sum(self.sizes.values())


def kept_bytes(autocast: bool = False, **options: Any) -> tuple[int, int]:
    model, opt = made(**options)
    train(model, opt, 9)  # until every layer has had its first data-driven basis
    assert not any(layer.leaf.binding.due for layer in layers(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return Kept(model).measure(lambda: model(data(0)))


@pytest.mark.parametrize(("proj_type", "bound"), [("std", 0.20), ("right", 0.50), ("full", 0.50)])
@pytest.mark.parametrize("autocast", [False, True])
def test_bytes_kept_by_the_linear_layers_of_a_llama_block(proj_type: str, bound: float, autocast: bool) -> None:
    """At r = hidden / 4. Four inputs: of q, k, v; of o; of gate and up; of down, which ``std`` needs itself."""
    before, block_before = kept_bytes(autocast, proj_type=proj_type, save_projected=False)
    after, block_after = kept_bytes(autocast, proj_type=proj_type)
    tokens, rank = BATCH * LENGTH, HIDDEN // 4
    if not autocast:  # under it each layer has a bfloat16 copy of its own
        assert before == 4 * tokens * (3 * HIDDEN + INNER)
        assert after == 4 * tokens * (6 * rank + (INNER if proj_type == "std" else rank))
    assert after <= (1 - bound) * before
    assert block_after < block_before


@pytest.mark.parametrize(
    ("widths", "rank", "expected"),
    [
        ((64,), 16, True),
        ((64, 64, 64), 21, True),
        ((64, 64, 64), 22, False),  # 66 numbers a token in place of 64
        ((64, 16, 16), 8, False),  # the narrow ones are projected on the left and keep X in any case
        ((64,), 48, False),  # r > mn / (m + n): G is formed
    ],
)
@pytest.mark.parametrize("views", [False, True])
def test_a_shared_input_is_projected_only_where_that_takes_less(
    widths: tuple[int, ...], rank: int, expected: bool, views: bool
) -> None:
    model, opt = made(rank, model=lambda: Reader(*widths, views=views))
    train_reader(model, opt)
    kept, _ = Kept(model).measure(lambda: model(data(0, 6, 64)))
    assert kept == 4 * 6 * (rank * len(widths) if expected else 64)


def train_reader(model: nn.Module, opt: Any, steps: int = 6) -> None:
    for step in range(steps):
        model(data(step, 6, 64)).backward()
        opt.step()
        opt.zero_grad()


def test_an_input_is_forgotten_with_its_memory() -> None:
    model, opt = made(8, model=lambda: Reader(64, 64))
    before = len(activations._readers)
    train_reader(model, opt)
    assert len(activations._readers) == before


@pytest.mark.parametrize("proj_type", ["std", "right", "full"])
@pytest.mark.parametrize("way", ["plain", "micro", "autocast", "non-reentrant", "reentrant", "per-layer"])
def test_no_number_depends_on_it(proj_type: str, way: str) -> None:
    """Fourteen steps with refreshes and comparisons: the same losses, R and codes, with and without checkpointing."""
    results, projecting = [], [0, 0]
    for save in (True, False):
        model, opt = made(8, model=lambda: Block(32, 48), gap=4, proj_type=proj_type, save_projected=save)

        def run(x: Tensor, model: Any = model, save: bool = save) -> Tensor:
            x = x[..., :32]
            projecting[save] += sum(layer.leaf.binding.projects for layer in layers(model))
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                if "reentrant" in way:
                    return checkpoint(model, x.requires_grad_(), use_reentrant=way == "reentrant")
                return model(x)

        if way == "per-layer":
            qg.enable_per_layer(opt)
        seen = train(model, opt, 14, run, micro=2 if way == "micro" else 1)
        results.append([*seen, *model.state_dict().values()])
        assert sum(entry["refreshes"] > 1 for entry in opt.telemetry()[-7:]) > 3
    assert projecting[True] > 10 and projecting[False] == 0
    assert len(results[0]) == len(results[1]) > 14
    for with_it, without in zip(*results, strict=True):
        assert torch.equal(with_it, without)


class Twice(nn.Module):
    """One layer that is called twice, on inputs of one and of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp[0](torch.tanh(self.mlp[0](x))[0, 0]).square().mean()


def test_a_layer_called_twice() -> None:
    results = []
    for save in (True, False):
        model, opt = made(8, model=Twice, gap=3, save_projected=save)
        seen = train(model, opt, 8, lambda x: model(x[..., :64]))  # noqa: B023
        assert layers(model)[0].leaf.binding.projects == save
        results.append([*seen, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def ready(gap: int = 1000) -> tuple[Any, Any, Any]:
    """A layer that projects its input in the next forward."""
    model, opt = made(8, model=lambda: Reader(64), gap=gap)
    train_reader(model, opt)
    layer = layers(model)[0]
    assert layer.leaf.binding.projects and not layer.leaf.binding.due
    return model, opt, layer


def test_a_due_layer_keeps_its_input_and_forms_g() -> None:
    model, _, layer = ready()
    layer.leaf.binding.mark(True)
    kept, _ = Kept(model).measure(lambda: model(data(0, 6, 64)).backward())
    assert kept == 4 * 6 * 64
    weight = layer.dequantize().requires_grad_()
    nn.functional.linear(data(0, 6, 64) + 1, weight, layer.bias).square().mean().backward()
    torch.testing.assert_close(layer.leaf.binding.stash, weight.grad)


def test_evaluation_projects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, layer = ready()
    monkeypatch.setattr(backward, "projected_input", None)
    with torch.no_grad():
        model(data(0, 6, 64))
    with torch.inference_mode():
        model(data(0, 6, 64))
    layer.leaf.requires_grad_(False)
    model(data(0, 6, 64))
    layer.leaf.requires_grad_(True)
    with pytest.raises(TypeError, match="not callable"):
        model(data(0, 6, 64))


@pytest.mark.parametrize("change", ["load", "optimizer", "refresh"])
def test_a_basis_that_changed_since_the_forward_is_refused(change: str) -> None:
    model, opt, layer = ready()
    loss = model(data(0, 6, 64))
    if change == "load":
        opt.load_state_dict(opt.state_dict())
    elif change == "optimizer":
        qg.QGaLoreAdamW8bit(qg.param_groups(model))
    else:
        layer.leaf.binding.codes.copy_(layer.leaf.binding.codes)
    with pytest.raises(RuntimeError, match="^the basis of readers.0 changed between this forward and its backward: "):
        loss.backward()
    assert layer.leaf.grad is None


def test_backward_after_the_step_is_autograd_s_error() -> None:
    model, opt, layer = ready()
    first, second = model(data(0, 6, 64)), model(data(1, 6, 64))
    first.backward()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_a_layer_that_became_due_after_its_forward_stays_due() -> None:
    """One micro-batch has no G, so that the two others' sum must not pass for the window's."""
    model, opt, layer = ready()
    binding, state = layer.leaf.binding, opt.state[layer.leaf]
    state["last_due"] = state["step"] - state["gap"]  # due now
    early = model(data(0, 6, 64))
    opt._mark_due()
    assert binding.due
    refreshes = state["refreshes"]
    model(data(1, 6, 64)).backward()
    assert binding.stash is not None
    early.backward()
    model(data(2, 6, 64)).backward()
    assert binding.stash is None
    opt.step()
    assert state["refreshes"] == refreshes and binding.due
    opt.zero_grad()
    model(data(3, 6, 64)).backward()
    opt.step()
    assert state["refreshes"] == refreshes + 1


def test_zeroed_gradients_make_a_window_whole_again() -> None:
    model, _, layer = ready()
    binding = layer.leaf.binding
    early = model(data(0, 6, 64))
    binding.mark(True)
    early.backward()
    model.zero_grad()
    model(data(1, 6, 64)).backward()
    assert binding.stash is not None
