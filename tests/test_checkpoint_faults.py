"""What goes wrong while a checkpoint is written or read: the old one stays, and one sentence names the file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import q_galore_torch as qg
from q_galore_torch import checkpoint, shards

INDEX = "model.safetensors.index.json"
# One save of the model below in 3 shards calls these as often; the last is after the index was replaced.
CALLS = {"open": 4, "fsync": 6, "replace": 4, "unlink": 3}


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16, bias=False))
    return qg.prepare_model(model, rank=2, target_modules=["0"])


def save(model: nn.Module, folder: Path) -> None:
    qg.save_model(model, folder, 400)


def is_equal(model: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def loaded(folder: Path) -> nn.Module:
    model = make(9)
    qg.load_model(model, folder)
    return model


def fail_at(name: str, call: int, fail: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the ``call``-th use of a function of the file system fail; returns the count of its uses."""
    owner: Any = {"open": shards, "unlink": Path}.get(name, os)
    real = getattr(owner, name, open)
    count = [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            fail()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper, raising=False)
    return count


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_calls_are_those_that_the_tests_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at a call that is never made would show nothing."""
    save(make(1), tmp_path)
    counts = {name: fail_at(name, 0, disk_full, monkeypatch) for name in CALLS}
    save(make(2), tmp_path)
    assert {name: count[0] for name, count in counts.items()} == CALLS


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name in ("open", "fsync", "replace") for call in range(1, CALLS[name] + 1)]
)
@pytest.mark.parametrize("old", [True, False])
def test_failing_write_leaves_the_old_checkpoint(
    name: str, call: int, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of the new one, unless it is the last sync that fails, when it is already there."""
    if old:
        save(make(1), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at(name, call, disk_full, patch)
        save(make(2), tmp_path)
    if (name, call) == ("fsync", CALLS["fsync"]):
        assert is_equal(loaded(tmp_path), make(2))
    else:
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert not old or is_equal(loaded(tmp_path), make(1))


def test_disk_that_fills_up_inside_a_shard_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make(1), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    class Full:
        def __init__(self, *args: Any) -> None:
            self.file, self.left = open(*args), 700

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def write(self, piece: Any) -> None:
            self.left -= memoryview(piece).nbytes
            if self.left < 0:
                disk_full()
            self.file.write(piece)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shards, "open", Full, raising=False)
        qg.save_model(make(2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before and is_equal(loaded(tmp_path), make(1))


@pytest.mark.parametrize(("name", "call"), [(name, call) for name in CALLS for call in range(1, CALLS[name] + 1)])
def test_killed_writer_leaves_a_whole_checkpoint(
    name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one before the index is replaced, the new one after; the next save removes what was left lying."""
    save(make(1), tmp_path)
    child = os.fork()
    if child == 0:
        try:
            fail_at(name, call, lambda: os._exit(9), monkeypatch)
            save(make(2), tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    new = name == "unlink" or (name, call) == ("fsync", CALLS["fsync"])
    assert is_equal(loaded(tmp_path), make(2 if new else 1))
    save(make(3), tmp_path)
    assert is_equal(loaded(tmp_path), make(3))
    index = json.loads((tmp_path / INDEX).read_text())
    assert {file.name for file in tmp_path.iterdir()} == {INDEX, *index["metadata"]["shards"]}


def test_interrupt_after_the_index_was_replaced_leaves_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the rename is raised just after it, when the new shards are the only ones that count: they stay."""
    save(make(1), tmp_path)
    real = os.replace

    def interrupted(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).name == INDEX:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        save(make(2), tmp_path)
    assert is_equal(loaded(tmp_path), make(2))
    save(make(3), tmp_path)
    assert is_equal(loaded(tmp_path), make(3)) and len(list(tmp_path.iterdir())) == 4


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text(name)
    save(make(1), tmp_path)
    save(make(2), tmp_path)
    assert (tmp_path / "model-00001-of-00002.safetensors").read_text() == "model-00001-of-00002.safetensors"
    assert (tmp_path / "config.json").exists() and (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize("name", [INDEX, "model.safetensors"])
@pytest.mark.parametrize("text", ["", "[1]", '{"metadata": {"total_size": 1}, "weight_map": {}}'])
def test_folder_of_another_writer_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match=rf"{name} was not written by this function: delete it or choose another"):
        save(make(1), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_folder_that_cannot_be_made_is_the_file_systems_error(tmp_path: Path) -> None:

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(make(1), tmp_path / "file")


# ------------------------------------------------------------ reading


def one_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def flip(folder: Path) -> None:
    data = bytearray(one_shard(folder).read_bytes())
    data[-5] ^= 1
    one_shard(folder).write_bytes(data)


def change_index(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["metadata"].update(changes)
        (folder / INDEX).write_text(json.dumps(content))

    return change


def misdirect(folder: Path) -> None:
    """Entries of one shard are said to be in another."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], one_shard(folder).name)
    (folder / INDEX).write_text(json.dumps(content))


def no_sizes(folder: Path) -> None:
    names = json.loads((folder / INDEX).read_text())["metadata"]["shards"]
    change_index(shards=dict.fromkeys(names, 5))(folder)


def escape(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["0.bias"] = "../" + one_shard(folder).name
    (folder / INDEX).write_text(json.dumps(content))


SHARD = r"model-00002-of-00003-[0-9a-f]{16}\.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "flipped bit": (flip, ValueError, SHARD + " is damaged: its checksum is not the one it was written with$"),
    "truncated": (
        *(lambda f: os.truncate(one_shard(f), 100), ValueError),
        SHARD + r" is truncated: it should have \d+ bytes and has 100$",
    ),
    "too long": (
        *(lambda f: os.truncate(one_shard(f), 10**5), ValueError),
        SHARD + r" is damaged: it should have \d+ bytes and has 100000$",
    ),
    "missing": (lambda f: one_shard(f).unlink(), FileNotFoundError, SHARD + " is missing from the checkpoint$"),
    "no index": (lambda f: (f / INDEX).unlink(), FileNotFoundError, f"holds no checkpoint: there is no {INDEX}$"),
    "no folder": (shutil.rmtree, FileNotFoundError, f"holds no checkpoint: there is no {INDEX}$"),
    "index truncated": (lambda f: os.truncate(f / INDEX, 50), ValueError, f"{INDEX} is damaged: it is not the index"),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), ValueError, f"{INDEX} is damaged: it is not the index"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), ValueError, f"{INDEX} is damaged: it is not the index"),
    "outside": (escape, ValueError, f"{INDEX} is damaged: it is not the index of a checkpoint$"),
    "no shards": (change_index(shards={}), ValueError, f"{INDEX} is damaged: it does not list its shards$"),
    "no aliases": (change_index(aliases=None), ValueError, f"{INDEX} is damaged: it does not list its shards$"),
    "no sizes": (no_sizes, ValueError, f"{INDEX} is damaged: it does not tell size and checksum of its shards$"),
    "other shard": (misdirect, ValueError, r"safetensors is damaged or truncated, or lacks [\w.]+: "),
    "version": (change_index(format_version=2), ValueError, "has format version 2, this package reads 1$"),
    "format": (change_index(format="pt"), ValueError, "was not written by save_model"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_changes_nothing(kind: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGES[kind]
    folder = tmp_path / "model"
    save(make(1), folder)
    damage(folder)
    model = make(2)
    with pytest.raises(error, match=message):
        qg.load_model(model, folder)
    assert is_equal(model, make(2))


def test_reading_holds_few_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is let go of whenever so much has been read, and never while a tensor of it is in use."""
    monkeypatch.setattr(shards, "READ_AT_ONCE", 100)
    opened = []
    real = shards.safe_open
    monkeypatch.setattr(shards, "safe_open", lambda *a, **k: opened.append(1) or real(*a, **k))
    save(make(1), tmp_path)
    model = make(2)
    qg.load_model(model, tmp_path)
    assert is_equal(model, make(1)) and len(opened) > 3


def test_nothing_is_pickled() -> None:
    for module in (checkpoint, shards):
        text = Path(module.__file__ or "").read_text()
        assert "pickle" not in text and "torch.load" not in text and "torch.save" not in text
