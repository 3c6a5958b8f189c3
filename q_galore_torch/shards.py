"""Folders of safetensors shards with an index: written so that they are complete or not there, read tensor by tensor.

The index is the checkpoint: shards that it does not name do not count, so replacing it, in one step of the file system,
is what replaces one checkpoint by the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of torch's dtypes in a safetensors header.
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.complex64: "C64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
# Pages of a mapped file that were read count as the process's memory until the mapping is gone.
READ_AT_ONCE = 2**26
_PIECE = 2**24
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What is written here, whole or left by a writer that was killed: shards and indexes by their mark.
_SHARD = re.compile(
    r"\.?model-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors(\.tmp)?|\.model\.safetensors\.index\.json\.[0-9a-f]{16}\.tmp"
)


def parse_size(value: int | str) -> int:
    """The bytes that a number or a text like ``"200MB"`` means.

    Raises:
        ValueError: it means none.
    """
    size = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())):
        size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0))
    if size < 1:
        raise ValueError(f"max_shard_size must be a number of bytes or a text like '200MB' or '5GB', got {value!r}")
    return size


def distinct(entries: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict to store, and for each further name of one of them the name it is stored under.

    Raises:
        ValueError: an entry is no dense tensor with values.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} cannot be saved: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.dtype not in DTYPES:
            raise ValueError(f"{name} cannot be saved: it is a {value.layout} tensor of {value.dtype}")
        if value.is_meta:
            raise ValueError(f"{name} cannot be saved: it is on the meta device and has no values")
        first = names.setdefault(place(name, value), name)
        if first == name:
            tensors[name] = value
        else:
            aliases[name] = first
    return tensors, aliases


def place(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """What tied tensors have in common: the same numbers in the same memory. Empty tensors are never tied."""
    if not tensor.numel():
        return (name,)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------ writing


def refuse_others(folder: Path, written_as: str) -> None:
    """A model of another writer is neither overwritten nor left where readers would take it for the new one.

    Raises:
        FileExistsError: there is one.
    """
    found = folder / SINGLE
    if not found.exists():
        found = folder / INDEX
        if not found.exists():
            return
        try:
            if json.loads(found.read_text(encoding="utf-8"))["metadata"]["format"] == written_as:
                return
        except (ValueError, KeyError, TypeError):
            pass
    raise FileExistsError(f"{found} was not written by this function: delete it or choose another folder")


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], most: int, metadata: Mapping[str, Any]) -> None:
    """Write shards and index, then remove the shards of the checkpoint that they replace.

    Args:
        folder: exists, and no other process writes there.
        tensors: by name, no two of the same memory.
        most: bytes of tensors in one shard.
        metadata: of the index; total size, and sizes and checksums of the shards are added.

    Raises:
        OSError: the file system refuses; what was there before is as it was, and what was begun is removed.
    """
    mark = secrets.token_hex(8)
    shards = _split(tensors, most)
    names = [f"model-{number:05d}-of-{len(shards):05d}-{mark}.safetensors" for number in range(1, len(shards) + 1)]
    index = folder / f".{INDEX}.{mark}.tmp"
    try:
        found = {}
        for name, shard in zip(names, shards, strict=True):
            found[name] = _write_shard(folder / name, {key: tensors[key] for key in shard})
        total = sum(tensor.nbytes for tensor in tensors.values())
        content = {
            "metadata": {**metadata, "total_size": total, "shards": found},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        write_file(index, [(json.dumps(content, indent=1) + "\n").encode()])
        sync_folder(folder)  # the shards' names are on the disk before the index that tells of them
        os.replace(index, folder / INDEX)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            if mark.encode() in (folder / INDEX).read_bytes():  # an interrupt, just after the index was replaced
                raise
        for path in [folder / name for name in names]:
            for leftover in (path, _temporary(path), index):
                with contextlib.suppress(OSError):
                    leftover.unlink()
        raise
    sync_folder(folder)  # and the index before the old shards are gone
    for file in folder.iterdir():
        if _SHARD.fullmatch(file.name) and file.name not in names:
            file.unlink()


def _split(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """The names of each shard, in order; a model without tensors has one empty shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > most and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor; safetensors' own writer makes all bytes of a file in memory first."""
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each begins at its alignment
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield from _pieces(tensors[name].detach())

    written = write_file(_temporary(path), pieces())
    os.replace(_temporary(path), path)
    return written


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _pieces(tensor: Tensor) -> Iterator[Any]:
    """A tensor's bytes in row-major order, some MB at a time where they must be copied."""
    if not tensor.is_contiguous() and tensor.nbytes > _PIECE:
        rows = len(tensor) * _PIECE // tensor.nbytes  # 0 where one alone is longer
        for part in tensor.split(rows) if rows else tensor:
            yield from _pieces(part)
        return
    flat = tensor.contiguous().resolve_conj().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), _PIECE):
        yield flat[begin : begin + _PIECE].cpu().numpy()


def write_file(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    """Write a file that is on the disk when this returns; its size and checksum."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------ reading


def read_index(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The file of each tensor and the metadata of a folder's index.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint: there is no {INDEX}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files, metadata = content["weight_map"], content.get("metadata") or {}
        whole = all(isinstance(file, str) and Path(file).name == file for file in files.values())
        if not whole or not isinstance(metadata, dict):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: it is not the index of a checkpoint") from None
    return files, metadata


def names_in(path: Path) -> list[str]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None


def check_files(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where a shard is missing or not as it was written.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: its size or checksum is another.
    """
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing from the checkpoint")
        size = path.stat().st_size
        if size != entry["size"]:
            kind = "truncated" if size < entry["size"] else "damaged"
            raise ValueError(f"{path} is {kind}: it should have {entry['size']} bytes and has {size}")
    for name, entry in expected.items():
        digest = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise ValueError(f"{folder / name} is damaged: its checksum is not the one it was written with")


class ShardReader:
    """The tensors of some safetensors files, mapped into memory anew whenever READ_AT_ONCE bytes have been read.

    Args:
        folder: of the files.
        files: file of each tensor.

    Raises:
        FileNotFoundError, ValueError: at the first use of a file that is missing or damaged.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self._folder, self._files = folder, dict(files)
        self._open: dict[Path, Any] = {}
        self._read = 0

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, from the header alone."""
        part = self._asked(name, lambda file: file.get_slice(name))
        dtype = _BY_NAME.get(part.get_dtype())
        if dtype is None:
            raise ValueError(f"{name} has the dtype {part.get_dtype()}, which is not supported")
        return dtype, tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor in the mapping: to be copied from and let go of, or its pages stay in memory."""
        tensor: Tensor = self._asked(name, lambda file: file.get_tensor(name))
        self._count(tensor)
        return tensor

    def copy_to(self, name: str, target: Tensor) -> None:
        """Copy a tensor into one of its shape, a large one some rows at a time."""
        rows = target.shape[0] if target.dim() else 0
        size = self.kind(name)[0].itemsize * target.numel()
        if rows < 2 or size <= READ_AT_ONCE:
            target.copy_(self.read(name))
            return
        step = max(1, rows * READ_AT_ONCE // size)
        for begin in range(0, rows, step):
            part: Tensor = self._asked(name, lambda file, b=begin: file.get_slice(name)[b : b + step])
            self._count(part)
            target[begin : begin + step].copy_(part)

    def _count(self, tensor: Tensor) -> None:
        """Let go of the mappings when enough was read; what is in use keeps its own."""
        self._read += tensor.nbytes
        if self._read >= READ_AT_ONCE:
            self._open.clear()
            self._read = 0

    def _asked(self, name: str, ask: Any) -> Any:
        path = self._folder / self._files[name]
        try:
            if path not in self._open:
                if not path.is_file():
                    raise FileNotFoundError(f"{path} is missing from the checkpoint")
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            return ask(self._open[path])
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated, or lacks {name}: {error}") from None
