"""A model with LLaMA's child names and what the tests of the old names share around it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, INNER = 48, 32, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
# What the public command line hands to prepare_model_for_int8_training and to the projected group.
ARGS = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
PROJECTED = {
    **{"rank": 8, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std", "quant": True, "quant_n_bit": 4},
    **{"quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5},
}


class Attention(nn.Module):
    """Causal attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU with a bias in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Two layers; forward gives the next-token loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).float().flatten(0, 1), tokens[:, 1:].flatten())


def batch(step: int) -> Tensor:
    """Sequences that count up in steps of 1, 3 or 5: what follows is known from the two tokens before."""
    draw = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (16, 1), generator=draw)
    stride = 1 + 2 * torch.randint(3, (16, 1), generator=draw)
    return (start + stride * torch.arange(12)) % VOCABULARY


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights as float32, the decoded ones of INT8 layers."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def assert_learns(model: nn.Module, train: Callable[[nn.Module], None], below: float = 2.0) -> None:
    """The loss on unseen sequences falls from log(48) = 3.9, and every parameter takes part."""
    before = values(model)
    with torch.no_grad():
        assert model(batch(999)).item() > 3.5
    train(model)
    with torch.no_grad():
        after = model(batch(999)).item()
    assert after < below, after
    now = values(model)
    still = [name for name, old in before.items() if torch.equal(old, now[name])]
    assert not still
