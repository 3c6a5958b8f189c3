"""The two small language models of the training measurements, and the text they learn.

``llama`` is the model of ``examples/run_pretrain.py --demo``; ``window`` is of another kind: a feed-forward network
over the last 16 bytes (Bengio et al. 2003) with layer norms, biases and GELU. Both read Python's own sources as bytes.
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


class WindowBlock(nn.Module):
    """An MLP behind a layer norm and around a residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class WindowBody(nn.Module):
    """Token ids [batch, length] to hidden states [batch, length, hidden], each from its token and those before it."""

    def __init__(self, window: int, embedding: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.window = window
        self.tokens = nn.Embedding(VOCABULARY, embedding)
        self.mlp_in = nn.Linear(window * embedding, hidden)
        self.blocks = nn.ModuleList(WindowBlock(hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        before = F.pad(self.tokens(tokens), (0, 0, self.window - 1, 0))
        x = self.mlp_in(before.unfold(1, self.window, 1).flatten(2))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class WindowModel(nn.Module):
    """The body under ``model`` and the output matrix under ``lm_head``, as the example's losses want them."""

    def __init__(self, window: int, embedding: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.model = WindowBody(window, embedding, hidden, blocks)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.lm_head.weight, std=0.02)


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
    "window": SmallModel(lambda: WindowModel(window=16, embedding=32, hidden=320, blocks=3), 64, 0.015),
    "tiny": SmallModel(_tiny_llama, 8, 0.015),  # for a smoke test
}


def seeded_model(name: str, seed: int) -> nn.Module:
    """A freshly initialised model."""
    torch.manual_seed(seed)
    return MODELS[name].build()


def text(length: int, seed: int) -> Corpus:
    """Python's own sources in blocks of ``length`` bytes; the held-out part does not depend on the seed."""
    return load_corpus("python", None, "byte", length, seed, HELD_OUT_TOKENS, vocabulary=VOCABULARY)
