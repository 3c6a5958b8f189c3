"""A linear layer with a float weight that is kept on the points of an INT8 grid: INT8 training, simulated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from q_galore_torch import ops
from q_galore_torch.nn.linear import check_layer_options
from q_galore_torch.nn.old_names import CodeNames, HookedParameter

# Beside the weights and not on them: torch drops the attributes of a Parameter that is copied. By weak references, or
# a weight would keep its layer and with it itself alive.
_layers = WeakTensorKeyDictionary()


class GridWeight(CodeNames, HookedParameter):
    """The float weight of a :class:`QLinear`."""

    def _layer(self) -> QLinear:
        layer = simulated(self)
        if layer is None:
            raise AttributeError("this parameter is not the weight of a QLinear any more")
        return layer


class QLinear(nn.Linear):
    """``nn.Linear`` whose float weight the forward rounds to the nearest point of its INT8 grid.

    The grid is that of :class:`q_galore_torch.QGaLoreLinear`: groups of ``group_size`` consecutive weights with
    ``w = scales * (code - zeros)``, codes 0 to 255. The gradient passes the rounding unchanged (straight-through), so
    any optimizer can train the weight; a group that has left its range gets a new one in the next forward.
    :class:`q_galore_torch.QGaLoreAdamW8bit` does more: it updates the codes as it does those of an INT8 layer, and
    writes the decoded numbers back.

    Args:
        in_features: n.
        out_features: m.
        bias: whether there is a bias. Default True.
        device: default torch's.
        dtype: of weight and bias, default torch's.
        weight_data: the weight to begin with, [m, n]; default ``nn.Linear``'s random one. It is rounded to the grid.
        bias_data: the bias to begin with, [m].
        num_bits: only 8.
        group_size: consecutive elements of the row-major weight that share a scale, default 256.
        stochastic_round: how QGaLoreAdamW8bit rounds this layer's codes; True (default): as its group says, False: to
            nearest.

    Attributes:
        weight: parameter [m, n]; every number lies on the grid after a step of QGaLoreAdamW8bit. It has the attributes
            ``group_size`` and ``stochastic_round`` of the layer, and ``backward_hook``.
        scales: buffer, float32 [ceil(mn / group_size)].
        zeros: buffer, int32 [ceil(mn / group_size)].

    Raises:
        ValueError: an option is out of range, ``weight_data`` or ``bias_data`` has another shape, or a weight is not
            finite.

    Note:
        A float32 weight gives its code back wherever its group lies; a bfloat16 one where ``|code - zeros| <= 128``, as
        nearly all do in a group about zero. In groups farther off, bfloat16 loses small updates: docs/simulation.md.

    Example:
        >>> layer = QLinear(64, 128)
        >>> torch.equal(layer.dequantize(), layer.weight)
        True
    """

    scales: Tensor
    zeros: Tensor
    label = ""  # the qualified name in the model that was prepared

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_data: Tensor | None = None,
        bias_data: Tensor | None = None,
        num_bits: int = 8,
        group_size: int = 256,
        stochastic_round: bool = True,
    ) -> None:
        _check_options(num_bits, group_size, stochastic_round)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.num_bits, self.group_size, self.stochastic_round = num_bits, group_size, stochastic_round
        for own, name, given in ((self.weight, "weight", weight_data), (self.bias, "bias", bias_data)):
            if given is None:
                continue
            if own is None or own.shape != given.shape:
                raise ValueError(
                    f"{name}_data must be {None if own is None else list(own.shape)}, got {list(given.shape)}"
                )
            own.data.copy_(given)
        self._add_grid()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, num_bits: int = 8, group_size: int = 256, stochastic_round: bool = True, label: str = ""
    ) -> QLinear:
        """The layer of an ``nn.Linear``, whose parameters it takes over; the weight is rounded to its grid.

        Args:
            linear: the layer to convert.
            num_bits, group_size, stochastic_round: as for the class.
            label: qualified name.
        """
        _check_options(num_bits, group_size, stochastic_round)
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)  # with its hooks, whose handles still remove them
        layer._parameters, layer._buffers = dict(linear._parameters), dict(linear._buffers)
        layer.num_bits, layer.group_size, layer.stochastic_round = num_bits, group_size, stochastic_round
        layer.label = label
        layer._add_grid()
        return layer

    def _add_grid(self) -> None:
        groups = -(-self.weight.numel() // self.group_size)
        self.register_buffer("scales", self.weight.new_full((groups,), 2.0**-100, dtype=torch.float32))
        # Not int16, as the codes' kernels have it: DDP broadcasts buffers, and neither gloo nor NCCL sends int16.
        self.register_buffer("zeros", self.weight.new_full((groups,), 128, dtype=torch.int32))
        self.requantize()

    # ------------------------------------------------------------ the grid

    @torch.no_grad()
    def requantize(self) -> None:
        """Give every group the range of its present weights, and round these to the new grid."""
        self._register()
        if self.weight.is_meta or self.weight.numel() == 0:
            return
        codes, scales, zeros = self._quantised()
        self.scales.copy_(scales)
        self.write(codes, self.scales, zeros)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight as codes uint8 [m, n] on its grid, with the scales and int16 zero points.

        Each weight's nearest point is taken; a group that has left its range gets a new one first.
        """
        weight, size = self.weight.detach(), self.group_size
        flat = weight.reshape(-1)
        scales, zeros = self._spread(self.scales), self._spread(self.zeros)
        codes = (flat.float() / scales).round_().add_(zeros)
        outside = ~((codes >= 0) & (codes <= 255))  # NaN too
        if outside.any():
            new_codes, new_scales, new_zeros = self._quantised()
            groups = F.pad(outside, (0, -flat.numel() % size)).view(-1, size).any(1)
            codes = torch.where(self._spread(groups), new_codes.view(-1).float(), codes)
            self.scales.copy_(torch.where(groups, new_scales, self.scales))
            self.zeros.copy_(torch.where(groups, new_zeros, self.zeros))
        return codes.to(torch.uint8).view(weight.shape), self.scales, self.zeros.to(torch.int16)

    def write(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Set weight and grid from codes that were read and changed."""
        self.weight.copy_(self._decoded(codes, scales, zeros))
        self.zeros.copy_(zeros)
        if scales is not self.scales:
            self.scales.copy_(scales)

    def _quantised(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self.weight.isfinite().all():
            raise ValueError(f"the weight of {self.label or 'a QLinear'} is not finite and has no INT8 grid")
        return _quantise(self.weight, self.group_size)

    def _spread(self, values: Tensor) -> Tensor:
        """One of each group's values for each weight, [mn]."""
        return values.repeat_interleave(self.group_size)[: self.weight.numel()]

    def _decoded(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        dtype = self.weight.dtype
        kernel = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        return ops.int8_dequantize(codes, scales, zeros, self.group_size, kernel).to(dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [m, n] that the forward uses, a new tensor without gradient, by default of the weight's dtype."""
        decoded = self._decoded(*self.read())
        return decoded if dtype is None else decoded.to(dtype)

    # ------------------------------------------------------------ module

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b`` with W rounded to its grid, for x [..., n]."""
        return F.linear(input, _Rounded.apply(self.weight, self), self.bias)

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Linear`` does, and give the weight a grid of its own."""
        super().reset_parameters()
        if "scales" in self._buffers:
            self.requantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """Moves and casts everything but the scales, which stay float32."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        self._register()
        return self

    def _register(self) -> None:
        if type(self.weight) in (nn.Parameter, HookedParameter):
            self.weight.__class__ = GridWeight
        _layers[self.weight] = weakref.ref(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and "scales" in self.__dict__.get("_buffers", ()):
            self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Loads the grid with the weight; a float weight alone, of an unprepared model, gets a grid of its own."""
        weight = state_dict.get(prefix + "weight")
        grid = {prefix + "scales", prefix + "zeros"} & state_dict.keys()
        if weight is not None and not grid and weight.shape == self.weight.shape:
            if not weight.isfinite().all():
                error_msgs: list[str] = arguments[-1]
                error_msgs.append(f"{prefix}weight must be finite to be quantised")
                return
            add_grid(state_dict, prefix, self.group_size)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The options that differ between layers."""
        rounding = "stochastic" if self.stochastic_round else "nearest"
        return f"{super().extra_repr()}, weight=float on an INT8 grid, group_size={self.group_size}, round={rounding}"


class _Rounded(torch.autograd.Function):
    """A layer's weight, rounded to its grid; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: QLinear) -> Tensor:
        return layer.dequantize()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def add_grid(state_dict: dict[str, Any], prefix: str, group_size: int) -> None:
    """Round a float weight of a state dict to a grid of its own, and add that, in place."""
    weight = state_dict[prefix + "weight"]
    codes, scales, zeros = _quantise(weight, group_size)
    decoded = ops.int8_dequantize(codes, scales, zeros, group_size, torch.float32)
    parts = {"weight": decoded.to(weight.dtype), "scales": scales, "zeros": zeros.int()}
    state_dict.update({prefix + name: part for name, part in parts.items()})


def simulated(parameter: Tensor) -> QLinear | None:
    """The layer whose weight a parameter is, None where it is no QLinear's."""
    found = _layers.get(parameter)
    layer = None if found is None else found()
    return layer if layer is not None and layer.weight is parameter else None


def _quantise(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return ops.int8_quantize(weight.detach().float().contiguous(), group_size)


def _check_options(num_bits: Any, group_size: Any, stochastic_round: Any) -> None:
    if num_bits != 8 or isinstance(num_bits, bool):
        raise ValueError(f"num_bits must be 8, got {num_bits!r}")
    check_layer_options(8, group_size, "full", "float32", True)
    if not isinstance(stochastic_round, bool):
        raise ValueError(f"stochastic_round must be True or False, got {stochastic_round!r}")
