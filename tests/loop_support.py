"""A small prepared model, its batches, optimizer and loss: what other trainers are compared with a plain loop on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import q_galore_torch as qg

BATCHES = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32), nn.LayerNorm(32))
    return qg.prepare_model(model, rank=4, target_modules="0|2")


def optimizer_of(model: nn.Module) -> qg.QGaLoreAdamW8bit:
    groups = qg.param_groups(model, update_proj_gap=2)
    return qg.QGaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=0)  # small moments are 8-bit, too


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.flip(0)).square().mean()
