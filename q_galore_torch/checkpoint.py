"""Models in safetensors files: ``save_model`` and ``load_model``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from q_galore_torch import ops
from q_galore_torch.nn.linear import QGaLoreLinear
from q_galore_torch.shards import (
    INDEX,
    ShardReader,
    check_files,
    distinct,
    parse_size,
    place,
    read_index,
    refuse_others,
    some,
    write_checkpoint,
)

FORMAT, VERSION = "q_galore_torch", 1
CODES = ("qweight", "scales", "zeros", "group_size")


def save_model(model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    """Write a model's parameters and buffers, INT8 weights as codes, to safetensors files in a folder.

    A checkpoint that the folder holds is replaced in one step at the end: whatever stops the writing before (a full
    disk, a kill, a power cut) leaves the old one as it was. Until then both need room. One process writes at a time.

    Args:
        model: prepared or not, on any device. What ``state_dict()`` holds is written; zero leaves are not in it.
        folder: made if it is missing.
        max_shard_size: most bytes of tensors in one file, a number or a text like ``"200MB"`` (10^6) or ``"1GiB"``
            (2^30). Default ``"5GB"``. A larger tensor has a file of its own.

    Raises:
        ValueError: ``max_shard_size`` is not a size, or an entry of the state dict is no dense tensor with values.
        FileExistsError: the folder holds another writer's model.
        OSError: the file system refuses; the files that were begun are removed.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, folder)
        ...     load_model(model, folder)
    """
    most = parse_size(max_shard_size)
    tensors, aliases = distinct(model.state_dict())
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    refuse_others(path, FORMAT)
    write_checkpoint(path, tensors, most, {"format": FORMAT, "format_version": VERSION, "aliases": aliases})


def load_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read what :func:`save_model` wrote into a model, tensor by tensor.

    Args:
        model: as it was saved, or the same model prepared otherwise: codes are decoded where it has a float weight,
            and a float weight is quantised where it has codes. Floats are cast to its dtypes. Its tensors are written
            in place, so optimizers and wrappers keep what they hold.
        folder: of the checkpoint.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or one of its files is missing.
        ValueError: a file is damaged, entries are missing, left over or of another shape or type, or a weight that is
            to be quantised is not finite. The model is unchanged.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, folder)
        ...     load_model(model, folder)
    """
    path = Path(folder)
    files, metadata = read_index(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by save_model (from_pretrained reads models of Hugging Face)")
    if metadata.get("format_version") != VERSION:
        raise ValueError(f"{path} has format version {metadata.get('format_version')!r}, this package reads {VERSION}")
    shards, aliases = metadata.get("shards"), metadata.get("aliases")
    if not isinstance(shards, dict) or not isinstance(aliases, dict) or not shards.keys() >= set(files.values()):
        raise ValueError(f"{path / INDEX} is damaged: it does not list its shards")
    if not all(isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in shards.values()):
        raise ValueError(f"{path / INDEX} is damaged: it does not tell size and checksum of its shards")
    check_files(path, shards)
    loading = _Loading(model, ShardReader(path, files), aliases)
    loading.check_finite()
    with torch.no_grad():
        for write in loading.writes:
            write()


class _Loading:
    """What is to be written to a model, found and checked before anything is."""

    def __init__(self, model: nn.Module, reader: ShardReader, aliases: dict[str, str]) -> None:
        self.writes: list[Callable[[], object]] = []
        self._reader, self._aliases = reader, aliases
        self._used: set[str] = set()
        self._quantised: list[str] = []
        self._sources: dict[tuple[object, ...], tuple[str, str | None]] = {}
        own = model.state_dict(keep_vars=True)
        held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        coded = {
            f"{name}.".lstrip("."): module
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, QGaLoreLinear) and module.weight_bits is not None
        }
        for name, tensor in own.items():
            prefix, _, last = name.rpartition(".")
            prefix += "." if prefix else ""
            if prefix in coded and last in CODES:
                if last == CODES[0]:
                    self._find_codes(prefix, coded[prefix])
            else:
                if not isinstance(tensor, Tensor) or id(tensor) not in held or tensor.is_meta:
                    raise ValueError(f"{name} cannot be loaded: it is not a parameter or buffer with memory of its own")
                self._find(name, tensor, prefix)
        left = [name for name in (*reader, *aliases) if name not in self._used]
        if left:
            raise ValueError(f"the checkpoint has entries that the model has not: {some(left)}")

    def _stored(self, name: str) -> str | None:
        """The name under which an entry is stored, None where there is none."""
        stored = self._aliases.get(name, name)
        if stored not in self._reader:
            return None
        self._used.update((name, stored))
        return stored

    def _find(self, name: str, tensor: Tensor, prefix: str) -> None:
        """An ordinary entry: as it is stored, or a float weight from codes."""
        stored = self._stored(name)
        if stored is None and name == f"{prefix}weight" and prefix + CODES[0] in self:
            group_size = self._check_codes(prefix, tuple(tensor.shape))
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must be {tensor.dtype}, as in the model, and is stored as codes")
            parts = [self._named(prefix + part) for part in CODES[:3]]
            if self._is_new(name, tensor, parts[0]):
                self.writes.append(lambda: tensor.copy_(self._decoded(parts, group_size)))
            return
        if stored is None:
            raise ValueError(f"the checkpoint lacks {name}")
        dtype, shape = self._reader.kind(stored)
        if shape != tuple(tensor.shape):
            raise ValueError(f"{name} must be {list(tensor.shape)}, as in the model, and is {list(shape)}")
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            raise ValueError(f"{name} must be {tensor.dtype}, as in the model, and is {dtype}")
        if self._is_new(name, tensor, stored):
            self.writes.append(lambda: self._reader.copy_to(stored, tensor))

    def _find_codes(self, prefix: str, layer: QGaLoreLinear) -> None:
        """The weight of an INT8 layer: codes as they are stored, or quantised."""
        shape = layer.out_features, layer.in_features
        weight = self._stored(prefix + "weight")
        if prefix + CODES[0] in self:
            group_size = self._check_codes(prefix, shape)
            if group_size != layer.group_size:
                raise ValueError(f"{prefix}group_size must be {layer.group_size}, as in the model, and is {group_size}")
            for part in CODES[:3]:
                self._find(prefix + part, layer._buffers[part], prefix)  # type: ignore[arg-type]
        elif weight is None:
            raise ValueError(f"the checkpoint lacks {prefix}qweight")
        else:
            dtype, found = self._reader.kind(weight)
            if found != shape or dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{prefix}weight must be {list(shape)} and a float, and is {list(found)} and {dtype}")
            if self._is_new(prefix + "weight", layer.qweight, weight):
                self._quantised.append(weight)
                self.writes.append(lambda: layer.set_weight(self._reader.read(weight).to(layer.qweight.device)))

    def __contains__(self, name: str) -> bool:
        return self._aliases.get(name, name) in self._reader

    def _named(self, name: str) -> str:
        stored = self._stored(name)
        if stored is None:
            raise ValueError(f"the checkpoint lacks {name}")
        return stored

    def _check_codes(self, prefix: str, shape: tuple[int, ...]) -> int:
        """The group size of codes that fit together and make a weight of the given shape."""
        parts = [self._named(prefix + part) for part in CODES]
        kinds = [self._reader.kind(part) for part in parts]
        group_size = int(self._reader.read(parts[3])) if kinds[3] == (torch.int64, ()) else 0
        groups = (-(-shape[0] * shape[1] // group_size),) if group_size > 0 and len(shape) == 2 else ()
        expected = [(torch.uint8, shape), (torch.float32, groups), (torch.int16, groups), (torch.int64, ())]
        for part, kind, wanted in zip(parts, kinds, expected, strict=True):
            if kind != wanted:
                raise ValueError(f"{part} must be {wanted[0]} {list(wanted[1])}, and is {kind[0]} {list(kind[1])}")
        return group_size

    def _decoded(self, parts: list[str], group_size: int) -> Tensor:
        codes, scales, zeros = (self._reader.read(part) for part in parts)
        return ops.int8_dequantize(codes, scales, zeros, group_size, torch.float32)

    def _is_new(self, name: str, tensor: Tensor, source: str) -> bool:
        """Whether a tensor has no write yet; one that is tied has one only, from one entry."""
        if any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} cannot be loaded: it is expanded, so that its elements share memory")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} cannot be loaded: it was made under torch.inference_mode")
        first, its_source = self._sources.setdefault(place(name, tensor), (name, source))
        if its_source != source:
            raise ValueError(f"{first} and {name} are one tensor in the model and two in the checkpoint")
        return first == name

    def check_finite(self) -> None:
        """Raise where a weight cannot be quantised, which is otherwise found when others have been written."""
        for name in self._quantised:
            if not bool(self._reader.read(name).isfinite().all()):
                raise ValueError(f"{name} of the checkpoint is not finite: it cannot be quantised")
