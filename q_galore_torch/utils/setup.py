"""Model weights and optimizer states in files, by the public Q-GaLore code's names; its own files can be read."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q_galore_torch import ops
from q_galore_torch.nn import QGaLoreLinear, public_weights
from q_galore_torch.nn.simulate import QLinear, add_grid
from q_galore_torch.optim import QGaLoreAdamW8bit, public_state
from q_galore_torch.shards import some, sync_folder

_CODES = {"qweight": torch.uint8, "scales": torch.float32, "zeros": torch.int16}
_GRID = {"scales": torch.float32, "zeros": torch.int32}  # of a simulated layer, beside its float weight
_COMPUTED = "rotary_emb.inv_freq"  # older versions of transformers stored it with the weights


def saving_model_weight(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model.state_dict()`` to a file that ``torch.load(path, weights_only=True)`` reads.

    The file appears under its name when it is complete and on the disk; an older one stays until then.

    Args:
        model: of any kind.
        path: of the file.

    Example:
        >>> saving_model_weight(torch.nn.Linear(4, 4), "pytorch_model.bin")  # doctest: +SKIP
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"  # beside it, as a rename must not cross file systems
    try:
        with open(temporary, "wb") as file:
            torch.save(model.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(Path(path).parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def load_model_weight(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file of :func:`saving_model_weight`, ours or the public code's, into a model of any kind.

    INT8 layers take stored codes over as they are, with the public code's ``stochastic_round``, and quantise float
    weights; in all other layers stored codes are decoded, ``w = scales * (codes - zeros)``, with their grid where the
    layer is a simulated one, which gives a float weight without a grid one of its own.

    Args:
        model: prepared with either ``grad_mode``, a simulated or an ordinary one.
        path: of the file. Objects other than tensors, numbers and strings in it are refused.

    Returns:
        ``model``.

    Raises:
        ValueError: the file cannot be read, or an entry is missing, has no place in the model, has another shape or
            group size, or is a weight to be quantised that is not finite; nothing is loaded then.

    Example:
        >>> load_model_weight(model, "pytorch_model.bin")  # doctest: +SKIP
    """
    entries = read_tensors(path)
    try:
        rounding = _fit(entries, model)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} does not fit the model: {error}") from None
    model.load_state_dict(entries)
    for layer, stochastic_round in rounding:
        layer.stochastic_round = stochastic_round
    return model


def load_optimizer_state(optimizer: QGaLoreAdamW8bit, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load an optimizer's file, the public code's too, without the states of parameters that those projects projected.

    Their projectors are pickled objects and are skipped; projected parameters keep the state that the optimizer has,
    with a fresh subspace and moments of zero if it is new. All others take over moments and step, and the groups
    ``lr``, ``betas``, ``eps`` and ``weight_decay``. A file of this package is loaded as a whole.

    Args:
        optimizer: with the same parameters in the same groups.
        path: of a file with an optimizer's state dict, or with one as its entry ``"optimizer"``.

    Returns:
        The other entries of the file (``"scheduler"``, ``"update_step"``, ...).

    Raises:
        ValueError: the file cannot be read, or does not fit the optimizer; nothing is loaded then.

    Example:
        >>> rest = load_optimizer_state(optimizer, "optimizer.pt")  # doctest: +SKIP
    """
    with torch.serialization.safe_globals([(public_state.LeftOut, name) for name in public_state.PROJECTORS]):
        found = read_tensors(path)
    rest = dict(found)
    saved = rest.pop("optimizer") if "optimizer" in found else found
    if not isinstance(saved, dict):
        raise ValueError(f"the entry 'optimizer' of {os.fspath(path)} must be a dict, got {type(saved).__name__}")
    if public_state.is_public(saved):
        saved = public_state.converted(optimizer, saved, leave_out_projected=True)
    optimizer.load_state_dict(saved)
    return rest if "optimizer" in found else {}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A dict from a file of ``torch.save``, of tensors, numbers and strings alone.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is cut off, holds other objects or no dict.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # not of torch's reader, but of the file
            raise
        raise ValueError(
            f"{os.fspath(path)} is not a file of torch.save, is cut off, or holds objects other than tensors, numbers "
            "and strings, which are not loaded since they can run code"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)} must hold a dict, got {type(found).__name__}")
    return found


def _fit(entries: dict[str, Any], model: nn.Module) -> list[tuple[QGaLoreLinear | QLinear, bool]]:
    """Make a file's entries those of the model's state dict, in place; gives the layers' ``stochastic_round``."""
    layers: dict[str, QGaLoreLinear | QLinear] = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QLinear) or (isinstance(module, QGaLoreLinear) and module.weight_bits is not None)
    }
    own = model.state_dict()
    public = [prefix for prefix in _prefixes(entries, "weight") if public_weights.is_public(entries, prefix)]
    rounding = {prefix: public_weights.convert(entries, prefix) for prefix in public}
    for prefix in _prefixes(entries, "qweight"):
        _take_codes(entries, prefix, layers.get(prefix))
    for prefix in _prefixes(entries, "weight"):
        _take_floats(entries, prefix, layers.get(prefix), own)
    _match(entries, own)
    return [(layers[prefix], value) for prefix, value in rounding.items() if prefix in layers]


def _prefixes(entries: dict[str, Any], last: str) -> list[str]:
    return [key.removesuffix(last) for key in entries if key.rpartition(".")[2] == last]


def _take_codes(entries: dict[str, Any], prefix: str, layer: QGaLoreLinear | QLinear | None) -> None:
    """Codes as they are for an INT8 layer, decoded and with their grid for a simulated one, decoded for any other."""
    _check_codes(entries, prefix)
    size = int(entries[f"{prefix}group_size"])
    if layer is not None and size != layer.group_size:
        raise ValueError(f"{prefix}group_size must be {layer.group_size}, as in this layer, got {size}")
    if isinstance(layer, QGaLoreLinear):
        return
    grid = {f"{prefix}{key}": entries[f"{prefix}{key}"].to(dtype) for key, dtype in _GRID.items()}
    entries[f"{prefix}weight"] = public_weights.decoded(entries, prefix)
    if layer is not None:
        entries.update(grid)


def _take_floats(
    entries: dict[str, Any], prefix: str, layer: QGaLoreLinear | QLinear | None, own: dict[str, Any]
) -> None:
    """A float weight quantised for an INT8 layer; for a simulated one with a grid, which no other layer has."""
    weight, grid = entries[f"{prefix}weight"], [f"{prefix}{key}" for key in _GRID]
    if isinstance(layer, QLinear) and any(key in entries for key in grid):
        return
    if layer is None:
        if [getattr(entries.get(key), "dtype", None) for key in grid] == list(_GRID.values()):
            for key in [key for key in grid if key not in own]:
                del entries[key]
        return
    if not isinstance(weight, Tensor):
        return
    _check_shape(f"{prefix}weight", weight, (layer.out_features, layer.in_features))
    if not weight.isfinite().all():
        raise ValueError(f"{prefix}weight must be finite to be quantised")
    if isinstance(layer, QLinear):
        add_grid(entries, prefix, layer.group_size)
        return
    del entries[f"{prefix}weight"]
    parts = ops.int8_quantize(weight.detach().contiguous(), layer.group_size)
    entries.update({prefix + key: part for key, part in zip(_CODES, parts, strict=True)})
    entries[f"{prefix}group_size"] = torch.tensor(layer.group_size, device="cpu")


def _match(entries: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ValueError where entries and the model's differ in name or shape; what is computed now is left out."""
    for key in [key for key in entries if key.endswith(_COMPUTED) and key not in own]:
        del entries[key]
    for kind, keys in (("lacks", own.keys() - entries.keys()), ("alone has", entries.keys() - own.keys())):
        if keys:
            raise ValueError(f"the file {kind} {some(sorted(keys))}")
    for key, value in own.items():
        if isinstance(value, Tensor):
            _check_shape(key, entries[key], tuple(value.shape))


def _check_codes(entries: dict[str, Any], prefix: str) -> None:
    for key, dtype in _CODES.items():
        value = entries.get(prefix + key)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{prefix}{key} must be a {dtype} tensor, got {got}")
    size = entries.get(f"{prefix}group_size")
    if size is None or int(size) < 1:
        raise ValueError(f"{prefix}group_size must be an integer >= 1, got {size}")
    groups = -(-entries[f"{prefix}qweight"].numel() // int(size))
    for key in ("scales", "zeros"):
        _check_shape(prefix + key, entries[prefix + key], (groups,))


def _check_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must have shape {list(shape)}, got {got}")
