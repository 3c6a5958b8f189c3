"""``python -m q_galore_torch report``: what is read from a log, what the page and the picture hold, what is refused."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from q_galore_torch import __main__ as command_line
from q_galore_torch import report
from q_galore_torch.report import ReportError, write_report

pytest.importorskip("matplotlib", reason="a report is drawn with matplotlib")

Record = dict[str, Any]
FLAGS: Record = {"optimizer": "q_galore_adamw8bit", "update_proj_gap": 10, "lr": 0.0125, "unused": None}


def matrix(name: str = "layers.0.q", **changes: Any) -> Record:
    entry = {"name": name, "id": 1, "refreshes": 1, "gap": 10, "similarity": None, "captured_energy": 0.5}
    return {**entry, "held_out_energy": None, "seconds": 0.5, **changes}


def telemetry(step: int, *entries: Record) -> Record:
    return {"kind": "telemetry", "step": step, "parameters": list(entries)}


def train(step: int, loss: float | None) -> Record:
    return {"kind": "train", "step": step, "loss": loss}


def made_run() -> list[Record]:
    """Two matrices over 40 updates: one every 10 updates, the other stretched to 20 after its second basis."""
    rows: list[Record] = [{"kind": "run", "step": 0, "name": "my run", "flags": FLAGS}]
    steady, lazy = {1: 1, 11: 2, 21: 3, 31: 4}, {2: 1, 12: 2, 32: 3}
    for step in range(1, 41):
        if step in steady:
            energy = 0.9 - step / 100
            q = matrix(refreshes=steady[step], captured_energy=energy, similarity=0.5, seconds=0.5 * steady[step])
            rows.append(telemetry(step, q))
        if step in lazy:
            gap = 10 if step == 2 else 20
            rows.append(telemetry(step, matrix("layers.1.q", id=2, refreshes=lazy[step], gap=gap, seconds=0.25)))
        if step - 1 in lazy:
            count, gap = lazy[step - 1], 10 if step == 3 else 20
            judged = matrix("layers.1.q", id=2, refreshes=count, gap=gap, seconds=0.25, held_out_energy=step / 100)
            rows.append(telemetry(step, judged))
        rows.append(train(step, 5.0 - step / 10))
    rows.append({"kind": "eval", "step": 20, "loss": 3.25})
    last = {"step": 40, "groups_shifted": 30, "groups_reranged": 1200}
    q = matrix(refreshes=4, captured_energy=0.59, similarity=0.5, seconds=2.0, qr_fallbacks=1, **last)
    other = matrix("layers.1.q", id=2, refreshes=3, gap=20, seconds=0.25, qr_fallbacks=2, **last)
    rows.append(telemetry(40, {"name": "norm", "id": 0, **last}, q, other))
    rows.append({"kind": "eval", "step": 40, "loss": 1.5})
    rows.append({"kind": "summary", "step": 40, "loss": 1.5})
    return rows


def write_log(folder: Path, rows: list[Record], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


class Page(HTMLParser):
    """The cells of all tables but their heads, the attributes of all tags, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1][0] == "td":
            self.rows[-1][-1] += data.strip("\n")

    def __getitem__(self, first: str) -> list[str]:
        (cells,) = [row[1:] for row in self.rows if row and row[0] == first]
        return cells


def page_of(folder: Path) -> Page:
    """The page without its picture, which takes a second to draw."""
    return Page(report._page(report._read(folder / "log.jsonl"), b""))


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has its right checksum."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        (checksum,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert zlib.crc32(content[at + 4 : at + 8 + length]) == checksum
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


# ---------------------------------------------------------------- what is read


def test_summary_tells_the_figures_of_the_run(tmp_path: Path) -> None:
    page = page_of(write_log(tmp_path, made_run()))
    assert "my run" in page.text
    assert page["optimizer"] == ["q_galore_adamw8bit"]
    assert page["updates"] == ["40"]
    assert page["training loss, smoothed"] == ["1.1000"]  # of updates 38, 39, 40: 1.2, 1.1, 1.0
    assert page["held-out loss"] == ["1.5000"]
    assert page["held-out perplexity"] == [f"{math.exp(1.5):.2f}"]
    assert page["projected matrices"] == ["2"]
    assert page["refreshes"] == ["7"]
    assert page["share of a fixed gap of 10"] == ["88% of 8"]  # of two matrices at updates 1, 11, 21, 31
    assert page["seconds in refreshes"] == ["2.25"]
    assert page["QR fallbacks"] == ["3"]
    assert page["INT8 groups shifted"] == ["90"] and page["INT8 groups re-ranged"] == ["3,600"]
    assert page["--lr"] == ["0.0125"]
    assert not [row for row in page.rows if row and row[0] == "--unused"]


def test_layer_table_has_the_newest_values(tmp_path: Path) -> None:
    page = page_of(write_log(tmp_path, made_run()))
    assert page["layers.0.q"] == ["4", "10", "0.500", "0.590", "-", "2.000", "1", "30", "1,200"]
    assert page["layers.1.q"][:2] == ["3", "20"]


def test_series_follow_the_records(tmp_path: Path) -> None:
    run = report._read(write_log(tmp_path, made_run()) / "log.jsonl")
    first, second = run.layers
    assert first.counts == [(1, 1), (11, 2), (21, 3), (31, 4)]
    assert [step for step, _ in first.captured] == [1, 11, 21, 31, 40]
    assert second.gaps == [(2, 10.0), (12, 20.0)]
    assert second.held_out == [(3, 0.03), (13, 0.13), (33, 0.33)]
    assert report._refreshes_per_step(run) == {1: 1, 2: 1, 11: 1, 12: 1, 21: 1, 31: 1, 32: 1}
    assert [run.fixed(step) for step in (0, 1, 10, 11, 40, 41)] == [0, 2, 2, 4, 8, 10]
    table, levels = report._gap_table(run)
    assert levels == [10, 20] and table.shape == (2, 40)
    assert (table[0] == 0).all()
    assert math.isnan(table[1, 0]) and (table[1, 1:11] == 0).all() and (table[1, 11:] == 1).all()


def test_equal_energy_of_a_new_basis_is_a_point_of_its_own(tmp_path: Path) -> None:
    """Held-out energy and similarity are judged later: until then an entry repeats those of the basis before."""
    rows = [telemetry(1, matrix(held_out_energy=0.25)), telemetry(6, matrix(refreshes=2, held_out_energy=0.25))]
    (layer,) = report._read(write_log(tmp_path, rows) / "log.jsonl").layers
    assert layer.captured == [(1, 0.5), (6, 0.5)] and layer.held_out == [(1, 0.25)]


def test_layers_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    """Blocks by number and not by letters, matrices of a block as the optimizer has them; ids may be missing."""
    names = ["m.2.q", "m.2.k", "m.10.q", "m.10.k"]
    entries = [matrix(name, id=number) for number, name in enumerate(names)]
    run = report._read(write_log(tmp_path, [telemetry(1, *reversed(entries))]) / "log.jsonl")
    assert [layer.name for layer in run.layers] == names
    bare = [{"name": name, "refreshes": 1} for name in ("b.10", "b.9", "a")]
    run = report._read(write_log(tmp_path, [telemetry(1, *bare)]) / "log.jsonl")
    assert [layer.name for layer in run.layers] == ["a", "b.9", "b.10"]


def test_refreshes_before_the_log_are_not_drawn_as_one_bar(tmp_path: Path) -> None:
    """A run continued in another folder begins with what was done before."""
    rows = [telemetry(100, matrix(refreshes=9)), train(101, 2.0), telemetry(101, matrix(refreshes=10)), train(102, 2.0)]
    run = report._read(write_log(tmp_path, rows) / "log.jsonl")
    assert run.first_step == 100 and report._refreshes_per_step(run) == {101: 1}
    assert page_of(tmp_path)["share of a fixed gap of 10"] == ["91% of 11"]


def test_median_is_over_the_newest_values_of_all_layers() -> None:
    from statistics import median

    series = [[(1, 1.0), (5, 4.0)], [(2, 3.0)], [(5, 8.0)]]
    assert report._newest(series, median) == [(1, 1.0), (2, 2.0), (5, 4.0)]


def test_smoothing_keeps_a_line_and_has_no_lag() -> None:
    line = [(step, 3.0 - step / 100) for step in range(1000)]
    smooth = report._smoothed(line)
    assert smooth[10:-10] == pytest.approx([loss for _, loss in line[10:-10]])
    steps = report._smoothed([(step, float(step >= 500)) for step in range(1000)])
    assert steps[489] == 0 and steps[510] == 1 and steps[500] == pytest.approx(11 / 21)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.q.weight", "model.layers.11.k.weight"], ["0.q", "11.k"]),
        (["one.name"], ["one.name"]),
        (["same.a", "same.a"], ["a", "a"]),
        (["a.b", "a"], ["a.b", "a"]),
        (["x." + 30 * "a" + 30 * "b", "y"], ["x.aaaaaaaaaa…bbbbbbbbbbbb", "y"]),
    ],
)
def test_names_are_shortened_to_what_differs(names: list[str], short: list[str]) -> None:
    assert report._short_names(names) == short


# ---------------------------------------------------------------- page and picture


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    picture, page = write_report(write_log(tmp_path, made_run()))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    tags = Page(text).tags
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "iframe", "object"})
    (image,) = [attributes for tag, attributes in tags if tag == "img"]
    source = image["src"]
    assert source is not None and source.startswith("data:image/png;base64,") and image["alt"]
    assert base64.b64decode(source.partition(",")[2], validate=True) == picture.read_bytes()
    assert "prefers-color-scheme: dark" in text and text.startswith("<!DOCTYPE html>")


def test_text_of_the_log_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script> & \"$\\frac$\" \ud800 层"
    rows = [
        {"kind": "run", "step": 0, "name": evil, "flags": {evil: evil, "optimizer": evil}},
        telemetry(1, matrix(f"layer {evil}")),
        train(1, 2.0),
    ]
    page = Page(write_report(write_log(tmp_path, rows))[1].read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    shown = evil.replace("\ud800", "?")
    assert page[f"--{shown}"] == [shown] and page["optimizer"][0] == shown and f"layer {shown}" in page.text


@pytest.mark.parametrize(("layers", "height"), [(0, 1500), (2, 1500), (28, 1887), (200, 2425)])
def test_picture_is_as_wide_as_said_and_higher_for_more_layers(tmp_path: Path, layers: int, height: int) -> None:
    """12 inches at 125 a inch; four rows of 2.5 inches, 0.4 for the title, and 1.6 to 9 for the layers."""
    entries = [matrix(f"layers.{i}.q", id=i) for i in range(layers)]
    picture, _ = write_report(write_log(tmp_path, [telemetry(1, *entries), train(1, 2.0), train(2, 1.0)]))
    assert png_size(picture.read_bytes()) == (1500, height)


def test_picture_is_the_same_every_time(tmp_path: Path) -> None:
    write_log(tmp_path, made_run())
    first, second = (write_report(tmp_path, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def panels(folder: Path) -> dict[str, Any]:
    """The drawn panels by their titles."""
    from matplotlib.figure import Figure

    figure = Figure()
    report._draw(figure, figure.add_gridspec(5, 2), report._read(folder / "log.jsonl"))
    return {axes.get_title("left").split(" (")[0]: axes for axes in figure.axes}


def test_panels_show_the_figures(tmp_path: Path) -> None:
    drawn = panels(write_log(tmp_path, made_run()))
    assert len(drawn) == 8 and all(axes.get_xlabel() == "update" for axes in drawn.values())
    assert all(axes.get_xlim() == (0, 40) for title, axes in drawn.items() if title != "Refreshes" or axes.patches)
    bars = {bar.get_x() + 0.5: bar.get_height() for bar in drawn["Refreshes"].patches}
    assert bars == {step: 1 for step in (1, 2, 11, 12, 21, 31, 32)}
    run, fixed = drawn["Refreshes so far"].lines
    assert run.get_label() == "this run: 7" and fixed.get_label() == "fixed gap of 10: 8"
    assert list(run.get_ydata()) == [1, 2, 3, 4, 5, 6, 7, 7] and run.get_xdata()[-1] == 40
    assert list(drawn["Time in refreshes so far"].lines[0].get_ydata()) == [0.5, 0.75, 1.25, 1.75, 2.25, 2.25]
    rows = [label.get_text() for label in drawn["Updates between two refreshes of a layer"].get_yticklabels()]
    assert rows == ["0", "1"]
    energies = [drawn[title].get_ylim() for title in ("Captured at a refresh", "Captured of the next gradient")]
    assert energies[0] == energies[1]
    assert [line.get_label() for line in drawn["Loss"].lines][1:] == ["training, smoothed", "held out"]


def test_many_layers_are_named_once_a_block(tmp_path: Path) -> None:
    entries = [matrix(f"layers.{i // 5}.{'qkvou'[i % 5]}", id=i) for i in range(200)]
    drawn = panels(write_log(tmp_path, [telemetry(1, *entries), train(2, 1.0)]))
    rows = [label.get_text() for label in drawn["Updates between two refreshes of a layer"].get_yticklabels()]
    assert rows == [f"{i}.q" for i in range(40)]


def test_long_runs_have_few_bars_that_lose_nothing(tmp_path: Path) -> None:
    entries = [telemetry(step, matrix(refreshes=1 + step // 7)) for step in range(0, 20000, 7)]
    drawn = panels(write_log(tmp_path, [*entries, train(1, 1.0), train(20000, 1.0)]))["Refreshes"]
    assert len(drawn.patches) <= 150 and drawn.get_ylabel() == "matrices in 134 updates"
    assert sum(bar.get_height() for bar in drawn.patches) == len(entries) - 1  # the one of step 0 was before


# ---------------------------------------------------------------- logs that lack something


def no_data(folder: Path) -> set[str]:
    return {title for title, axes in panels(folder).items() if any(t.get_text() == "no data" for t in axes.texts)}


SUBSPACES = {
    "Captured at a refresh", "Captured of the next gradient", "Updates between two refreshes of a layer", "Refreshes",
    "Refreshes so far", "Similarity to the old basis", "Time in refreshes so far",
}  # fmt: skip


def test_run_without_subspaces_says_no_data(tmp_path: Path) -> None:
    rows = [train(1, 2.0), train(2, 1.0), telemetry(2, {"name": "embedding", "id": 0, "step": 2, "groups_shifted": 0})]
    page = page_of(write_log(tmp_path / "my run", rows))
    assert no_data(tmp_path / "my run") == SUBSPACES
    assert "this run has no subspaces" in page.text and page["refreshes"] == ["-"]
    assert not [row for row in page.rows if row and row[0].startswith("share of")]
    assert "my run" in page.text and page["optimizer"] == ["-"]


def test_telemetry_without_energies_is_drawn(tmp_path: Path) -> None:
    """Of a version that knows neither energies nor seconds."""
    old = {"name": "a", "refreshes": 1, "gap": 10, "similarity": 0.5}
    write_log(tmp_path, [telemetry(1, old), train(1, 2.0)])
    assert no_data(tmp_path) == {"Captured at a refresh", "Captured of the next gradient", "Time in refreshes so far"}
    assert page_of(tmp_path)["a"] == ["1", "10", "0.500", "-", "-", "-", "-", "-", "-"]


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    tail = '{"kind": "train", "step": 3, "loss": NaN}\n{"kind": "train", "step": 4, "loss": -Infinity}\n'
    tail += '{"kind": "train", "step": 5, "loss": "two"}\n{"kind": "eval", "step": 5, "loss": 1e308}\n'
    page = page_of(write_log(tmp_path, [train(1, 2.0), train(2, None)], tail))
    assert page["training loss, smoothed"] == ["2.0000"] and page["updates"] == ["5"]
    assert page["held-out loss"] == page["held-out perplexity"] == ["-"]


def test_no_losses_at_all_is_no_data(tmp_path: Path) -> None:
    write_log(tmp_path, [train(1, None)])
    assert "Loss" in no_data(tmp_path)
    assert page_of(tmp_path)["training loss, smoothed"] == ["-"]


def test_entries_of_the_wrong_kind_are_left_out(tmp_path: Path) -> None:
    odd = [None, 3, {"name": 4, "refreshes": 1}, {"name": "x", "refreshes": "many"}, {"name": "y", "refreshes": True}]
    odd.append({"name": "z", "refreshes": 1e299})  # too large to be drawn
    bad = matrix(gap="wide", similarity=[1], captured_energy={}, held_out_energy="", seconds=None)
    rows = [{"kind": "telemetry", "step": 1, "parameters": 7}, telemetry(2, *odd, bad)]  # type: ignore[arg-type]
    rows.append({"kind": "run", "step": 2, "name": 5, "flags": []})
    page = page_of(write_log(tmp_path / "folder", rows))
    assert page["projected matrices"] == ["1"] and page["layers.0.q"] == ["1", *8 * ["-"]] and "folder" in page.text


def test_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    page = page_of(write_log(tmp_path, [train(1, 2.0)], '{"kind": "train", "step": 2, "lo'))
    assert page["updates"] == ["1"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no records"),
        ("\n\n", "has no records"),
        ('{"kind": "tr', "has no records"),
        ('{"kind": "train", "step": 1}\n{"kind"\n{"kind": "train", "step": 2}\n', "line 2 of .* is no JSON object"),
        ('{"kind"\n', "line 1 of .* is no JSON object"),
        ("[1, 2]\n", "line 1 of .* is no record of a run: it needs a kind and a step"),
        ('{"loss": 1.0, "step": 3}\n', "line 1 of .* is no record of a run"),
        ('{"kind": "train", "step": "3"}\n', "line 1 of .* is no record of a run"),
        ('{"kind": "train", "step": true}\n', "line 1 of .* is no record of a run"),
        ('{"kind": "train", "step": -1}\n', "line 1 of .* is no record of a run"),
        (f'{{"kind": "train", "step": {10**30}}}\n', "line 1 of .* is no record of a run"),
        (10**5 * "[" + "\n", "line 1 of .* is no JSON object"),
    ],
    ids=range(12),
)
def test_damaged_log_is_refused(
    tmp_path: Path, content: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    assert command_line.main(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert re.search(sentence, printed.err) and printed.err.count("\n") == 1 and printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(bytes(range(256)) + b"\n")
    with pytest.raises(ReportError, match="line 1 of .* is no JSON object"):
        write_report(tmp_path)


def test_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no run .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="there is no log.jsonl in"):
        write_report(tmp_path)


def test_missing_matplotlib_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, made_run())
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line.main(["report", str(tmp_path)]) == 2
    expected = 'q_galore_torch: a report needs matplotlib: pip install "q-galore-torch[plot]"\n'
    assert capsys.readouterr().err == expected
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path, made_run()) / "log.jsonl"
    with pytest.raises(ReportError, match="cannot write into .*log.jsonl: "):
        write_report(tmp_path, log)


def test_failed_write_keeps_the_report_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the second report is written."""
    before = [path.read_bytes() for path in write_report(write_log(tmp_path, made_run()))]
    write_log(tmp_path, [train(1, 2.0)])

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ReportError, match="No space left on device"):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "report.png", "report.html"}
    assert [(tmp_path / name).read_bytes() for name in ("report.png", "report.html")] == before


# ---------------------------------------------------------------- command line


def test_command_prints_the_two_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_log(tmp_path / "run", made_run()), tmp_path / "a" / "b"
    assert command_line.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.png'}\n{run / 'report.html'}\n"
    assert command_line.main(["report", "--out", str(out), str(run / "log.jsonl")]) == 0
    assert capsys.readouterr().out == f"{out / 'report.png'}\n{out / 'report.html'}\n"
    names = ("report.png", "report.html")
    assert [(run / name).read_bytes() for name in names] == [(out / name).read_bytes() for name in names]


def test_command_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-m", "q_galore_torch", "report", "run"]
    write_log(tmp_path / "run", [train(1, 2.0)])
    root = str(Path(report.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["run/report.png", "run/report.html"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: RUN"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--out"], "argument --out: expected one argument"),
        (["a", "--format", "pdf"], "unrecognized arguments: --format pdf"),
    ],
)
def test_bad_command_line_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["report", *words]) == 2
    assert capsys.readouterr().err == f"q_galore_torch: {sentence}; {command_line._USAGE}\n"


# ---------------------------------------------------------------- with the optimizer


def test_loop_of_the_page_gives_a_log_that_is_read(tmp_path: Path) -> None:
    """docs/report.md shows the lines to write; here they run with a real optimizer."""
    import torch

    import q_galore_torch as qg

    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 32, bias=False))
    qg.prepare_model(model, rank=4, target_modules="all-linear")
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model, rank=4, update_proj_gap=4), lr=0.01)
    with open(tmp_path / "log.jsonl", "w") as log:
        for step in range(1, 13):
            loss = model(torch.randn(8, 32)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            exec(lines, {"json": json, "log": log, "step": step, "loss": loss, "opt": opt})
    run = report._read(tmp_path / "log.jsonl")
    told = {entry["name"]: entry["refreshes"] for entry in opt.telemetry() if "refreshes" in entry}
    assert told and {layer.name: layer.counts[-1][1] for layer in run.layers} == told
    assert len(run.train) == 12 and run.base_gap == 4
    assert all(page_of(tmp_path)[name][0] == str(refreshes) for name, refreshes in told.items())
