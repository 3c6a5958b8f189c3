"""Progress bars: at a terminal, for what takes long, and without keeping what was done."""

from __future__ import annotations

import io
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import q_galore_torch as qg
from q_galore_torch import progress

pytest.importorskip("tqdm")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal. Not a fixture, after which pytest would take stderr again."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    return stream


def model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))


def test_preparing_and_exporting_show_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    prepared = qg.prepare_model(model(), rank=4, target_modules=["0", "1", "2"])
    assert "preparing" in terminal.getvalue() and "0/3" in terminal.getvalue()
    qg.export_model(prepared)
    assert "exporting" in terminal.getvalue()


def test_preparing_a_meta_model_shows_a_bar_of_all_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    with torch.device("meta"):
        empty = model()

    def draw(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)

    qg.prepare_model(empty, rank=4, target_modules=["0"], initialize=draw)
    assert "preparing" in terminal.getvalue() and "0/6" in terminal.getvalue()


def test_what_is_done_soon_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 60.0)
    qg.prepare_model(model(), rank=4, target_modules=["0"])
    assert terminal.getvalue() == ""


def test_no_bar_goes_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    qg.prepare_model(model(), rank=4, target_modules=["0"])
    assert stream.getvalue() == ""


@pytest.mark.parametrize("package", ["there", "missing"])
def test_items_are_let_go_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Or one float layer would lie beside the next while a large model is converted."""
    terminal = at_terminal(monkeypatch)
    if package == "missing":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    alive: list[weakref.ref[nn.Module]] = []

    def made() -> Iterator[nn.Module]:
        for _ in range(4):
            assert not alive or alive[-1]() is None
            item = nn.Linear(2, 2)
            alive.append(weakref.ref(item))
            yield item
            del item

    count = 0
    for item in progress.shown(made(), "making", 4):
        count += isinstance(item, nn.Linear)
        del item
    assert count == 4 and ("making" in terminal.getvalue()) == (package == "there")
