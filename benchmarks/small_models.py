"""The two small language models of the training measurements, and the text they learn.

``llama`` is the model of ``examples/run_pretrain.py --demo``; ``gpt`` differs in all that a GPT differs in: layer norms
and biases, learned positions, one matrix for query, key and value, GELU. Both read bytes of Python's own sources.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from pretrain.data import Corpus, load_corpus  # noqa: E402
from pretrain.model import LlamaConfig, LlamaForCausalLM  # noqa: E402

VOCABULARY = 264  # of the byte tokenizer
HELD_OUT_TOKENS = 32768


class GPTLayer(nn.Module):
    """Attention and MLP, each behind a layer norm and around a residual."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(hidden, 3 * hidden), "out": nn.Linear(hidden, hidden)})
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        split = self.attn["qkv"](self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["out"](mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.mlp(self.norms[1](x))


class GPTBody(nn.Module):
    """Token ids [batch, length] to hidden states [batch, length, hidden]."""

    def __init__(self, hidden: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, hidden), nn.Embedding(length, hidden)
        self.layers = nn.ModuleList(GPTLayer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class GPT(nn.Module):
    """The body under ``model`` and the output matrix under ``lm_head``, as the example's losses want them."""

    def __init__(self, hidden: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.model = GPTBody(hidden, layers, heads, length)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class SmallModel(NamedTuple):
    """How a model is built, what is projected in it and how fast it learns.

    Attributes:
        build: makes it, freshly initialised from torch's generator.
        rank: of the projection.
        lr: peak learning rate.
    """

    build: Callable[[], nn.Module]
    rank: int
    lr: float


def _tiny_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(VOCABULARY, 32, 48, 2, 2))


MODELS = {
    "llama": SmallModel(
        lambda: LlamaForCausalLM(LlamaConfig.from_json(str(EXAMPLES / "configs" / "llama_demo.json"))), 64, 0.015
    ),
    "gpt": SmallModel(lambda: GPT(hidden=160, layers=3, heads=5, length=256), 32, 0.015),
    "tiny": SmallModel(_tiny_llama, 8, 0.015),  # for a smoke test
}


def seeded_model(name: str, seed: int) -> nn.Module:
    """A freshly initialised model."""
    torch.manual_seed(seed)
    return MODELS[name].build()


def text(length: int, seed: int) -> Corpus:
    """Python's own sources in blocks of ``length`` bytes; the held-out part does not depend on the seed."""
    return load_corpus("python", None, "byte", length, seed, HELD_OUT_TOKENS, vocabulary=VOCABULARY)
