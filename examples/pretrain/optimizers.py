"""The optimizer names of the command line: four of torch.optim, six over q_galore_torch.

adam, adamw, sgd, adafactor    torch.optim, every parameter alike
adam8bit                       8-bit moments, no projection
galore_adamw                   attention and MLP matrices projected; float32 moments, float32 projector
galore_adamw8bit               the same with 8-bit moments
q_galore_adamw8bit             8-bit moments, low-rank backward; --proj_quant quantises the projector,
                               --weight_quant stores the matrices in INT8; with --simulation the gradients are full
                               ones, and with --weight_quant too the matrices are floats on an INT8 grid
..._per_layer                  the two 8-bit ones, each parameter updated as soon as its gradient is there
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .errors import UsageError, import_optional

QUANTISED = ("q_galore_adamw8bit", "q_galore_adamw8bit_per_layer")
PROJECTED = ("galore_adamw", "galore_adamw8bit", "galore_adamw8bit_per_layer", *QUANTISED)
PLAIN = ("adam", "adamw", "sgd", "adafactor")
PER_LAYER = ("galore_adamw8bit_per_layer", "q_galore_adamw8bit_per_layer")
OPTIMIZERS = (*PLAIN, "adam8bit", *PROJECTED)

TARGET_MODULES = ["attn", "mlp"]


def is_prepared(args: argparse.Namespace) -> bool:
    """Whether the model's layers are the package's own, with a low-rank backward."""
    return args.optimizer in QUANTISED and not args.simulation


def prepare(model: nn.Module, args: argparse.Namespace, initialize: Callable[[nn.Module], None]) -> None:
    """Give a model that :func:`is_prepared` its layers and its values, one module after the other.

    Args:
        model: On the meta device; what is there gets memory on ``args.torch_device``.
        args: The flags.
        initialize: Sets a module's own parameters.

    Raises:
        UsageError: The package refuses a value, or is not installed.
    """
    qg = _package(args)
    prepared: dict[str, Any] = {"rank": args.rank, "target_modules": TARGET_MODULES, "proj_type": args.proj_type}
    if args.weight_quant:
        prepared.update(weight_bits=args.weight_bits, group_size=args.weight_group_size)
    else:
        prepared["weight_bits"] = None
    if args.lazy_rule == "upstream":  # it compares singular vectors of full gradients
        prepared["grad_mode"] = "full"
    try:
        qg.prepare_model(model, **prepared, initialize=initialize, device=args.torch_device)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from None


def simulate_int8(model: nn.Module, args: argparse.Namespace) -> None:
    """Round the matrices of a float model to an INT8 grid, on which they stay.

    Raises:
        UsageError: The package refuses a value, or is not installed.
    """
    _package(args)
    from q_galore_torch.utils.simulate_quantization import prepare_model_for_int8_training_simulation

    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_projected(name, module)})
    try:
        prepare_model_for_int8_training_simulation(model, args, names)
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> Optimizer:
    """The optimizer that ``args.optimizer`` names, of a model that is prepared where :func:`is_prepared` says so.

    Raises:
        UsageError: The package refuses a value, or is not installed.
    """
    if args.optimizer in PLAIN:
        return _torch_optimizer(model, args)
    qg = _package(args)
    try:
        groups, keywords = _groups(qg, model, args)
        return qg.QGaLoreAdamW8bit(
            groups, lr=args.lr, betas=_betas(args), weight_decay=args.weight_decay, seed=args.seed, **keywords
        )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from None


def update_per_layer(
    optimizer: Optimizer, args: argparse.Namespace, backwards: int, ddp: DistributedDataParallel | None
) -> Any:
    """Update every parameter in its gradient's hook.

    Args:
        optimizer: One of ``PER_LAYER``.
        args: The flags.
        backwards: Backward passes of one update.
        ddp: The model's wrapper where there are several processes.

    Returns:
        The handle, whose ``grad_norm`` is the last update's.
    """
    clipping: dict[str, Any] = {}
    if args.grad_clipping:
        clipping = {"max_grad_norm": args.grad_clipping, "clip": clip_of(args)}
    return _package(args).enable_per_layer(optimizer, accumulation_steps=backwards, ddp=ddp, **clipping)


def clip_of(args: argparse.Namespace) -> str:
    """What bounds the gradients of a ``PER_LAYER`` optimizer: the norm of all gradients can wait for their end only
    where they are low-rank; full ones are bounded by the norm of the update before."""
    return "global" if is_prepared(args) and args.lazy_rule != "upstream" else "last_norm"


def ready_for_ddp(wrapped: nn.Module, args: argparse.Namespace) -> None:
    """Make the processes' INT8 codes agree once, so that DistributedDataParallel leaves them alone.

    Args:
        wrapped: What DistributedDataParallel is going to wrap.
        args: The flags.
    """
    if is_prepared(args):
        from q_galore_torch.integrations import distributed
        from q_galore_torch.nn.linear import QGaLoreLinear

        if any(isinstance(module, QGaLoreLinear) for module in wrapped.modules()):
            distributed.prepare(wrapped)


def _package(args: argparse.Namespace) -> ModuleType:
    return import_optional("q_galore_torch", f"--optimizer {args.optimizer}", "pip install q-galore-torch")


def _betas(args: argparse.Namespace) -> tuple[float, float]:
    return (0.9 if args.beta1 is None else args.beta1, args.beta2)


def _torch_optimizer(model: nn.Module, args: argparse.Namespace) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, betas=_betas(args), **common)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=_betas(args), **common)
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=args.beta1 or 0.0, **common)
    return torch.optim.Adafactor(parameters, **common)


def _groups(qg: ModuleType, model: nn.Module, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parameter groups and the optimizer's further keywords."""
    if args.optimizer == "adam8bit":
        return [{"params": [p for p in model.parameters() if p.requires_grad]}], {}
    projection: dict[str, Any] = {"update_proj_gap": args.update_proj_gap, "scale": args.galore_scale}
    keywords: dict[str, Any] = {}
    if args.optimizer in QUANTISED:
        projection.update(_lazy_rule(args), **_projector_format(args))
        if args.weight_quant:
            keywords["stochastic_round"] = args.stochastic_round
    else:  # GaLore as published
        projection.update(proj_format="float32", subspace="svd", lazy_rule="fixed")
        keywords["moments_dtype"] = "float32" if args.optimizer == "galore_adamw" else "dynamic8"
    if is_prepared(args):
        return qg.param_groups(model, rank=args.rank, **projection), keywords
    matrices = [(name, module.weight) for name, module in model.named_modules() if is_projected(name, module)]
    chosen = {id(weight) for _, weight in matrices}
    regular = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in chosen]
    projection.update(rank=args.rank, proj_type=args.proj_type)
    return [{"params": regular}, {"params": matrices, **projection}], keywords


def is_projected(name: str, module: nn.Module) -> bool:
    """Whether a module is one of the linear layers of attention and MLP."""
    return isinstance(module, nn.Linear) and any(target in name for target in TARGET_MODULES)


def _lazy_rule(args: argparse.Namespace) -> dict[str, Any]:
    lazy = {name: getattr(args, name) for name in ("energy_threshold", "cos_threshold", "gamma_proj", "queue_size")}
    return {**{name: value for name, value in lazy.items() if value is not None}, "lazy_rule": args.lazy_rule}


def _projector_format(args: argparse.Namespace) -> dict[str, Any]:
    if not args.proj_quant:
        return {"proj_format": "float32"}
    return {"quant": True, "quant_n_bit": args.proj_bits, "quant_group_size": args.proj_group_size}
