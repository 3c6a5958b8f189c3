"""Whole programs as other projects write them against the public Q-GaLore, by its names alone.

Each style is one function. What it calls, with which names, keys and spellings, is theirs; the model is ours.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import q_galore_torch as qg
from dropin_model import ARGS, PROJECTED, TARGETS, Model, assert_learns, batch, values


def fit(model: nn.Module, optimizer: Any, steps: int = 120) -> None:
    """The loop of any trainer."""
    for step in range(steps):
        model(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- the public pretraining script


def public_groups(model: nn.Module) -> tuple[list[dict[str, Any]], set[int]]:
    """Weights in mlp and attn with a rank, and the rest."""
    from q_galore_torch.utils.quantization import QGaLoreLinear

    galore_params = []
    for module_name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or isinstance(module, QGaLoreLinear)):
            continue
        if not any(target_key in module_name for target_key in ["attn", "mlp"]):
            continue
        galore_params.append(module.weight)
    id_galore_params = [id(p) for p in galore_params]
    regular_params = [p for p in model.parameters() if id(p) not in id_galore_params]
    return [{"params": regular_params}, {"params": galore_params, **PROJECTED}], set(id_galore_params)


def public_model(dtype: torch.dtype = torch.float32, args: Namespace = ARGS) -> nn.Module:
    """Prepared, cast, moved, its scales and zero points moved once more."""
    from q_galore_torch.utils.quantization import QGaLoreLinear, prepare_model_for_int8_training

    model = prepare_model_for_int8_training(Model(), args, TARGETS)
    model = model.to(dtype=dtype)
    model = model.to(device="cpu")
    for _name, module in model.named_modules():
        if isinstance(module, QGaLoreLinear):
            weight_device = module.weight.device
            module.weight.scales = module.weight.scales.to(device=weight_device)
            module.weight.zeros = module.weight.zeros.to(device=weight_device)
    return model


def public_loop(
    model: nn.Module, steps: int = 120, clip: float = 1.0, accumulation: int = 1, groups: Any = None
) -> None:
    """Ordinary mode, with clipping and accumulation as the script has them."""
    from q_galore_torch import QGaLoreAdamW8bit

    trainable_params = [p for p in model.parameters() if p.requires_grad]
    param_groups = public_groups(model)[0] if groups is None else groups
    optimizer = QGaLoreAdamW8bit(param_groups, lr=0.01, weight_decay=0, betas=(0.9, 0.95))
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for step in range(steps * accumulation):
        (model(batch(step)) / accumulation).backward()
        if (step + 1) % accumulation != 0:
            continue
        torch.nn.utils.clip_grad_norm_(trainable_params, clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def public_loop_per_layer(model: nn.Module, steps: int = 120) -> dict[Any, Any]:
    """One optimizer and one scheduler for each parameter, stepped by the hook that setattr puts on it."""
    from q_galore_torch import QGaLoreAdamW8bit

    _, id_galore_params = public_groups(model)
    optimizer_dict, scheduler_dict, settings = {}, {}, dict(lr=0.01, weight_decay=0)
    for p in model.parameters():
        if id(p) in id_galore_params:
            optimizer_dict[p] = QGaLoreAdamW8bit([{"params": [p], **PROJECTED}], **settings)
        elif p.requires_grad:
            optimizer_dict[p] = QGaLoreAdamW8bit([p], **settings)
    for p in model.parameters():
        if id(p) in id_galore_params or p.requires_grad:
            scheduler_dict[p] = LambdaLR(optimizer_dict[p], lambda step: 1.0)

    def optimizer_hook(p: Any) -> None:
        if (not hasattr(p, "float_grad")) and p.grad is None:
            return
        optimizer_dict[p].step()
        optimizer_dict[p].zero_grad()
        scheduler_dict[p].step()

    for p in model.parameters():
        if id(p) in id_galore_params or p.requires_grad:
            setattr(p, "backward_hook", optimizer_hook)  # noqa: B010 - as it is written there
    for step in range(steps):
        model(batch(step)).backward()
    return optimizer_dict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_loop_trains(dtype: torch.dtype) -> None:
    assert_learns(public_model(dtype), public_loop)


def test_public_loop_counts_int8_weights_by_their_group_size() -> None:
    model = public_model()
    trainable_params_int8 = [p for p in model.parameters() if hasattr(p, "group_size")]
    assert sum(p.numel() for p in trainable_params_int8) == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Model().parameters())


def test_public_loop_is_the_new_api_in_full_mode() -> None:
    """Old and new names train the same bits."""
    old, new = public_model(), qg.prepare_model(Model(), 8, ["attn", "mlp"], grad_mode="full")
    public_loop(old, 12)
    public_loop(new, 12, groups=qg.param_groups(new, **PROJECTED))
    for name, value in values(old).items():
        assert torch.equal(value, values(new)[name]), name


def test_public_loop_accumulates_like_one_large_batch() -> None:
    """Two micro-batches make one update; the public script's INT8 weights sum in the activations' dtype."""
    model, other = public_model(), public_model()
    public_loop(model, 1, accumulation=2, clip=1e9)
    groups, _ = public_groups(other)
    optimizer = qg.QGaLoreAdamW8bit(groups, lr=0.001, weight_decay=0, betas=(0.9, 0.95))
    other(torch.cat([batch(0), batch(1)])).backward()
    optimizer.step()
    for name, value in values(other).items():
        step = 2 * model.get_parameter(name).scales.max().item() if hasattr(model.get_parameter(name), "scales") else 0
        assert torch.allclose(value, values(model)[name], rtol=0, atol=step + 1e-4), name


def test_public_per_layer_loop_trains_every_parameter() -> None:
    assert_learns(public_model(), public_loop_per_layer)


def test_public_loop_trains_in_ddp_of_one_process(process_group: None) -> None:
    """What torchrun starts without --single_gpu."""
    model = public_model()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    groups, _ = public_groups(model)
    assert_learns(model, lambda _: public_loop(wrapped, groups=groups))


def test_public_per_layer_loop_leaves_no_gradient_behind() -> None:
    model = public_model()
    optimizers = public_loop_per_layer(model, 2)
    assert len(optimizers) == len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert {optimizer.state[p]["step"] for p, optimizer in optimizers.items()} == {2}


def test_public_per_layer_loop_gives_each_weight_its_own_noise() -> None:
    """One optimizer for each weight, each counting from 0, would round all weights by the same random numbers."""

    def ids() -> list[int]:
        model = public_model()
        optimizers = public_loop_per_layer(model, 1)
        return [o.state[p]["id"] for p, o in optimizers.items() if hasattr(p, "group_size")]

    assert len(set(ids())) == 14
    assert ids() == ids()


# ---------------------------------------------------------------- axolotl


@pytest.fixture
def old_module() -> Iterator[Any]:
    """The module that axolotl patches, put back afterwards."""
    import q_galore_torch.q_galore_adamw8bit as mod

    kept, init = mod.F, mod.AdamW8bit.__init__
    yield mod
    mod.F, mod.AdamW8bit.__init__ = kept, init


def axolotl_patch() -> None:
    """What axolotl does before it builds the optimizer, so that the public package runs with newer bitsandbytes."""
    import bitsandbytes.functional as F
    from bitsandbytes.optim.optimizer import Optimizer2State

    import q_galore_torch.q_galore_adamw8bit as mod

    mod.F = types.SimpleNamespace(
        optimizer_update_8bit_blockwise=lambda *a, **kw: F.optimizer_update_8bit_blockwise(*a, **kw),
        optimizer_update_32bit=lambda *a, **kw: F.optimizer_update_32bit(*a, **kw),
    )
    arguments = inspect.signature(Optimizer2State.__init__).parameters
    if "percentile_clipping" in arguments or getattr(mod.AdamW8bit, "_axolotl_bnb050_patched", False):
        return

    def _init(self: Any, params: Any, lr: float = 1e-3, **kwargs: Any) -> None:
        Optimizer2State.__init__(self, "adam", params, lr)

    get_config = mod.AdamW8bit.get_config
    mod.AdamW8bit.__init__, mod.AdamW8bit.get_config = _init, get_config


def axolotl_optimizer(model: nn.Module, targets: list[str], optim_args: str) -> Any:
    """Groups from parameter names by substring, keyword arguments from a string."""
    from q_galore_torch import QGaLoreAdamW8bit

    galore, plain = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        (galore if p.dim() == 2 and any(t in name for t in targets) else plain).append(p)
    kwargs: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    kwargs.update(pair.split("=") for pair in optim_args.replace(" ", "").split(","))
    return QGaLoreAdamW8bit([{"params": galore, **PROJECTED}, {"params": plain}], **kwargs)


def test_axolotl_trains_after_its_patch(old_module: Any) -> None:
    pytest.importorskip("bitsandbytes")
    axolotl_patch()
    assert old_module.F is not None
    model = Model()
    optimizer = axolotl_optimizer(model, ["attn", "mlp"], "weight_decay=0.01, eps=1e-7")
    assert optimizer.defaults["weight_decay"] == 0.01 and optimizer.defaults["eps"] == 1e-7
    assert_learns(model, lambda m: fit(m, optimizer))


def test_axolotl_does_not_replace_the_constructor(old_module: Any) -> None:
    """With bitsandbytes >= 0.50 it would, by that of bitsandbytes' optimizer, unless the class says it is done."""
    pytest.importorskip("bitsandbytes")
    ours = old_module.AdamW8bit.__init__
    axolotl_patch()
    assert old_module.AdamW8bit.__init__ is ours


def test_axolotl_trains_whatever_f_is(old_module: Any) -> None:
    """Nothing is called there: without bitsandbytes, or with one that broke."""
    results = []
    for assigned in (None, types.SimpleNamespace(), "nothing of use"):
        old_module.F = assigned
        model = Model()
        fit(model, axolotl_optimizer(model, ["attn", "mlp"], "eps=1e-8"), 3)
        results.append(values(model))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


# ---------------------------------------------------------------- ms-swift


def swift_optimizer(model: nn.Module, config: Namespace, optim_args: Namespace) -> Any:
    """Linear and embedding weights by module name, groups with and without decay, the class under GaLore's name."""
    assert importlib.util.find_spec("q_galore_torch") is not None
    from q_galore_torch import QGaLoreAdamW8bit as GaLoreAdamW

    galore_params = []
    for module_name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or not any(
            k in module_name for k in config.target_modules
        ):
            continue
        if not module.weight.requires_grad:
            continue
        galore_params.append(module.weight)
    ids = {id(p) for p in galore_params}
    defaults = {"weight_decay": optim_args.weight_decay}
    galore_defaults = {
        **{"rank": config.rank, "update_proj_gap": config.update_proj_gap, "scale": config.galore_scale},
        **{"proj_type": config.proj_type, **defaults},
        **{"quant": config.proj_quant, "quant_n_bit": config.proj_bits, "quant_group_size": config.proj_group_size},
        **{"cos_threshold": config.cos_threshold, "gamma_proj": config.gamma_proj, "queue_size": config.queue_size},
    }
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in ids and p.requires_grad]
    groups = [
        {"params": galore_params, **galore_defaults},
        {"params": [p for n, p in rest if "norm" not in n], "weight_decay": defaults["weight_decay"]},
        {"params": [p for n, p in rest if "norm" in n], "weight_decay": 0.0},
    ]
    betas = (optim_args.adam_beta1, optim_args.adam_beta2)
    return GaLoreAdamW(groups, lr=optim_args.learning_rate, betas=betas, eps=optim_args.adam_epsilon)


@pytest.mark.parametrize("proj_quant", [False, True])
@pytest.mark.parametrize("targets", [["self_attn", "mlp"], ["embed_tokens", "self_attn", "mlp", "lm_head"]])
def test_ms_swift_trains(proj_quant: bool, targets: list[str]) -> None:
    """Embeddings are projected, too, and a group may turn out to be empty."""
    config = Namespace(
        **dict(rank=8, target_modules=targets, update_proj_gap=5, galore_scale=1.0, proj_type="std"),
        **dict(proj_quant=proj_quant, proj_bits=4, proj_group_size=256, cos_threshold=0.4, gamma_proj=2, queue_size=5),
    )
    args = Namespace(learning_rate=0.01, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.01)
    model = Model()
    optimizer = swift_optimizer(model, config, args)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]
    assert optimizer.param_groups[0]["proj_format"] == ("int4" if proj_quant else "float32")
    assert_learns(model, lambda m: fit(m, optimizer), below=2.5)


def test_a_subclass_that_hands_everything_on_trains() -> None:
    """ms-swift's successor names its own class over the imported one."""

    class Handle(qg.QGaLoreAdamW8bit):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    model = Model()
    groups, _ = public_groups(model)
    optimizer = Handle(groups, lr=0.01)
    assert_learns(model, lambda m: fit(m, optimizer))


# ---------------------------------------------------------------- pytorch-optimizer


def load_q_galore_optimizer(optimizer: str) -> Any:
    """The class by pytorch-optimizer's name for it."""
    import q_galore_torch

    if "adamw8bit" in optimizer:
        return q_galore_torch.QGaLoreAdamW8bit
    raise NotImplementedError(optimizer)


def create_optimizer(model: nn.Module, name: str, lr: Any = 1e-3, weight_decay: float = 0.0, **kwargs: Any) -> Any:
    """All parameters as one generator, or two groups by a list of names without decay; decay also as a keyword."""
    kwargs["weight_decay"] = weight_decay
    if weight_decay > 0:
        banned = [(p, any(part in n for part in ("bias", "norm"))) for n, p in model.named_parameters()]
        parameters: Any = [
            {"params": [p for p, ban in banned if not ban], "weight_decay": weight_decay},
            {"params": [p for p, ban in banned if ban], "weight_decay": 0.0},
        ]
    else:
        parameters = [{"params": model.parameters(), "weight_decay": weight_decay}]
    return load_q_galore_optimizer(name.lower())(parameters, lr=lr, **kwargs)


@pytest.mark.parametrize("lr", [0.003, torch.tensor(0.003)], ids=["number", "tensor"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_pytorch_optimizer_trains(weight_decay: float, lr: Any) -> None:
    """No group has a rank there: 8-bit AdamW."""
    model = Model()
    optimizer = create_optimizer(model, "Q_GaLore_AdamW8bit", lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    assert_learns(model, lambda m: fit(m, optimizer))


def test_pytorch_optimizer_is_torch_adamw_where_moments_are_small() -> None:
    """Below min_8bit_size the moments are float32, and the numbers are those of torch.optim.AdamW."""
    ours, reference = Model(), Model()
    fit(ours, create_optimizer(ours, "q_galore_adamw8bit", lr=0.003, min_8bit_size=1 << 20), 10)
    fit(reference, torch.optim.AdamW(reference.parameters(), lr=0.003, weight_decay=0.0), 10)
    for name, value in values(reference).items():
        assert torch.allclose(values(ours)[name], value, rtol=0, atol=2e-5), name


# ---------------------------------------------------------------- none of them needs more than torch


def test_no_style_imports_bitsandbytes() -> None:
    """The public package imports it first of all."""
    import q_galore_torch.q_galore_adamw8bit as mod
    from q_galore_torch.utils import quantization

    for module in (mod, quantization, qg):
        source = inspect.getsource(sys.modules[module.__name__])
        assert "import bitsandbytes" not in source
