"""The attributes that scripts written for the public Q-GaLore read and set on an INT8 weight.

There they hang on a uint8 parameter and are lost by ``.to()``, ``deepcopy`` and ``state_dict()``. Here they are views
of what the layer holds, so that they go wherever the layer goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from q_galore_torch.nn.public_weights import are_scales, are_zeros

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from q_galore_torch.nn.linear import QGaLoreLinear
    from q_galore_torch.nn.simulate import QLinear


class BackwardHook:
    """``weight.backward_hook = f``: f(weight) is called whenever a backward pass has completed the gradient.

    The public code calls it from its INT8 layer's backward alone, so that what else trains never hears of it.
    """

    _hook: tuple[Callable[[Any], Any], RemovableHandle] | None = None

    @property
    def backward_hook(self) -> Callable[[Any], Any] | None:
        """The function that is called, None for none."""
        return None if self._hook is None else self._hook[0]

    @backward_hook.setter
    def backward_hook(self, hook: Callable[[Any], Any] | None) -> None:
        if hook is not None and not callable(hook):
            raise TypeError(f"backward_hook must be callable with the weight, or None, got {hook!r}")
        if self._hook is not None:
            self._hook[1].remove()
        self._hook = None if hook is None else (hook, self._register(hook))

    def _register(self, hook: Callable[[Any], Any]) -> RemovableHandle:
        def call(weight: Any) -> None:  # torch refuses hooks that return something
            hook(weight)

        weight: Any = self
        trains = weight.requires_grad
        try:
            weight.requires_grad_(True)  # torch takes no hook of a frozen tensor, but calls one once it trains again
            handle: RemovableHandle = weight.register_post_accumulate_grad_hook(call)
            return handle
        finally:
            weight.requires_grad_(trains)


class HookedParameter(BackwardHook, nn.Parameter):
    """An ordinary parameter of a prepared model, whose ``backward_hook`` is called like that of an INT8 weight."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.data, self.requires_grad)  # without the hook, as in a deepcopy


def _rebuild(data: Tensor, requires_grad: bool) -> HookedParameter:
    return HookedParameter(data, requires_grad)


torch.serialization.add_safe_globals([_rebuild])  # for files that hold parameters and no detached tensors


def hook_parameters(model: nn.Module) -> None:
    """Make all ordinary parameters of a model :class:`HookedParameter`, the same objects with the same values."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            parameter.__class__ = HookedParameter


class CodeNames(BackwardHook):
    """What an INT8 weight answers, and the float weight of a layer that simulates one; mixed into a parameter.

    Attributes:
        group_size: consecutive elements of the row-major weight that share a scale; cannot be changed.
        stochastic_round: default True; False rounds this weight's updates to nearest, as a group's option does.
        backward_hook: default None. Stays over ``.to()``, is not copied by ``deepcopy``.
    """

    def _layer(self) -> QGaLoreLinear | QLinear:
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """See the class."""
        return self._layer().group_size

    @group_size.setter
    def group_size(self, value: int) -> None:
        _keep("group_size", self.group_size, value)

    @property
    def stochastic_round(self) -> bool:
        """See the class."""
        return self._layer().stochastic_round

    @stochastic_round.setter
    def stochastic_round(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"stochastic_round of an INT8 weight must be True or False, got {value!r}")
        self._layer().stochastic_round = value


class OldNames(CodeNames):
    """What an INT8 weight answers under the public code's attribute names beside those of :class:`CodeNames`.

    Attributes:
        scales: float32 [groups]. Assigning writes into the layer's buffer.
        zeros: int16 [groups]. Assigning writes into the layer's buffer.
        saved_data_dtype: of the codes, ``torch.uint8``; cannot be changed.
        float_grad: the gradient, ``.grad`` by its old name.
    """

    grad: Tensor | None

    def _layer(self) -> QGaLoreLinear:
        raise NotImplementedError

    @property
    def scales(self) -> Tensor:
        """See the class."""
        return self._layer().scales

    @scales.setter
    def scales(self, value: Tensor) -> None:
        _write("scales", self._layer().scales, value)

    @property
    def zeros(self) -> Tensor:
        """See the class."""
        return self._layer().zeros

    @zeros.setter
    def zeros(self, value: Tensor) -> None:
        _write("zeros", self._layer().zeros, value)

    @property
    def saved_data_dtype(self) -> torch.dtype:
        """See the class."""
        return self._layer().qweight.dtype

    @saved_data_dtype.setter
    def saved_data_dtype(self, value: torch.dtype) -> None:
        _keep("saved_data_dtype", self.saved_data_dtype, value)

    @property
    def float_grad(self) -> Tensor | None:
        """See the class."""
        return self.grad

    @float_grad.setter
    def float_grad(self, value: Tensor | None) -> None:
        self.grad = value


def _write(name: str, own: Tensor, value: Any) -> None:
    """Write a tensor of one value per group, as a vector or the public code's column, into a layer's buffer."""
    shapes = [list(own.shape), [*own.shape, 1]]
    if not isinstance(value, Tensor) or list(value.shape) not in shapes:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} of an INT8 weight must be a tensor {shapes[0]} or {shapes[1]}, got {got}")
    if value is own or value.device.type == "meta" or own.device.type == "meta":
        return  # nothing to copy: the values come with the layer's own
    value = value.detach().reshape(own.shape)
    if name == "scales":
        if not are_scales(value):
            raise ValueError("scales of an INT8 weight must be finite and > 0")
    elif not are_zeros(value):
        raise ValueError("zeros of an INT8 weight must be integers that int16 holds")
    with torch.no_grad():
        own.copy_(value)


def _keep(name: str, own: Any, value: Any) -> None:
    if value != own:
        raise ValueError(f"{name} of this INT8 weight is {own} and cannot be changed, got {value!r}: make a new layer")
