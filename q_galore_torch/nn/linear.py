"""A linear layer with an INT8 or float weight whose backward computes the projected gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from q_galore_torch import ops
from q_galore_torch.nn import leaf as leaves
from q_galore_torch.nn import public_weights
from q_galore_torch.nn.activations import projects
from q_galore_torch.nn.backward import LinearFunction
from q_galore_torch.nn.leaf import ZeroLeaf, ZeroWeight
from q_galore_torch.subspace import FULL, RIGHT, side_of

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
_GRAD_MODES = ("low_rank", "full")
_GRAD_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class QGaLoreLinear(nn.Module):
    """``y = x W^T + b`` with W stored as INT8 codes or as floats, trained by :class:`q_galore_torch.QGaLoreAdamW8bit`.

    Made by :func:`q_galore_torch.prepare_model`. The layer has one trainable leaf of zeros that takes no memory:

    - ``grad_mode="low_rank"``: ``coordinates``, of the shape of the projected gradient R. The backward computes
      ``R = (X P^T)^T dY`` (right), ``(P dY^T) X`` (left) or ``(P_L dY^T) (X P_R^T)`` (full) and never forms the full
      gradient, except in the steps in which a new basis is due, and for r > mn / (m + n) (full: r (m + n + r) > mn),
      where forming it is cheaper. The bases are lent by the optimizer.
    - ``grad_mode="full"``: ``weight``, of the weight's shape, whose gradient is the ordinary one.

    Args:
        in_features: n.
        out_features: m.
        bias: whether there is a bias, an ordinary parameter. Default True.
        rank: number of basis vectors r in low-rank mode (clipped to min(m, n)).
        weight_bits: 8 (default) or None for a float weight.
        group_size: consecutive elements of the row-major weight that share a scale, default 256.
        grad_mode: ``"low_rank"`` (default) or ``"full"`` (INT8 only).
        grad_dtype: dtype of R's accumulator, ``"float32"`` (default) or ``"bfloat16"`` (some 8 micro-batches at most).
        proj_type: which side of the gradient is projected: ``"std"`` (default) the shorter one, ``"reverse_std"`` the
            longer one, ``"right"`` (in_features) and ``"left"`` (out_features) the one they name, ``"full"`` both.
        save_projected: keep ``X P^T`` in place of the input X for a low-rank backward, where the right side is
            projected and it takes less memory (default True); no number depends on it. False: always X.
        device: default torch's.
        dtype: float dtype of the bias, a float weight and of decoded weights outside the forward, default torch's.

    Attributes:
        qweight: buffer, uint8 [m, n] (``weight_bits=8``).
        scales: buffer, float32 [ceil(mn / group_size)].
        zeros: buffer, int16 [ceil(mn / group_size)].
        bias: parameter [m] or None.
        stochastic_round: default True; False rounds the updates of an INT8 weight to nearest, whatever its group says.

    Raises:
        ValueError: an option is out of range.

    Note:
        ``weight`` of a low-rank INT8 layer is a decoded copy: an in-place write to it changes nothing, use
        ``set_weight``. The forward decodes W to x's dtype (autocast's under autocast), the backward once more.
        ``state_dict`` holds codes, scales, zeros, ``group_size`` (or the float weight) and bias, never the leaf.

    Source: Q-GaLore (arXiv 2407.08296), section 3; the low-rank backward is this package's own.
    """

    bias: nn.Parameter | None
    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    stochastic_round = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int | None = None,
        weight_bits: int | None = 8,
        group_size: int = 256,
        grad_mode: str = "low_rank",
        grad_dtype: str = "float32",
        proj_type: str = "std",
        save_projected: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer_options(weight_bits, group_size, grad_mode, grad_dtype, save_projected)
        if grad_mode == "full" and weight_bits is None:
            raise ValueError("grad_mode='full' with weight_bits=None is nn.Linear itself: use that")
        if rank is None and grad_mode == "low_rank":
            raise ValueError("grad_mode='low_rank' needs a rank, got None")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
        self.in_features, self.out_features = in_features, out_features
        self.weight_bits, self.group_size = weight_bits, group_size
        self.grad_mode, self.grad_dtype, self.proj_type = grad_mode, _GRAD_DTYPES[grad_dtype], proj_type
        self.save_projected = save_projected
        self.rank = None if rank is None else min(rank, in_features, out_features)
        self.side = side_of(proj_type, out_features, in_features)
        self.label = ""
        where = torch.empty(0, device=device, dtype=dtype)
        self.compute_dtype = where.dtype
        if weight_bits is None:
            self.weight = nn.Parameter(where.new_zeros(out_features, in_features), requires_grad=False)
        else:
            groups = (out_features * in_features + group_size - 1) // group_size
            self.register_buffer("qweight", where.new_full((out_features, in_features), 128, dtype=torch.uint8))
            self.register_buffer("scales", where.new_full((groups,), 2.0**-100, dtype=torch.float32))
            self.register_buffer("zeros", where.new_full((groups,), 128, dtype=torch.int16))
        self.register_parameter("bias", nn.Parameter(where.new_zeros(out_features)) if bias else None)
        self._leaf_name = "coordinates" if grad_mode == "low_rank" else "weight"
        kind = ZeroLeaf if grad_mode == "low_rank" else ZeroWeight
        shape = self._low_rank_shape() if grad_mode == "low_rank" else (out_features, in_features)
        self.register_parameter(self._leaf_name, kind(shape, where.device, self._leaf_dtype()))
        self._bind()

    # ------------------------------------------------------------ weight

    @classmethod
    def from_linear(cls, linear: nn.Linear, label: str = "", **options: Any) -> QGaLoreLinear:
        """The layer of an ``nn.Linear``, whose weight is quantised (or taken over, ``weight_bits=None``).

        Args:
            linear: the layer to convert; a float weight and the bias are shared with it, not copied. The leaf
                requires a gradient where its weight does.
            label: qualified name, for messages.
            options: as for the class.
        """
        weight = linear.weight.detach()
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            name = label or "the layer"
            raise ValueError(f"the weight of {name} must be float32, bfloat16 or float16, got {weight.dtype}")
        layer = cls.__new__(cls)  # a subclass may have a constructor of its own
        shape = linear.in_features, linear.out_features
        QGaLoreLinear.__init__(layer, *shape, False, device="meta", dtype=weight.dtype, **options)
        layer.label = layer.leaf.label = label
        layer._retie(weight.device)
        layer.leaf.requires_grad_(linear.weight.requires_grad)
        if layer.weight_bits is None:
            layer.register_parameter("weight", cast(nn.Parameter, linear.weight))
        else:
            for name, value in zip(("qweight", "scales", "zeros"), layer._quantise(weight), strict=True):
                layer._buffers[name] = value
        layer._parameters["bias"] = linear.bias
        layer.train(linear.training)
        for hooks in _HOOKS:
            setattr(layer, hooks, getattr(linear, hooks))  # shared, so that their handles still remove them
        if layer.weight_bits is None:
            linear.weight.requires_grad_(False)
        return layer

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if weight.device.type == "meta":
            groups = (weight.numel() + self.group_size - 1) // self.group_size
            return (
                torch.empty_like(weight, dtype=torch.uint8),
                weight.new_empty(groups, dtype=torch.float32),
                weight.new_empty(groups, dtype=torch.int16),
            )
        try:
            return ops.int8_quantize(weight.contiguous(), self.group_size)
        except ValueError as error:
            raise ValueError(f"{self.label or 'QGaLoreLinear'}: {error}") from None

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Replace the weight by a float one [m, n]; an INT8 layer quantises it, rounding to nearest."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"weight must be [{self.out_features}, {self.in_features}], got {list(weight.shape)}")
        if self.weight_bits is None:
            self.weight.copy_(weight)
            return
        for old, new in zip((self.qweight, self.scales, self.zeros), self._quantise(weight.detach()), strict=True):
            old.copy_(new)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [m, n] as floats, a new tensor without gradient, by default of the layer's dtype."""
        dtype = self.compute_dtype if dtype is None else dtype
        if self.weight_bits is None:
            return self.weight.detach().to(dtype, copy=True)
        return ops.int8_dequantize(self.qweight, self.scales, self.zeros, self.group_size, dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("_leaf_name") == "coordinates" and self.weight_bits is not None:
            return self.dequantize()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self.__dict__.get("_leaf_name") and not isinstance(value, ZeroLeaf):
            raise RuntimeError(
                f"the zero leaf {name} of {self.label or 'a QGaLoreLinear'} cannot be replaced by a "
                f"{type(value).__name__}; FSDP and fully_shard are not supported, use DistributedDataParallel"
                + ("; a weight is set by layer.set_weight(tensor) or load_state_dict()" if name == "weight" else "")
            )
        if name == "weight" and self.__dict__.get("_leaf_name") == "coordinates" and self.weight_bits is not None:
            raise RuntimeError(
                f"the INT8 weight of {self.label or 'a QGaLoreLinear'} cannot be assigned; use layer.set_weight(tensor)"
            )
        super().__setattr__(name, value)

    # ------------------------------------------------------------ leaf

    @property
    def leaf(self) -> ZeroLeaf:
        """The parameter of zeros that an optimizer takes: ``coordinates`` or ``weight``."""
        leaf = self._parameters[self._leaf_name]
        if not isinstance(leaf, ZeroLeaf):
            kind = type(leaf).__name__
            raise RuntimeError(
                f"the zero leaf of {self.label or 'a QGaLoreLinear'} was replaced by a {kind}: leave it alone"
            )
        return leaf

    def _bind(self) -> None:
        # A tensor, and on the CPU, as compiled code would be made anew for each value of an integer.
        with torch.inference_mode(False):
            self._number = torch.tensor(leaves.bind(self.leaf, self), device="cpu")

    def _low_rank_shape(self) -> tuple[int, int]:
        assert self.rank is not None
        if self.side == FULL:
            return self.rank, self.rank
        return self.rank, self.out_features if self.side == RIGHT else self.in_features

    def _leaf_dtype(self) -> torch.dtype:
        return self.grad_dtype if self.grad_mode == "low_rank" else self.compute_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QGaLoreLinear:
        """Moves and casts everything but the leaf, which is cut anew, and the scales, which stay float32."""
        leaf, parameters = self.leaf, dict(self._parameters)
        scales = self._buffers.get("scales")
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=leaf.device))
        self._parameters.pop(self._leaf_name)
        if scales is not None:
            self._buffers["scales"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            moved = dict(self._parameters)
            self._parameters.clear()
            for name in parameters:  # in the old order
                self._parameters[name] = leaf if name == self._leaf_name else moved[name]
            self._buffers["scales"] = scales
            if scales is None:
                self._buffers.pop("scales")
        if scales is not None:
            applied = fn(scales)
            self._buffers["scales"] = applied if applied.dtype == torch.float32 else scales.to(applied.device)
        if probe.is_floating_point():
            self.compute_dtype = probe.dtype
        self._retie(probe.device)
        return self

    def _retie(self, device: torch.device) -> None:
        leaf = self.leaf
        if (device, self._leaf_dtype()) != (leaf.device, leaf.dtype):
            self._parameters[self._leaf_name] = leaf.retied(device, self._leaf_dtype())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        name = self._leaf_name
        leaf = self._parameters.pop(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._parameters[name] = leaf
        if self.weight_bits is not None:
            destination[prefix + "group_size"] = torch.tensor(self.group_size, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads codes, the public code's too, or quantises a float ``weight`` from one of the unprepared model."""
        if public_weights.is_public(state_dict, prefix):
            try:
                self.stochastic_round = public_weights.convert(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(str(error))
                return
            if self.weight_bits is None:
                state_dict[prefix + "weight"] = public_weights.decoded(state_dict, prefix)
        saved, key = state_dict.pop(prefix + "group_size", None), prefix + "weight"
        if self.weight_bits is not None and prefix + "qweight" in state_dict and saved is not None:
            if int(saved) != self.group_size:
                error_msgs.append(f"{prefix}group_size must be {self.group_size}, as in this layer, got {int(saved)}")
                return
        if self.weight_bits is not None and key in state_dict and prefix + "qweight" not in state_dict:
            value = state_dict.pop(key)
            if tuple(value.shape) == (self.out_features, self.in_features):
                for name, part in zip(("qweight", "scales", "zeros"), self._quantise(value.detach()), strict=True):
                    state_dict[prefix + name] = part.to(self.qweight.device)
            else:
                error_msgs.append(f"{key} must be [{self.out_features}, {self.in_features}], got {list(value.shape)}")
        for name in ("qweight", "scales", "zeros"):
            own, given = self._buffers.get(name), state_dict.get(prefix + name)
            if own is not None and given is not None and given.dtype != own.dtype:
                error_msgs.append(f"{prefix + name} must be {own.dtype}, got {given.dtype}")
                del state_dict[prefix + name]
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        name = self._leaf_name
        order = list(self._parameters)
        leaf = self._parameters.pop(name)
        try:
            super()._load_from_state_dict(state_dict, prefix, *arguments)
        finally:
            loaded = {**self._parameters, name: leaf}
            self._parameters.clear()
            self._parameters.update((key, loaded[key]) for key in order)

    # ------------------------------------------------------------ forward

    def decoded(self, stored: Tensor, scales: Tensor | None, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight for a product in ``dtype``: decoded codes, or the float weight, cast only if it must be."""
        if scales is None or zeros is None:
            return stored.to(dtype)
        direct = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        return ops.int8_dequantize(stored, scales, zeros, self.group_size, direct).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` for x [..., n], computed in x's dtype, or autocast's under autocast; returns [..., m].

        Raises:
            RuntimeError: x is not of a float dtype, or, outside autocast, not of a float weight's own; or a transform
                of ``torch.func`` (vmap, grad, jvp) is active.
        """
        if not x.is_floating_point():
            raise RuntimeError(f"{self.label or 'QGaLoreLinear'} expects a {self.compute_dtype} input, got {x.dtype}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif self.weight_bits is None and x.dtype != self.weight.dtype:
            name, dtype = self.label or "QGaLoreLinear", self.weight.dtype
            raise RuntimeError(f"{name} has a float weight and expects a {dtype} input like it, got {x.dtype}")
        if torch.compiler.is_compiling():  # what is due, and so what to keep, changes from step to step: keep x
            project = False
        else:
            _refuse_transforms(self)
            project = projects(x, self)
        if self.weight_bits is None:
            return LinearFunction.apply(x, self.leaf, self.bias, self.weight, None, None, self, project)
        return LinearFunction.apply(x, self.leaf, self.bias, self.qweight, self.scales, self.zeros, self, project)

    def extra_repr(self) -> str:
        """Shapes, what is projected, and how weight and gradient are stored."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.rank is not None:
            side = {RIGHT: "right", FULL: "both"}.get(self.side, "left")
            text += f", rank={self.rank}, proj_type={self.proj_type} ({side})"
        if self.grad_mode == "low_rank":
            text += f", R={list(self.leaf.shape)} " + str(self.leaf.dtype).removeprefix("torch.")
        stored = f"{self.weight_bits} bits, group_size={self.group_size}"
        stored += "" if self.stochastic_round else ", round=nearest"
        if self.weight_bits is None:
            stored = str(self.compute_dtype).removeprefix("torch.")
        return f"{text}, weight={stored}, grad_mode={self.grad_mode}"


def _refuse_transforms(layer: QGaLoreLinear) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{layer.label or 'QGaLoreLinear'} does not support the transforms of torch.func (vmap, grad, jvp, ...): "
            "use backward() or torch.autograd.grad, or export_model for a model of ordinary layers"
        )


def check_layer_options(
    weight_bits: Any, group_size: Any, grad_mode: Any, grad_dtype: Any, save_projected: Any
) -> None:
    """Raise ValueError where a layer option is out of range."""
    if weight_bits is not None and (weight_bits != 8 or isinstance(weight_bits, bool)):
        raise ValueError(f"weight_bits must be 8 or None, got {weight_bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or not 1 <= group_size < 2**31:
        raise ValueError(f"group_size must be an integer >= 1, got {group_size!r}")
    if grad_mode not in _GRAD_MODES:
        raise ValueError(f"grad_mode must be 'low_rank' or 'full', got {grad_mode!r}")
    if grad_dtype not in _GRAD_DTYPES:
        raise ValueError(f"grad_dtype must be 'float32' or 'bfloat16', got {grad_dtype!r}")
    if not isinstance(save_projected, bool):
        raise ValueError(f"save_projected must be True or False, got {save_projected!r}")
