"""AdamW, GaLore and Q-GaLore out of the flags.

nothing                             torch's AdamW on every parameter
--enable_galore                     GaLore: the named matrices are projected; exact SVDs at a fixed gap, float32 moments
--enable_galore --weight_quant      Q-GaLore: those matrices are INT8 with a low-rank backward, all moments have 8 bits

The projector is float32 unless one of three kinds of flags gives its format: ``--proj_format``,
``--proj_quantize_type`` or ``--quantize_type``, each with its block size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import q_galore_torch as qg
from pretrain.errors import UsageError

# Parts of the names of linear layers that are projected: those of queries and values alone, and all of attention and
# MLP. The family that has most of a model's layers is taken: BERT and its kin, LLaMA and its kin, DistilBERT, ALBERT,
# MPNet, OPT and BART.
TARGETS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("query",), ("query", "key", "value", "intermediate.dense", "output.dense")),
    (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    (("q_lin", "v_lin"), ("q_lin", "k_lin", "v_lin", "out_lin", "ffn.lin1", "ffn.lin2")),
    (("query",), ("query", "key", "value", "attention.dense", "ffn")),
    (("attention.attn.q",), ("attention.attn.", "intermediate.dense", "output.dense")),
    (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "attn.out_proj", "fc1", "fc2")),
)
FORMAT_FLAGS = (
    "proj_format", "proj_block", "proj_quantize_type", "proj_quantize_blocksz", "quantize_type", "quantize_blocksz"
)  # fmt: skip


def build_optimizer(model: nn.Module, args: argparse.Namespace, seed: int) -> Optimizer:
    """The optimizer of the flags; with ``--weight_quant`` the model's matrices become INT8 here.

    Raises:
        UsageError: The package refuses a value, or the model has no layer to project.
    """
    try:
        if not args.enable_galore:
            return torch.optim.AdamW(_with_decay(_trained(model), args), lr=args.learning_rate)
        targets = target_modules(model, args)
        return _q_galore(model, args, targets, seed) if args.weight_quant else _galore(model, args, targets, seed)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from None


def target_modules(model: nn.Module, args: argparse.Namespace) -> list[str]:
    """Parts of the names of the layers to project.

    Raises:
        UsageError: No linear layer has such a name, or one that --target_modules gives.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    given = "the known names"
    if args.target_modules:
        unknown = [part for part in args.target_modules if not any(part in name for name in names)]
        if not unknown:
            return list(args.target_modules)
        given = f"--target_modules {' '.join(unknown)}"
    else:
        families = [family[args.lora_all_modules] for family in TARGETS]
        counts = [sum(any(part in name for part in parts) for name in names) for parts in families]
        if any(counts):
            return list(families[counts.index(max(counts))])
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise UsageError(f"no linear layer of the model matches {given}; there are {shown} (--target_modules chooses)")


def method_name(args: argparse.Namespace, optimizer: Optimizer) -> str:
    """What the method is called in tables, with the settings that tell it from others of its kind."""
    projected = [group for group in optimizer.param_groups if group.get("rank") is not None]
    if not projected:
        return "AdamW"
    group = projected[0]
    kind = "Q-GaLore, INT8 weights" if args.weight_quant else "GaLore"
    block = "" if group["proj_format"] in ("float32", "bfloat16") else f" ({_block(group['proj_block'])})"
    return f"{kind}, rank {args.lora_r}, {group['proj_format']}{block}"


def _block(size: int) -> str:
    return f"block {size}" if size else "whole tensor"


def _galore(model: nn.Module, args: argparse.Namespace, targets: list[str], seed: int) -> Optimizer:
    """GaLore as published, but for the format of its projector."""
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in targets)
    }
    matrices = [pair for pair in _trained(model) if pair[0] in layers]  # a weight that two layers share once
    rest = [pair for pair in _trained(model) if pair[0] not in layers]
    projected = {"params": matrices, "rank": args.lora_r, "proj_type": args.proj_type, **_projection(args, "svd")}
    return qg.GaLoreAdamW([*_with_decay(rest, args), projected], lr=args.learning_rate, eps=1e-8, seed=seed)


def _q_galore(model: nn.Module, args: argparse.Namespace, targets: list[str], seed: int) -> Optimizer:
    qg.prepare_model(
        model, rank=args.lora_r, target_modules=targets, group_size=args.weight_group_size, proj_type=args.proj_type
    )
    regular, *matrices = qg.param_groups(model, **_projection(args, "warm"))
    rest = zip(regular["param_names"], regular["params"], strict=True)
    return qg.QGaLoreAdamW8bit([*_with_decay(rest, args), *matrices], lr=args.learning_rate, seed=seed)


def _projection(args: argparse.Namespace, subspace: str) -> dict[str, Any]:
    """Options of the projected group; the package refuses a format that is given in two ways."""
    given = {flag: getattr(args, flag) for flag in FORMAT_FLAGS if getattr(args, flag) is not None}
    options = {flag: None if value == "none" else value for flag, value in given.items()}
    if not options:
        options = {"proj_format": "float32"}
    options.update(update_proj_gap=args.update_proj_gap, scale=args.galore_scale, weight_decay=args.weight_decay)
    return {**options, "subspace": args.subspace or subspace}


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _with_decay(named: Iterable[tuple[str, Tensor]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Two groups: biases and norms are left out of ``--weight_decay``."""
    pairs = list(named)
    matrices = [pair for pair in pairs if pair[1].ndim > 1]
    vectors = [pair for pair in pairs if pair[1].ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
