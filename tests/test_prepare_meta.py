"""prepare_model on a meta model: the same layers as from a float model, which never exists as a whole."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import q_galore_torch as qg
from q_galore_torch.nn.linear import QGaLoreLinear

RANK = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Linear(width, 2 * width, bias=False)
        self.mlp_down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp_down(torch.relu(self.mlp(x)))


class Model(nn.Module):
    """An embedding tied to the head, blocks, a table that is not saved and a counter."""

    def __init__(self, blocks: int = 3, width: int = 16, words: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(8.0), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1], None].sin()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, Model):
        module.positions.copy_(torch.arange(8.0))
        module.seen.zero_()


def initialize_bfloat16(module: nn.Module) -> None:
    """Float32 numbers, rounded: what ``.to(torch.bfloat16)`` makes of the whole model."""
    initialize(module)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)


def from_float(dtype: torch.dtype, **options: Any) -> nn.Module:
    model = Model()
    torch.manual_seed(3)
    for module in model.modules():
        initialize(module)
    return qg.prepare_model(model.to(dtype), rank=RANK, **options)


def from_meta(build: Callable[[], nn.Module] = Model, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model = build()
    torch.manual_seed(3)
    return qg.prepare_model(model, rank=RANK, **{"initialize": initialize, **options})


@pytest.mark.parametrize(("dtype", "setter"), [(torch.float32, initialize), (torch.bfloat16, initialize_bfloat16)])
@pytest.mark.parametrize(
    "options",
    [{}, {"grad_mode": "full"}, {"weight_bits": None}, {"weight_bits": None, "grad_mode": "full"}, {"group_size": 48}],
    ids=str,
)
def test_meta_model_equals_the_float_one(
    dtype: torch.dtype, setter: Callable[[nn.Module], None], options: dict[str, Any]
) -> None:
    """Every parameter and buffer, saved or not, bit for bit, with the same names, dtypes and flags."""
    expected, got = from_float(dtype, **options), from_meta(initialize=setter, **options)
    assert [(n, type(m)) for n, m in got.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    for kind in ("named_parameters", "named_buffers"):
        pairs = list(zip(getattr(expected, kind)(), getattr(got, kind)(), strict=True))
        for (name, theirs), (other, ours) in pairs:
            assert name == other and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
            with torch.no_grad():
                assert torch.equal(ours, theirs), name
    assert got.head.weight is got.embed.weight
    assert expected.state_dict().keys() == got.state_dict().keys()


def test_prepared_meta_model_trains_like_the_float_one() -> None:
    losses = []
    for model in (from_float(torch.float32), from_meta()):
        optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=2), lr=0.01)
        tokens = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))
        losses.append([])
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


class FloatBytes(TorchDispatchMode):
    """The most bytes of float storages alive at once among those made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@pytest.mark.parametrize("blocks", [2, 12])
def test_only_one_layer_is_float_at_a_time(blocks: int) -> None:
    """Largest layer 128 x 64 in float32; scales, norms, biases, embedding and shared zeros stay."""
    with FloatBytes() as floats:
        model = from_meta(lambda: Model(blocks, width=64), group_size=256)
    largest = 4 * 128 * 64
    kept = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    staying = sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point())
    assert floats.peak <= staying + largest + 64
    assert floats.peak > largest + 4 * 40 * 64  # the embedding: the counting counts
    whole = 4 * blocks * (64 * 64 + 2 * 128 * 64)
    assert floats.live < staying + 64 and (blocks == 2 or floats.peak < 0.4 * whole)


def test_tied_layers_become_one_with_the_last_values() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp_a, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.mlp_b = nn.Linear(8, 8, bias=False)
            self.mlp_b.weight = self.mlp_a.weight
            self.again = nn.ModuleDict({"mlp": self.mlp_a})

    model = Tied()
    torch.manual_seed(3)
    for module in model.modules():
        initialize(module)
    expected = qg.prepare_model(model, rank=RANK, target_modules=["mlp"])
    got = from_meta(Tied, target_modules=["mlp"])
    assert got.mlp_a is got.mlp_b is got.again["mlp"] and type(got.other) is nn.Linear
    assert torch.equal(got.mlp_a.qweight, expected.mlp_a.qweight) and torch.equal(
        got.other.weight, expected.other.weight
    )


def test_what_is_real_already_is_kept() -> None:
    """A table that the constructor computed off the meta device survives (transformers' rotary frequencies)."""

    def build() -> nn.Module:
        model = Model()
        model.register_buffer("positions", torch.arange(8.0, device="cpu").exp(), persistent=False)
        return model

    def leave_positions(module: nn.Module) -> None:
        if isinstance(module, Model):
            module.seen.zero_()
        else:
            initialize(module)

    model = from_meta(build, initialize=leave_positions)
    assert torch.equal(model.positions, torch.arange(8.0).exp())


def test_without_an_initializer_a_meta_model_stays_on_meta() -> None:
    model = from_meta(initialize=None)
    assert isinstance(model.blocks[0].attn, QGaLoreLinear)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def leaving_out(kind: type, name: str) -> Callable[[nn.Module], None]:
    def setter(module: nn.Module) -> None:
        kept = copy.copy(getattr(module, name)) if type(module) is kind else None
        if kept is None:
            initialize(module)

    return setter


@pytest.mark.parametrize(
    ("setter", "what"),
    [
        (leaving_out(nn.Linear, "weight"), r"blocks\.0\.attn\.weight of a Linear"),
        (leaving_out(nn.LayerNorm, "weight"), r"blocks\.0\.norm\.weight of a LayerNorm"),
        (leaving_out(Model, "positions"), r"positions of a Model"),
        (lambda module: nn.init.ones_(module.positions) if type(module) is Model else None, "seen of a Model"),
    ],
    ids=["weight", "norm", "float-buffer", "int-buffer"],
)
def test_what_is_left_without_values_is_named(setter: Callable[[nn.Module], None], what: str) -> None:
    with pytest.raises(ValueError, match=f"initialize must give values to {what}"):
        from_meta(initialize=setter)


def test_a_meta_tensor_out_of_reach_is_refused_first() -> None:
    def build() -> nn.Module:
        model = Model()
        model.blocks[1].table = torch.arange(3)
        return model

    called = []
    with pytest.raises(ValueError, match=r"blocks\.1\.table is a tensor on the meta device, but neither parameter nor"):
        from_meta(build, initialize=called.append)
    assert not called


def test_device_without_an_initializer_is_refused() -> None:
    with pytest.raises(ValueError, match="device goes with initialize, got device='cpu' alone"):
        qg.prepare_model(Model(), rank=RANK, device="cpu")
    with pytest.raises(ValueError, match="initialize needs a device with memory, got meta"):
        from_meta(device="meta")
