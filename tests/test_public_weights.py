"""Files of saving_model_weight, the public code's and ours, into prepared and ordinary models."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q_galore_torch as qg
from public_files import public_decoded, public_model
from q_galore_torch.utils.quantization import prepare_model_for_int8_training
from q_galore_torch.utils.setup import load_model_weight, saving_model_weight
from q_galore_torch.utils.simulate_quantization import prepare_model_for_int8_training_simulation

NAMES = ["1", "3"]


def float_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 32, bias=False))


def prepared(grad_mode: str = "low_rank", weight_bits: int | None = 8, group_size: int = 256) -> nn.Module:
    options: dict[str, Any] = dict(weight_bits=weight_bits, group_size=group_size, grad_mode=grad_mode)
    return qg.prepare_model(float_model(1), rank=8, target_modules=NAMES, **options)


KINDS = {
    "low_rank": lambda: prepared(),
    "full": lambda: prepared("full"),
    "float weight": lambda: prepared(weight_bits=None),
    "ordinary": lambda: float_model(1),
}


def weight_of(layer: nn.Module) -> Tensor:
    return layer.dequantize() if isinstance(layer, qg.QGaLoreLinear) else layer.weight.detach()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def public_file(tmp_path: Path) -> Path:
    torch.save(public_model(float_model(), NAMES, dtype=torch.bfloat16), tmp_path / "public.bin")
    return tmp_path / "public.bin"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_load_model_weight_decodes_a_public_file_exactly(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    entries = public_model(float_model(), NAMES, dtype=dtype)
    torch.save(entries, tmp_path / "public.bin")
    model = KINDS[kind]()
    assert load_model_weight(model, tmp_path / "public.bin") is model
    for name in NAMES:
        expected = public_decoded(entries, name).float()  # one rounding, as s (q - z) has no more in float32
        assert torch.equal(weight_of(model.get_submodule(name)), expected)
    for key in ("0.weight", "1.bias", "2.weight"):
        assert torch.equal(model.state_dict()[key], entries[key])


@pytest.mark.parametrize("kind", ["low_rank", "full", "float weight"])
def test_load_state_dict_reads_public_entries(kind: str) -> None:
    entries = public_model(float_model(), NAMES)
    model = KINDS[kind]()
    model.load_state_dict(entries)
    for name in NAMES:
        assert torch.equal(weight_of(model.get_submodule(name)), public_decoded(entries, name).float())


def test_load_model_weight_trains_on(public_file: Path) -> None:
    model = load_model_weight(prepared(), public_file)
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=5), lr=1e-2)
    tokens, target = torch.arange(20), torch.linspace(-1, 1, 32).expand(20, 32)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(tokens), target)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_saving_model_weight_comes_back_in_every_kind_of_model(source: str, target: str, tmp_path: Path) -> None:
    load_model_weight(model := KINDS[source](), _public(tmp_path))
    saving_model_weight(model, tmp_path / "ours.bin")
    assert isinstance(torch.load(tmp_path / "ours.bin", weights_only=True), dict)
    loaded = load_model_weight(KINDS[target](), tmp_path / "ours.bin")
    for name in NAMES:
        wanted, got = weight_of(model.get_submodule(name)), weight_of(loaded.get_submodule(name))
        if source in ("ordinary", "float weight") and target in ("low_rank", "full"):  # floats, encoded here
            step = wanted.abs().amax() * 2 / 247
            assert (got - wanted).abs().amax() <= step
        else:
            assert torch.equal(got, wanted)


def _public(folder: Path) -> Path:
    torch.save(public_model(float_model(), NAMES), folder / "public.bin")
    return folder / "public.bin"


def test_saving_model_weight_keeps_the_old_file_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.bin"
    saving_model_weight(float_model(), path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        saving_model_weight(float_model(3), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.bin"]


FAULTS: dict[str, tuple[Any, str]] = {
    "missing scales": (
        lambda e: e.pop("1.scales"),
        r"1\.weight holds uint8.*without scales.*saving_model_weight",
    ),
    "missing layer": (lambda e: [e.pop(k) for k in list(e) if k.startswith("1.")], r"the file lacks 1\.bias, 1\.group"),
    "extra layer": (lambda e: e.update({"7.weight": torch.ones(2)}), r"the file alone has 7\.weight"),
    "other shape": (lambda e: e.update({"2.weight": torch.ones(7)}), r"2\.weight must have shape \[96\], got \[7\]"),
    "other codes": (
        lambda e: e.update({"1.weight": e["1.weight"].detach().reshape(64, 96)}),
        r"1\.qweight must have shape \[96, 64\], got \[64, 96\]",
    ),
    "scales": (lambda e: e.update({"1.scales": e["1.scales"][:-1]}), r"1\.scales must be a float tensor.*24 groups"),
    "zero scale": (lambda e: e["1.scales"].zero_(), r"1\.scales must be finite and > 0"),
    "fraction": (lambda e: e["1.zeros"].add_(0.5), r"1\.zeros must be integers"),
    "group size": (lambda e: e.update({"1.group_size": 0}), r"group_size of 1 must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_load_model_weight_refuses_what_does_not_fit_and_changes_nothing(fault: str, tmp_path: Path) -> None:
    damage, message = FAULTS[fault]
    entries = copy.deepcopy(public_model(float_model(), NAMES))
    damage(entries)
    torch.save(entries, tmp_path / "public.bin")
    model = prepared()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        load_model_weight(model, tmp_path / "public.bin")
    assert same(bits(model), before)


@pytest.mark.parametrize("ours", [False, True])
def test_load_model_weight_refuses_another_group_size(ours: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    if ours:
        saving_model_weight(prepared(group_size=128), path)
    else:
        torch.save(public_model(float_model(), NAMES, group_size=128), path)
    model = prepared()
    before = bits(model)
    with pytest.raises(ValueError, match=r"1\.group_size must be 256, as in this layer, got 128"):
        load_model_weight(model, path)
    assert same(bits(model), before)


def test_load_state_dict_names_the_missing_scales_of_public_codes() -> None:
    entries = public_model(float_model(), NAMES)
    del entries["3.zeros"]
    with pytest.raises(RuntimeError, match=r"3\.weight holds uint8 codes.*without zeros"):
        prepared().load_state_dict(entries)


def test_load_model_weight_refuses_a_file_that_is_cut_off(public_file: Path) -> None:
    public_file.write_bytes(public_file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is cut off"):
        load_model_weight(prepared(), public_file)


def test_load_model_weight_refuses_objects(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "objects.bin")
    with pytest.raises(ValueError, match="objects other than tensors"):
        load_model_weight(prepared(), tmp_path / "objects.bin")


def test_load_model_weight_refuses_a_list(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="must hold a dict, got list"):
        load_model_weight(prepared(), tmp_path / "list.bin")


def test_load_model_weight_refuses_codes_of_another_dtype(tmp_path: Path) -> None:
    entries = prepared().state_dict()
    entries["1.zeros"] = entries["1.zeros"].float()
    torch.save(entries, tmp_path / "ours.bin")
    with pytest.raises(ValueError, match=r"1\.zeros must be a torch\.int16 tensor, got torch\.float32"):
        load_model_weight(float_model(), tmp_path / "ours.bin")


def test_load_model_weight_leaves_out_the_rotary_frequencies_of_older_transformers(tmp_path: Path) -> None:
    entries = public_model(float_model(), NAMES)
    entries["layers.0.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(entries, tmp_path / "public.bin")
    load_model_weight(prepared(), tmp_path / "public.bin")


@pytest.mark.parametrize("load", ["load_model_weight", "load_state_dict"])
def test_load_model_weight_takes_over_how_the_updates_are_rounded(load: str, tmp_path: Path) -> None:
    entries = public_model(float_model(), NAMES)
    entries["3.stochastic_round"] = False
    torch.save(entries, tmp_path / "public.bin")
    model = prepared("full")
    if load == "load_model_weight":
        load_model_weight(model, tmp_path / "public.bin")
    else:
        model.load_state_dict(entries)
    assert [model.get_submodule(name).leaf.stochastic_round for name in NAMES] == [True, False]


def test_load_model_weight_goes_with_the_public_codes_own_preparation(public_file: Path, tmp_path: Path) -> None:
    args = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
    model = prepare_model_for_int8_training(float_model(2), args, NAMES)
    load_model_weight(model, public_file)
    entries = torch.load(public_file, weights_only=True)
    for name in NAMES:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.scales, entries[f"{name}.scales"].float().flatten())
        assert torch.equal(weight_of(model.get_submodule(name)), public_decoded(entries, name).float())
    saving_model_weight(model, tmp_path / "ours.bin")
    again = load_model_weight(prepare_model_for_int8_training(float_model(4), args, NAMES), tmp_path / "ours.bin")
    assert same(bits(again), bits(model))


# ------------------------------------------------------------ simulated layers


def simulated(seed: int = 1, group_size: int = 256) -> nn.Module:
    args = Namespace(weight_bits=8, weight_group_size=group_size, stochastic_round=True)
    return prepare_model_for_int8_training_simulation(float_model(seed), args, NAMES)


@pytest.mark.parametrize("writer", ["public code", "ours"])
def test_load_model_weight_gives_simulated_layers_the_stored_codes(writer: str, tmp_path: Path) -> None:
    """With their own scales and zero points, which another range of the same weights would not have."""
    entries = public_model(float_model(), NAMES)
    for name in NAMES:
        entries[f"{name}.weight"].data.clamp_(60, 200)
    entries["3.stochastic_round"] = False
    torch.save(entries, tmp_path / "file.bin")
    real = load_model_weight(prepared("full"), tmp_path / "file.bin")
    if writer == "ours":
        saving_model_weight(real, tmp_path / "file.bin")
    model = load_model_weight(simulated(), tmp_path / "file.bin")
    for name in NAMES:
        layer, wanted = model.get_submodule(name), real.get_submodule(name)
        parts = zip(layer.read(), (wanted.qweight, wanted.scales, wanted.zeros), strict=True)
        assert all(torch.equal(got, part) for got, part in parts)
        assert torch.equal(layer.weight, wanted.dequantize())
    assert [model.get_submodule(name).stochastic_round for name in NAMES] == [True, writer == "ours"]


def test_load_model_weight_gives_simulated_layers_a_grid_for_floats(tmp_path: Path) -> None:
    saving_model_weight(float_model(), tmp_path / "float.bin")  # as the public code writes simulated models
    model, wanted = load_model_weight(simulated(), tmp_path / "float.bin"), simulated(0)
    assert same(bits(model), bits(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_load_model_weight_takes_simulated_files(kind: str, tmp_path: Path) -> None:
    source = simulated(0)
    saving_model_weight(source, tmp_path / "simulated.bin")
    model = load_model_weight(KINDS[kind](), tmp_path / "simulated.bin")
    for name in NAMES:
        assert torch.allclose(weight_of(model.get_submodule(name)), source.get_submodule(name).weight, atol=1e-6)


@pytest.mark.parametrize("make", [simulated, prepared])
def test_load_model_weight_names_a_weight_that_is_not_finite(make: Any, tmp_path: Path) -> None:
    source = float_model()
    source[3].weight.data[0, 0] = float("nan")
    saving_model_weight(source, tmp_path / "float.bin")
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=r"does not fit the model: 3\.weight must be finite to be quantised"):
        load_model_weight(model, tmp_path / "float.bin")
    assert same(bits(model), before)


def test_load_model_weight_refuses_codes_of_another_group_size_for_simulated_layers(public_file: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.group_size must be 128, as in this layer, got 256"):
        load_model_weight(simulated(group_size=128), public_file)
