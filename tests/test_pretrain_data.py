"""Reading, holding out, tokenising and packing in examples/pretrain/data.py and tokenizer.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from pretrain import data  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402
from pretrain.tokenizer import ByteTokenizer, make_tokenizer  # noqa: E402
from pretrain_support import make_documents, write_corpus  # noqa: E402


def decode(tokens: torch.Tensor) -> str:
    return bytes(t for t in tokens.tolist() if t < 256).decode()


def test_split_is_by_document_and_complete() -> None:
    documents = make_documents(200)
    train, held_out = data.split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)
    share = sum(map(len, held_out)) / sum(map(len, documents))
    assert data.HELD_OUT_SHARE <= share < data.HELD_OUT_SHARE + 0.01
    assert data.split_documents(documents) == (train, held_out)


def test_few_documents_are_cut_at_a_line_end() -> None:
    documents = ["\n".join(f"line {i} of {name}" for i in range(100)) for name in "ab"]
    train, held_out = data.split_documents(documents)
    assert [a + b for a, b in zip(train, held_out, strict=True)] == documents
    assert all(text.endswith("\n") for text in train)
    assert all(0.04 * len(d) <= len(h) <= 0.08 * len(d) for d, h in zip(documents, held_out, strict=True))


def test_copies_and_empty_documents_are_dropped() -> None:
    assert data.unique(["b", " \n", "a", "b", ""]) == ["b", "a"]


def test_no_block_holds_text_of_both_parts(tmp_path: Path) -> None:
    """Every block of either part is made of that part's documents, and no document appears in both."""
    folder = Path(write_corpus(tmp_path, 200))
    for i in range(0, 200, 2):  # a copy of a held-out document must not be trained on
        (folder / f"copy{i}.txt").write_text((folder / f"{i:03}.txt").read_text())
    corpus = data.load_corpus("text", str(folder), "byte", 64, 0, 0, 264)
    assert isinstance(corpus.train, data.PackedBlocks)

    def numbers(tokens: torch.Tensor) -> set[str]:
        return {part.split(":")[0] for part in decode(tokens).split("document ")[1:]}

    train, held_out = numbers(corpus.train.tokens), numbers(corpus.held_out)
    assert corpus.description.startswith(f"{folder}: 200 documents")
    assert len(train) + len(held_out) == 200 and not train & held_out and len(held_out) >= 4
    seen = torch.cat([corpus.train.next_batch(1)[0][0] for _ in range(corpus.train.blocks)])
    rows = {tuple(row.tolist()) for row in seen.view(-1, 64)}
    for inputs, _ in data.held_out_batches(corpus.held_out, 64, 1):
        assert tuple(inputs[0].tolist()) not in rows


def test_an_epoch_predicts_every_token_once() -> None:
    tokens = torch.arange(1001, dtype=torch.int32)
    blocks = data.PackedBlocks(tokens, 10, seed=0)
    inputs, targets = blocks.next_batch(100)
    assert torch.equal(inputs + 1, targets)
    assert sorted(targets.flatten().tolist()) == list(range(1, 1001))
    second = blocks.next_batch(100)[1]
    assert sorted(second.flatten().tolist()) == list(range(1, 1001)) and not torch.equal(targets, second)


def test_order_depends_on_the_seed_alone() -> None:
    tokens = torch.arange(1001, dtype=torch.int32)
    draws = [data.PackedBlocks(tokens, 10, seed).next_batch(30)[0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("drawn", [0, 7, 99, 100, 101, 250])
def test_position_is_restored(drawn: int) -> None:
    tokens = torch.arange(1001, dtype=torch.int32)
    first, second = (data.PackedBlocks(tokens, 10, seed=3) for _ in range(2))
    for _ in range(drawn):
        first.next_batch(1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.next_batch(60)[0], second.next_batch(60)[0])


@pytest.mark.parametrize("count", [2, 10, 11, 12, 95, 101, 137])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_held_out_batches_predict_every_token_once(count: int, size: int) -> None:
    batches = list(data.held_out_batches(torch.arange(count, dtype=torch.int32), 10, size))
    assert torch.cat([t.flatten() for _, t in batches]).tolist() == list(range(1, count))
    assert all(torch.equal(inputs + 1, targets) and len(inputs) <= size for inputs, targets in batches)


@pytest.mark.parametrize(("limit", "expected"), [(0, 1000), (1000, 1000), (999, 500), (500, 500), (100, 100), (10, 10)])
def test_held_out_batches_keep_within_the_limit(limit: int, expected: int) -> None:
    targets = [t for _, t in data.held_out_batches(torch.arange(1001, dtype=torch.int32), 10, 8, limit)]
    assert sum(t.numel() for t in targets) == expected
    assert len({int(t) for part in targets for t in part.flatten()}) == expected


def test_bytes_are_the_text_and_an_end() -> None:
    text = "naïve → 3"
    tokens = data.tokenise([text, "", "b"], ByteTokenizer())
    assert tokens.tolist() == [*text.encode(), 256, ord("b"), 256]
    assert tokens.dtype == torch.uint16


def test_python_corpus_is_the_running_one() -> None:
    corpus = data.load_corpus("python", None, "byte", 256, 0, 0, 264)
    assert isinstance(corpus.train, data.PackedBlocks)
    assert "\ndef " in bytes(t for t in corpus.train.tokens[:100_000].tolist() if t < 256).decode(errors="replace")
    assert len(corpus.train.tokens) > 5_000_000 and len(corpus.held_out) > 100_000


def test_files_that_are_not_utf8_hidden_or_tests_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("kept")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe latin")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.txt").write_text("a test")
    assert data.read_documents(tmp_path, "*") == ["kept"]
    with pytest.raises(UsageError, match="there is no UTF-8 text in"):
        data.read_documents(tmp_path / "b.txt", "*")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a few words, not more\n" * 4)
    with pytest.raises(UsageError, match="too few for --max_length 256"):
        data.load_corpus("text", str(file), "byte", 256, 0, 0, 264)


def test_bpe_is_trained_on_the_training_part_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="the BPE tokenizer needs the package tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    documents = make_documents(30)
    first = make_tokenizer("bpe:300", documents, "f" * 64)
    assert len(list((tmp_path / "cache" / "q-galore-torch").iterdir())) == 1
    again = make_tokenizer("bpe:300", [], "f" * 64)  # nothing to train on: it has to come from the cache
    ids = next(iter(first.encode(documents[:1])))
    assert torch.equal(ids, next(iter(again.encode(documents[:1])))) and len(ids) < len(documents[0])
    assert first.vocab_size == 300 and first.end is not None
    folder = tmp_path / "saved"
    folder.mkdir()
    first.inner.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    loaded = make_tokenizer(str(folder), [], "")
    assert torch.equal(ids, next(iter(loaded.encode(documents[:1])))) and loaded.end == first.end


class FakeC4:
    """As much of a streamed data set as the script uses."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def skip(self, count: int) -> FakeC4:
        return FakeC4(self.texts[count:])

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter([{"text": text} for text in self.texts])


def fake_datasets(calls: list[tuple[Any, ...]]) -> SimpleNamespace:
    def load_dataset(*path: str, split: str, streaming: bool) -> FakeC4:
        calls.append((*path, split, streaming))
        return FakeC4(make_documents(50) if split == "train" else ["held out text\n"] * 9)

    return SimpleNamespace(load_dataset=load_dataset)


def test_c4_is_streamed_packed_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(calls))
    corpus = data.load_corpus("c4", None, "byte", 32, 0, 100, 264)
    assert len(corpus.held_out) == 101 and decode(corpus.held_out).startswith("held out text")
    got = [corpus.train.next_batch(3) for _ in range(6)]
    assert calls[0] == ("allenai/c4", "en", "validation", True) and ("allenai/c4", "en", "train", True) in calls
    stream = data.tokenise(make_documents(50), ByteTokenizer()).to(torch.int64)
    assert torch.equal(torch.cat([inputs.flatten() for inputs, _ in got]), stream[: 6 * 96])
    assert torch.equal(torch.cat([targets.flatten() for _, targets in got]), stream[1 : 6 * 96 + 1])
    again = data.load_corpus("c4", None, "byte", 32, 0, 100, 264)
    again.train.load_state_dict(corpus.train.state_dict())
    for _ in range(400):  # over the end of the data set, which begins again
        assert torch.equal(corpus.train.next_batch(2)[0], again.train.next_batch(2)[0])
