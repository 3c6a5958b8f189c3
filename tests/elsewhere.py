"""Tests on another device: where their tensors are made, and definitions that stay on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Tests of the ops, the optimizer and the layer that ask for something of the CPU's.
_MESSAGES = "its messages name the CPU"
_MIXED = "mixed precision of the CPU"
_PLACES = "looks at the CPU's own buffers"
_LATER = "a GPU tells of gradients that are not finite later: test_asynchronous.py"
CPU_ONLY = {
    "test_int8_refuses_bad_input": _MESSAGES,
    "test_projector_refuses_bad_input": _MESSAGES,
    "test_dynamic8_refuses_bad_input": _MESSAGES,
    "test_adam8_refuses_bad_input_and_changes_nothing": _MESSAGES,
    "test_galore_refuses_bad_input_and_changes_nothing": _MESSAGES,
    "test_galore_refuses_bad_right_bases_and_changes_nothing": _MESSAGES,
    "test_wrong_arguments_are_refused": _MESSAGES,
    "test_nonfinite_raise_names_the_parameter_and_writes_nothing": _LATER,
    "test_nonfinite_skip_leaves_that_parameter_alone": _LATER,
    "test_plain_projected_gradients_are_limited_so_that_r_can_be_squared": _LATER,
    "test_adam8_results_do_not_depend_on_the_thread_count": "threads",
    "test_autocast_bfloat16": _MIXED,
    "test_autocast_around_backward_alone_rounds_nothing": _MIXED,
    "test_inputs_that_are_not_floats_are_refused": _MIXED,
    "test_a_float_weight_takes_inputs_of_its_own_dtype": _MIXED,
    "test_a_step_that_a_grad_scaler_skips_drops_the_stash": _MIXED,
    "test_the_buffer_grows_in_place_and_is_freed_with_its_last_leaf": _PLACES,
    "test_to_dtype_keeps_leaf_scales_and_order": _PLACES,
    "test_from_meta_by_to_empty": _PLACES,
    "test_metadata_of_a_full_mode_weight": _PLACES,
}

PLAIN = {
    torch.arange, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
    torch.tensor, torch.zeros,
}  # fmt: skip
RANDOM = {torch.normal, torch.rand, torch.randint, torch.randn, torch.randperm}


class Elsewhere(TorchFunctionMode):
    """Tensors for which no device is named are made on this one; random ones have the numbers that the CPU draws."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device: torch.device | None = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.device is not None and kwargs.get("device") is None and not kwargs.get("pin_memory"):
            if func in PLAIN:
                kwargs["device"] = self.device
            elif func in RANDOM:
                wants_grad = kwargs.pop("requires_grad", False)
                return func(*args, **kwargs).to(self.device).requires_grad_(wants_grad)
        return func(*args, **kwargs)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_changed(v, change) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(v, change) for v in value)
    return value


def on_cpu(function: Callable[..., Any], mode: Elsewhere) -> Callable[..., Any]:
    """A function that works on copies on the CPU; what it writes and returns goes where the arguments are."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        home, pairs = mode.device, []

        def copied(tensor: Tensor) -> Tensor:
            copy = tensor.detach().to("cpu", copy=True)
            pairs.append((tensor, copy, copy.clone()))
            return copy

        mode.device = None
        try:
            result = function(*_changed(args, copied), **{k: _changed(v, copied) for k, v in kwargs.items()})
        finally:
            mode.device = home
        for tensor, copy, before in pairs:
            if not torch.equal(copy, before):
                with torch.no_grad():
                    tensor.copy_(copy)
        return _changed(result, lambda tensor: tensor.to(home))

    return run
