"""QGaLoreAdamW8bit: AdamW with quantised low-rank projection, 8-bit moments and INT8 weights."""

from __future__ import annotations

import copy
import logging
import math
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from q_galore_torch import ops
from q_galore_torch.integrations.distributed import check_replicas, reduce_stashes
from q_galore_torch.nn.binding import Binding
from q_galore_torch.nn.leaf import ZeroLeaf, ZeroWeight, bind, check_untouched, layer_of, refuse_elsewhere
from q_galore_torch.nn.simulate import simulated
from q_galore_torch.optim import options, public_state, schedule
from q_galore_torch.optim.describe import describe
from q_galore_torch.optim.finite import Unread, asynchronous, keep_finite
from q_galore_torch.optim.state import (
    UNMEASURED,
    checked_groups,
    checked_lengths,
    checked_state,
    new_state,
    placed,
    projection_of,
    refuse_parameter,
    target_of,
)
from q_galore_torch.optim.update import Work, checked_gradient, is_low_rank, update
from q_galore_torch.subspace import first_refresh_steps

if TYPE_CHECKING:
    from q_galore_torch.optim.per_layer import PerLayer

_log = logging.getLogger(__name__)


class QGaLoreAdamW8bit(Optimizer):
    """AdamW in a quantised low-rank subspace (Q-GaLore), 8-bit AdamW for groups without a rank.

    One step of an m x n matrix in a group with a ``rank`` (std: right side projected if m >= n)::

        R = P G^T;  m, v, N = Adam(R);  W <- W (1 - lr wd) - lr scale N^T P

    Args:
        params: parameters, named parameters or groups. Besides ``lr, betas, eps, weight_decay, moments_dtype,
            stochastic_round`` a group takes ``rank`` and with it ``update_proj_gap`` (200), ``scale`` (0.25),
            ``proj_type`` ("std", "reverse_std", "right", "left" or "full"), ``proj_format`` ("int4"; "int8", "fp8",
            "fp8_e4m3", "fp4", "nf4", "bfloat16", "float32") and ``proj_block`` (256, for fp4 and nf4 64; 0: one scale
            for the whole basis), or in their place ``quant, quant_n_bit, quant_group_size`` or ``quantize_type``
            ("4bit", "8bit", "8bit_blockwise", None) and ``quantize_blocksz``, also spelt ``proj_quantize_...``,
            ``subspace`` ("warm", "svd" or "random"), ``lazy_rule`` ("energy", "upstream" or "fixed") with
            ``energy_threshold`` (0.8) or ``cos_threshold`` (0.4), ``gamma_proj`` (2), ``queue_size`` (5) and
            ``max_proj_gap`` (16 gaps), ``moments`` ("keep", "rotate" or "reset") and ``norm_growth_limit`` (None). A
            weight of more than two dimensions is projected as the matrix that
            :func:`q_galore_torch.subspace.matrix_shape` names.
        lr: learning rate, default 1e-3; a number or a tensor of one element.
        betas: decay rates of the moments, default (0.9, 0.999).
        eps: added to the root of the second moment, default 1e-8.
        weight_decay: decoupled, applied to the weight before the update as in ``torch.optim.AdamW``; default 1e-2.
        amsgrad: only False.
        optim_bits: 8 or 32, accepted and without effect; use ``moments_dtype``.
        args: only None.
        min_8bit_size: moments with fewer elements stay float32, default 4096.
        percentile_clipping: only 100.
        block_wise: only True.
        is_paged: only False.
        moments_dtype: ``"dynamic8"`` (default) or ``"float32"``.
        seed: of the rounding noise and the random bases, default 0.
        stochastic_round: of INT8 and bfloat16 weights, default True; else to nearest.
        nonfinite: ``"raise"`` (default) or ``"skip"``: what happens on a gradient that is not finite. On a GPU that is
            told later, by the first ``step()`` that knows of it, by ``check()`` or ``state_dict()``.
        compute_dtype: ``"float32"`` (default) or ``"bfloat16"``, of the products of step and refresh.

    Raises:
        ValueError: an option is unknown or out of range, or a parameter cannot be optimised.

    Note:
        Deviations from the paper and its public code: decay comes before the update; INT8 weights are updated in steps
        of their codes, ``q' = q + floor(d) + [j < 2^24 frac(d)]``, with scales kept; moment blocks run along basis
        vectors; bases are sign-canonical and refreshes staggered: parameter i at steps = (i q) mod gap.

    Source: Q-GaLore (arXiv 2407.08296), GaLore (arXiv 2403.03507), 8-bit Adam (arXiv 2110.02861).

    Example:
        >>> layer = torch.nn.Linear(64, 128)
        >>> opt = QGaLoreAdamW8bit([{"params": [layer.bias]}, {"params": [layer.weight], "rank": 16}], lr=0.01)
        >>> layer(torch.ones(2, 64)).sum().backward()
        >>> opt.step()
    """

    _projected_defaults: ClassVar[dict[str, Any]] = {}  # of a subclass, where they are not those of options.PROJECTED

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        *,
        moments_dtype: str = "dynamic8",
        seed: int = 0,
        stochastic_round: bool = True,
        nonfinite: str = "raise",
        compute_dtype: str = "float32",
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        checked = options.check_constructor(given)
        self._ready = False
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._per_layer: PerLayer | None = None
        self._unread = Unread()
        super().__init__(params, {key: checked[key] for key in (*options.COMMON, *options.KEPT)})
        self._ready = True
        self._say_clipped(self.param_groups)
        self._plan_first_refreshes([p for group in self.param_groups for p in group["params"]])
        self._bind()

    def __repr__(self) -> str:
        return describe(type(self).__name__, self.param_groups, self.state)

    # ------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its parameters' state.

        Args:
            param_group: as for the constructor.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter cannot be optimised.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = options.check_group(param_group, self.defaults, self._projected_defaults)
        _agree_on_names(group, self.param_groups)
        before = len(self.param_groups)
        super().add_param_group(group)
        try:
            if self._per_layer is not None:
                self._per_layer.refuse_group(self.param_groups[-1])
            created = self._create_states(group, before)
        except Exception:
            del self.param_groups[before:]
            raise
        self.state.update(created)
        if self._ready:
            self._say_clipped(self.param_groups[-1:])
            self._plan_first_refreshes(group["params"])
            self._bind()

    def _say_clipped(self, groups: list[dict[str, Any]]) -> None:
        clipped: Counter[int] = Counter()
        for group in groups:
            ranks = [] if group["rank"] is None else [projection_of(self.state[p]).rank for p in group["params"]]
            clipped[group["rank"]] += sum(rank < group["rank"] for rank in ranks)
        for rank, count in clipped.items():
            if count:
                _log.warning("rank %d is larger than the shorter side of %d matrices: clipped", rank, count)

    def _create_states(self, group: dict[str, Any], index: int) -> dict[Tensor, dict[str, Any]]:
        states = list(self.state.values())
        next_id = max((1 + s["id"] for s in states), default=_first_id(group["params"]))
        next_number = 1 + max((s["number"] for s in states if "number" in s), default=-1)
        created: dict[Tensor, dict[str, Any]] = {}
        for position, parameter in enumerate(group["params"]):
            name = _name(group, index, position)
            target = target_of(parameter, name)
            refuse_parameter(parameter, target, group, name)
            created[parameter] = new_state(
                target,
                group,
                id=next_id,
                number=next_number,
                min_8bit_size=group["min_8bit_size"],
            )
            next_id += 1
            next_number += group["rank"] is not None
        return created

    def _plan_first_refreshes(self, parameters: list[Tensor]) -> None:
        """Spread the first data-driven bases of new low-rank leaves, so that few full gradients are summed at once."""
        new = [self.state[p] for p in parameters if is_low_rank(p) and "number" in self.state[p]]
        for state, step in zip(new, first_refresh_steps(len(new)), strict=True):
            state["last_due"] = step - state["gap"]

    def _bind(self) -> None:
        """Lend the projectors to the layers, and tell them what is due."""
        for parameter, _, group in self._parameters():
            if is_low_rank(parameter):
                binding, state = parameter.binding, self.state[parameter]
                if binding is not None and binding.lends(state):
                    continue  # with what it has summed since the last step
                if binding is not None:
                    binding.drop()
                parameter.binding = Binding(state, group)
        self._mark_due()
        self._agreed = False

    def _mark_due(self) -> None:
        """Fix which layers sum their full gradient in the next step, from replicated state, before any forward."""
        for parameter, _, group in self._parameters():
            if is_low_rank(parameter):
                state = self.state[parameter]
                parameter.binding.mark(schedule.needs_gradient(state, group, projection_of(state), True))

    def _adopt(self) -> None:
        """Take a layer's present leaf where it was replaced: layers are found by number, not by identity."""
        for group in self.param_groups:
            for position, parameter in enumerate(group["params"]):
                layer = layer_of(parameter) if isinstance(parameter, ZeroLeaf) else None
                if layer is None or layer.leaf is parameter:
                    continue
                group["params"][position] = leaf = layer.leaf
                bind(leaf, layer, parameter.uid)
                leaf.label, leaf.binding = parameter.label, parameter.binding
                if leaf.binding is not None:
                    leaf.binding.drop()
                self.state[leaf] = self.state.pop(parameter)

    def _parameters(self) -> Iterator[tuple[Any, str, dict[str, Any]]]:
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                yield parameter, _name(group, index, position), group

    # ------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss. Default None.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a group's ``lr``, ``betas``, ``eps``, ``weight_decay``, ``scale``, ``update_proj_gap`` or
                ``max_proj_gap`` has become invalid.
            NonFiniteGradientError: with ``nonfinite="raise"``; nothing was updated then. On a GPU this or an earlier
                step may be meant, which left that parameter alone and updated the others; this one has been made.
            RuntimeError: something else wrote to the layers' zero leaves, with per-layer updates a backward pass of
                this update failed, the optimizers of several processes do not hold the same ids, shapes and options,
                or a CUDA graph is being captured.

        With :func:`q_galore_torch.enable_per_layer` the backward passes have updated most parameters by then: this
        updates the others and closes the update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._agreed:
            check_replicas(list(self._parameters()), self.state)
            self._agreed = True
        if self._per_layer is not None:
            self._per_layer.close()
        else:
            self._prepare()
            self._apply(self._collect())
        self._mark_due()
        self._unread.send()
        self._unread.read()  # last: when a number arrives must not decide what is updated, or replicas drift apart
        return loss

    def _prepare(self) -> None:
        """Before anything is updated: take over new leaves, check what users and other code may have changed."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of QGaLoreAdamW8bit cannot be captured in a CUDA graph, which would replay its step counts, "
                "rates and rounding noise: call step() outside of the capture"
            )
        options.check_settings(self.param_groups)
        self._adopt()
        check_untouched([p for p, _, _ in self._parameters() if isinstance(p, ZeroLeaf)])

    def _collect(self) -> list[Work]:
        """Everything that has a gradient."""
        return [self._work(*entry) for entry in self._parameters() if entry[0].grad is not None]

    def _work(self, parameter: Any, name: str, group: dict[str, Any]) -> Work:
        state = self.state[parameter]
        if is_low_rank(parameter) and not (parameter.binding is not None and parameter.binding.lends(state)):
            raise RuntimeError(
                f"{name} was taken over by an optimizer made later, and its gradient is of that one's projector"
            )
        shapes = projection_of(state) if group["rank"] is not None else None
        target = target_of(parameter, name)
        refuse_elsewhere(name, target.weight.device, state["exp_avg"].device)
        gradient = checked_gradient(parameter, name, shapes, target.low_rank)
        return Work(parameter, name, group, state, target, gradient, shapes)

    def _apply(
        self,
        work: list[Work],
        clip: Callable[[list[Work]], None] | None = None,
        refused: str = "nothing was updated",
    ) -> None:
        """One update of some parameters; ``clip`` scales the finite gradients in place before they are used.

        Args:
            work: what is updated.
            clip: called with those whose gradients are finite.
            refused: what the error of a gradient that is not finite says of the others.
        """
        if any(self._looks_at(item) or not asynchronous(item.gradient.device) for item in work):
            work, sizes = keep_finite(work, refused)
        else:
            work, sizes = self._unread.flagged(work), [math.nan] * len(work)
        if clip is not None:
            clip(work)
        for item, size in zip(work, sizes, strict=True):
            if item.shapes is not None and not item.low_rank and size > 0:
                self._refresh(item, item.gradient, item.state["step"], self._is_due(item))
        after = [(item, self._is_due(item)) for item in work if item.low_rank]
        update(work)
        for item, _ in after:
            item.parameter.binding.settle()
            item.parameter.binding.forget_if_zeroed(item.parameter)
        reduce_stashes([item.parameter for item, _ in after if item.parameter.binding.due])
        for item, due in after:
            self._refresh_after(item, due)

    def _looks_at(self, item: Work) -> bool:
        """Whether this step reads numbers of the gradient on the host: for a new basis, or to compare two."""
        return item.shapes is not None and (self._is_due(item) or schedule.is_pending(item.state))

    def _is_due(self, item: Work) -> bool:
        assert item.shapes is not None
        return schedule.is_due(item.state, item.group, item.shapes, item.low_rank)

    def _refresh(self, item: Work, gradient: Tensor | None, step: int, due: bool) -> None:
        """Compare two bases, then find a new one, where either waits; ``step`` is the parameter's own."""
        assert item.shapes is not None
        if not (due or schedule.is_pending(item.state)):
            return
        start, gap = time.perf_counter(), item.state["gap"]
        if gradient is not None and schedule.is_pending(item.state):
            schedule.compare(item.state, item.group, item.shapes, gradient)
        if due:
            schedule.refresh(item.state, item.group, item.shapes, gradient, step=step, gap=gap, low_rank=item.low_rank)
        self._seconds[item.state["id"]] += time.perf_counter() - start

    def _refresh_after(self, item: Work, due: bool) -> None:
        """R was summed under the old basis, so a due leaf is updated first. A G that is zero or broken keeps it due."""
        binding, before = item.parameter.binding, item.state["step"] - 1
        stash = binding.stash
        if stash is not None and 0 < ops.absmax([stash]).item() < float("inf"):
            self._refresh(item, stash, before, due)
        elif due and item.group["subspace"] == "random":
            self._refresh(item, None, before, due)
        binding.drop()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; the full gradients that due layers have summed are dropped with them.

        With per-layer updates it does nothing between the updates of a window and its ``step()``.

        Args:
            set_to_none: default True, else the gradients are zeroed in place.
        """
        self._adopt()
        if self._per_layer is not None and not self._per_layer.restart():
            return
        super().zero_grad(set_to_none)
        for parameter, _, _ in self._parameters():
            if is_low_rank(parameter) and parameter.binding is not None:
                parameter.binding.drop()

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only; the same keys before and after the first step.

        Example:
            >>> opt = QGaLoreAdamW8bit([torch.nn.Parameter(torch.ones(4))])
            >>> sorted(opt.state_dict())
            ['param_groups', 'state']

        Raises:
            NonFiniteGradientError: of an earlier step on a GPU, as :meth:`check`.
            RuntimeError: per-layer updates are on, and the update is not finished: call it after ``step()``.
        """
        if self._per_layer is not None:
            self._per_layer.refuse_open("state_dict()")
        self.check()
        self._adopt()
        for group in self.param_groups:
            group["last_grad_norm"] = float(group["last_grad_norm"])  # a tensor after per-layer updates
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; every tensor keeps its own dtype (torch's method casts them to the parameter's).

        Low-rank layers lose their gradients, which are coordinates in the bases that are replaced.

        Args:
            state_dict: from :meth:`state_dict` of an optimizer with the same parameters in the same groups. That of
                bitsandbytes' AdamW8bit, ``torch.optim.AdamW`` or the public Q-GaLore code is converted where no
                parameter is projected; see :func:`q_galore_torch.utils.setup.load_optimizer_state`.

        Raises:
            ValueError: groups or shapes differ; nothing is loaded then.
            RuntimeError: per-layer updates are on, and an update is not finished.
        """
        if self._per_layer is not None:
            self._per_layer.refuse_open("load_state_dict()")
        self._adopt()
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if public_state.is_public(state_dict):
            state_dict = public_state.converted(self, state_dict)
        groups, sources = self._checked(state_dict)
        self._unread.forget()
        for parameter, key, device in sources:  # one by one: two copies of all would not fit beside a large model
            if is_low_rank(parameter) and parameter.binding is not None:
                parameter.binding.drop()
                parameter.binding = None  # it holds the state that is replaced
                parameter.grad = None  # R of the basis that is replaced
            self.state[parameter] = placed(state_dict["state"][key], device)
        self.param_groups[:] = groups
        self._bind()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked(self, state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[Any, Any, torch.device]]]:
        """New groups from a state dict, and where each state is found and goes, after checking all of it."""
        saved_groups = checked_groups(state_dict)
        checked_lengths(self.param_groups, saved_groups)
        groups, sources = [], []
        for index, (own, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            kept: dict[str, Any] = {key: own[key] for key in ("params", "param_names") if key in own}
            options_of: dict[str, Any] = {key: value for key, value in saved.items() if key != "params"}
            group: dict[str, Any] = {**own, **copy.deepcopy(options_of), **kept}
            if "param_names" not in own:
                group.pop("param_names", None)
            groups.append(group)
            if (own["rank"] is None) == (group["rank"] is None):
                try:
                    options.check_saved(group)
                except ValueError as error:
                    raise ValueError(f"group {index} of the state dict: {error}") from None
            for position, (parameter, key) in enumerate(zip(own["params"], saved["params"], strict=True)):
                name = _name(own, index, position)
                if key not in state_dict["state"]:
                    raise ValueError(f"the state dict has no state for {name}")
                if (own["rank"] is None) != (group["rank"] is None):
                    raise ValueError(f"the rank of {name} must be {own['rank']}, got {group['rank']} in the state dict")
                entry, target = state_dict["state"][key], target_of(parameter, name)
                refuse_parameter(parameter, target, group, name)
                template = new_state(
                    target, group, id=0, number=0, min_8bit_size=group["min_8bit_size"], device=torch.device("meta")
                )
                checked_state(entry, template, name)
                sources.append((parameter, key, target.weight.device))
        return groups, sources

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._ready = True
        self._seconds = defaultdict(float)
        self._per_layer = None
        self._unread = Unread()
        super().__setstate__(state)
        self._bind()

    # ------------------------------------------------------------ reports

    def check(self) -> None:
        """Wait for the device, and tell of gradients of earlier steps that were not finite. On the CPU there are none.

        Raises:
            NonFiniteGradientError: with ``nonfinite="raise"``; that parameter was left alone in its step. Each is told
                of once.
        """
        self._unread.read(wait=True)

    def telemetry(self) -> list[dict[str, Any]]:
        """What happened to each parameter so far. Waits for the device.

        Returns:
            One dict per parameter: ``name``, ``id``, ``step``, ``groups_shifted`` and ``groups_reranged`` (INT8 groups,
            since the start). For projected ones also ``refreshes``, ``last_refresh`` (the parameter's step, -1 before
            it), ``gap`` (steps), ``similarity`` (of the last two bases), ``captured_energy`` (share of the gradient
            that the newest basis was made from, before quantisation), ``held_out_energy`` (share that it captured of
            the next gradient, as stored), ``seconds`` (spent on its refreshes by this object) and ``qr_fallbacks``.
            What has not been measured yet is None; only ``lazy_rule="energy"`` measures the held-out energy.
        """
        self._adopt()
        report = []
        for parameter, name, group in self._parameters():
            state = self.state[parameter]
            shifted, reranged = state["range_stats"].tolist()
            entry = {"name": name, "id": state["id"], "step": state["step"]}
            entry.update(groups_shifted=shifted, groups_reranged=reranged)
            if group["rank"] is not None:
                measured = [None if value == UNMEASURED else value for value in state["measured"].tolist()]
                entry.update({key: state[key] for key in ("refreshes", "last_refresh", "gap", "qr_fallbacks")})
                entry.update(zip(("similarity", "captured_energy", "held_out_energy"), measured, strict=True))
                entry["seconds"] = self._seconds[state["id"]]
            report.append(entry)
        return report


def _name(group: dict[str, Any], index: int, position: int) -> str:
    """A parameter's name for messages: given, its layer's, or its place."""
    names = group.get("param_names")
    if names is not None:
        return str(names[position])
    parameter = group["params"][position]
    label = parameter.label if isinstance(parameter, ZeroLeaf) else ""
    return label or f"parameter {position} of group {index} (shape {list(parameter.shape)})"


def _first_id(parameters: list[Tensor]) -> int:
    """0, or, for an INT8 weight (a simulated one too) alone in its group, a number made from its layer's name.

    Loops that update per layer with one optimizer for each weight would otherwise give every weight the same id, and
    so the same rounding noise.
    """
    alone = parameters[0] if len(parameters) == 1 else None
    holder = alone if alone is None or isinstance(alone, ZeroWeight) else simulated(alone)
    return zlib.crc32(holder.label.encode()) >> 1 if holder is not None and holder.label else 0


def _agree_on_names(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """torch wants names in all groups or in none; where this one differs from the earlier ones it follows them."""
    if not groups:
        return
    parameters = group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    named = bool(parameters) and all(isinstance(p, tuple) for p in parameters)
    if "param_names" in groups[0] and "param_names" not in group and not named:
        group["param_names"] = [f"group {len(groups)}.{position}" for position in range(len(parameters))]
    elif "param_names" not in groups[0]:
        group.pop("param_names", None)
        group["params"] = [p[1] if isinstance(p, tuple) else p for p in parameters]
