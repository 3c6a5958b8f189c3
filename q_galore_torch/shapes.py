"""The shapes of LLaMA-like models: by name, from a config, and as a model of shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

META = torch.device("meta")


@dataclass(frozen=True)
class LlamaShape:
    """The shape of a LLaMA-like decoder, by the names of Hugging Face's configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False

    @property
    def head_size(self) -> int:
        """Of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's seven matrices, by the end of their names."""
        hidden, inner, keys = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_size
        return {
            **{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)},
            **{"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)},
            **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
        }


def _known(hidden: int, inner: int, layers: int, heads: int) -> LlamaShape:
    return LlamaShape(32000, hidden, inner, layers, heads, heads)


# The sizes of the GaLore and Q-GaLore papers.
KNOWN = {
    "60m": _known(512, 1376, 8, 8),
    "130m": _known(768, 2048, 12, 12),
    "350m": _known(1024, 2736, 24, 16),
    "1b": _known(2048, 5461, 24, 32),
    "7b": _known(4096, 11008, 32, 32),
}
REQUIRED = [field.name for field in fields(LlamaShape)][:5]
# What a config may say besides, without the matrices being others.
_PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
_MODEL_TYPES = ("llama", "mistral")


def read_shape(config: str | Path | Mapping[str, Any]) -> LlamaShape:
    """The shape that a name, a JSON file or a dict describes.

    Args:
        config: ``"60m"`` to ``"7b"`` (also ``"llama_7b"``), the path of a Hugging Face style JSON file, or its content.

    Raises:
        ValueError: the name or file is unknown, or the config is not that of a LLaMA-like model.
    """
    if isinstance(config, (str, Path)):
        name = str(config).lower().removeprefix("llama").lstrip("_-")
        if name in KNOWN:
            return KNOWN[name]
        config, source = _read_json(config), str(config)
    else:
        source = "the config"
    kind = config.get("model_type", "llama")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type in {source} must be one of {listed(_MODEL_TYPES)}, got {kind!r}: give the model")
    for key, only in _PLAIN.items():
        if config.get(key, only) != only:
            raise ValueError(f"{key} in {source} must be {only!r}, got {config[key]!r}: give the model itself")
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    values = {key: config[key] for key in REQUIRED}
    values["num_key_value_heads"] = config.get("num_key_value_heads") or values["num_attention_heads"]
    for key, value in values.items():
        check_count(f"{key} in {source}", value)
    if values["hidden_size"] % values["num_attention_heads"]:
        raise ValueError(
            f"hidden_size in {source} must be a multiple of num_attention_heads={values['num_attention_heads']}, "
            f"got {values['hidden_size']}"
        )
    shape = LlamaShape(**values, tie_word_embeddings=bool(config.get("tie_word_embeddings", False)))
    if config.get("head_dim") not in (None, shape.head_size):
        raise ValueError(
            f"head_dim in {source} must be {shape.head_size}, got {config['head_dim']!r}: give the model itself"
        )
    return shape


def _read_json(path: str | Path) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"config must be one of {listed(tuple(KNOWN))} or a JSON file, got {str(path)!r} ({error.strerror})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, got {type(content).__name__}")
    return content


def listed(values: tuple[Any, ...]) -> str:
    """Values for a message."""
    return ", ".join(repr(value) for value in values)


def check_count(name: str, value: Any) -> None:
    """Raise ValueError where a value is not a count."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def skeleton(shape: LlamaShape, dtype: torch.dtype) -> nn.Module:
    """The parameters of a LLaMA on the meta device under the usual names; it has no forward."""

    def linear(rows: int, cols: int) -> nn.Linear:
        return nn.Linear(cols, rows, bias=False, device=META, dtype=dtype)

    def norm() -> nn.RMSNorm:
        return nn.RMSNorm(shape.hidden_size, device=META, dtype=dtype)

    model, body = nn.Module(), nn.Module()
    body.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size, device=META, dtype=dtype)
    body.layers = nn.ModuleList()
    for _ in range(shape.num_hidden_layers):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        for name, size in shape.projections.items():
            parent, _, child = name.partition(".")
            setattr(layer.get_submodule(parent), child, linear(*size))
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
        body.layers.append(layer)
    body.norm = norm()
    model.model = body
    model.lm_head = linear(shape.vocab_size, shape.hidden_size)
    if shape.tie_word_embeddings:
        model.lm_head.weight = body.embed_tokens.weight
    return model
