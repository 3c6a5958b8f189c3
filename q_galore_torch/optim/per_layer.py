"""Per-layer updates: every parameter is updated in its gradient hook, and its gradient freed at once.

A *window* is what one ``step()`` closes: ``accumulation_steps`` backward passes. Gradients sum as always; in the hooks
of the last pass each parameter is updated as soon as its sum is complete, so that with one pass per window no two
gradients exist at a time. What has a gradient left at ``step()`` (an expert without a token in the last pass, a window
that ends early) is updated there. Each parameter's update is the ordinary one, bit for bit.

Where the update needs what only the end of the window knows (the norm of all gradients, other processes' gradients),
everything is updated in ``step()``.
"""

from __future__ import annotations

import math
import sys
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from q_galore_torch.integrations.distributed import wrapper_of
from q_galore_torch.optim.clip import check_largest, scale, total_norm, usable_norm
from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit
from q_galore_torch.optim.update import Work, is_low_rank

CLIPS = ("global", "per_parameter", "last_norm")
_PARTLY = "what the backward pass had reached before it was updated; call abort_window() of the per-layer handle"


def enable_per_layer(
    optimizer: QGaLoreAdamW8bit,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    clip: str = "global",
    ddp: DistributedDataParallel | None = None,
) -> PerLayer:
    """Update every parameter as soon as its gradient is complete, and free the gradient.

    The loop stays as it is: ``accumulation_steps`` backward passes (the caller divides the loss), then ``step()``,
    which closes the update, and the scheduler's. The losses are those of the ordinary mode, bit for bit.

    Args:
        optimizer: whose parameters, all that require a gradient, are updated in their hooks.
        accumulation_steps: backward passes of one update, default 1. With more, gradients wait in ``.grad`` for the
            last one: R of low-rank layers, the ordinary gradient of others.
        max_grad_norm: the largest norm allowed, None (default) does not clip.
        clip: what is measured: ``"global"`` (default) all gradients together, as ``torch.nn.utils.clip_grad_norm_``
            does; they then wait for ``step()``. ``"per_parameter"`` each one by itself; ``"last_norm"`` all gradients
            of the update before, so that the first update is not clipped. These two free each gradient at once.
        ddp: the DistributedDataParallel wrapper of the model, None (default) without one. All updates are then made in
            ``step()``: gradients are complete only when the last bucket has been reduced, and its buckets hold all of
            them anyway.

    Returns:
        The handle: ``grad_norm``, ``abort_window()``, ``remove()``.

    Raises:
        TypeError: the optimizer is not a :class:`QGaLoreAdamW8bit`, or ``ddp`` not a DistributedDataParallel.
        ValueError: an option is out of range, or ``clip="global"`` meets projected parameters with ordinary gradients,
            all of which would have to be kept.
        RuntimeError: the optimizer updates per layer already, holds gradients, or its model is in a
            DistributedDataParallel that was not given.

    Example:
        >>> layer = torch.nn.Linear(8, 4)
        >>> opt = QGaLoreAdamW8bit(layer.parameters(), lr=0.01)
        >>> handle = enable_per_layer(opt)
        >>> layer(torch.ones(2, 8)).sum().backward()
        >>> layer.weight.grad is None
        True
        >>> opt.step()
        >>> handle.remove()

    Source: algorithm of GaLore's per-layer weight updates (arXiv 2403.03507, section 4.3); accumulation, clipping and
    the order of refreshes are this package's own.
    """
    if isinstance(getattr(optimizer, "optimizer", None), QGaLoreAdamW8bit):
        raise TypeError(
            f"per-layer updates are for plain loops, got a {type(optimizer).__name__}: accelerate and the Trainer "
            "clip, accumulate and schedule around the ordinary step(), which they call"
        )
    if not isinstance(optimizer, QGaLoreAdamW8bit):
        raise TypeError(f"optimizer must be a QGaLoreAdamW8bit, got {type(optimizer).__name__}")
    if not isinstance(accumulation_steps, int) or isinstance(accumulation_steps, bool) or accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be an integer >= 1, got {accumulation_steps!r}")
    if max_grad_norm is not None:
        check_largest("max_grad_norm", max_grad_norm, "a number > 0 or None")
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    if max_grad_norm is None and clip != "global":
        raise ValueError(f"clip={clip!r} needs a max_grad_norm")
    if ddp is not None and not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp must be a DistributedDataParallel or None, got {type(ddp).__name__}")
    if optimizer._per_layer is not None:
        raise RuntimeError("the optimizer updates per layer already: remove() the earlier handle first")
    return PerLayer(optimizer, accumulation_steps, max_grad_norm, clip, ddp)


class PerLayer:
    """The handle of an optimizer's per-layer updates, made by :func:`enable_per_layer`.

    Attributes:
        accumulation_steps: backward passes of one update.
        max_grad_norm: the largest norm allowed, or None.
        clip: what is measured.
        grad_norm: norm over all gradients of the last update before clipping: R of low-rank layers, the ordinary
            gradient elsewhere; NaN before there is one. To read it waits for the device.
    """

    def __init__(
        self,
        optimizer: QGaLoreAdamW8bit,
        accumulation_steps: int,
        max_grad_norm: float | None,
        clip: str,
        ddp: DistributedDataParallel | None,
    ) -> None:
        self.accumulation_steps, self.max_grad_norm, self.clip = accumulation_steps, max_grad_norm, clip
        self._norm: Tensor | None = None
        self._optimizer = weakref.ref(optimizer)  # which owns this object
        self._ddp = ddp
        self._hooks: dict[int, tuple[weakref.ref[Any], RemovableHandle]] = {}
        self._checked_ddp = False
        self._deferred = ddp is not None or (max_grad_norm is not None and clip == "global")
        for group in optimizer.param_groups:
            self.refuse_group(group)
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError("the parameters hold gradients already: call zero_grad() before enable_per_layer")
        self._refuse_unknown_ddp(optimizer)
        self._reset()
        self._attach(optimizer)
        optimizer._per_layer = self
        # GradScaler then hands over to step(), which can refuse it; otherwise it fails on gradients that are gone.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    @property
    def grad_norm(self) -> float:
        """See the class."""
        return math.nan if self._norm is None else self._norm.item()

    def _owner(self) -> QGaLoreAdamW8bit:
        optimizer = self._optimizer()
        if optimizer is None or optimizer._per_layer is not self:
            raise RuntimeError("these per-layer updates were removed, or their optimizer is gone")
        return optimizer

    def _reset(self) -> None:
        """Begin a new window."""
        self._passes = 0  # that are complete
        self._task: int | None = None  # autograd's number of the pass that runs
        self._fired: set[int] = set()  # parameters whose hook ran in it
        self._updating = False  # parameters have been updated in this window
        self._failed = ""  # why the window cannot be closed
        self._places: dict[int, tuple[Any, str, dict[str, Any]]] = {}
        self._norms: list[Tensor] = []

    # ------------------------------------------------------------ hooks

    def _attach(self, optimizer: QGaLoreAdamW8bit) -> None:
        """Hook every parameter that requires a gradient and has no hook yet."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                hooked = self._hooks.get(id(parameter))
                if parameter.requires_grad and (hooked is None or hooked[0]() is not parameter):
                    handle = parameter.register_post_accumulate_grad_hook(_Hook(self))
                    self._hooks[id(parameter)] = weakref.ref(parameter), handle

    @torch.no_grad()
    def on_gradient(self, parameter: Tensor) -> None:
        """What the hook of a parameter does when its gradient of a backward pass is complete."""
        self._enter()
        if id(parameter) in self._fired:
            self._fail(
                "a parameter got its gradient twice in one backward pass, as reentrant activation checkpointing does: "
                "checkpoint with use_reentrant=False"
            )
        self._fired.add(id(parameter))
        last = self._passes == self.accumulation_steps - 1
        if self._deferred or not last or id(parameter) not in self._places:
            return
        self._updating = True
        optimizer = self._owner()
        optimizer._apply([optimizer._work(*self._places[id(parameter)])], self._clip_each, _PARTLY)
        parameter.grad = None

    def _enter(self) -> None:
        """Notice that a backward pass begins, and be told when it ends."""
        task = torch._C._current_graph_task_id()
        if self._failed:
            raise RuntimeError(f"{self._failed}; call abort_window() of the per-layer handle first")
        if task == self._task:
            return
        inside = _inside_backward()
        if self._task is not None:
            if inside:  # reentrant checkpointing: a pass within the one that is known
                return
            self._fail("the backward pass before this one failed, or another thread runs one")
        if inside:
            self._fail(
                "the first gradient came from a backward pass within another, as in reentrant activation "
                "checkpointing: checkpoint with use_reentrant=False"
            )
        if self._passes == self.accumulation_steps:
            self._fail(f"more backward passes than accumulation_steps={self.accumulation_steps} came before step()")
        optimizer = self._owner()
        if not self._checked_ddp:
            self._refuse_unknown_ddp(optimizer)
            self._checked_ddp = True
        self._task = task  # first, so that step() refuses a pass that ends here
        optimizer._prepare()
        self._places = {id(entry[0]): entry for entry in optimizer._parameters()}
        torch.autograd.Variable._execution_engine.queue_callback(self._leave)

    def _leave(self) -> None:
        self._task = None
        self._fired.clear()
        self._passes += 1

    def _fail(self, why: str) -> NoReturn:
        self._failed = why
        raise RuntimeError(f"{why}; call abort_window() of the per-layer handle before going on")

    # ------------------------------------------------------------ clipping

    def _clip_each(self, work: list[Work]) -> None:
        """Measure single gradients, and scale each by what is known before the others are."""
        for item in work:
            norm = _norm_of([item])
            self._norms.append(norm)
            if self.max_grad_norm is not None:
                if self.clip == "last_norm":
                    last = item.group["last_grad_norm"]
                    norm = last.to(norm) if isinstance(last, Tensor) else torch.full_like(norm, last)
                scale([item.gradient], norm, self.max_grad_norm)

    def _clip_all(self, work: list[Work]) -> None:
        """Measure all gradients of the window, and scale them together."""
        if not work:
            return
        self._norms.append(_norm_of(work))
        if self.max_grad_norm is not None:
            scale([item.gradient for item in work], self._norms[-1], self.max_grad_norm)

    # ------------------------------------------------------------ windows

    @property
    def is_open(self) -> bool:
        """Whether a window has begun and is not closed."""
        return self._passes > 0 or self._task is not None or bool(self._failed)

    def refuse_open(self, what: str) -> None:
        """Raise RuntimeError inside a window."""
        if self.is_open:
            raise RuntimeError(
                f"{what} inside an update: {self._passes} of {self.accumulation_steps} backward passes are done and "
                "step() has not closed it (after a failed one call abort_window() of the per-layer handle)"
            )

    def close(self) -> None:
        """The optimizer's ``step()``: update what has a gradient left, and end the window."""
        optimizer = self._owner()
        self._refuse_scaler(optimizer)
        if not self._failed and self._task is not None:
            self._failed = "a backward pass of this update failed"
        if self._failed:
            raise RuntimeError(
                f"step() cannot close the update: {self._failed}; call abort_window() of the per-layer handle"
            )
        optimizer._prepare()
        work = optimizer._collect()
        together = self._deferred and self.clip == "global"
        clip = self._clip_all if together else self._clip_each
        optimizer._apply(work, clip, _PARTLY if self._updating else "nothing was updated")
        for item in work:
            item.parameter.grad = None
        if self._norms:  # else nothing was updated
            self._norm = torch.nn.utils.get_total_norm(self._norms)
            self._remember(optimizer, torch.where(self._norm.isfinite(), self._norm, 0.0))
        self._reset()
        self._attach(optimizer)

    def _remember(self, optimizer: QGaLoreAdamW8bit, norm: float | Tensor) -> None:
        for group in optimizer.param_groups:
            group["last_grad_norm"] = norm

    def restart(self) -> bool:
        """The optimizer's ``zero_grad()``: the window begins again, and True comes back, unless parameters have been
        updated in it; what waits for ``step()`` then belongs to the same update."""
        if self._updating:
            return False
        self._reset()
        return True

    def abort_window(self) -> None:
        """Give the window up after an exception: what has been updated stays updated, everything else is dropped.

        The update counts as made for the parameters that were reached, and as skipped for the others.
        """
        optimizer = self._owner()
        self._reset()
        optimizer.zero_grad()
        optimizer._mark_due()
        self._attach(optimizer)

    def remove(self) -> None:
        """Go back to the ordinary mode.

        Raises:
            RuntimeError: inside a window.
        """
        optimizer = self._optimizer()
        if optimizer is None or optimizer._per_layer is not self:
            return
        self.refuse_open("remove()")
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._remember(optimizer, 0.0)  # no update that comes later is the one after the last of these
        optimizer._per_layer = None
        del optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    # ------------------------------------------------------------ what is refused

    def refuse_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a group that cannot be updated in this mode."""
        if self._ddp is not None or not self._deferred or group["rank"] is None:
            return
        if not all(is_low_rank(parameter) for parameter in group["params"]):
            raise ValueError(
                "clip='global' would keep the full gradient of every projected parameter until step(); use "
                "clip='per_parameter' or 'last_norm', or low-rank layers (prepare_model)"
            )

    def _refuse_scaler(self, optimizer: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            del optimizer.grad_scale, optimizer.found_inf
            raise RuntimeError(
                "a GradScaler cannot be used with per-layer updates, which are made before it could unscale or skip: "
                "train in bfloat16, or call remove() of the per-layer handle"
            )

    def _refuse_unknown_ddp(self, optimizer: QGaLoreAdamW8bit) -> None:
        """Gradients that a reducer has not summed yet must not be used."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._ddp is not None or not distributed:
            return
        if wrapper_of([p for group in optimizer.param_groups for p in group["params"]]) is not None:
            raise RuntimeError("the model is in a DistributedDataParallel: give it to enable_per_layer as ddp=")


def _norm_of(work: list[Work]) -> Tensor:
    """The norm of the gradients that are used."""
    gradients, flags = [item.gradient for item in work], [item.flag for item in work if item.flag is not None]
    return usable_norm(gradients, flags) if flags else total_norm(gradients)


class _Hook:
    """A parameter's hook, which does not keep the optimizer alive."""

    def __init__(self, handle: PerLayer) -> None:
        self.handle = weakref.ref(handle)

    def __call__(self, parameter: Tensor) -> None:
        handle = self.handle()
        if handle is not None and handle._optimizer() is not None:
            handle.on_gradient(parameter)


def _inside_backward() -> bool:
    """Whether this hook runs in a backward pass that the backward of a Python autograd function has called."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        # BackwardCFunction's methods; the ``apply`` of a forward is a class method.
        node = code.co_name in ("apply", "apply_boxed") and code.co_varnames[:1] == ("self",)
        if node and code.co_filename.endswith("function.py") and "autograd" in code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
