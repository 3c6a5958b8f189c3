"""INT8 models in the layout of compressed-tensors, which transformers and others read."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q_galore_torch.nn.leaf import ZeroLeaf
from q_galore_torch.nn.linear import QGaLoreLinear
from q_galore_torch.shards import distinct, parse_size, refuse_others, sync_folder, write_checkpoint, write_file

_log = logging.getLogger(__name__)

FORMAT, LAYOUT = "compressed-tensors", "int-quantized"
LEAST_GROUP = 32


def export_compressed(
    model: Any, folder: str | os.PathLike[str], group_size: int = 128, max_shard_size: int | str = "5GB"
) -> None:
    """Write a prepared Hugging Face model so that ``from_pretrained`` of transformers reads its INT8 weights.

    The layout is compressed-tensors' ``int-quantized`` with 8 bits, groups along the rows and zero points. A layer's
    codes are written as they are. Its groups, which run on over the ends of rows, are cut into smaller ones that do
    not: of ``gcd(group_size, in_features, its own group size)`` weights, with the scale and zero point of the group
    they are cut from. So the weights are those of :func:`q_galore_torch.export_model`, bit for bit in float32, but for

    - groups whose zero point is outside 0..255 (all weights of one sign): encoded anew, with an error of at most half a
      step, max|w| / 510; one warning says how many and the largest error;
    - layers whose groups would have less than 32 weights: written as floats.

    Args:
        model: prepared with ``weight_bits=8``, with a ``config`` of transformers. It is left as it is.
        folder: made if it is missing. ``config.json`` is replaced before the weights, which are replaced in one step.
        group_size: most weights of a group there, default 128, which more readers have kernels for than 256.
        max_shard_size: as for :func:`q_galore_torch.save_model`.

    Raises:
        ValueError: the model has no config, or no layer that can be written as INT8, or an option is out of range.
        FileExistsError: the folder holds another writer's model.
        OSError: the file system refuses.

    Example:
        >>> from q_galore_torch.integrations.compressed import export_compressed
        >>> export_compressed(model, "llama-int8")  # doctest: +SKIP
    """
    most = parse_size(max_shard_size)
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < LEAST_GROUP:
        raise ValueError(f"group_size must be an integer >= {LEAST_GROUP}, got {group_size!r}")
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise ValueError(f"the model must have a config of transformers, got a {type(model).__name__}")
    tensors, quantised, ignored = _entries(model, group_size)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    refuse_others(path, FORMAT)
    _write_config(model, path, _quantization_config(quantised, ignored))
    write_checkpoint(path, tensors, most, {"format": FORMAT})


def _entries(model: Any, group_size: int) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """What is stored, the group size of each INT8 layer, and the linear layers that are floats."""
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Linear, QGaLoreLinear))
    }
    quantised: dict[str, int] = {}
    made: dict[str, Tensor] = {}
    cast = _Recoded()
    for name, layer in layers.items():
        if not isinstance(layer, QGaLoreLinear) or layer.weight_bits is None:
            continue
        size = math.gcd(group_size, layer.in_features, layer.group_size)
        if size < LEAST_GROUP:
            made[f"{name}.weight"] = layer.dequantize()
            continue
        quantised[name] = size
        made.update((f"{name}.{key}", tensor) for key, tensor in _int8(layer, size, cast))
    if not quantised:
        raise ValueError(f"the model has no INT8 layer with groups of at least {LEAST_GROUP} weights along its rows")
    cast.report(len(quantised))
    codes = tuple(f"{name}." for name in layers if isinstance(layers[name], QGaLoreLinear))
    own = ("qweight", "scales", "zeros", "group_size")
    plain = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name.startswith(codes) and name.rpartition(".")[2] in own)
    }
    # What transformers ties when it loads is stored once, anything else that is shared under each of its names.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept, aliases = distinct(plain)
    kept.update((name, plain[name]) for name, first in aliases.items() if not {name, first} & set(tied))
    return {**kept, **made}, quantised, [name for name in layers if name not in quantised]


class _Recoded:
    """Counts groups that had to be encoded anew."""

    def __init__(self) -> None:
        self.count, self.total, self.error = 0, 0, 0.0

    def report(self, layers: int) -> None:
        if self.count:
            _log.warning(
                "%d of %d groups in %d layers have a zero point outside 0..255 and were encoded anew, with an error of "
                "at most %.3g",
                *(self.count, self.total, layers, self.error),
            )


def _int8(layer: QGaLoreLinear, size: int, recoded: _Recoded) -> Iterator[tuple[str, Tensor]]:
    """A layer's entries in the layout of ``int-quantized``."""
    rows, groups = layer.out_features, layer.in_features // size
    repeat = layer.group_size // size
    codes = layer.qweight.detach()
    scales, zeros = (part.repeat_interleave(repeat)[: rows * groups] for part in (layer.scales, layer.zeros.int()))
    outside = ((zeros < 0) | (zeros > 255)).nonzero()[:, 0]
    recoded.total += zeros.numel()
    if outside.numel():
        codes = codes.clone()
        weights = scales[outside, None] * (codes.view(-1, size)[outside].int() - zeros[outside, None]).float()
        new = _encoded(weights)
        codes.view(-1, size)[outside], scales[outside], zeros[outside] = new
        decoded = new[1][:, None] * (new[0].int() - new[2][:, None]).float()
        recoded.count += outside.numel()
        recoded.error = max(recoded.error, float((decoded - weights).abs().max()))
    yield "weight", _signed(codes)
    yield "weight_scale", scales.view(rows, groups)
    yield "weight_zero_point", _signed(zeros.to(torch.uint8)).view(rows, groups)


def _signed(codes: Tensor) -> Tensor:
    """0..255 as -128..127: the highest bit turned over."""
    return codes.bitwise_xor(128).view(torch.int8)


def _encoded(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of one sign with the zero point at an end: codes [k, size] uint8, scales [k], zero points int32 [k]."""
    scales = (weights.abs().amax(1) / 255).clamp(min=2.0**-100)
    zeros = torch.where(weights[:, 0] < 0, 255, 0).int()
    codes = (weights / scales[:, None]).round().int() + zeros[:, None]
    return codes.clamp(0, 255).to(torch.uint8), scales, zeros


def _quantization_config(quantised: dict[str, int], ignored: list[str]) -> dict[str, Any]:
    """What config.json says of the layout: a group of layers for each group size."""
    groups = {}
    for number, size in enumerate(sorted(set(quantised.values()))):
        weights = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": size}
        groups[f"group_{number}"] = {
            "format": LAYOUT,
            "targets": [name for name, its_size in quantised.items() if its_size == size],
            "weights": {**weights, "dynamic": False, "observer": "minmax"},
            "input_activations": None,
            "output_activations": None,
        }
    kind = {"quant_method": FORMAT, "format": LAYOUT, "quantization_status": "compressed"}
    return {**kind, "config_groups": groups, "ignore": ignored}


def _write_config(model: Any, folder: Path, quantization: dict[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # As save_pretrained does: what the config says may be of before model.float().
    config.dtype = next((p.dtype for p in model.parameters() if not isinstance(p, ZeroLeaf)), config.dtype)
    config.quantization_config = quantization
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # which refuses contradictions
    temporary = folder / ".config.json.tmp"
    write_file(temporary, [config.to_json_string().encode()])
    os.replace(temporary, folder / "config.json")
    sync_folder(folder)
