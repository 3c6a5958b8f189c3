"""Run by test_state.py in a fresh process: load a checkpoint, train on, write weights and state."""

from __future__ import annotations

import sys

import torch
from torch import nn

import q_galore_torch as qg


def build(dtype: torch.dtype) -> tuple[nn.Module, qg.QGaLoreAdamW8bit]:
    """A small INT8 model with low-rank layers, and its optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 48), nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 48), nn.LayerNorm(48), nn.Linear(48, 50)
    ).to(dtype)
    qg.prepare_model(model, 8, ["1", "3"])
    groups = qg.param_groups(model, update_proj_gap=7, scale=1.0)
    compute = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return model, qg.QGaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=256, compute_dtype=compute, seed=5)


def train(model: nn.Module, opt: qg.QGaLoreAdamW8bit, first: int, last: int) -> None:
    """Steps first..last - 1 on data that depends on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(50, (2, 33), generator=generator)
        for micro in tokens:
            logits = model(micro[:-1]).float()
            nn.functional.cross_entropy(logits, micro[1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()


if __name__ == "__main__":
    checkpoint, result, dtype_name = sys.argv[1:]
    model, opt = build(getattr(torch, dtype_name))
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    train(model, opt, 20, 40)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, result)
