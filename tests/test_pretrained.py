"""integrations.pretrained.from_pretrained against transformers' own, followed by prepare_model."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import q_galore_torch as qg
from q_galore_torch import shards
from q_galore_torch.integrations.pretrained import from_pretrained
from test_prepare_meta import FloatBytes

transformers = pytest.importorskip("transformers", minversion="5")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
DECODER = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
ENCODER = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 40}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama tied": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**DECODER, "head_dim": 8}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", ENCODER),
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16}),
}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32, size: str = "20KB", **changes: Any) -> nn.Module:
    config, model_class, values = MODELS[kind]
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(getattr(transformers, config)(**{**values, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=size)
    return model


def theirs(folder: Path, auto_class: Any, dtype: Any = "auto", config: Any = None, **options: Any) -> nn.Module:
    more = {} if config is None else {"config": config}
    torch.manual_seed(5)
    return qg.prepare_model(auto_class.from_pretrained(folder, dtype=dtype, **more), **options)


def ours(folder: Path, auto_class: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(5)
    return from_pretrained(folder, auto_class=auto_class, **options)


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    """Types, every parameter and buffer, saved or not, what is tied, and the logits."""
    assert [(n, type(m)) for n, m in got.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(got, kind)(), getattr(expected, kind)(), strict=True)
        for (name, mine), (other, reference) in pairs:
            assert name == other and mine.dtype == reference.dtype and mine.requires_grad == reference.requires_grad
            with torch.no_grad():
                assert torch.equal(mine, reference), name
    assert got.training == expected.training and got.dtype == expected.dtype
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": tokens}
    if got.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        assert torch.equal(got(**inputs)[0], expected(**inputs)[0])


@pytest.mark.parametrize("kind", MODELS)
def test_model_equals_transformers_own(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    auto_class = getattr(transformers, MODELS[kind][1])
    options: dict[str, Any] = {"rank": 4, "target_modules": "all-linear"}
    assert_same(ours(tmp_path, **options), theirs(tmp_path, auto_class, **options))


@pytest.mark.parametrize("options", [{"weight_bits": None}, {"grad_mode": "full"}, {"group_size": 64}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options_are_those_of_prepare_model(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    saved("llama", tmp_path, torch.bfloat16)
    options = {**options, "rank": 4, "dtype": dtype}
    assert_same(ours(tmp_path, **options), theirs(tmp_path, transformers.AutoModelForCausalLM, **options))


def test_float_logits_are_the_unprepared_models(tmp_path: Path) -> None:
    original = saved("llama tied", tmp_path).eval()
    model = ours(tmp_path, rank=4, weight_bits=None)
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_that_stay_float32_do(dtype: torch.dtype, tmp_path: Path) -> None:
    """T5 keeps some of its layers in float32 where the rest is float16."""
    saved("t5", tmp_path)
    options: dict[str, Any] = {"rank": 4, "target_modules": "all-linear", "dtype": dtype}
    got = ours(tmp_path, **options)
    assert_same(got, theirs(tmp_path, transformers.T5ForConditionalGeneration, **options))
    kept = got.encoder.block[0].layer[1].DenseReluDense.wo.compute_dtype
    assert (kept == torch.float32) == (dtype == torch.float16)


@pytest.mark.parametrize("kind", ["roberta", "bert", "distilbert"])
def test_missing_head_is_initialised_by_the_models_rule(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A masked language model's files in a classifier: prefix, head, pooler; told of in one line each."""
    saved(kind, tmp_path)
    auto_class = transformers.AutoModelForSequenceClassification
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_labels=3)
    options: dict[str, Any] = {"rank": 4, "target_modules": ["attention", "ffn"], "config": config}
    with caplog.at_level(logging.WARNING, "q_galore_torch"):
        got = ours(tmp_path, auto_class, **options)
    assert got.config.num_labels == 3
    assert_same(got, theirs(tmp_path, auto_class, **options))
    (lacks, has) = [record.getMessage() for record in caplog.records]
    assert " lacks " in lacks and "newly initialised" in lacks and " more" in lacks
    assert "has entries that the model has no place for: " in has


def test_model_of_the_base_is_read_into_the_base_class(tmp_path: Path) -> None:
    """The prefix that the files have and the model has not."""
    saved("roberta", tmp_path)
    options: dict[str, Any] = {"rank": 4, "target_modules": ["attention"]}
    assert_same(ours(tmp_path, "RobertaModel", **options), theirs(tmp_path, transformers.AutoModel, **options))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite the one file of a folder; safetensors refuses entries that share memory."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_old_names_of_norms_are_read(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {name.replace(new, old[new]) if (new := ".".join(name.split(".")[-2:])) in old else name: tensor
                for name, tensor in tensors.items()}  # fmt: skip

    saved("bert", tmp_path, size="1GB")
    expected = ours(tmp_path, rank=4, target_modules=["attention"])
    rewrite(tmp_path, rename)
    assert any(name.endswith("LayerNorm.gamma") for name in load_file(tmp_path / "model.safetensors"))
    assert_same(ours(tmp_path, rank=4, target_modules=["attention"]), expected)


def test_half_of_a_module_may_be_missing(tmp_path: Path) -> None:
    """The rule that gives values to a bias leaves alone the weight that was read."""
    lost = ["bert.encoder.layer.0.attention.self.query.bias", "bert.embeddings.LayerNorm.bias"]
    saved("bert", tmp_path, size="1GB")
    rewrite(tmp_path, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items() if name not in lost})
    options: dict[str, Any] = {"rank": 4, "target_modules": ["attention"]}
    assert_same(ours(tmp_path, **options), theirs(tmp_path, transformers.BertForMaskedLM, **options))


def test_old_tables_are_passed_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved("llama", tmp_path, size="1GB")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tmp_path, lambda tensors: {**tensors, **table})
    got = ours(tmp_path, rank=4)
    assert not caplog.records and not torch.equal(got.model.rotary_emb.inv_freq, torch.ones(4))


def test_tied_weight_is_found_under_its_other_name(tmp_path: Path) -> None:
    """The files have the head and not the embedding, or both and equal."""
    saved("llama tied", tmp_path, size="1GB")
    expected = ours(tmp_path, rank=4)
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):

        def rename(tensors: dict[str, Any], names: list[str] = names) -> dict[str, Any]:
            tied = [tensors.pop(n) for n in ("lm_head.weight", "model.embed_tokens.weight") if n in tensors]
            return {**tensors, **dict.fromkeys(names, tied[0])}

        rewrite(tmp_path, rename)
        assert_same(ours(tmp_path, rank=4), expected)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    saved("llama tied", tmp_path, size="1GB")
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": torch.zeros(100, 32)})
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight and lm_head\.weight are tied in the model and differ in"
    ):
        ours(tmp_path, rank=4)


def test_dtype_is_that_of_the_files_where_the_config_has_none(tmp_path: Path) -> None:
    saved("llama", tmp_path, torch.bfloat16)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert ours(tmp_path, rank=4).dtype == torch.bfloat16


def test_generation_config_is_read(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    model.generation_config.max_new_tokens = 17
    model.generation_config.save_pretrained(tmp_path)
    assert ours(tmp_path, rank=4).generation_config.max_new_tokens == 17


def test_model_trains_saves_and_exports(tmp_path: Path) -> None:
    saved("llama tied", tmp_path)
    model = ours(tmp_path, rank=4).train()
    optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model, update_proj_gap=2), lr=0.01)
    tokens = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    qg.export_model(model).save_pretrained(tmp_path / "exported")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(again(tokens).logits, qg.export_model(model).eval()(tokens).logits)
    qg.save_model(model, tmp_path / "codes")
    qg.load_model(model, tmp_path / "codes")
    with pytest.raises(ValueError, match="was written by save_model: read it with load_model$"):
        transformers.AutoConfig.for_model("llama").save_pretrained(tmp_path / "codes")
        ours(tmp_path / "codes", rank=4)


@pytest.mark.usefixtures("own_zeros")
def test_floats_of_one_layer_exist_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above what stays float: the largest layer and what is read of it, whatever the number of layers."""
    above = []
    for layers in (2, 6):
        saved("llama", tmp_path / str(layers), num_hidden_layers=layers)
        monkeypatch.setattr(shards, "READ_AT_ONCE", 1)
        with FloatBytes() as floats:
            model = ours(tmp_path / str(layers), rank=4)
        kept = sum(p.nbytes for n, p in model.named_parameters() if not n.endswith("coordinates"))
        scales = sum(b.nbytes for b in model.buffers() if b.is_floating_point())
        above.append(floats.peak - kept - scales)
    assert above[1] <= above[0] + 1000 < 3 * 4 * 32 * 100, above


@pytest.mark.parametrize("limit", [1, 300, 2**26])
def test_large_tensors_are_copied_some_rows_at_a_time(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.randn(37, 5), "b": torch.randn(300), "c": torch.tensor(3.0), "d": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "x")
    monkeypatch.setattr(shards, "READ_AT_ONCE", limit)
    reader = shards.ShardReader(tmp_path, dict.fromkeys(tensors, "x"))
    for name, tensor in tensors.items():
        target = torch.full_like(tensor, torch.nan)
        reader.copy_to(name, target)
        assert torch.equal(target, tensor)


# ------------------------------------------------------------ what is refused


def test_pickles_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"holds pytorch_model\.bin, a pickle, and no safetensors: rewrite it with"
    ):
        ours(tmp_path, rank=4)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json$"
    ):
        ours(tmp_path, rank=4)


def test_name_of_the_hub_is_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"^some/model is not a folder \(a model of the hub is fetched with"):
        ours(Path("some/model"), rank=4)


def test_merged_experts_are_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is stored in a form that transformers converts to .*: use its own from_pretr"
    ):
        ours(tmp_path, rank=4)


def test_other_shape_is_refused(tmp_path: Path) -> None:
    saved("roberta", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, vocab_size=101)
    with pytest.raises(
        ValueError, match=r"word_embeddings\.weight must be \[101, 32\], as in the model, and is \[100, 32\]"
    ):
        ours(tmp_path, rank=4, target_modules=["attention"], config=config)


def test_quantised_model_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="is quantised already: a model of floats is needed$"):
        ours(tmp_path, rank=4, config=config)


def test_prepared_models_files_are_refused(tmp_path: Path) -> None:
    """Its linear layers were newly initialised, with a warning."""
    saved("llama", tmp_path / "float")
    ours(tmp_path / "float", rank=4).save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="int8 was saved from a prepared model: prepare a model and give these files"):
        ours(tmp_path / "int8", rank=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"auto_class": "NoSuchModel"},
            r"^auto_class must be a model class of transformers or its name, got 'NoSuchModel'$",
        ),
        ({"auto_class": nn.Linear}, r"^auto_class must be a model class of transformers or its name, got <class"),
        ({"dtype": "int8"}, r"^dtype must be 'auto' or a float dtype of torch, got 'int8'$"),
        ({"dtype": "no"}, r"^dtype must be 'auto' or a float dtype of torch, got 'no'$"),
        ({"config": "llama"}, r"^config must be one of transformers, got 'llama'$"),
        ({"initialize": print}, r"^initialize is not an option here: the values come from the files$"),
        ({"target_modules": ["nothing"]}, r"^target_modules=\['nothing'\] matches no nn\.Linear"),
        ({"rank": 0}, r"^rank must be an integer >= 1, got 0$"),
    ],
    ids=str,
)
def test_wrong_option_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    with pytest.raises(ValueError, match=message):
        ours(tmp_path, **{"rank": 4, **options})


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_damaged_file_is_named(size: str, tmp_path: Path) -> None:
    saved("llama", tmp_path, size=size)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or truncated"):
        ours(tmp_path, rank=4)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.name} is missing from the checkpoint$|holds neither"):
        ours(tmp_path, rank=4)


def test_old_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(ImportError, match=r"^from_pretrained needs transformers 5 or later, found 4\.57\.1$"):
        ours(tmp_path, rank=4)


# ------------------------------------------------------------ the page and the figures


def test_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/checkpoints.md, its blocks one after the other."""
    pytest.importorskip("compressed_tensors")
    saved("llama", tmp_path / "llama", hidden_size=64, intermediate_size=96)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    names: dict[str, Any] = {}
    for lines in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(lines, names)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(names["int8"](tokens).logits, qg.export_model(names["model"])(tokens).logits)


def test_peak_is_measured_for_the_same_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark at its smallest, with its processes run in this one, where the peak says nothing."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    convert_memory = importlib.import_module("convert_memory")
    monkeypatch.setattr(convert_memory, "child", lambda *words: convert_memory.main(list(words)))
    record = convert_memory.main(["--hidden", "96", "--layers", "1", "--shard", "1MB", "--no-save"])
    sizes = {row["model_bytes"] for row in record["contestants"].values()}
    assert len(sizes) == 1 and sizes.pop() < record["float_bytes"] and "M weights, " in capsys.readouterr().out


def test_committed_peak_is_below_the_whole_models() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "convert_memory.json").read_text())
    (ours, whole) = record["contestants"].values()
    assert ours["model_bytes"] == whole["model_bytes"]
    assert ours["peak"] < 0.8 * record["float_bytes"] and whole["peak"] > 1.2 * record["float_bytes"]
