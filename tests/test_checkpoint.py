"""save_model and load_model: every kind of model, tied tensors, shards, one kind of weight into another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch import shards

INDEX = "model.safetensors.index.json"


class Model(nn.Module):
    """An embedding tied to the head, layers with and without bias, buffers of several kinds, one of them not saved."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.attn = nn.Linear(24, 24)
        self.mlp = nn.ModuleList([nn.Linear(24, 50, bias=False), nn.Linear(50, 24)])
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("unsaved", torch.ones(3), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attn(self.embed(tokens))
        x = x + self.mlp[1](torch.relu(self.mlp[0](x)))
        return self.head(x)


PREPARED: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 full": {"grad_mode": "full", "group_size": 100},
    "float": {"weight_bits": None},
    "float full": {"weight_bits": None, "grad_mode": "full"},
}


def make(kind: str, seed: int, dtype: torch.dtype = torch.float32, tied: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = Model(tied).to(dtype)
    model.norm.num_batches_tracked += seed
    if kind != "plain":
        qg.prepare_model(model, rank=4, **{**PREPARED[kind], **options})
    return model


def assert_equal_state(got: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for name, tensor in got.state_dict().items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def frozen_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("size", [1, 5000, "5GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", *PREPARED])
def test_load_restores_every_entry(kind: str, dtype: torch.dtype, size: int | str, tmp_path: Path) -> None:
    saved, loaded = make(kind, 1, dtype), make(kind, 2, dtype)
    qg.save_model(saved, tmp_path, size)
    tensors = dict(loaded.named_parameters()), dict(loaded.named_buffers())
    qg.load_model(loaded, tmp_path)
    assert_equal_state(loaded, saved)
    assert loaded.head.weight is loaded.embed.weight
    for held, now in zip(tensors, (loaded.named_parameters(), loaded.named_buffers()), strict=True):
        assert all(held[name] is tensor for name, tensor in now)


def test_files_are_plain_safetensors_without_leaves(tmp_path: Path) -> None:
    """What safetensors itself reads is the state dict, each tied tensor once, in shards no larger than asked for."""
    model = make("int8", 1)
    qg.save_model(model, tmp_path, "4KB")
    index = json.loads((tmp_path / INDEX).read_text())
    found = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 4000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found.update(tensors)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [name for name in found if name.endswith("coordinates")] and "unsaved" not in found
    assert index["metadata"]["aliases"] == {"head.weight": "embed.weight"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {file.name for file in tmp_path.iterdir()} == {INDEX, *index["metadata"]["shards"]}


def test_tensors_lie_at_multiples_of_their_element_size(tmp_path: Path) -> None:
    """Where odd numbers of bytes come before floats in the state dict; readers map the file and read in place."""
    model = nn.Module()
    for name, dtype in {"a": torch.uint8, "b": torch.float64, "c": torch.int16, "d": torch.float32}.items():
        model.register_buffer(name, torch.ones(3, dtype=dtype))
    qg.save_model(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in model.named_buffers():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_long_tensors_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous or not: the pieces make the same bytes as the whole."""
    monkeypatch.setattr(shards, "_PIECE", 64)
    values = torch.randn(7, 5, 12, generator=torch.Generator().manual_seed(0))
    model = nn.Module()
    for name, tensor in {"plain": values, "turned": values.transpose(0, 2), "every_other": values[:, ::2]}.items():
        model.register_buffer(name, tensor)
    qg.save_model(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.named_buffers())


@pytest.mark.parametrize("shape", [(4000,), (1000, 2), (1, 4000)], ids=str)
def test_pieces_of_strided_tensors_are_not_single_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of 4 million numbers, or many rows of few, took half a minute when each row was a piece."""
    monkeypatch.setattr(shards, "_PIECE", 1000)
    values = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))[..., 0]
    pieces = list(shards._pieces(values))
    assert b"".join(piece.tobytes() for piece in pieces) == values.numpy().tobytes()
    assert len(pieces) <= values.nbytes // 1000 + 2


def test_conjugate_view_is_saved_by_value(tmp_path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    values = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    model.register_buffer("a", values.conj())
    other.register_buffer("a", torch.zeros_like(values))
    qg.save_model(model, tmp_path)
    qg.load_model(other, tmp_path)
    assert torch.equal(other.a, values.conj())


def test_codes_are_decoded_into_a_float_model(tmp_path: Path) -> None:
    """Into an unprepared model and into a prepared float one, in each dtype: export_model's weights."""
    saved = make("int8", 1)
    qg.save_model(saved, tmp_path)
    for kind in ("plain", "float"):
        for dtype in (torch.float32, torch.bfloat16):
            loaded = make(kind, 2, dtype)
            qg.load_model(loaded, tmp_path)
            expected = qg.export_model(saved, dtype).state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("into", ["int8", "int8 full"])
@pytest.mark.parametrize("kind", ["plain", "float"])
def test_floats_are_quantised_into_an_int8_model(kind: str, into: str, tmp_path: Path) -> None:
    saved, loaded = make(kind, 1), make(into, 2)
    qg.save_model(saved, tmp_path)
    qg.load_model(loaded, tmp_path)
    assert_equal_state(loaded, make(into, 1))


def test_codes_are_read_into_a_model_that_never_had_floats(tmp_path: Path) -> None:
    """Prepared on the meta device; what is not saved is the caller's to set."""
    saved = make("int8", 1)
    qg.save_model(saved, tmp_path)
    with torch.device("meta"):
        loaded = qg.prepare_model(Model(), rank=4)
    loaded.to_empty(device="cpu")
    loaded.head.weight = loaded.embed.weight
    qg.load_model(loaded, tmp_path)
    assert_equal_state(loaded, saved)
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(loaded(tokens), saved(tokens))


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The same model into which the checkpoint is read trains on as the one that wrote it."""
    tokens = torch.arange(30).reshape(5, 6)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    models = [make("int8", 1), make("int8", 2)]
    optimizers = [qg.QGaLoreAdamW8bit(qg.param_groups(m, update_proj_gap=3), lr=0.01) for m in models]
    for _ in range(2):
        train(models[0], optimizers[0])
    qg.save_model(models[0], tmp_path)
    qg.load_model(models[1], tmp_path)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert [train(models[0], optimizers[0]) for _ in range(4)] == [train(models[1], optimizers[1]) for _ in range(4)]
    assert_equal_state(models[1], models[0])


def test_shared_layer_is_stored_once(tmp_path: Path) -> None:
    """One INT8 layer under two names, into such a model and into floats that are tied."""

    def build(seed: int, prepared: bool) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"attn_a": nn.Linear(16, 16), "attn_b": nn.Linear(16, 16)})
        model["attn_b"] = model["attn_a"]
        return qg.prepare_model(model, rank=2) if prepared else model

    saved = build(1, True)
    qg.save_model(saved, tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["aliases"]["attn_b.qweight"] == "attn_a.qweight"
    for prepared in (True, False):
        loaded = build(2, prepared)
        qg.load_model(loaded, tmp_path)
        assert torch.equal(loaded["attn_b"].weight, saved["attn_a"].dequantize())


def test_tied_entries_are_read_into_a_model_that_has_two(tmp_path: Path) -> None:
    saved, loaded = make("int8", 1), make("int8", 2, tied=False)
    qg.save_model(saved, tmp_path)
    qg.load_model(loaded, tmp_path)
    assert_equal_state(loaded, saved)


def test_model_that_is_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved, loaded = (qg.prepare_model(nn.Sequential(nn.Linear(8, 8)), 2, "all-linear|0")[0] for _ in range(2))
    qg.save_model(saved, tmp_path)
    qg.load_model(loaded, tmp_path)
    assert_equal_state(loaded, saved)


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("200MB", 200_000_000), ("1.5 kb", 1500), ("2GiB", 2**31), ("12", 12)],
)
def test_sizes_are_those_of_their_units(text: int | str, size: int) -> None:
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("size", [0, -1, True, None, 1.5, "", "MB", "5 apples", "0GB"])
def test_size_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_shard_size must be a number of bytes or a text like .*, got "):
        qg.save_model(make("plain", 1), tmp_path / "new", size)
    assert not (tmp_path / "new").exists()


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^_extra_state cannot be saved: expected a tensor, got dict$"):
        qg.save_model(Extra(), tmp_path)


def test_sparse_tensor_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"^mask cannot be saved: it is a torch.sparse_coo tensor of torch.float32$"):
        qg.save_model(model, tmp_path)


def test_meta_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^weight cannot be saved: it is on the meta device and has no values$"):
        qg.save_model(nn.Linear(2, 2, device="meta"), tmp_path)
    qg.save_model(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"^weight cannot be loaded: it is not a parameter or buffer with memory"):
        qg.load_model(nn.Linear(2, 2, device="meta"), tmp_path)


def widened(model: nn.Module) -> None:
    model.head = nn.Linear(24, 41, bias=False)


def counted(model: nn.Module) -> None:
    model.table = torch.zeros(3, 2, dtype=torch.int64)


def untied(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(torch.zeros(40, 24))


MISFITS: list[tuple[str, Callable[[nn.Module], object], Callable[[nn.Module], object], str]] = [
    ("missing", lambda m: delattr(m, "norm"), lambda m: None, r"^the checkpoint lacks norm\.weight$"),
    (
        "missing codes",
        lambda m: delattr(m.mlp[0], "qweight"),
        lambda m: None,
        r"^the checkpoint lacks mlp\.0\.qweight$",
    ),
    (
        *("unexpected", lambda m: None, lambda m: delattr(m, "norm")),
        r"^the checkpoint has entries that the model has not: norm\.weight, norm\.bias, norm\.running_mean and 2 more$",
    ),
    ("shape", lambda m: None, widened, r"^head\.weight must be \[41, 24\], as in the model, and is \[40, 24\]$"),
    ("dtype", lambda m: None, counted, r"^table must be torch\.int64, as in the model, and is torch\.float32$"),
    ("untied", untied, lambda m: None, r"^embed\.weight and head\.weight are one tensor in the model and two in the "),
    (
        *("codes' shape", lambda m: setattr(m, "attn", qg.QGaLoreLinear(8, 24, rank=2)), lambda m: None),
        r"^attn\.qweight must be torch\.uint8 \[24, 24\], and is torch\.uint8 \[24, 8\]$",
    ),
    (
        *("group size", lambda m: setattr(m, "attn", qg.QGaLoreLinear(24, 24, rank=2, group_size=16)), lambda m: None),
        r"^attn\.group_size must be 256, as in the model, and is 16$",
    ),
    (
        *("floats' shape", lambda m: setattr(m, "attn", nn.Linear(8, 24)), lambda m: None),
        r"^attn\.weight must be \[24, 24\] and a float, and is \[24, 8\] and torch\.float32$",
    ),
    (
        *("scales", lambda m: setattr(m.attn, "scales", m.attn.scales[:1].clone()), lambda m: None),
        r"^attn\.scales must be torch\.float32 \[3\], and is torch\.float32 \[1\]$",
    ),
    (
        *("no zeros", lambda m: m.attn._buffers.pop("zeros"), lambda m: None),
        r"^the checkpoint lacks attn\.zeros$",
    ),
    (
        *("infinite", lambda m: setattr(m, "attn", infinite()), lambda m: None),
        r"^attn\.weight of the checkpoint is not finite: it cannot be quantised$",
    ),
]


@pytest.mark.parametrize("kind", ["expanded", "inference_mode"])
def test_model_that_cannot_be_written_is_unchanged(kind: str, tmp_path: Path) -> None:
    """These came up as errors of torch's when the entries before them had been written."""
    qg.save_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), tmp_path)
    with torch.inference_mode(kind == "inference_mode"):
        last = nn.Linear(3, 3)
    if kind == "expanded":
        last.weight = nn.Parameter(torch.zeros(3, 1).expand(3, 3))
    model = nn.Sequential(nn.Linear(4, 3), last)
    before = frozen_copy(model)
    with pytest.raises(ValueError, match=rf"^1\.weight cannot be loaded: it .*{kind}"):
        qg.load_model(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def infinite() -> nn.Linear:
    layer = nn.Linear(24, 24)
    with torch.no_grad():
        layer.weight[3, 3] = torch.inf
    return layer


@pytest.mark.parametrize(("of_saved", "of_loaded", "message"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS])
def test_checkpoint_that_does_not_fit_changes_nothing(
    of_saved: Callable[[nn.Module], object], of_loaded: Callable[[nn.Module], object], message: str, tmp_path: Path
) -> None:
    saved, loaded = make("int8", 1), make("int8", 2)
    of_saved(saved)
    of_loaded(loaded)
    qg.save_model(saved, tmp_path)
    before = frozen_copy(loaded)
    with pytest.raises(ValueError, match=message):
        qg.load_model(loaded, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
