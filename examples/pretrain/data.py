"""From documents to batches: read, hold out, tokenise, pack, and remember the position.

The held-out part is chosen among *documents*, before anything is packed, so no block holds text of both parts. It
depends on the documents alone and not on ``--seed``. Duplicates are dropped first, since a copy would leak.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UsageError, import_optional
from .processes import ALONE, Processes
from .tokenizer import Tokenizer, make_tokenizer

HELD_OUT_SHARE = 0.02
# With fewer documents than this a whole one is too coarse a share: the end of each is held out instead.
FEW_DOCUMENTS = 20
HELD_OUT_TAIL = 0.05
NOT_IN_THE_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Source(Protocol):
    """An endless source of training batches whose position can be saved.

    Of several processes each gets its own part of what all of them draw together; the position is the common one, so a
    run may be continued by another number of processes.
    """

    def next_batch(self, size: int) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Corpus:
    """Training batches, held-out tokens, and what identifies them."""

    train: Source
    held_out: Tensor
    tokenizer: Tokenizer
    description: str
    fingerprint: str


class PackedBlocks:
    """Blocks of ``length`` tokens from one long stream, in a new seeded order every epoch.

    Block i predicts tokens i*length + 1 ... (i+1)*length from the ones before, so blocks share one token and every
    token is predicted once an epoch. The position is the number of blocks drawn so far, and nothing else.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int, processes: Processes = ALONE) -> None:
        self.tokens, self.length, self.seed, self.processes = tokens, length, seed, processes
        self.blocks = (len(tokens) - 1) // length
        if self.blocks < 1:
            raise UsageError(f"the training text has {len(tokens)} tokens, too few for --max_length {length}")
        self.drawn = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def next_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [size, length] each."""
        first = self.drawn + self.processes.rank * size
        rows = torch.stack([self._block(first + i) for i in range(size)])
        self.drawn += self.processes.count * size
        return rows[:, :-1], rows[:, 1:]

    def _block(self, number: int) -> Tensor:
        epoch, index = divmod(number, self.blocks)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed + epoch * 1_000_003) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.blocks, generator=generator)
        start = int(self._order[index]) * self.length
        return self.tokens[start : start + self.length + 1].to(torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class StreamedBlocks:
    """Blocks packed on the fly from documents that arrive one by one, in the order they arrive.

    The position is the number of documents taken and the tokens of the last one not used yet.

    Args:
        documents: Called with a number of documents to skip, returns an iterator over the texts behind them.
        tokenizer: Turns texts into ids.
        length: Tokens of a block.
        processes: Every one reads and tokenises the whole stream, and keeps its part of each batch.
    """

    def __init__(self, documents: Any, tokenizer: Tokenizer, length: int, processes: Processes = ALONE) -> None:
        self.documents, self.tokenizer, self.length, self.processes = documents, tokenizer, length, processes
        self.taken, self.rest = 0, torch.empty(0, dtype=torch.int32)
        self._texts: Iterator[str] | None = None

    def next_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [size, length] each."""
        own = size * self.length
        needed = self.processes.count * own + 1
        pieces, have = [self.rest], len(self.rest)
        while have < needed:
            pieces.append(with_end(next(self.tokenizer.encode([self._next_text()])), self.tokenizer))
            have += len(pieces[-1])
        stream = torch.cat(pieces)
        self.rest = stream[needed - 1 :].clone()
        used = stream[self.processes.rank * own :][: own + 1].to(torch.int64)
        return used[:-1].view(size, self.length), used[1:].view(size, self.length)

    def _next_text(self) -> str:
        for _ in range(2):
            if self._texts is None:
                self._texts = self.documents(self.taken)
            text = next(self._texts, None)
            if text is not None:
                self.taken += 1
                return text
            self._texts, self.taken = None, 0  # the end: once more from the start
        raise UsageError("the streamed data set is empty")

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "rest": self.rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, self.rest, self._texts = state["taken"], state["rest"].clone(), None


def held_out_batches(tokens: Tensor, length: int, size: int, limit: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for an evaluation; the last ones may be smaller and shorter.

    Args:
        tokens: The held-out stream.
        length: Tokens of a block.
        size: Blocks of a batch.
        limit: 0 predicts every token but the first exactly once. Otherwise, where there are more tokens than this,
            every n-th block is taken, n being the smallest that keeps within the limit.
    """
    blocks = (len(tokens) - 1) // length
    stride = math.ceil(blocks / max(1, limit // length)) if 0 < limit < len(tokens) - 1 else 1
    starts = [index * length for index in range(0, blocks, stride)]
    for first in range(0, len(starts), size):
        rows = torch.stack([tokens[start : start + length + 1] for start in starts[first : first + size]])
        yield rows[:, :-1].to(torch.int64), rows[:, 1:].to(torch.int64)
    rest = tokens[blocks * length :].to(torch.int64)
    if len(rest) > 1 and stride == 1:
        yield rest[None, :-1], rest[None, 1:]


def load_corpus(
    kind: str,
    path: str | None,
    tokenizer: str,
    length: int,
    seed: int,
    held_out_tokens: int,
    vocabulary: int,
    processes: Processes = ALONE,
) -> Corpus:
    """Everything the training loop needs to know about its data.

    Args:
        kind: ``python`` (the running Python's own sources), ``text`` (a file or folder) or ``c4`` (streamed).
        path: The file or folder of ``text``.
        tokenizer: See ``make_tokenizer``.
        length: Tokens of a block.
        seed: Orders the training blocks.
        held_out_tokens: So many are read of a streamed validation part; 0 stands for 10 million.
        vocabulary: Entries the model has room for.
        processes: Those that share the training part.
    """
    if kind == "c4":
        return _load_c4(tokenizer, length, held_out_tokens, vocabulary, processes)
    root = Path(sysconfig.get_path("stdlib")) if kind == "python" else Path(str(path))
    documents = unique(read_documents(root, "*.py" if kind == "python" else "*"))
    train_texts, held_out_texts = split_documents(documents)
    fingerprint = hashlib.sha256("".join(map(_digest, documents)).encode()).hexdigest()
    chosen = make_tokenizer(tokenizer, train_texts, fingerprint)
    _check_vocabulary(chosen, vocabulary)
    held_out = tokenise(held_out_texts, chosen)
    if len(held_out) < 2:
        raise UsageError(f"{root} holds too little text to hold a part out")
    train = tokenise(train_texts, chosen)
    name = "Python's own sources" if kind == "python" else str(root)
    description = (
        f"{name}: {len(documents)} documents, {len(train):,} training and {len(held_out):,} held-out tokens "
        f"({chosen.name} tokenizer)"
    )
    return Corpus(PackedBlocks(train, length, seed, processes), held_out, chosen, description, fingerprint)


def read_documents(root: Path, pattern: str) -> list[str]:
    """The text of one file, or of all files under a folder in the order of their paths.

    Hidden files, tests and installed packages are left out of folders; files that are not UTF-8 are skipped.
    """
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(_walk(root, pattern))
    else:
        raise UsageError(f"there is no file or folder {root}")
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from None
    if not any(texts):
        raise UsageError(f"there is no UTF-8 text in {root}")
    return texts


def _walk(root: Path, pattern: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_IN_THE_CORPUS and name[0] != "."]
        for name in names:
            if name[0] != "." and Path(name).match(pattern):
                yield Path(folder, name)


def unique(documents: Iterable[str]) -> list[str]:
    """The documents without empty ones and without copies, in their order."""
    return list({_digest(text): text for text in documents if text.strip()}.values())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents.

    Whole documents are held out, those with the smallest digests, until they make up HELD_OUT_SHARE of the text.
    With fewer than FEW_DOCUMENTS the last HELD_OUT_TAIL of each is held out, cut where a line ends if possible.
    """
    if len(documents) < FEW_DOCUMENTS:
        cuts = [_line_end(text, int(len(text) * (1 - HELD_OUT_TAIL))) for text in documents]
        pairs = list(zip(documents, cuts, strict=True))
        return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]
    wanted = HELD_OUT_SHARE * sum(map(len, documents))
    held_out: set[int] = set()
    for index in sorted(range(len(documents)), key=lambda i: _digest(documents[i])):
        if wanted <= 0:
            break
        held_out.add(index)
        wanted -= len(documents[index])
    return (
        [text for i, text in enumerate(documents) if i not in held_out],
        [text for i, text in enumerate(documents) if i in held_out],
    )


def _line_end(text: str, near: int) -> int:
    """The position behind the last line end before ``near``, or ``near`` where there is none."""
    return text.rfind("\n", 0, near) + 1 or near


def tokenise(texts: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    """One stream of all texts, each followed by the tokenizer's end; 2 bytes a token where the ids allow it."""
    small = torch.uint16 if tokenizer.vocab_size <= 65536 else torch.int32
    pieces = [with_end(ids, tokenizer).to(small) for ids in tokenizer.encode(text for text in texts if text)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=small)


def with_end(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """The ids and the tokenizer's end, if it has one."""
    return ids if tokenizer.end is None else torch.cat([ids, ids.new_tensor([tokenizer.end])])


def _check_vocabulary(tokenizer: Tokenizer, vocabulary: int) -> None:
    if tokenizer.vocab_size > vocabulary:
        raise UsageError(
            f"the {tokenizer.name} tokenizer has {tokenizer.vocab_size} entries, more than the model's "
            f"vocab_size of {vocabulary}"
        )


def _load_c4(tokenizer: str, length: int, held_out_tokens: int, vocabulary: int, processes: Processes) -> Corpus:
    """The English part of C4, streamed; it is shuffled already, so its own order is kept."""
    if tokenizer.startswith("bpe"):
        raise UsageError("--tokenizer bpe cannot be trained on streamed data; give a tokenizer folder with --data c4")
    datasets = import_optional("datasets", "--data c4", 'pip install "q-galore-torch[hf]"')
    chosen = make_tokenizer(tokenizer, (), "c4")
    _check_vocabulary(chosen, vocabulary)

    def part(split: str) -> Any:
        try:
            return datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
        except Exception as error:  # connection errors come as many types
            raise UsageError(f"C4 cannot be reached: {str(error).strip().splitlines()[0]}") from None

    def training_texts(skip: int) -> Iterator[str]:
        return (row["text"] for row in part("train").skip(skip))

    limit = held_out_tokens or 10_000_000
    pieces, have = [], 0
    for ids in chosen.encode(row["text"] for row in part("validation")):
        pieces.append(with_end(ids, chosen))
        have += len(pieces[-1])
        if have > limit:
            break
    if have < 2:
        raise UsageError("the validation part of C4 is empty")
    held_out = torch.cat(pieces)[: limit + 1]
    description = f"C4 (en), streamed: {len(held_out):,} held-out tokens ({chosen.name} tokenizer)"
    blocks = StreamedBlocks(training_texts, chosen, length, processes)
    return Corpus(blocks, held_out, chosen, description, "c4/en")
