"""export_compressed, read by the compressed-tensors library and by transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import q_galore_torch as qg
from q_galore_torch.integrations.compressed import export_compressed
from q_galore_torch.integrations.pretrained import from_pretrained

transformers = pytest.importorskip("transformers", minversion="5")
compressed_tensors = pytest.importorskip("compressed_tensors")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Rows of 352 = 11 * 32 weights and of 128, so that groups of 256 run over the ends of rows.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
TOKENS = torch.arange(1, 41).reshape(2, 20)


def llama(dtype: torch.dtype = torch.float32, target_modules: Any = "all-linear", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {key: changes.pop(key) for key in ("group_size", "grad_mode", "weight_bits") if key in changes}
    config = transformers.LlamaConfig(**{**SHAPE, **changes}, attention_bias=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # .to(dtype) would round its tables
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return qg.prepare_model(model, rank=4, target_modules=target_modules, **options).eval()


def written(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found, json.loads((folder / "config.json").read_text())


def decoded(found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The INT8 weights as the compressed-tensors library decodes them, from the config's own words."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(config["quantization_config"])
    assert scheme.quant_method == "compressed-tensors"
    weights = {}
    for group in scheme.config_groups.values():
        for name in group.targets:
            own = {key.removeprefix(f"{name}."): t for key, t in found.items() if key.startswith(f"{name}.weight")}
            reader = BaseCompressor.get_value_from_registry(CompressionFormat(group.format).value)
            weights[name] = reader.decompress(own, group)["weight"]
    return weights


@pytest.mark.parametrize("options", [{}, {"grad_mode": "full"}, {"group_size": 96}, {"group_size": 64}], ids=str)
@pytest.mark.parametrize("group_size", [128, 64, 4096])
def test_library_decodes_the_weights_bit_for_bit(options: dict[str, Any], group_size: int, tmp_path: Path) -> None:
    model = llama(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_compressed(model, tmp_path, group_size)
    weights = decoded(*written(tmp_path))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qg.QGaLoreLinear)}
    assert weights.keys() == layers.keys() and len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(weights[name], layer.dequantize()), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_the_exported_models_logits(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    export_compressed(model, tmp_path, max_shard_size="100KB")
    found, config = written(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and ("lm_head.weight" in found) != tied
    assert config["architectures"] == ["LlamaForCausalLM"] and (tmp_path / "generation_config.json").exists()
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, qg.export_model(model)(TOKENS).logits)


def test_bfloat16_reader_rounds_the_scales(tmp_path: Path) -> None:
    """Scale, product and the reference are rounded once each, to 8 bits."""
    model = llama(torch.bfloat16)
    export_compressed(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        loaded(TOKENS)
    expected, modules = qg.export_model(model), dict(loaded.named_modules())
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear):
            mine, reference = module.weight.float(), modules[name].weight.float()
            assert torch.all((mine - reference).abs() <= 3 * 2.0**-8 * 1.01 * mine.abs()), name
    in_float32 = llama()
    in_float32.load_state_dict(model.state_dict())
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(exact(TOKENS).logits, qg.export_model(in_float32)(TOKENS).logits)


def test_config_says_the_models_dtype(tmp_path: Path) -> None:
    """A model of bfloat16 that was cast to train: its readers rounded the scales and what stayed float."""
    model = llama(torch.bfloat16).float()
    torch.nn.init.uniform_(model.model.norm.weight)
    assert model.config.dtype == torch.bfloat16
    export_compressed(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and model.config.dtype == torch.bfloat16
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_layer_of_narrow_groups_is_written_as_floats(tmp_path: Path) -> None:
    """Rows of 344 = 8 * 43 weights have groups of 8 at most."""
    model = llama(intermediate_size=344)
    export_compressed(model, tmp_path)
    found, config = written(tmp_path)
    ignored = config["quantization_config"]["ignore"]
    assert ignored == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    down = model.model.layers[0].mlp.down_proj
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], down.dequantize())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, qg.export_model(model)(TOKENS).logits)


def test_groups_of_one_sign_are_encoded_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Within half a step of max|w| / 255; all other groups stay as they are."""
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.dequantize()
    flat = weight.view(-1, 256)
    flat[0] = flat[0].abs() + 1
    flat[3] = -flat[3].abs() - 0.5
    flat[5] = -7.25
    flat[7] = 1e-3
    layer.set_weight(weight)
    assert int(((layer.zeros < 0) | (layer.zeros > 255)).sum()) == 4
    with caplog.at_level(logging.WARNING, "q_galore_torch"):
        export_compressed(model, tmp_path)
    weights = decoded(*written(tmp_path))
    error = (weights["model.layers.0.self_attn.q_proj"] - layer.dequantize()).abs().view(-1, 128)
    largest = layer.dequantize().abs().view(-1, 128).amax(1)
    changed = torch.tensor([0, 1, 6, 7, 10, 11, 14, 15])
    assert torch.all(error[changed].amax(1) <= largest[changed] / 510 * (1 + 1e-5)) and float(error.max()) > 0
    rest = torch.ones(len(error), dtype=torch.bool)
    rest[changed] = False
    assert not error[rest].any()
    for name in set(weights) - {"model.layers.0.self_attn.q_proj"}:
        assert torch.equal(weights[name], model.get_submodule(name).dequantize())
    (record,) = caplog.records
    assert record.getMessage().startswith("8 of ") and f"at most {float(error.max()):.3g}" in record.getMessage()


def test_zero_points_at_the_ends_of_the_range_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.zeros[0], layer.zeros[1] = 0, 255
    export_compressed(model, tmp_path)
    assert torch.equal(decoded(*written(tmp_path))["model.layers.0.self_attn.q_proj"], layer.dequantize())
    assert not caplog.records


def test_shared_layers_are_written_under_each_name(tmp_path: Path) -> None:
    """transformers ties what its config says, and nothing else."""
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    export_compressed(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():  # both layers of the one model would take the same place in a cache
        ours, theirs = (m(TOKENS, use_cache=False).logits for m in (qg.export_model(model), loaded))
    assert torch.equal(ours, theirs)


def test_folder_is_written_again_and_others_are_refused(tmp_path: Path) -> None:
    model = llama()
    export_compressed(model, tmp_path)
    first = {file.name for file in tmp_path.iterdir()}
    export_compressed(model, tmp_path)
    assert len(first) == len(list(tmp_path.iterdir())) == 4
    with pytest.raises(FileExistsError, match="was not written by this function"):
        qg.save_model(model, tmp_path)
    with pytest.raises(ValueError, match="was not written by save_model"):
        qg.load_model(model, tmp_path)
    with pytest.raises(ValueError, match="is quantised already: a model of floats is needed$"):
        from_pretrained(tmp_path, rank=4)


@pytest.mark.parametrize("group_size", [0, 31, 128.0, True, None])
def test_group_size_out_of_range_is_refused(group_size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^group_size must be an integer >= 32, got "):
        export_compressed(llama(), tmp_path / "new", group_size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"weight_bits": None}, {"group_size": 16}], ids=str)
def test_model_without_int8_layers_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^the model has no INT8 layer with groups of at least 32 weights along its rows$"
    ):
        export_compressed(llama(**options), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refused_generation_config_leaves_the_old_export(tmp_path: Path) -> None:
    """config.json had been replaced by then, and spoke of other groups than the weights."""
    model = llama()
    export_compressed(model, tmp_path, group_size=32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="`do_sample` is not set to `True`"):
        export_compressed(model, tmp_path, group_size=64)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_model_without_a_config_is_refused(tmp_path: Path) -> None:
    model = qg.prepare_model(nn.Sequential(nn.Linear(64, 64)), 4, ["0"])
    with pytest.raises(ValueError, match=r"^the model must have a config of transformers, got a Sequential$"):
        export_compressed(model, tmp_path / "new")
