"""Text to token ids: plain bytes, a tokenizer folder, or a byte-level BPE trained on the corpus.

A tokenizer has ``name``, ``vocab_size``, ``end`` (the id put after every document, or None) and
``encode(texts)``, which yields one int32 tensor of ids per text, without the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UsageError, import_optional

DEFAULT_BPE_SIZE = 8000
END_OF_TEXT = "<|endoftext|>"
INSTALL_TOKENIZERS = "pip install tokenizers"


class Tokenizer(Protocol):
    """What data.py needs to know about a tokenizer."""

    name: str
    vocab_size: int
    end: int | None

    def encode(self, texts: Iterable[str]) -> Iterator[Tensor]: ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    name = "byte"
    vocab_size = 257
    end = 256

    def encode(self, texts: Iterable[str]) -> Iterator[Tensor]:
        for text in texts:
            codes = bytearray(text.encode("utf-8"))
            yield (
                torch.frombuffer(codes, dtype=torch.uint8).to(torch.int32)
                if codes
                else torch.empty(0, dtype=torch.int32)
            )


class FastTokenizer:
    """A ``tokenizers.Tokenizer``: a BPE of ours, or the tokenizer.json of a folder."""

    def __init__(self, name: str, inner: Any, end: int | None) -> None:
        self.name, self.inner, self.end = name, inner, end
        self.vocab_size = inner.get_vocab_size()

    def encode(self, texts: Iterable[str]) -> Iterator[Tensor]:
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == 64:
                yield from self._encode(batch)
                batch = []
        yield from self._encode(batch)

    def _encode(self, batch: list[str]) -> Iterator[Tensor]:
        for encoding in self.inner.encode_batch(batch, add_special_tokens=False):
            yield torch.tensor(encoding.ids, dtype=torch.int32)


class HuggingFaceTokenizer:
    """Any other folder transformers can read, such as one with a SentencePiece tokenizer.model."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner, self.end = name, inner, inner.eos_token_id
        self.vocab_size = len(inner)

    def encode(self, texts: Iterable[str]) -> Iterator[Tensor]:
        for text in texts:
            yield torch.tensor(self.inner.encode(text, add_special_tokens=False), dtype=torch.int32)


def cache_folder() -> Path:
    """Where trained tokenizers are kept: $XDG_CACHE_HOME or ~/.cache, under q-galore-torch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "q-galore-torch"


def make_tokenizer(choice: str, corpus: Iterable[str], fingerprint: str) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names.

    Args:
        choice: ``byte``, ``bpe``, ``bpe:SIZE`` or a folder.
        corpus: Training documents, read only when a BPE has to be trained.
        fingerprint: Identifies the corpus in the name of the cached BPE.
    """
    if choice == "byte":
        return ByteTokenizer()
    if choice == "bpe" or choice.startswith("bpe:"):
        size = choice.partition(":")[2] or str(DEFAULT_BPE_SIZE)
        if not size.isdecimal() or not 300 <= int(size) <= 65536:
            raise UsageError(f"--tokenizer bpe:SIZE takes a size from 300 to 65536, got {size!r}")
        return _cached_bpe(int(size), corpus, fingerprint)
    if Path(choice).is_dir():
        return _from_folder(Path(choice))
    raise UsageError(f"--tokenizer takes byte, bpe, bpe:SIZE or a folder, and there is no folder {choice}")


def _cached_bpe(size: int, corpus: Iterable[str], fingerprint: str) -> Tokenizer:
    """A byte-level BPE trained on the corpus, or the same one trained earlier."""
    tokenizers = import_optional("tokenizers", "--tokenizer bpe", INSTALL_TOKENIZERS)
    path = cache_folder() / f"bpe-{size}-{fingerprint[:16]}.json"
    if path.is_file():
        inner = tokenizers.Tokenizer.from_file(str(path))
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(corpus, trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        inner.save(str(unfinished))
        unfinished.replace(path)
    return FastTokenizer(f"bpe:{size}", inner, inner.token_to_id(END_OF_TEXT))


def _from_folder(folder: Path) -> Tokenizer:
    """A tokenizer saved by ``save_pretrained``; transformers is needed only when there is no tokenizer.json."""
    name = folder.resolve().name
    if (folder / "tokenizer.json").is_file():
        tokenizers = import_optional("tokenizers", "a tokenizer folder", INSTALL_TOKENIZERS)
        try:
            inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the package raises bare Exception
            raise UsageError(f"cannot read {folder / 'tokenizer.json'}: {error}") from None
        inner.no_padding()
        inner.no_truncation()
        return FastTokenizer(name, inner, _end_of_folder(folder, inner))
    transformers = import_optional(
        "transformers", "a tokenizer folder without tokenizer.json", 'pip install "q-galore-torch[hf]"'
    )
    try:
        return HuggingFaceTokenizer(name, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{folder} holds no readable tokenizer: {str(error).strip().splitlines()[0]}") from None


def _end_of_folder(folder: Path, inner: Any) -> int | None:
    """The id of the end-of-text token: as the folder's config says, else a usual name, else none."""
    names = ["</s>", END_OF_TEXT, "<eos>", "[SEP]"]
    try:
        configured = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
        names.insert(0, configured["content"] if isinstance(configured, dict) else configured)
    except (OSError, ValueError, AttributeError, KeyError):
        pass
    ids = (inner.token_to_id(name) for name in names if isinstance(name, str))
    return next((number for number in ids if number is not None), None)
