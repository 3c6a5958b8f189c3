"""The zero leaf: what the optimizer and trainers see of a layer whose weight is not an ordinary parameter.

A leaf is an ``nn.Parameter`` that is always zero and takes no memory: it is cut out of one zero buffer shared by all
leaves of a device and dtype. Its ``.grad`` is what counts. In low-rank mode (:class:`ZeroLeaf`) it has the shape of the
projected gradient R, in full mode (:class:`ZeroWeight`) the shape of the weight. The forward pass never reads it.

A write to a leaf (a foreign optimizer, an initialiser, an average of weights) would go into the shared buffer. The
buffer's version counter tells; :func:`check_untouched` then restores the zeros and raises.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from q_galore_torch.nn.old_names import OldNames

if TYPE_CHECKING:
    from q_galore_torch.nn.binding import Binding
    from q_galore_torch.nn.linear import QGaLoreLinear

_buffers: weakref.WeakValueDictionary[tuple[torch.device, torch.dtype], ZeroBuffer] = weakref.WeakValueDictionary()
_layers: weakref.WeakValueDictionary[int, QGaLoreLinear] = weakref.WeakValueDictionary()
_uids = itertools.count(1)
_DATA: Any = torch.Tensor.data


class ZeroBuffer:
    """Zeros of one device and dtype, as long as the longest leaf."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self.base = torch.zeros(0, device=device, dtype=dtype)

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> ZeroBuffer:
        """The buffer of a device and dtype; it lives as long as one of its leaves."""
        buffer = _buffers.get((device, dtype))
        if buffer is None:
            buffer = _buffers[device, dtype] = ZeroBuffer(device, dtype)
        return buffer

    def cut(self, shape: torch.Size) -> Tensor:
        """A view of the given shape that shares the buffer's memory and version counter."""
        count, have = math.prod(shape), self.base.numel()
        with torch.inference_mode(False), torch.no_grad():
            if count > have:
                self.base.resize_(count)  # in place: the leaves cut before share the storage
                self.base[have:].zero_()
            return self.base[:count].view(shape)


class _Refused:
    """An attribute that a wrapper sets on each parameter which it is about to replace by memory of its own."""

    def __init__(self, wrapper: str, instead: str) -> None:
        self._message = f"{wrapper} is not supported for %s: {instead}"

    def __get__(self, leaf: Any, owner: type) -> Any:
        raise AttributeError

    def __set__(self, leaf: ZeroLeaf, value: Any) -> None:
        raise RuntimeError(self._message % (leaf.label or "a QGaLoreLinear"))


class ZeroLeaf(nn.Parameter):
    """A parameter that is always zero and takes no memory; see the module's text.

    Attributes:
        uid: number of the layer that the leaf belongs to in this process, 0 for none.
        label: the layer's qualified name, for messages.
        binding: what the optimizer lends to the layer's backward, None without an optimizer.
    """

    uid: int
    label: str
    binding: Binding | None
    _mp_param = _Refused("DistributedDataParallel(mixed_precision=...)", "use torch.autocast")
    _fsdp_flattened = _Refused("FullyShardedDataParallel", "use DistributedDataParallel")
    _zero: ZeroBuffer
    _seen: tuple[int, int]

    def __new__(
        cls,
        shape: torch.Size | tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        requires_grad: bool = True,
    ) -> ZeroLeaf:
        zero = ZeroBuffer.of(device, dtype)
        leaf: ZeroLeaf = torch.Tensor._make_subclass(cls, zero.cut(torch.Size(shape)), requires_grad)
        leaf.uid, leaf.label, leaf.binding, leaf._zero = 0, "", None, zero
        leaf._seen = leaf._versions()
        return leaf

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def _versions(self) -> tuple[int, int]:
        return self._version, self._zero.base._version

    @property
    def data(self) -> Tensor:
        """The zeros as a plain tensor that shares the version counter, so that writes to ``.data`` are noticed too."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)

    def retied(self, device: torch.device, dtype: torch.dtype) -> ZeroLeaf:
        """This leaf cut out of the zeros of another device and dtype: the same object where torch allows it, else a new
        one with the same number (an optimizer takes it over at its next call)."""
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            gradient, self.grad = self.grad, None
            if (self.device.type == "meta") != (device.type == "meta"):
                leaf = type(self)(self.shape, device, dtype, self.requires_grad)
                leaf.uid, leaf.label, leaf.binding = self.uid, self.label, self.binding
                return leaf
            self._zero = ZeroBuffer.of(device, dtype)
            _DATA.__set__(self, self._zero.cut(self.shape))
            self._seen = self._versions()
            if gradient is not None:
                self.grad = gradient.to(device, dtype)
            return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroLeaf:
        """A new leaf of the same zeros; whoever copies the layer or the optimizer binds it."""
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                copied = type(self)(self.shape, self.device, self.dtype, self.requires_grad)
            copied.label = self.label
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        with torch._C.DisableTorchFunctionSubclass():
            return _rebuild, (type(self), tuple(self.shape), self.device, self.dtype, self.requires_grad, self.label)


def _rebuild(
    cls: type[ZeroLeaf], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, grad: bool, label: str
) -> ZeroLeaf:
    leaf = cls(shape, device, dtype, grad)
    leaf.label = label
    return leaf


# What may be asked of a full-mode weight without decoding it.
_METADATA = {
    *("shape", "dtype", "device", "layout", "ndim", "grad", "grad_fn", "requires_grad", "is_leaf", "names"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "retains_grad"),
    *("is_xpu", "is_mps", "is_sparse_csr", "itemsize", "nbytes", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("size", "stride", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "_version"),
    *("get_device", "storage_offset", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook"),
    *("is_same_size", "is_inference", "is_signed", "_is_view", "is_shared", "__hash__", "retain_grad", "ndimension"),
    *("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "new_zeros", "new_empty"),
    *("is_conj", "is_neg", "_is_zerotensor", "grad_dtype"),  # asked when a model is compiled
    *("new_ones", "new_full", "new_tensor", "untyped_storage", "data_ptr", "is_contiguous", "__len__"),
}


class ZeroWeight(OldNames, ZeroLeaf):
    """The ``weight`` of a full-mode layer: zeros that stand for the INT8 weight.

    Shape, dtype, device and gradient are the parameter's own. A read of its numbers gives the decoded weight; under
    grad mode it raises, since no gradient would flow. A write raises. What it answers under the names of the public
    Q-GaLore is in :class:`q_galore_torch.nn.old_names.OldNames`.
    """

    @property
    def data(self) -> Tensor:
        """The decoded weight, a new tensor: writing to it changes nothing."""
        return self._decoded()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(f"{self._what()} cannot be assigned; load a state dict or use layer.set_weight(tensor)")

    def _what(self) -> str:
        return f"the INT8 weight of {self.label or 'a QGaLoreLinear'}"

    def _layer(self) -> QGaLoreLinear:
        layer = layer_of(self)
        if layer is None:
            raise RuntimeError(f"{self._what()} was read, but its layer is gone")
        return layer

    def _decoded(self) -> Tensor:
        return self._layer().dequantize()

    def retied(self, device: torch.device, dtype: torch.dtype) -> ZeroLeaf:
        leaf = super().retied(device, dtype)
        if leaf is not self and isinstance(leaf, ZeroWeight):
            leaf.backward_hook = self.backward_hook
        return leaf

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name not in _METADATA:
            leaf = next(a for a in _flatten((args, kwargs)) if isinstance(a, ZeroWeight))
            written = any(a is leaf for a in _flatten(args[:1] or kwargs))  # nn.init passes its tensor by keyword
            if name.endswith("_") and not name.endswith("__") and written:
                raise RuntimeError(f"{leaf._what()} cannot be written by {name}; use layer.set_weight(tensor)")
            if torch.is_grad_enabled() and name not in ("detach", "__repr__", "__deepcopy__", "__reduce_ex__", "data"):
                raise RuntimeError(
                    f"{leaf._what()} was read by {name} under grad mode, where no gradient would flow through it; "
                    "call the layer, or read layer.dequantize() or weight.detach()"
                )
            args, kwargs = _decode((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ZeroWeight standing for:\n{self._decoded()!r}"


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flatten(item)]
    if isinstance(value, dict):
        return _flatten(list(value.values()))
    return [value]


def _decode(value: Any) -> Any:
    if isinstance(value, ZeroWeight):
        return value._decoded()
    if isinstance(value, (tuple, list)):
        return type(value)(_decode(item) for item in value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value


def bind(leaf: ZeroLeaf, layer: QGaLoreLinear, uid: int | None = None) -> int:
    """Make ``layer`` the owner of ``leaf``; returns the layer's number, a new one unless given."""
    uid = next(_uids) if uid is None else uid
    leaf.uid = uid
    _layers[uid] = layer
    return uid


def layer_of(leaf: ZeroLeaf) -> QGaLoreLinear | None:
    """The layer that a leaf stands for, found by number and not by identity; None where it is gone."""
    return _layers.get(leaf.uid)


def refuse_elsewhere(name: str, device: torch.device, state_device: torch.device) -> None:
    """Raise RuntimeError where a parameter was moved and its state was not."""
    if device != state_device:
        raise RuntimeError(
            f"{name} is on {device} and its optimizer state on {state_device}: make the optimizer after "
            "model.to(device), or let the state follow with opt.load_state_dict(opt.state_dict())"
        )


def numbered(uid: int) -> QGaLoreLinear:
    """The layer of a number.

    Raises:
        RuntimeError: it is gone.
    """
    layer = _layers.get(uid)
    if layer is None:
        raise RuntimeError(f"layer {uid} of a compiled model is gone: keep the model alive")
    return layer


def untouched(leaf: ZeroLeaf) -> bool:
    """Whether the leaf's memory still is zero. Costs two integer comparisons unless something wrote there."""
    if leaf._versions() == leaf._seen or leaf.device.type == "meta":
        return True
    if leaf._zero.base.count_nonzero().item() == 0:  # the buffer grew, or zeros were written (DDP's first broadcast)
        leaf._seen = leaf._versions()
        return True
    return False


def check_untouched(leaves: list[ZeroLeaf]) -> None:
    """Raise if anything wrote to the leaves' memory, after putting the zeros back.

    Raises:
        RuntimeError: naming a leaf.
    """
    with torch._C.DisableTorchFunctionSubclass():
        written = [leaf for leaf in leaves if not untouched(leaf)]
        if not written:
            return
        for leaf in written:
            with torch.no_grad():
                leaf._zero.base.zero_()
        for leaf in leaves:
            leaf._seen = leaf._versions()
    raise RuntimeError(
        f"something wrote to the zero leaf of {written[0].label or 'a QGaLoreLinear'}; an initialiser, optimizer "
        "or a weight average must leave these parameters alone (their value is always zero, only .grad is used); "
        "the zeros are restored"
    )
