"""A small self-contained LLaMA: RMSNorm, rotary positions, SwiGLU, causal attention.

Module names are those of transformers' ``LlamaForCausalLM``, so state dicts can be exchanged and
``target_modules=["attn", "mlp"]`` finds the seven matrices of every layer. ``--use_hf_model`` takes transformers'
own model instead; ``hidden_states`` is the one place that knows the difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import UsageError, import_optional


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA, read from a Hugging Face style JSON file; other keys of the file are left alone."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_sequence_length: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0

    @classmethod
    def from_json(cls, path: str) -> LlamaConfig:
        """Read and check a config file; UsageError names the file and what is wrong with it."""
        values = read_config_json(path)
        known = {field.name: field for field in fields(cls)}
        missing = [name for name in list(known)[:5] if name not in values]
        if missing:
            raise UsageError(f"the model config {path} lacks {', '.join(missing)}")
        chosen = {name: value for name, value in values.items() if name in known}
        for name, value in chosen.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise UsageError(f"{name} in {path} must be a positive number, got {value!r}")
            if "int" in str(known[name].type) and not isinstance(value, int):
                raise UsageError(f"{name} in {path} must be a whole number, got {value!r}")
        config = cls(**chosen)
        if config.hidden_size % (2 * config.num_attention_heads):
            raise UsageError(
                f"hidden_size in {path} must be an even multiple of num_attention_heads, "
                f"got {config.hidden_size} and {config.num_attention_heads}"
            )
        for name, only in (
            ("num_key_value_heads", config.num_attention_heads),
            ("tie_word_embeddings", False),
            ("hidden_act", "silu"),
            ("head_dim", config.hidden_size // config.num_attention_heads),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            if values.get(name, only) not in (only, None):
                raise UsageError(f"{name}={values[name]!r} in {path} needs --use_hf_model")
        return config

    @property
    def num_parameters(self) -> int:
        """Number of weights of the model this config describes."""
        hidden = self.hidden_size
        layer = 4 * hidden * hidden + 3 * hidden * self.intermediate_size + 2 * hidden
        return 2 * self.vocab_size * hidden + self.num_hidden_layers * layer + hidden


def read_config_json(path: str) -> dict[str, Any]:
    """The JSON object in a model config file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the model config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"the model config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"the model config {path} must hold one JSON object")
    return values


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn each pair (x[i], x[i + half]) by its position's angle; x is [..., length, head]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal multi-head self-attention without biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            projection(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBody(nn.Module):
    """Embeddings, layers and the last norm: token ids [batch, length] to hidden states [batch, length, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta
        self.checkpointing = False  # keep only each layer's input, and run the layer again in the backward

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self._angles(tokens.shape[1], x)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return self.norm(x)

    def _angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [length, head] of position * theta^(-2i/head), computed in float32."""
        pairs = torch.arange(0, self.head_size, 2, device=like.device, dtype=torch.float32)
        frequencies = self.rope_theta ** (-pairs / self.head_size)
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class LlamaForCausalLM(nn.Module):
    """The body under ``model`` and the output matrix under ``lm_head``, as transformers names them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            initializer(config.initializer_range)(module)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocab]."""
        return self.lm_head(self.model(tokens))


def initializer(std: float, dtype: torch.dtype = torch.float32) -> Callable[[nn.Module], None]:
    """What sets a module's own parameters: normal weights and embeddings, norms of one, biases of zero.

    Args:
        std: Of the normal distribution; with 0 nothing is drawn.
        dtype: Numbers are drawn in float32 and then rounded, so that every dtype begins with the same ones.
    """

    @torch.no_grad()
    def initialize(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight":
                parameter.normal_(std=std) if std else parameter.zero_()
            else:
                parameter.fill_(0.0 if name == "bias" else 1.0)
            parameter.data = parameter.data.to(dtype)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0

    return initialize


def build_model(path: str, use_hf_model: bool, dtype: torch.dtype, on_meta: bool = False) -> nn.Module:
    """A model from a config file, freshly initialised in ``dtype``.

    Args:
        path: The config file.
        use_hf_model: transformers' LLaMA instead of ours.
        dtype: Of the parameters; what transformers keeps in buffers, the rotary frequencies, stays float32.
        on_meta: Leave the parameters on the meta device, for ``prepare_model(initialize=...)`` to set them one module
            after the other, with the same numbers.

    Raises:
        UsageError: The file is unusable, or transformers is asked for and not installed.
    """
    with torch.device("meta"):
        model = _transformers_model(path) if use_hf_model else LlamaForCausalLM(LlamaConfig.from_json(path))
    if not on_meta:
        model.to_empty(device="cpu")
    if use_hf_model:  # neither knows of ties or of values that the constructor has computed
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if not on_meta:
        for module in model.modules():
            initializer(model.config.initializer_range, dtype)(module)
    return model


def _transformers_model(path: str) -> Any:
    values = read_config_json(path)
    transformers = import_optional("transformers", "--use_hf_model", 'pip install "q-galore-torch[hf]"')
    values.setdefault("max_position_embeddings", values.get("max_sequence_length", 2048))
    try:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, use_cache=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"transformers refuses the model config {path}: {str(error).splitlines()[0]}") from None


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of the decoder layers for the backward pass, which runs each layer once more."""
    if isinstance(model, LlamaForCausalLM):
        model.model.checkpointing = True
        return
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Last hidden states [batch, length, hidden] of our model or of transformers', before ``lm_head``."""
    output = model.model(tokens)
    return output if isinstance(output, Tensor) else output.last_hidden_state
