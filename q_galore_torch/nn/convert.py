"""Turning a model's linear layers into QGaLoreLinear and back, and the parameter groups of a prepared model."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from q_galore_torch.nn.initialize import initialized_modules
from q_galore_torch.nn.leaf import ZeroLeaf
from q_galore_torch.nn.linear import QGaLoreLinear, check_layer_options
from q_galore_torch.nn.old_names import HookedParameter
from q_galore_torch.nn.simulate import QLinear
from q_galore_torch.progress import shown
from q_galore_torch.subspace import side_of

_log = logging.getLogger(__name__)

_ALL = "all-linear"
_MARK = "_q_galore"
# Modules that read .weight of their linear children themselves, in a fused path that never calls the child.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# The bases of PEFT's layers, which write to .weight of their children when adapters are merged.
_ADAPTERS = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")


def prepare_model(
    model: nn.Module,
    rank: int,
    target_modules: Sequence[str] | str = ("attn", "mlp"),
    weight_bits: int | None = 8,
    group_size: int = 256,
    grad_mode: str = "low_rank",
    grad_dtype: str = "float32",
    proj_type: str = "std",
    save_projected: bool = True,
    initialize: Callable[[nn.Module], None] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replace linear layers by :class:`QGaLoreLinear`, in place.

    Args:
        model: any module. Only children whose type is exactly ``nn.Linear`` are converted; one that is registered twice
            is converted once. What is inside of PEFT's layers (adapters and the weights that they adapt) is left alone.
        rank: number of basis vectors r; clipped to min(m, n).
        target_modules: substrings of qualified names (default ``("attn", "mlp")``), or one string: ``"all-linear"``
            (every linear layer but the output head) or a regular expression that the whole name must match.
        weight_bits: 8 (default) quantises the weights, None keeps them as floats.
        group_size: consecutive weights that share a scale and a zero point, default 256.
        grad_mode: ``"low_rank"`` (default): the backward computes the projected gradient; ``"full"``: the ordinary one.
        grad_dtype: dtype of the projected gradient, ``"float32"`` (default) or ``"bfloat16"``.
        proj_type: which side is projected: ``"std"`` (default) the shorter one, ``"reverse_std"`` the longer one,
            ``"right"``, ``"left"``, or ``"full"`` for both (R is then r x r).
        save_projected: a low-rank layer that projects the right side keeps ``X P^T`` in place of its input X for the
            backward, where that takes less memory (default True); no number depends on it. False: always X.
        initialize: sets the values (and, if it likes, the dtype) of a module's own parameters and buffers, given that
            module. With it a model that was built under ``torch.device("meta")`` gets memory module by module, and each
            matching layer is quantised and its floats freed before the next one: the whole never exists in float. It is
            called for every module in the order of ``model.modules()``, so the random numbers are those of the same
            loop over a float model. Default None: a meta model becomes a prepared meta model.
        device: where ``initialize`` finds a meta model's tensors, default torch's.

    Returns:
        ``model``.

    Raises:
        ValueError: an option is out of range, nothing matches, or a matching layer cannot be converted (its parent
            reads ``.weight`` itself, the weight is shared with a module that is not converted with it, is computed from
            others (``weight_norm``, ``prune``, parametrizations) or is not finite); no layer is converted then. With
            ``initialize`` also: it left a tensor without values, or a meta tensor is neither parameter nor buffer; what
            comes up only while it runs leaves a model that is half made.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        >>> type(prepare_model(model, rank=16, target_modules=["0"])[0]).__name__
        'QGaLoreLinear'
    """
    check_layer_options(weight_bits, group_size, grad_mode, grad_dtype, save_projected)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    if device is not None and initialize is None:
        raise ValueError(f"device goes with initialize, got device={str(device)!r} alone")
    side_of(proj_type, 1, 1)
    targets = _targets(model, target_modules)
    _refuse_tied(model, targets)
    options: dict[str, Any] = dict(weight_bits=weight_bits, group_size=group_size, grad_mode=grad_mode)
    options.update(grad_dtype=grad_dtype, proj_type=proj_type, save_projected=save_projected)
    clipped = sum(rank > min(shape) for shape in {id(m.weight): m.weight.shape for m in targets.values()}.values())

    def convert(name: str, linear: nn.Linear) -> nn.Module:
        if grad_mode == "full" and weight_bits is None:
            setattr(linear, _MARK, {"rank": min(rank, *linear.weight.shape), "proj_type": proj_type})
            return linear
        return QGaLoreLinear.from_linear(linear, name, rank=rank, **options)

    if initialize is None:
        _convert(model, targets, convert)
    else:
        _convert_initialized(model, targets, convert, initialized_modules(model, initialize, device))
    if clipped:
        _log.warning("rank %d is larger than the shorter side of %d layers: clipped there", rank, clipped)
    return model


def convert_named(model: nn.Module, names: Sequence[str], convert: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace the linear layers whose own names are given by what ``convert`` makes of them, all or none.

    Args:
        model: changed in place.
        names: of children, compared as a whole: ``["q_proj", "up_proj"]``.
        convert: given qualified name and layer.

    Raises:
        ValueError: there is no such layer, or one cannot be converted (see :func:`prepare_model`).
    """
    listed = isinstance(names, Iterable) and not isinstance(names, str)
    names = list(names) if listed else names
    if not listed or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"target_module must be a list of child names, got {names!r}")
    named = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    if not any(type(module) is nn.Linear or _is_computed(module) for module in named):
        others = sorted({type(module).__name__ for module in named if isinstance(module, nn.Linear)})
        but = f", but layers of type {' and '.join(others)}" if others else ""
        raise ValueError(f"target_module={names!r} names no nn.Linear of the model{but}")
    targets = _targets(model, rf"(?s:(.*\.)?({'|'.join(map(re.escape, names))}))")
    _refuse_tied(model, targets)
    for name, linear in targets.items():  # before any weight is rounded in place
        if not linear.weight.is_meta and not linear.weight.isfinite().all():
            raise ValueError(f"{name} cannot be converted: its weight is not finite")
    _convert(model, targets, convert)


def _convert(model: nn.Module, targets: dict[str, nn.Linear], convert: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace all targets, or none if one of them cannot be converted."""
    trained = [(linear.weight, linear.weight.requires_grad) for linear in targets.values()]
    converted: dict[int, nn.Module] = {}
    try:
        for name, linear in shown(targets.items(), "preparing", len(targets)):
            if id(linear.weight) not in converted:
                converted[id(linear.weight)] = convert(name, linear)
    except Exception:
        for weight, trains in trained:
            weight.requires_grad_(trains)
        raise
    for name, linear in targets.items():
        _replace(model, name, converted[id(linear.weight)])


def _convert_initialized(
    model: nn.Module,
    targets: dict[str, nn.Linear],
    convert: Callable[[str, nn.Linear], nn.Module],
    modules: Iterator[nn.Module],
) -> None:
    """Replace each target as soon as it and those that share its weight are initialised, and let go of it."""
    names = _names_at_last_module(targets)
    targets.clear()
    for module in shown(modules, "preparing", sum(1 for _ in model.modules())):
        own = names.pop(id(module), [])
        if own:
            new = convert(own[0], cast(nn.Linear, module))
            for name in own:
                _replace(model, name, new)
        del module  # or its weight stays while the next one is made


def _names_at_last_module(targets: dict[str, nn.Linear]) -> dict[int, list[str]]:
    """The names of all targets that share a weight, by the id of the last module that has it."""
    last: dict[int, tuple[int, list[str]]] = {}
    for linear in {id(linear): linear for linear in targets.values()}.values():
        last[id(linear.weight)] = id(linear), []
    for name, linear in targets.items():
        last[id(linear.weight)][1].append(name)
    return dict(last.values())


def _targets(model: nn.Module, target_modules: Sequence[str] | str) -> dict[str, nn.Linear]:
    """The linear layers to convert by qualified name; one module may stand there under several names."""
    if isinstance(target_modules, str):
        head = _output_head(model)
        try:
            pattern = None if target_modules == _ALL else re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
    else:
        given = isinstance(target_modules, Iterable) and bool(target_modules)
        if not given or not all(isinstance(part, str) for part in target_modules):
            raise ValueError(f"target_modules must be a string or a list of strings, got {target_modules!r}")
        head, pattern = None, None
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear layer: wrap it in a module")
    targets, readers, adapters = {}, {}, []
    other: Counter[str] = Counter()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _READERS):
            readers[name] = type(module).__name__
        if _is_adapter(module):
            adapters.append(f"{name}.")
        if not isinstance(module, nn.Linear) or name.startswith(tuple(adapters)):
            continue
        if target_modules == _ALL:
            wanted = module is not head and (type(module) is nn.Linear or _is_computed(module))
        elif pattern is not None:
            wanted = pattern.fullmatch(name) is not None
        else:
            wanted = any(part in name for part in target_modules)
        if not wanted:
            continue
        parent = name.rpartition(".")[0]
        if parent in readers:
            raise ValueError(
                f"{name} cannot be converted: its parent {readers[parent]} reads .weight itself instead of calling the "
                "layer; narrow target_modules"
            )
        if _is_computed(module):
            raise ValueError(
                f"{name} cannot be converted: its weight or bias is computed from other tensors (weight_norm, prune or "
                "a parametrization); remove that first"
            )
        if type(module) is not nn.Linear:
            other[type(module).__name__] += 1
            continue
        _refuse_hooks(name, module)
        targets[name] = module
    for kind, count in other.items():
        _log.warning(
            "%d layers that target_modules matches are of type %s, not nn.Linear: left as they are", count, kind
        )
    if not targets:
        besides = "" if target_modules != _ALL or head is None else " besides its output layer"
        raise ValueError(f"target_modules={target_modules!r} matches no nn.Linear of the model{besides}")
    return targets


def _is_computed(module: nn.Module) -> bool:
    """Whether an nn.Linear has been given other parameters, from which weight or bias are computed."""
    if is_parametrized(module):
        return type(module).__mro__[1] is nn.Linear
    return type(module) is nn.Linear and set(module._parameters) != {"weight", "bias"}


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers, which is told without importing PEFT."""
    bases = type(module).__mro__
    return any(base.__name__ in _ADAPTERS and base.__module__.partition(".")[0] == "peft" for base in bases)


def _refuse_hooks(name: str, module: nn.Module) -> None:
    """Hooks of forward and backward are carried over; those of the state dict belong to the old entries."""
    kinds = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    if any(getattr(module, kind) for kind in kinds):
        raise ValueError(f"{name} cannot be converted: it has a state dict hook, which expects nn.Linear's entries")


def _output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding where the model says which it is, else the last linear layer."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is not None:
        return head
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, module in reversed(named):
        if name.rpartition(".")[2] in ("lm_head", "head", "output", "classifier", "score"):
            return module
    return named[-1][1] if named else None


def _refuse_tied(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    """Tied linear layers are converted into one; a weight shared with anything else cannot be."""
    by_weight: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                by_weight.setdefault(id(parameter), []).append((name, module))
    for name, linear in targets.items():
        for other_name, other in by_weight[id(linear.weight)]:
            bias = getattr(other, "bias", None)
            if other_name not in targets or bias is not linear.bias:
                shared = f"{other_name} ({type(other).__name__})"
                raise ValueError(f"{name} cannot be converted: it shares its weight with {shared}")


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def param_groups(model: nn.Module, rank: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """The parameter groups of a prepared model for :class:`q_galore_torch.QGaLoreAdamW8bit`.

    Args:
        model: from :func:`prepare_model`.
        rank: default the prepared layers'; another value is refused. Layers of
            :func:`q_galore_torch.utils.quantization.prepare_model_for_int8_training` have none, and take any.
        options: options of the projected group: ``update_proj_gap``, ``scale``, ``proj_format``, ``lr``, ...

    Returns:
        ``[{"params": everything else that trains}, {"params": the layers' leaves, "rank": rank, "proj_type": type,
        **options}]``; a group for each rank and type where clipped ranks or types differ, and no group without
        parameters. Each carries ``param_names``.

    Raises:
        ValueError: the model is not prepared, or ``rank`` or ``proj_type`` differ from its layers.
    """
    matrices: dict[int, tuple[Tensor, str, tuple[int, str]]] = {}
    for name, module in model.named_modules():
        mark = getattr(module, _MARK, None)
        if isinstance(module, QGaLoreLinear):
            parameter: Tensor = module.leaf
            mark = {"rank": module.rank, "proj_type": module.proj_type}
        elif mark is not None and isinstance(module, nn.Linear):
            parameter = module.weight
        else:
            continue
        if not parameter.requires_grad:
            continue
        rows, cols = _weight_shape(module)
        if mark["rank"] is None:
            if rank is None:
                raise ValueError(f"{name} was prepared without a rank: give one to param_groups")
            mark["rank"] = min(rank, rows, cols)
        if rank is not None and min(rank, rows, cols) != mark["rank"]:
            raise ValueError(f"rank must be {mark['rank']}, with which {name} was prepared, got {rank!r}")
        given = options.get("proj_type", mark["proj_type"])
        if given != mark["proj_type"]:
            raise ValueError(f"proj_type must be {mark['proj_type']!r}, with which {name} was prepared, got {given!r}")
        matrices[id(parameter)] = (parameter, name, (mark["rank"], mark["proj_type"]))
    if not matrices:
        if is_prepared(model):
            raise ValueError(
                "all prepared layers of the model are frozen: give the optimizer the parameters that train"
            )
        raise ValueError("the model has no trainable prepared layer: call prepare_model first")
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in matrices]
    groups: list[dict[str, Any]] = []
    if rest:
        groups.append({"params": [p for _, p in rest], "param_names": [n for n, _ in rest]})
    for kind in sorted({kind for _, _, kind in matrices.values()}, key=lambda kind: (-kind[0], kind[1])):
        members = [(p, name) for p, name, its_kind in matrices.values() if its_kind == kind]
        names = [f"{name}.{_leaf_name(model.get_submodule(name))}" for _, name in members]
        shape = {"rank": kind[0], "proj_type": kind[1]}
        groups.append({"params": [p for p, _ in members], "param_names": names, **shape, **options})
    return groups


def is_prepared(model: nn.Module) -> bool:
    """Whether :func:`prepare_model` has been at a model."""
    return any(isinstance(module, QGaLoreLinear) or hasattr(module, _MARK) for module in model.modules())


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, (nn.Linear, QGaLoreLinear))
    return module.out_features, module.in_features


def _leaf_name(module: nn.Module) -> str:
    return module._leaf_name if isinstance(module, QGaLoreLinear) else "weight"


def export_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An ordinary copy of a prepared model: each QGaLoreLinear and QLinear is an ``nn.Linear`` of the decoded weight.

    Args:
        model: left as it is.
        dtype: float dtype of the copy, default each parameter's own.

    Returns:
        A new model that knows nothing of this package (``save_pretrained`` works where it did before).
    """
    layers = [module for module in model.modules() if isinstance(module, (QGaLoreLinear, QLinear))]
    memo: dict[int, Any] = {id(layer): _ordinary(layer) for layer in shown(layers, "exporting", len(layers))}
    exported = copy.deepcopy(model, memo)
    for module in exported.modules():
        module.__dict__.pop(_MARK, None)
    for parameter in exported.parameters():
        if type(parameter) is HookedParameter:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
    return exported if dtype is None else exported.to(dtype)


def _ordinary(layer: QGaLoreLinear | QLinear) -> nn.Linear:
    weight = layer.dequantize()
    trained = layer.weight if isinstance(layer, QLinear) else layer.leaf
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, trained.requires_grad)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    linear.train(layer.training)
    return linear


def num_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """The number of weights of a model, where a zero leaf counts for the weight that it stands for.

    Args:
        model: prepared or not.
        trainable_only: leave out what does not require a gradient. Default False.

    Returns:
        As many as the unprepared model has; what is shared counts once.
    """
    return sum(count for count, trains in _counts(model) if trains or not trainable_only)


def _counts(model: nn.Module) -> Iterator[tuple[int, bool]]:
    seen: set[int] = set()
    for module in model.modules():
        stored = None
        if isinstance(module, QGaLoreLinear):
            yield module.in_features * module.out_features, module.leaf.requires_grad
            stored = module._parameters.get("weight")
        for parameter in module._parameters.values():
            if parameter is None or parameter is stored or isinstance(parameter, ZeroLeaf) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield parameter.numel(), parameter.requires_grad
