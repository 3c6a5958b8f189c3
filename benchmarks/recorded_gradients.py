"""Records the gradients of a training run, then holds bases, projector formats and the energy rule to exact SVDs.

    python benchmarks/recorded_gradients.py record FOLDER [--model llama|window]
    python benchmarks/recorded_gradients.py analyse FOLDER [--model llama|window] [--rank R] [--part PART]
    python benchmarks/recorded_gradients.py tables [--write]

``record`` trains as subspace_runs.py does, with full gradients, and keeps those of all projected matrices in float32 at
every tenth update and at the one after it: 1.5 GB for 600 updates of the LLaMA, outside the repository. ``analyse``
appends one line for each part to ``results/recorded_gradients.jsonl``; parts that are there already are not repeated.

Energies are computed here, in float64, and the exact bases by the eigenvectors of the Gram matrix, so that no figure
relies on the code that is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import tables
import timing
import torch
from small_models import MODELS
from subspace_runs import Setting, append_record, read_log, train
from torch import Tensor

from q_galore_torch import ops, subspace

LOG = timing.RESULTS / "recorded_gradients.jsonl"
EVERY = 10  # updates between two recordings, and the base gap of the simulated rule
MULTIPLES = (1, 2, 5, 10)  # of it: the gaps at which chains of warm bases are followed
STEPS = (1, 2, 3)  # power steps, beside as many as the package takes
THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
QUEUE, GAMMA, CAP = 5, 2, 16  # the defaults of the package
BLOCKS = {"fp4": (64, 256), "nf4": (64, 128, 256), "int4": (64, 128, 256)}  # others: 256 alone
# INT8 weights and an INT4 projector as everywhere, so the gradients are those of the training they stand for.
RECORDED: dict[str, Any] = {
    "group": {"subspace": "warm", "lazy_rule": "fixed", "update_proj_gap": 50},
    "layers": {"grad_mode": "full"},
}
SAMPLE = 4  # every so many recordings are enough for cold bases and formats


# ---------------------------------------------------------------- recording


def record(folder: Path, setting: Setting, every: int) -> None:
    """Train once and keep the gradients of updates s and s + 1 for every s that is a multiple of ``every``."""
    target = folder / setting.model
    if (target / "recording.json").exists():
        print(f"{target} holds a finished recording", flush=True)
        return
    target.mkdir(parents=True, exist_ok=True)
    sides: dict[str, int] = {}

    def keep(step: int, gradients: dict[str, Tensor]) -> None:
        if step % every > 1 or step - step % every + 1 >= setting.steps:
            return
        sides.update({name: subspace.side_of("std", *gradient.shape) for name, gradient in gradients.items()})
        torch.save({name: gradient.float() for name, gradient in gradients.items()}, target / f"{step}.pt")

    run = train(setting, keep)
    about = {"setting": asdict(setting), "every": every, "sides": sides, **{k: run[k] for k in ("held_out", "machine")}}
    (target / "recording.json").write_text(json.dumps({**about, "seconds": run["seconds"]}))


def oriented(gradient: Tensor, side: int) -> Tensor:
    """A view of [m, n] whose columns are the projected dimension."""
    return gradient if side == subspace.RIGHT else gradient.t()


class Matrix(NamedTuple):
    """The recorded gradients of one matrix.

    Attributes:
        name: of the parameter.
        number: its place among the matrices.
        side: the projected one.
        rank: of the bases.
        gradients: float32 [m, n] at each recorded update.
        following: those of the update after it.
    """

    name: str
    number: int
    side: int
    rank: int
    gradients: list[Tensor]
    following: list[Tensor]

    def turned(self, slot: int) -> Tensor:
        """The recorded gradient as [k, d]: its columns are what is projected."""
        return oriented(self.gradients[slot], self.side)

    def turned_following(self, slot: int) -> Tensor:
        """The one after it, likewise."""
        return oriented(self.following[slot], self.side)

    def slots(self, multiple: int = 1) -> range:
        """The numbers of every ``multiple``-th recording."""
        return range(0, len(self.gradients), multiple)


def matrices(folder: Path, rank: int) -> Iterator[Matrix]:
    """The matrices of a recording, one after the other; the files are mapped, not read as a whole."""
    about = json.loads((folder / "recording.json").read_text())
    steps = range(0, about["setting"]["steps"] - 1, about["every"])
    first, second = ([torch.load(folder / f"{s + shift}.pt", mmap=True) for s in steps] for shift in (0, 1))
    for number, (name, side) in enumerate(about["sides"].items()):
        recorded, following = ([step[name] for step in files] for files in (first, second))
        yield Matrix(name, number, side, min(rank, *recorded[0].shape), recorded, following)


# ---------------------------------------------------------------- what is measured, and what it is held to


def refreshed(
    matrix: Matrix, slot: int, old: Tensor, steps: int | None = None, compute: str = "float32"
) -> subspace.Basis:
    """The package's refresh of a basis from a recorded gradient."""
    found = subspace.refresh_basis(matrix.gradients[slot], matrix.side, old, steps, compute)
    assert found is not None
    return found


def first_basis(matrix: Matrix, slot: int = 0, compute: str = "float32") -> subspace.Basis:
    """The first basis of a low-rank leaf, and of a plain matrix too large for an SVD: power steps from a random one."""
    start = subspace.random_basis(matrix.rank, matrix.turned(slot).shape[1], 0, matrix.number)
    found = refreshed(matrix, slot, start.vectors, subspace.COLD_STEPS, compute)
    return found._replace(fallbacks=found.fallbacks + start.fallbacks)


def stored(vectors: Tensor, proj_format: str = "int4", block: int = 256) -> Tensor:
    """The basis as it comes back from storage."""
    return _decoded(_encoded(vectors, proj_format, block), proj_format, block, vectors.shape[1])


def _encoded(vectors: Tensor, proj_format: str, block: int) -> tuple[Tensor, ...]:
    return ops.projector_quantize(vectors.contiguous(), proj_format, block)


def _decoded(encoded: tuple[Tensor, ...], proj_format: str, block: int, dim: int) -> Tensor:
    return ops.projector_dequantize(*encoded, proj_format, block, dim)


def energy(gradient: Tensor, basis: Tensor) -> float:
    """The share of ||G||^2 in the span of the rows of a basis, in float64."""
    matrix = gradient.double()
    q = torch.linalg.qr(basis.double().t()).Q
    return ((matrix @ q).square().sum() / matrix.square().sum()).item()


def exact_basis(gradient: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors [rank, d] in float64."""
    matrix = gradient.double()
    return torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -rank:].t()


def similarity(gradient: Tensor, old: Tensor, new: Tensor) -> float:
    """How much of what the new basis captures above chance the old one captures too, on a gradient neither has seen."""
    chance = new.shape[0] / new.shape[1]
    gained = energy(gradient, new) - chance
    if gained < 0.1 * (1 - chance):
        return 0.0
    return min(1.0, max(0.0, (energy(gradient, old) - chance) / gained))


def stretched(gap: int, queue: deque[float], value: float, threshold: float) -> int:
    """The rule's next gap in base gaps; the queue takes the similarity and is emptied where the gap grows."""
    queue.append(value)
    if value < threshold:
        return 1
    if len(queue) == QUEUE and statistics.fmean(queue) >= threshold:
        queue.clear()
        return min(CAP, gap * GAMMA)
    return gap


# ---------------------------------------------------------------- the parts


class Link(NamedTuple):
    """One refresh in a chain: its slot, the old basis as stored (None at the start), and the new one before storage."""

    slot: int
    old: Tensor | None
    new: subspace.Basis


def chain(matrix: Matrix, multiple: int, compute: str = "float32", steps: int | None = None) -> Iterator[Link]:
    """The refreshes of a matrix every ``multiple`` recordings, each from the INT4 form of the one before.

    Args:
        matrix: its gradients.
        multiple: recordings from one refresh to the next.
        compute: dtype of the products.
        steps: power steps of a refresh, default None: as many as the package takes.
    """
    old = None
    for slot in matrix.slots(multiple):
        new = first_basis(matrix, slot, compute) if old is None else refreshed(matrix, slot, old, steps, compute)
        yield Link(slot, old, new)
        old = stored(new.vectors)


def bases(every: int, recorded: Iterator[Matrix]) -> dict[str, Any]:
    """Energy that warm and cold bases capture, before quantisation, over that of exact ones."""
    ratios: dict[str, list[tuple[float, str, int]]] = {}
    fallbacks: dict[str, int] = {}
    exact_energies = []
    for matrix in recorded:
        exact = [energy(g, exact_basis(g, matrix.rank)) for g in map(matrix.turned, matrix.slots())]
        exact_energies += exact

        def note(name: str, slot: int, basis: subspace.Basis, matrix: Matrix = matrix, exact: list[float] = exact):
            ratio = energy(matrix.turned(slot), basis.vectors) / exact[slot]
            ratios.setdefault(name, []).append((ratio, matrix.name, slot * every))
            fallbacks[name] = fallbacks.get(name, 0) + basis.fallbacks

        for compute in ("float32", "bfloat16"):
            for multiple in MULTIPLES if compute == "float32" else MULTIPLES[:1]:
                for link in chain(matrix, multiple, compute):
                    if link.old is not None:
                        note(f"warm, gap {multiple * every}, {compute}", link.slot, link.new)
            for slot in matrix.slots(SAMPLE):
                note(f"cold, {compute}", slot, first_basis(matrix, slot, compute))
        for steps in STEPS:
            for link in chain(matrix, 1, steps=steps):
                if link.old is not None:
                    note(f"warm, gap {every}, {steps} step{'s' * (steps > 1)}", link.slot, link.new)
    return {
        "exact energy": quantiles(exact_energies),
        "ratio": {name: quantiles([row[0] for row in rows]) for name, rows in ratios.items()},
        "below 0.98": {name: sum(row[0] < 0.98 for row in rows) for name, rows in ratios.items()},
        "worst": {
            name: [[round(ratio, 5), where, step] for ratio, where, step in sorted(rows)[:5]]
            for name, rows in ratios.items()
        },
        "qr fallbacks": fallbacks,
    }


def formats(every: int, recorded: Iterator[Matrix]) -> dict[str, Any]:
    """Energy captured after storage over that before, for each format and block."""
    kinds = [(name, block) for name in ops.PROJ_FORMATS for block in BLOCKS.get(name, (256,))]
    ratios: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    for matrix in recorded:
        for link in chain(matrix, 1):
            if link.slot % SAMPLE:
                continue
            gradient, vectors = matrix.turned(link.slot), link.new.vectors
            before = energy(gradient, vectors)
            for kind in kinds:
                name = f"{kind[0]}, block {kind[1]}" if kind[0] not in ("float32", "bfloat16") else kind[0]
                encoded = _encoded(vectors, *kind)
                after = energy(gradient, _decoded(encoded, *kind, vectors.shape[1]))
                ratios.setdefault(name, []).append(after / before)
                sizes[name] = sum(part.numel() * part.element_size() for part in encoded) / vectors.numel()
    return {"ratio": {name: {**quantiles(rows), "bytes": round(sizes[name], 4)} for name, rows in ratios.items()}}


def similarities(every: int, recorded: Iterator[Matrix]) -> dict[str, Any]:
    """The rule's similarity with warm INT4 bases against that with exact ones, and how often they decide alike."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for matrix in recorded:
        exact = [exact_basis(matrix.turned(slot), matrix.rank) for slot in matrix.slots()]
        for multiple in MULTIPLES:
            for link in chain(matrix, multiple):
                if link.old is None:
                    continue
                judge = matrix.turned_following(link.slot)
                warm = similarity(judge, link.old, stored(link.new.vectors))
                ideal = similarity(judge, exact[link.slot - multiple], exact[link.slot])
                pairs.setdefault(f"gap {multiple * every}", []).append((warm, ideal))
    pairs["all"] = [pair for rows in pairs.values() for pair in rows]
    found: dict[str, Any] = {}
    for name, rows in pairs.items():
        alike = {str(t): round(statistics.fmean((w >= t) == (e >= t) for w, e in rows), 4) for t in THRESHOLDS}
        kept = {str(t): round(statistics.fmean(w >= t for w, _ in rows), 4) for t in THRESHOLDS}
        below = {str(t): [w < t for w, e in rows if e < t] for t in THRESHOLDS}
        found[name] = {
            "refreshes": len(rows),
            "agreement": alike,
            "agreement below": {t: round(statistics.fmean(same), 4) if same else None for t, same in below.items()},
            "share above": kept,
            "warm": quantiles([w for w, _ in rows]),
            "exact": quantiles([e for _, e in rows]),
            "difference": quantiles([w - e for w, e in rows]),
        }
    return found


def rule(every: int, recorded: Iterator[Matrix]) -> dict[str, Any]:
    """Refreshes that the energy rule would have asked for, over those of the fixed gap, at each threshold."""
    counts: dict[str, int] = {}
    by_matrix: dict[str, dict[str, int]] = {}
    slots = 0
    for matrix in recorded:
        slots += len(matrix.gradients)
        for threshold in THRESHOLDS:
            taken = simulated(matrix, threshold)
            counts[str(threshold)] = counts.get(str(threshold), 0) + taken
            by_matrix.setdefault(str(threshold), {})[matrix.name] = taken
    return {
        "fixed": slots,
        "refreshes": counts,
        "share": {threshold: round(taken / slots, 4) for threshold, taken in counts.items()},
        "by matrix": by_matrix,
    }


def simulated(matrix: Matrix, threshold: float) -> int:
    """Refreshes of one matrix: warm INT4 bases at the dates of the rule, which go on from the bases it kept."""
    old = stored(first_basis(matrix).vectors)
    gap, due, taken = 1, 1, 1
    queue: deque[float] = deque(maxlen=QUEUE)
    while due < len(matrix.gradients):
        new = stored(refreshed(matrix, due, old).vectors)
        taken += 1
        gap = stretched(gap, queue, similarity(matrix.turned_following(due), old, new), threshold)
        old, due = new, due + gap
    return taken


PARTS: dict[str, Callable[[int, Iterator[Matrix]], dict[str, Any]]] = {
    "bases": bases,
    "formats": formats,
    "similarity": similarities,
    "rule": rule,
}


def quantiles(values: list[float]) -> dict[str, float]:
    """Count, minimum, quartiles, mean and maximum."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = dict(zip(("quarter", "median", "three quarters"), quarters, strict=True))
    found = {"minimum": min(values), **named, "mean": statistics.fmean(values), "maximum": max(values)}
    return {"count": len(values), **{name: round(value, 5) for name, value in found.items()}}


def analyse(folder: Path, model: str, rank: int, parts: list[str], log: Path) -> None:
    """Append what the log does not hold yet of this recording."""
    about = json.loads((folder / model / "recording.json").read_text())
    done = read_log(log)
    for part in parts:
        what = {"part": part, "rank": rank, "every": about["every"], "setting": about["setting"]}
        key = json.dumps(what, sort_keys=True)
        title = f"{model} {part} rank {rank}"
        if key in done:
            print(f"{title}: in {log.name}", flush=True)
            continue
        start = time.perf_counter()
        found = PARTS[part](about["every"], _with_progress(matrices(folder / model, rank), title))
        seconds = round(time.perf_counter() - start, 1)
        machine = {**timing.machine(), "threads": torch.get_num_threads()}
        append_record(log, {"key": key, **what, "result": found, "seconds": seconds, "machine": machine})


def _with_progress(recorded: Iterator[Matrix], title: str) -> Iterator[Matrix]:
    start = time.perf_counter()
    for matrix in recorded:
        print(f"{title}: {time.perf_counter() - start:6.1f} s  {matrix.name}", flush=True)
        yield matrix


# ---------------------------------------------------------------- tables


def all_tables(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown tables by the name of their place in the page."""
    writers = {"bases": _bases_table, "formats": _formats_table, "similarity": _similarity_table, "rule": _rule_table}
    found = {}
    for part, write in writers.items():
        rows = [row for record in records.values() if record["part"] == part for row in write(record)]
        if rows:
            found[f"recorded-{part}"] = tables.markdown(HEADERS[part], rows)
    return found


HEADERS = {
    "bases": ["model, rank", "basis", "refreshes", "median", "mean", "minimum", "QR fallbacks"],
    "formats": ["model, rank", "format", "bytes a value", "mean", "worst"],
    "similarity": ["model, rank", "gap", "refreshes", *(f"alike at {t}" for t in THRESHOLDS)],
    "rule": ["model, rank", "fixed gap", *(f"threshold {t}" for t in THRESHOLDS)],
}


def _title(record: dict[str, Any]) -> str:
    return f"{record['setting']['model']}, {record['rank']}"


def _bases_table(record: dict[str, Any]) -> list[list[str]]:
    result = record["result"]
    return [
        [
            _title(record), name, str(row["count"]), f"{row['median']:.4f}", f"{row['mean']:.4f}",
            f"{row['minimum']:.4f}", str(result["qr fallbacks"][name]),
        ]
        for name, row in result["ratio"].items()
    ]  # fmt: skip


def _formats_table(record: dict[str, Any]) -> list[list[str]]:
    rows = record["result"]["ratio"].items()
    return [
        [_title(record), name, f"{row['bytes']:.3f}", f"{row['mean']:.4f}", f"{row['minimum']:.4f}"]
        for name, row in rows
    ]


def _similarity_table(record: dict[str, Any]) -> list[list[str]]:
    table = []
    for name, row in record["result"].items():
        cells = []
        for threshold, share in row["agreement"].items():
            below = row["agreement below"][threshold]
            cells.append(f"{100 * share:.1f} %" + ("" if below is None else f" ({100 * below:.0f})"))
        table.append([_title(record), name, str(row["refreshes"]), *cells])
    return table


def _rule_table(record: dict[str, Any]) -> list[list[str]]:
    result = record["result"]
    return [[_title(record), str(result["fixed"]), *(f"{100 * share:.1f} %" for share in result["share"].values())]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["record", "analyse", "tables"])
    parser.add_argument("folder", nargs="?", type=Path, help="of the recordings, outside the repository")
    parser.add_argument("--model", choices=list(MODELS), default="llama")
    parser.add_argument("--rank", type=int, help="with analyse: of the bases; default: the model's")
    parser.add_argument("--part", choices=list(PARTS), help="default: all")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--quick", action="store_true", help="with record: a tiny model and 26 updates")
    parser.add_argument("--write", action="store_true", help="with tables: write them into docs/subspace.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.action == "tables":
        for name, table in all_tables(read_log(arguments.log)).items():
            print(f"\n{name}\n\n{table}")
            if arguments.write:
                tables.rewrite(tables.PAGE, name, table)
        return
    if arguments.folder is None:
        parser.error(f"{arguments.action} needs a folder")
    if arguments.folder.resolve().is_relative_to(Path(__file__).resolve().parent.parent):
        parser.error(f"the folder must lie outside the repository, got {arguments.folder}")
    if arguments.action == "record" and arguments.quick:
        record(arguments.folder, Setting("tiny", **RECORDED, steps=26, sequences=4, length=32), every=2)
    elif arguments.action == "record":
        record(arguments.folder, Setting(arguments.model, **RECORDED, steps=arguments.steps), arguments.every)
    else:
        rank = arguments.rank or MODELS[arguments.model].rank
        parts = [arguments.part] if arguments.part else list(PARTS)
        analyse(arguments.folder, arguments.model, rank, parts, arguments.log)


if __name__ == "__main__":
    main()
