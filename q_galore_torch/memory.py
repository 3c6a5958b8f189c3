"""What training will take: predicted bytes by part, before anything is allocated.

Nothing here knows how large a state is. A model of shapes alone (on the meta device) is prepared and given to the
optimizer as a real one would be, and the tensors that come out are counted. What a formula has to say is only when each
gradient lives (:func:`_moments_in_time`) and, as an estimate, how large a LLaMA's activations are.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q_galore_torch.nn import QGaLoreLinear, param_groups, prepare_model
from q_galore_torch.nn.activations import keeps_input
from q_galore_torch.nn.convert import is_prepared
from q_galore_torch.nn.leaf import ZeroLeaf
from q_galore_torch.optim import QGaLoreAdamW8bit
from q_galore_torch.optim.options import PROJECTED
from q_galore_torch.optim.per_layer import CLIPS
from q_galore_torch.optim.state import projection_of
from q_galore_torch.optim.update import is_low_rank
from q_galore_torch.shapes import META, REQUIRED, LlamaShape, check_count, listed, read_shape, skeleton
from q_galore_torch.subspace import next_phase_step

GB = 10**9
LOGITS_AT_ONCE = 2**25  # a longer batch's logits are assumed to be made piece by piece, as the example does
_RANK_STEP = 64  # largest ranks are looked for in these steps
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; the model is not touched and no tensor of it is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if isinstance(parameter, ZeroLeaf):
            leaf = type(parameter)(parameter.shape, META, parameter.dtype, parameter.requires_grad)
            leaf.label = parameter.label
            memo[id(parameter)] = leaf
        else:
            value = torch.empty_like(parameter, device=META)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=META)
    return copy.deepcopy(model, memo)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes, by part, at the moment of an update at which they are most.

    Attributes:
        weights: float weights, INT8 codes and the model's own buffers.
        scales: scales and zero points of INT8 weights.
        zero_leaf: the zeros that all prepared layers of a dtype share.
        projectors: bases with their scales.
        moments: both of Adam's, with their scales.
        schedule: counters, similarities and what else is kept for each matrix.
        old_bases: bases before the newest, kept while the two wait to be compared.
        low_rank_gradients: R of the low-rank layers that are alive together.
        gradients: the other gradients that are.
        stashes: full float32 gradients of low-rank layers whose basis is due or is being judged.
        activations: an estimate, with the logits and one decoded weight; None where the model is not a LLaMA by its
            config.
        steady: :attr:`tracked` in an update in which no basis is made or judged.
    """

    weights: int
    scales: int
    zero_leaf: int
    projectors: int
    moments: int
    schedule: int
    old_bases: int
    low_rank_gradients: int
    gradients: int
    stashes: int
    activations: int | None
    steady: int

    @property
    def tracked(self) -> int:
        """Everything but activations: what the tensors of model, optimizer and gradients take at the peak."""
        return sum(getattr(self, name) for name in _TRACKED)

    @property
    def total(self) -> int:
        """Tracked bytes and the activations: above the real peak, since the two seldom peak together."""
        return self.tracked + (self.activations or 0)

    def __str__(self) -> str:
        estimate = "not estimated" if self.activations is None else f"{self.activations / GB:.3f}"
        lines = [(_LABELS[name], f"{getattr(self, name) / GB:.3f}") for name in _TRACKED]
        lines.append(("tracked", f"{self.tracked / GB:.3f}"))
        lines.append(("activations (estimate)", estimate))
        lines.append(("total", f"{self.total / GB:.3f}"))
        lines.append(("tracked, between refreshes", f"{self.steady / GB:.3f}"))
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value:>13} GB" for label, value in lines)


_LABELS = {
    "weights": "weights",
    "scales": "scales and zero points",
    "zero_leaf": "shared zeros",
    "projectors": "projectors",
    "moments": "moments",
    "schedule": "schedule",
    "old_bases": "old bases",
    "low_rank_gradients": "low-rank gradients R",
    "gradients": "other gradients",
    "stashes": "full gradients of due layers",
}
_TRACKED = tuple(_LABELS)


def plan_memory(
    model: str | Path | Mapping[str, Any] | nn.Module,
    rank: int | None = None,
    *,
    batch: int = 1,
    tokens: int = 256,
    per_layer: bool = False,
    accumulation: int = 1,
    clipping: str | None = None,
    activation_checkpointing: bool = False,
    dtype: str | None = None,
    **options: Any,
) -> MemoryPlan:
    """Predict what training takes, from shapes alone.

    Args:
        model: ``"60m"``, ``"130m"``, ``"350m"``, ``"1b"`` or ``"7b"`` (also ``"llama_7b"``), the path of a Hugging Face
            style JSON file, its content as a dict, or a module: prepared or not, on any device, left as it is.
        rank: of the projection; may be left out for a prepared model.
        batch: sequences in a micro-batch, default 1; with ``tokens`` it decides the activations alone.
        tokens: of a sequence, default 256.
        per_layer: updates in the gradient hooks, default False.
        accumulation: micro-batches in an update, default 1.
        clipping: None (default), ``"global"``, or with per-layer updates ``"per_parameter"`` or ``"last_norm"``.
            Ordinary updates keep all gradients anyway, so clipping costs nothing there.
        activation_checkpointing: each decoder layer keeps its input alone and runs again in the backward.
        dtype: of what is not quantised, for a config: ``"bfloat16"`` (default), ``"float32"`` or ``"float16"``.
        options: of :func:`prepare_model`, of :class:`QGaLoreAdamW8bit` and of its projected group, by their names.

    Returns:
        The bytes by part.

    Raises:
        ValueError: the config or an option is not understood, or an option has no meaning for this model.

    Example:
        >>> plan = plan_memory("llama_60m", rank=128, per_layer=True)
        >>> 0.1 < plan.tracked / 1e9 < 0.3
        True
    """
    for name, value in (("batch", batch), ("tokens", tokens), ("accumulation", accumulation)):
        check_count(name, value)
    allowed = (None, *CLIPS) if per_layer else (None, "global")
    if clipping not in allowed:
        raise ValueError(f"clipping must be one of {listed(allowed)} with per_layer={per_layer}, got {clipping!r}")
    shapes, shape = _shapes(model, dtype)
    given = _sorted_options(options)
    if is_prepared(shapes):
        for key, value in given.prepare.items():
            raise ValueError(f"{key}={value!r} has no meaning for a model that is prepared already")
    elif rank is None:
        raise ValueError("rank must be given for a model that is not prepared, got None")
    else:
        prepare_model(shapes, rank, **given.prepare)
    optimizer = QGaLoreAdamW8bit(param_groups(shapes, rank, **given.group), **given.constructor)
    parameters = _parameters(optimizer)
    if per_layer and clipping == "global" and any(p.first is not None and not p.low_rank for p in parameters):
        raise ValueError("clipping='global' refuses projected parameters with full gradients: see enable_per_layer")
    moments = _moments_in_time(parameters, not per_layer or accumulation > 1 or clipping == "global")
    fixed = {**_model_bytes(shapes), **_state_bytes(optimizer)}
    activations = None
    if shape is not None:
        activations = _activations(shape, shapes, batch * tokens, activation_checkpointing)
    steady = sum(fixed.values()) + sum(moments[0])
    peak = max(moments, key=sum)
    return MemoryPlan(**fixed, **peak._asdict(), activations=activations, steady=steady)


def _shapes(model: Any, dtype: str | None) -> tuple[nn.Module, LlamaShape | None]:
    """A meta model, and the shape from which activations are estimated where there is one."""
    if isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError(f"dtype={dtype!r} has no meaning for a module, which has its own")
        return _without_values(model), _shape_of(model)
    if not isinstance(model, (str, Path, Mapping)):
        raise ValueError(f"model must be a name, a path, a dict or an nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {listed(tuple(_DTYPES))}, got {dtype!r}")
    shape = read_shape(model)
    return skeleton(shape, _DTYPES[dtype or "bfloat16"]), shape


def _shape_of(model: nn.Module) -> LlamaShape | None:
    """The shape of a module that carries a LLaMA-like config, else None."""
    config = getattr(model, "config", None)
    names = (*REQUIRED, "model_type", "num_key_value_heads", "head_dim")
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        return read_shape(values)
    except ValueError:
        return None


class _Options(NamedTuple):
    prepare: dict[str, Any]
    constructor: dict[str, Any]
    group: dict[str, Any]


def _sorted_options(options: Mapping[str, Any]) -> _Options:
    """Options by who takes them; what nobody knows goes to the group, which says what it takes."""
    prepare = set(inspect.signature(prepare_model).parameters) - {"model", "rank"}
    constructor = set(inspect.signature(QGaLoreAdamW8bit).parameters) - set(PROJECTED)
    found = _Options({}, {}, {})
    for key, value in options.items():
        where = found.prepare if key in prepare else found.constructor if key in constructor else found.group
        where[key] = value
    return found


# ---------------------------------------------------------------- what is always there


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _model_bytes(model: nn.Module) -> dict[str, int]:
    leaves: list[Tensor] = []
    weights: list[Tensor] = []
    for parameter in model.parameters():
        (leaves if isinstance(parameter, ZeroLeaf) else weights).append(parameter)
    with torch._C.DisableTorchFunctionSubclass():
        longest: defaultdict[torch.dtype, int] = defaultdict(int)
        for leaf in leaves:
            longest[leaf.dtype] = max(longest[leaf.dtype], leaf.numel() * leaf.element_size())
    layers = [module for module in model.modules() if isinstance(module, QGaLoreLinear) and module.weight_bits]
    scales = _bytes(tensor for layer in layers for tensor in (layer.scales, layer.zeros))
    buffers = _bytes(model.buffers())
    return {"weights": _bytes(weights) + buffers - scales, "scales": scales, "zero_leaf": sum(longest.values())}


def _state_bytes(optimizer: QGaLoreAdamW8bit) -> dict[str, int]:
    sizes: defaultdict[str, int] = defaultdict(int)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    part = "moments" if key.startswith("exp_avg") else "schedule"
                    sizes["projectors" if key.startswith(("proj_", "right_")) else part] += _bytes([value])
            if group["rank"] is not None:
                sizes["schedule"] += 8 * group["queue_size"]  # a float64 each, once the queue is full
                if group["lazy_rule"] == "upstream":
                    sizes["schedule"] += 4 * state["dim"]  # the first vector of the basis before
    return {part: sizes[part] for part in ("projectors", "moments", "schedule")}


# ---------------------------------------------------------------- what comes and goes


class _Moment(NamedTuple):
    """Bytes that are alive together for a while."""

    old_bases: int
    low_rank_gradients: int
    gradients: int
    stashes: int


class _Parameter(NamedTuple):
    """One trained parameter.

    Attributes:
        low_rank: its gradient is R.
        gradient: bytes of its gradient.
        stash: bytes of its full float32 gradient where one is summed beside R, else 0.
        basis: bytes of its projector where the one before is kept for a comparison, else 0.
        first: the update that makes its first basis from data, None where none ever is.
        phase: later bases are made at updates that are this modulo ``gap``.
        gap: in updates, 0 where the first basis stays.
    """

    low_rank: bool
    gradient: int
    stash: int
    basis: int
    first: int | None
    phase: int
    gap: int


def _parameters(optimizer: QGaLoreAdamW8bit) -> list[_Parameter]:
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            with torch._C.DisableTorchFunctionSubclass():
                gradient = parameter.numel() * parameter.element_size()
            found.append(_parameter(is_low_rank(parameter), gradient, state, group))
    return found


def _parameter(low_rank: bool, gradient: int, state: dict[str, Any], group: dict[str, Any]) -> _Parameter:
    if group["rank"] is None:
        return _Parameter(low_rank, gradient, 0, 0, None, 0, 0)
    shapes = projection_of(state)
    reads_gradient = group["subspace"] != "random"
    stash = 4 * shapes.rows * shapes.cols if low_rank and reads_gradient else 0
    kept = reads_gradient and group["lazy_rule"] == "energy"
    basis = _bytes(state[key] for key in state if key.startswith(("proj_", "right_")) and key != "right_dim")
    first = state["last_due"] + state["gap"] if low_rank else 0
    if shapes.whole:
        return _Parameter(low_rank, gradient, stash, 0, None if low_rank else first, 0, 0)
    return _Parameter(low_rank, gradient, stash, basis if kept else 0, first, state["phase"], state["gap"])


def _moments_in_time(parameters: list[_Parameter], kept: bool) -> list[_Moment]:
    """The greatest moment of an update without a new basis, and of each update with one.

    Args:
        parameters: all of them.
        kept: gradients live until the update is closed; otherwise each goes in its hook.

    Gaps that the lazy rule has stretched are multiples of the first one, so no update is due for more layers than the
    ones that are looked at here: the first bases, and then as many updates as the longest gap has.
    """
    due: defaultdict[int, set[int]] = defaultdict(set)  # by update: who gets a new basis
    judged: defaultdict[int, set[int]] = defaultdict(set)  # and whose two bases are compared
    last = 1 + max((p.first for p in parameters if p.first is not None), default=0)
    last += 2 * max((p.gap for p in parameters), default=0)
    for index, parameter in enumerate(parameters):
        if parameter.first is None:
            continue
        due[parameter.first].add(index)
        later = next_phase_step(parameter.first, parameter.phase, parameter.gap) if parameter.gap else last
        for step in range(later, last, parameter.gap or 1):
            due[step].add(index)
            if parameter.basis:
                judged[step + 1].add(index)
    moments = [_moment(parameters, kept, set(), set(), set())]
    for step in sorted(due.keys() | judged.keys()):
        moments.append(_moment(parameters, kept, due[step], judged[step], judged[step + 1]))
    return moments


def _moment(
    parameters: list[_Parameter], kept: bool, due: set[int], judged: set[int], next_judged: set[int]
) -> _Moment:
    """The greatest moment of one update.

    Where gradients are kept, that is the end of the backward, with all stashes and the bases that are to be judged, or
    the end of the update, with the predecessors of the new bases and no stash. Otherwise it is the largest hook.
    """
    before, after = (sum(parameters[index].basis for index in which) for which in (judged, next_judged))
    stashes = [p.stash if index in due | judged else 0 for index, p in enumerate(parameters)]
    if not kept:
        largest, stash = max(zip(parameters, stashes, strict=True), key=lambda item: item[0].gradient + item[1])
        low_rank, other = (largest.gradient, 0) if largest.low_rank else (0, largest.gradient)
        return _Moment(max(before, after), low_rank, other, stash)
    low_rank = sum(p.gradient for p in parameters if p.low_rank)
    other = sum(p.gradient for p in parameters if not p.low_rank)
    return max(_Moment(before, low_rank, other, sum(stashes)), _Moment(after, low_rank, other, 0), key=sum)


# ---------------------------------------------------------------- activations

# What the matrices of a decoder layer read: who shares an input. The attention's output is kept anyway.
_READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _activations(shape: LlamaShape, model: nn.Module, tokens: int, checkpointing: bool) -> int:
    """An estimate of what forward and backward keep, with the largest decoded weight and the logits.

    Counted on a decoder layer of ``examples/`` by saved-tensor hooks: two norms that keep input and output in float32,
    q, k, v and the attention's output, three tensors of the MLP's inner width, and the inputs of the matrices.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = shape.num_key_value_heads * shape.head_size
    size = next(
        p.element_size() for p in model.parameters() if not isinstance(p, ZeroLeaf) and p.dtype.is_floating_point
    )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QGaLoreLinear)}
    first = {name.rpartition(".")[2]: layer for name, layer in layers.items() if ".0." in name}
    inputs = sum(
        _kept_of_input([first.get(name) for name in names], already, width)
        for names, already, width in zip(_READERS, (0, hidden, 0, 0), (hidden, hidden, hidden, inner), strict=True)
    )
    block = 16 * hidden + size * (2 * hidden + 2 * keys + 3 * inner + inputs) + 4 * (shape.num_attention_heads + 2)
    whole = shape.num_hidden_layers * block
    if checkpointing:
        whole = shape.num_hidden_layers * size * hidden + block
    logits = min(tokens * shape.vocab_size, LOGITS_AT_ONCE) * (size + 8)  # as made, in float32, and their gradient
    decoded = size * max((layer.in_features * layer.out_features for layer in layers.values()), default=0)
    return tokens * (whole + 8 * hidden) + logits + decoded


def _kept_of_input(readers: list[QGaLoreLinear | None], already: int, width: int) -> int:
    """Values a token that are kept for the readers of one input: itself, or its low-rank products where they are fewer.

    Args:
        readers: None is an ordinary linear layer.
        already: values of the input that are kept for others.
        width: of the input.
    """
    products = 0
    for layer in readers:
        if layer is None or keeps_input(layer):
            return width - already
        products += layer.rank or 0
    return products if products < width else width - already


# ---------------------------------------------------------------- what fits


class Fit(NamedTuple):
    """A way to train and what it takes.

    Attributes:
        name: of the way.
        plan: at the rank asked for.
        fits: its total is within the memory.
        largest_rank: the largest multiple of 64 that is, 0 where none is.
    """

    name: str
    plan: MemoryPlan
    fits: bool
    largest_rank: int


_WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("per-layer updates, one micro-batch", {"per_layer": True}),
    ("accumulation or clipping, R in bfloat16", {"grad_dtype": "bfloat16"}),
    ("accumulation or clipping, R in float32", {"grad_dtype": "float32"}),
)


def what_fits(config: str | Path | Mapping[str, Any], rank: int, gpu_memory: float, **options: Any) -> list[Fit]:
    """Which ways to train fit into a memory, and up to which rank.

    Accumulation and clipping by the norm of all gradients keep every gradient until the update, with ordinary updates
    and per-layer ones alike.

    Args:
        config: a name, a path or a dict, as for :func:`plan_memory`.
        rank: for the plans.
        gpu_memory: in GB of 10**9 bytes.
        options: of :func:`plan_memory`, but how updates are made and the dtype of R.

    Raises:
        ValueError: as :func:`plan_memory`.
    """
    if isinstance(gpu_memory, bool) or not isinstance(gpu_memory, (int, float)) or not gpu_memory > 0:
        raise ValueError(f"gpu_memory must be a number of GB > 0, got {gpu_memory!r}")
    room, shape = gpu_memory * GB, read_shape(config)
    found = []
    for name, way in _WAYS:

        def needs(rank: int, way: dict[str, Any] = way) -> int:
            return plan_memory(config, rank, **{**options, **way}).total

        low, high = 0, min(shape.hidden_size, shape.intermediate_size) // _RANK_STEP  # in steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needs(middle * _RANK_STEP) <= room else (low, middle - 1)
        plan = plan_memory(config, rank, **{**options, **way})
        found.append(Fit(name, plan, plan.total <= room, low * _RANK_STEP))
    return found
