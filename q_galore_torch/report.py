"""``python -m q_galore_torch report RUN``: loss and subspaces of a run, from its log, as a picture and a page.

The log is ``log.jsonl`` as ``examples/run_pretrain.py`` writes it: one JSON object a line, with ``kind`` and ``step``.
``docs/report.md`` names the records and fields that are read; whatever a log lacks is left out of the report.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_Point = tuple[int, float]

# Okabe and Ito's palette: told apart with every kind of colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_WIDTH, _DPI = 12.0, 125  # inches, pixels per inch
_PANEL = 2.5  # inches, height of every panel but the heat map
_COLUMNS, _BARS = 600, 150  # of the heat map and of the bars at most: more would be narrower than a pixel or two
_ROWS = 64  # of the heat map that are named at most
_NAME = 26  # letters of a row's name


class ReportError(ValueError):
    """There is nothing to report on, or no way to draw or write it; the message is one sentence."""


@dataclass
class _Layer:
    """What the log says about one projected matrix, each series in the order of the steps."""

    name: str
    order: tuple[Any, ...]
    counts: list[tuple[int, int]] = field(default_factory=list)  # step, refreshes so far
    gaps: list[_Point] = field(default_factory=list)
    captured: list[_Point] = field(default_factory=list)
    held_out: list[_Point] = field(default_factory=list)
    similarity: list[_Point] = field(default_factory=list)
    seconds: list[_Point] = field(default_factory=list)


@dataclass
class _Run:
    name: str
    flags: dict[str, Any]
    train: list[_Point]
    held_out: list[_Point]
    layers: list[_Layer]
    last: list[dict[str, Any]]  # the newest entry of every parameter, projected or not
    first_step: int  # what happened up to here is not in this log
    last_step: int

    @property
    def base_gap(self) -> int | None:
        """The fixed gap to compare with: the run's flag, else the smallest gap of a layer."""
        flag = self.flags.get("update_proj_gap")
        if isinstance(flag, int) and flag > 0:
            return flag
        return min((int(gap) for layer in self.layers for _, gap in layer.gaps), default=None)

    def fixed(self, step: int) -> int:
        """Refreshes up to a step if each matrix had one at updates 1, 1 + gap, 1 + 2 gap, ..."""
        return len(self.layers) * -(-step // (self.base_gap or 1))


# ---------------------------------------------------------------- reading


def _log_of(run: Path) -> Path:
    if not run.exists():
        raise ReportError(f"there is no run {run}")
    log = run / "log.jsonl" if run.is_dir() else run
    if not log.is_file():
        raise ReportError(f"there is no log.jsonl in {run}")
    return log


def _records(log: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line cut short, as a killed run leaves it, is left out."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ReportError(f"cannot read {log}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise ReportError(f"line {number} of {log} is no JSON object") from None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or _step(record) is None:
            raise ReportError(f"line {number} of {log} is no record of a run: it needs a kind and a step")
        records.append(record)
    if not records:
        raise ReportError(f"{log} has no records")
    return records


def _step(record: dict[str, Any]) -> int | None:
    step = record.get("step")
    return step if type(step) is int and 0 <= step < 2**53 else None


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return None
    return float(value)


def _losses(records: Iterable[dict[str, Any]], kind: str) -> list[_Point]:
    found = {r["step"]: _number(r.get("loss")) for r in records if r["kind"] == kind}
    return sorted((step, loss) for step, loss in found.items() if loss is not None)


def _read(log: Path) -> _Run:
    records = _records(log)
    about = [r for r in records if r["kind"] == "run"] or [{}]
    flags, name = about[-1].get("flags"), about[-1].get("name")
    layers: dict[str, _Layer] = {}
    last: dict[str, dict[str, Any]] = {}
    for record in sorted((r for r in records if r["kind"] == "telemetry"), key=lambda r: r["step"]):
        entries = record.get("parameters")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                last[entry["name"]] = {**last.get(entry["name"], {}), **entry}
                _follow(layers, record["step"], entry)
    steps = [r["step"] for r in records]
    trained = [r["step"] for r in records if r["kind"] == "train"]
    return _Run(
        name=name if isinstance(name, str) else log.resolve().parent.name,
        flags=flags if isinstance(flags, dict) else {},
        train=_losses(records, "train"),
        held_out=_losses(records, "eval"),
        layers=sorted(layers.values(), key=lambda layer: layer.order),
        last=list(last.values()),
        first_step=max(0, min(trained, default=0) - 1),
        last_step=max(steps),
    )


def _follow(layers: dict[str, _Layer], step: int, entry: dict[str, Any]) -> None:
    """Take one entry into the series of its layer."""
    refreshes = _number(entry.get("refreshes"))
    if refreshes is None or not 0 < refreshes < 2**53:
        return
    name = entry["name"]
    layer = layers.setdefault(name, _Layer(name, _order(name, entry.get("id"))))
    is_new = not layer.counts or refreshes > layer.counts[-1][1]
    if is_new:
        layer.counts.append((step, int(refreshes)))
    for series, key in ((layer.captured, "captured_energy"), (layer.held_out, "held_out_energy"),
                        (layer.similarity, "similarity"), (layer.gaps, "gap"), (layer.seconds, "seconds")):  # fmt: skip
        value = _number(entry.get(key))
        # An entry repeats what was known: only the energy of a new basis may be equal to the one before by chance.
        if value is not None and (not series or value != series[-1][1] or (is_new and key == "captured_energy")):
            series.append((step, value))


def _order(name: str, number: Any) -> tuple[Any, ...]:
    """Model order: by the first number in the name (the block's), then as the optimizer has them."""
    head, digits, rest = re.fullmatch(r"([^0-9]*)([0-9]*)(.*)", name, re.S).groups()  # type: ignore[union-attr]
    natural = [(int(part) if i % 2 else 0, part) for i, part in enumerate(re.split(r"([0-9]+)", rest))]
    return head, int(digits or 0), number if type(number) is int else -1, natural


# ---------------------------------------------------------------- figures of the run


def _smoothed(points: Sequence[_Point]) -> list[float]:
    """Mean over a hundredth of the points on either side, at least two: centred, so that a falling loss has no lag."""
    half = max(2, len(points) // 100)
    sums = np.cumsum([0.0, *(value for _, value in points)])
    at = np.arange(len(points))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(points))
    smooth: list[float] = ((sums[end] - sums[first]) / (end - first)).tolist()
    return smooth


def _newest(series: Iterable[Sequence[_Point]], of: Callable[[Iterable[float]], float]) -> list[_Point]:
    """At each step where any series changes: median, sum, ... of the newest values of all series that have begun."""
    events: dict[int, dict[int, float]] = {}
    for index, points in enumerate(series):
        for step, value in points:
            events.setdefault(step, {})[index] = value
    newest: dict[int, float] = {}
    result = []
    for step in sorted(events):
        newest.update(events[step])
        result.append((step, of(newest.values())))
    return result


def _refreshes_per_step(run: _Run) -> Counter[int]:
    counts: Counter[int] = Counter()
    for layer in run.layers:
        before = 0
        for step, count in layer.counts:
            if step > run.first_step:
                counts[step] += count - before
            before = count
    return counts


def _total(run: _Run, key: str) -> float | None:
    values = [v for v in (_number(entry.get(key)) for entry in run.last) if v is not None]
    return sum(values) if values else None


def _text(value: Any, form: str = ",.0f") -> str:
    number = _number(value)
    return "-" if number is None else format(number, form)


def _summary(run: _Run) -> list[tuple[str, str]]:
    held_out = run.held_out[-1][1] if run.held_out else None
    done, fixed = _total(run, "refreshes"), run.fixed(run.last_step)
    rows = [
        ("optimizer", str(run.flags.get("optimizer", "-"))),
        ("updates", _text(run.last_step)),
        ("training loss, smoothed", _text(_smoothed(run.train)[-1] if run.train else None, ".4f")),
        ("held-out loss", _text(held_out, ".4f")),
        ("held-out perplexity", _text(math.exp(held_out) if held_out is not None and held_out < 700 else None, ",.2f")),
        ("projected matrices", _text(len(run.layers))),
        ("refreshes", _text(done)),
    ]
    if done is not None and run.base_gap and fixed:
        rows.append((f"share of a fixed gap of {run.base_gap:,}", f"{done / fixed:.0%} of {fixed:,}"))
    rows += [
        ("seconds in refreshes", _text(_total(run, "seconds"), ",.2f")),
        ("QR fallbacks", _text(_total(run, "qr_fallbacks"))),
        ("INT8 groups shifted", _text(_total(run, "groups_shifted"))),
        ("INT8 groups re-ranged", _text(_total(run, "groups_reranged"))),
    ]
    return rows


# ---------------------------------------------------------------- picture


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without the parts that all of them begin or end with, cut in the middle where still long."""
    parts = [name.split(".") for name in names]
    for at in (0, -1):
        while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[at] for p in parts}) == 1:
            parts = [p[1:] if at == 0 else p[:-1] for p in parts]
    short = [".".join(p) for p in parts]
    return [_cut(name, _NAME) for name in short]


def _cut(name: str, letters: int) -> str:
    """A name that can be drawn, cut in the middle where too long."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    half = letters // 2 - 1
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"


def _title(axes: Any, title: str, y: str, x: str = "update") -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Any, **more: Any) -> None:
    """Above the axes at the right, where no data is."""
    if axes.get_legend_handles_labels()[0] or more:
        axes.legend(
            **more, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=9, frameon=False, fontsize=8,
            borderaxespad=0.1, columnspacing=1.2, handlelength=1.4,
        )  # fmt: skip


def _no_data(axes: Any) -> None:
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_loss(axes: Any, run: _Run) -> None:
    _title(axes, "Loss", "nats per token")
    if not run.train and not run.held_out:
        return _no_data(axes)
    if run.train:
        axes.plot(*zip(*run.train, strict=True), color=_BLUE, alpha=0.25, linewidth=0.8)
        axes.plot([s for s, _ in run.train], _smoothed(run.train), color=_BLUE, label="training, smoothed")
    if run.held_out:
        axes.plot(*zip(*run.held_out, strict=True), "o-", color=_ORANGE, markersize=4, label="held out")
    axes.grid(alpha=0.25)
    _legend(axes)


def _draw_series(
    axes: Any,
    run: _Run,
    title: str,
    y: str,
    series: list[list[_Point]],
    colour: str,
    beside: Sequence[list[_Point]] = (),
) -> None:
    """One faint line a layer, and the median of the newest values; the scale suits the series ``beside`` as well."""
    _title(axes, title, y)
    series = [points for points in series if points]
    if not series:
        return _no_data(axes)
    alpha = max(0.06, min(0.35, 6 / len(series)))
    for points in series:
        axes.plot(*zip(*points, strict=True), ".-", color=colour, alpha=alpha, linewidth=0.7, markersize=2.5)
    steps, medians = zip(*_newest(series, statistics.median), strict=True)
    axes.step([*steps, run.last_step], [*medians, medians[-1]], where="post", color="black", linewidth=1.6,
              label=f"median of {len(series)}")  # fmt: skip
    values = [value for points in (*series, *beside) for _, value in points]
    axes.set_ylim(math.floor(min(values) * 10 - 0.1) / 10, max(1.0, math.ceil(max(values) * 10) / 10) + 0.02)
    axes.grid(alpha=0.25)
    _legend(axes)


def _gap_table(run: _Run) -> tuple[Any, list[float]]:
    """Layers x columns: the index of each gap in the sorted list of all gaps, NaN before the first basis."""
    span = max(1, run.last_step - run.first_step)
    ends = run.first_step + np.linspace(0, span, min(span, _COLUMNS) + 1)[1:]
    levels = sorted({gap for layer in run.layers for _, gap in layer.gaps})
    table = np.full((len(run.layers), len(ends)), np.nan)
    for row, layer in enumerate(run.layers):
        if layer.gaps:
            steps, gaps = zip(*layer.gaps, strict=True)
            at = np.searchsorted(steps, ends, side="right") - 1
            table[row] = np.where(at < 0, np.nan, np.searchsorted(levels, np.asarray(gaps)[np.maximum(at, 0)]))
    return table, levels


def _draw_gaps(axes: Any, run: _Run) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    _title(axes, "Updates between two refreshes of a layer (white: no basis yet)", "")
    table, levels = _gap_table(run)
    if not levels:
        return _no_data(axes)
    count = len(levels)
    colours = colormaps["cividis"](np.linspace(0.1, 0.95, count) if count > 1 else [0.1])
    axes.imshow(
        table, aspect="auto", interpolation="nearest", cmap=ListedColormap(colours), vmin=-0.5, vmax=count - 0.5,
        extent=(run.first_step, max(run.last_step, run.first_step + 1), len(run.layers) - 0.5, -0.5),
    )  # fmt: skip
    names = _short_names([layer.name for layer in run.layers])
    rows = list(range(len(names)))
    if len(rows) > _ROWS:  # the first of each block
        rows = [r for r in rows if r == 0 or run.layers[r].order[:2] != run.layers[r - 1].order[:2]]
    rows = rows[:: -(-len(rows) // _ROWS)]
    axes.set_yticks(rows, [names[row] for row in rows], parse_math=False)
    axes.tick_params(axis="y", labelsize=8 if len(rows) <= 32 else 6.5)
    shown = sorted({round(i * (count - 1) / 7) for i in range(8)})
    _legend(axes, handles=[Patch(color=colours[i], label=f"{levels[i]:,.0f}") for i in shown])


def _draw_bars(axes: Any, run: _Run) -> None:
    counts = _refreshes_per_step(run)
    width = -(-max(1, run.last_step - run.first_step) // _BARS)
    _title(axes, "Refreshes", "matrices an update" if width == 1 else f"matrices in {width:,} updates")
    if not counts:
        return _no_data(axes)
    bars: Counter[int] = Counter()
    for step, count in counts.items():
        bars[(step - run.first_step - 1) // width] += count
    lefts = [run.first_step + 0.5 + index * width for index in bars]
    axes.bar(lefts, list(bars.values()), width=width, align="edge", color=_BLUE, zorder=2)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.25)


def _draw_cumulative(axes: Any, run: _Run) -> None:
    _title(axes, "Refreshes so far", "matrices")
    if not run.layers:
        return _no_data(axes)
    done = _newest([layer.counts for layer in run.layers], lambda counts: float(sum(counts)))
    steps, totals = zip(*done, strict=True)
    axes.step([*steps, run.last_step], [*totals, totals[-1]], where="post", color=_BLUE, linewidth=1.6,
              label=f"this run: {totals[-1]:,.0f}")  # fmt: skip
    if run.base_gap:
        grid = np.unique(np.linspace(run.first_step, run.last_step, 2000).astype(np.int64))
        label = f"fixed gap of {run.base_gap:,}: {run.fixed(run.last_step):,}"
        axes.step(grid, [run.fixed(int(step)) for step in grid], "--", where="post", color=_ORANGE, label=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    _legend(axes)


def _draw_seconds(axes: Any, run: _Run) -> None:
    _title(axes, "Time in refreshes so far", "seconds")
    spent = _newest([layer.seconds for layer in run.layers], sum)
    if not spent:
        return _no_data(axes)
    steps, seconds = zip(*spent, strict=True)
    axes.step([*steps, run.last_step], [*seconds, seconds[-1]], where="post", color=_BLUE, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _picture(run: _Run) -> bytes:
    """The PNG: 1500 pixels wide, higher with more layers."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError('a report needs matplotlib: pip install "q-galore-torch[plot]"') from None
    heat_map = min(9.0, max(1.6, 0.5 + 0.15 * len(run.layers)))
    heights = [_PANEL, _PANEL, heat_map, _PANEL, _PANEL]
    figure: Any = Figure(figsize=(_WIDTH, sum(heights) + 0.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    figure.suptitle(_cut(run.name, 80), fontsize=13, parse_math=False)
    _draw(figure, figure.add_gridspec(5, 2, height_ratios=heights), run)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters of a name that the font lacks are drawn as boxes
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(figure: Any, grid: Any, run: _Run) -> None:
    """All panels, over the same updates."""
    loss, gaps = (figure.add_subplot(grid[row, :]) for row in (0, 2))
    captured, next_one, bars, cumulative, similarity, seconds = (
        figure.add_subplot(grid[row, column]) for row in (1, 3, 4) for column in (0, 1)
    )
    at_refresh, held_out = [layer.captured for layer in run.layers], [layer.held_out for layer in run.layers]
    similarities = [layer.similarity for layer in run.layers]
    _draw_loss(loss, run)
    _draw_series(captured, run, "Captured at a refresh", "share of energy", at_refresh, _BLUE, held_out)
    _draw_series(next_one, run, "Captured of the next gradient", "share of energy", held_out, _GREEN, at_refresh)
    _draw_gaps(gaps, run)
    _draw_bars(bars, run)
    _draw_cumulative(cumulative, run)
    _draw_series(similarity, run, "Similarity to the old basis", "similarity", similarities, _BLUE)
    _draw_seconds(seconds, run)
    for axes in figure.axes:
        if axes.get_xticks().size:
            axes.set_xlim(run.first_step, max(run.last_step, run.first_step + 1))


# ---------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #555; --head: #f2f2f2; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; --head: #2a2a2a; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { width: 100%; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--head); }
p, summary { color: var(--soft); }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<table><tbody>
{summary}
</tbody></table>
<h2>Over the run</h2>
<img alt="Loss, captured energy, gaps, refreshes, similarity and time in refreshes over the updates of the run"
 src="data:image/png;base64,{picture}">
<p>{note}</p>
<h2>Layers at the end</h2>
{layers}
<h2>Flags</h2>
{flags}
</body>
</html>
"""

_NOTE = (
    "Captured: share of the gradient's energy inside the basis, at a refresh on the gradient the basis was fitted to, "
    "before quantisation, and then for the stored basis on the next update's gradient. A fixed gap refreshes each "
    "matrix at updates 1, 1 + gap, 1 + 2 gap and so on."
)

_COLUMNS_OF_LAYERS = (
    ("refreshes", "refreshes", ",.0f"), ("gap", "gap", ",.0f"), ("similarity", "similarity", ".3f"),
    ("captured_energy", "captured", ".3f"), ("held_out_energy", "next gradient", ".3f"), ("seconds", "seconds", ",.3f"),
    ("qr_fallbacks", "QR fallbacks", ",.0f"), ("groups_shifted", "groups shifted", ",.0f"),
    ("groups_reranged", "groups re-ranged", ",.0f"),
)  # fmt: skip


def _row(cells: Iterable[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _layer_table(run: _Run) -> str:
    if not run.layers:
        return "<p>No data: this run has no subspaces, or did not log them.</p>"
    entries = {entry["name"]: entry for entry in run.last}
    head = _row(["layer", *(title for _, title, _ in _COLUMNS_OF_LAYERS)], "th")
    rows = [
        _row([layer.name, *(_text(entries[layer.name].get(key), form) for key, _, form in _COLUMNS_OF_LAYERS)])
        for layer in run.layers
    ]
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"


def _flag_table(run: _Run) -> str:
    rows = [_row([f"--{name}", str(value)]) for name, value in run.flags.items() if value is not None]
    if not rows:
        return "<p>No data.</p>"
    body = "\n".join(rows)
    return f"<details><summary>{len(rows)} flags</summary><table><tbody>\n{body}\n</tbody></table></details>"


def _page(run: _Run, picture: bytes) -> str:
    return _PAGE.format(
        title=html.escape(run.name),
        style=_STYLE,
        summary="\n".join(_row(pair) for pair in _summary(run)),
        picture=base64.b64encode(picture).decode(),
        note=html.escape(_NOTE),
        layers=_layer_table(run),
        flags=_flag_table(run),
    )


# ---------------------------------------------------------------- files


def _write(path: Path, content: bytes) -> None:
    """Complete or not at all: a page that is open in a browser is never half a page."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(run: str | Path, out: str | Path | None = None) -> tuple[Path, Path]:
    """Draw what a run's log says, as ``report.png`` and as ``report.html``, which holds the picture too.

    Args:
        run: The run's folder, with ``log.jsonl`` in it, or such a file.
        out: Folder to write into, made if needed. Default None: beside the log.

    Returns:
        The paths of the PNG (1500 pixels wide) and of the page (no other file or address is needed to read it).

    Raises:
        ReportError: There is no log, it has no records or a damaged one, matplotlib is not installed, or the folder
            cannot be written to. No file is left half written then.
    """
    log = _log_of(Path(run))
    data = _read(log)
    picture = _picture(data)
    page = _page(data, picture).encode("utf-8", errors="replace")
    folder = log.parent if out is None else Path(out)
    paths = folder / "report.png", folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, (picture, page), strict=True):
            _write(path, content)
    except OSError as error:
        raise ReportError(f"cannot write into {folder}: {error.strerror}") from None
    return paths
