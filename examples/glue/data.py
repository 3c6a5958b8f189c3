"""Training and validation texts from the hub, from GLUE's folders or from files."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UsageError, import_optional

from .files import Row, read_rows, read_table
from .tasks import TASKS, Task

# Columns of numbered rows, which hold no text.
_COUNTERS = ("idx", "id", "index")


@dataclass(frozen=True)
class Split:
    """Rows: one or two texts each, and a class number or a value to predict."""

    texts: tuple[list[str], ...]
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Texts:
    """What a run is trained and judged on.

    Attributes:
        train: training rows.
        validation: validation rows by what stands behind their metrics' names: "", and "_mm" for MNLI's mismatched.
        labels: class names, none where a number is predicted.
        metrics: names of the metrics; the first is the one that methods are compared by.
        description: one line for the reader.
    """

    train: Split
    validation: dict[str, Split]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    description: str

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any text or label."""
        everything = [(split.texts, split.labels) for split in (self.train, *self.validation.values())]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def load_texts(args: argparse.Namespace) -> Texts:
    """What the flags name: ``--train_file`` and ``--validation_file``, else ``--data_dir``, else the hub.

    Raises:
        UsageError: Files, columns or labels are not what they should be, or the hub cannot be reached.
    """
    if args.train_file is not None:
        texts = _from_files(args)
    elif args.data_dir is not None:
        texts = _from_folder(Path(args.data_dir), args.task_name)
    else:
        texts = _from_hub(args.task_name)
    if args.max_train_samples is not None:
        texts = Texts(_first(texts.train, args.max_train_samples), *list(vars(texts).values())[1:])
    return texts


def _first(split: Split, count: int) -> Split:
    return Split(tuple(column[:count] for column in split.texts), split.labels[:count])


# ---------------------------------------------------------------- the hub


def _from_hub(name: str) -> Texts:
    datasets = import_optional("datasets", f"--task_name {name} without --data_dir", "pip install datasets")
    task = TASKS[name]
    try:
        parts = datasets.load_dataset("glue", name)
    except Exception as error:  # no network, no disk, no such mirror: a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot load GLUE's {name} from the hub ({reason}); --data_dir takes local files") from None

    def split(part: str) -> Split:
        columns = tuple(list(map(str, parts[part][column])) for column in task.columns)
        return Split(columns, list(parts[part]["label"]))

    validation = {_suffix(end): split(f"validation{end}") for end in task.validation}
    return _described(split("train"), validation, task, f"GLUE's {name} from the hub")


def _suffix(end: str) -> str:
    return "_mm" if end == "_mismatched" else ""


def _described(train: Split, validation: dict[str, Split], task: Task, source: str) -> Texts:
    return Texts(train, validation, task.labels, task.metrics, _line(source, train, validation))


def _line(source: str, train: Split, validation: dict[str, Split]) -> str:
    counts = " and ".join(f"{len(split):,}" for split in validation.values())
    return f"{source}: {len(train):,} training and {counts} validation rows"


# ---------------------------------------------------------------- GLUE's folders


def _from_folder(folder: Path, name: str) -> Texts:
    task = TASKS[name]
    if not folder.is_dir():
        raise UsageError(f"--data_dir {folder} is no folder")
    if (folder / task.folder).is_dir():
        folder = folder / task.folder
    broken = 0

    def read(path: Path) -> list[Row]:
        nonlocal broken
        rows, left_out = read_table(path, header=name != "cola")
        broken += left_out
        return rows

    if (folder / "train.tsv").is_file():
        train = read(folder / "train.tsv")
        dev = {end: read(folder / f"dev{end}.tsv") for end in task.validation if _is_there(folder, end)}
    elif name == "mrpc" and (folder / "msr_paraphrase_train.txt").is_file():
        train, held_out = _split_of_mrpc(folder, read(folder / "msr_paraphrase_train.txt"))
        dev = {"": held_out}
    else:
        also = ", or msr_paraphrase_train.txt and dev_ids.tsv" if name == "mrpc" else ""
        raise UsageError(f"{folder} lacks the files of {name}: train.tsv and dev{task.validation[0]}.tsv{also}")
    *columns, label = task.file_columns
    where = f"{folder} ({name})"
    splits = {_suffix(end): _task_split(rows, columns, label, task, where) for end, rows in dev.items()}
    source = f"{where}, {broken} broken rows left out" if broken else where
    return _described(_task_split(train, columns, label, task, where), splits, task, source)


def _is_there(folder: Path, end: str) -> bool:
    """MNLI's second file of validation rows may be missing; the first one of every task may not."""
    return end != "_mismatched" or (folder / f"dev{end}.tsv").is_file()


def _split_of_mrpc(folder: Path, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The corpus of paraphrases comes in one file, and GLUE's list says which of its pairs validate."""
    for name in ("dev_ids.tsv", "mrpc_dev_ids.tsv"):
        if (folder / name).is_file():
            pairs = {(row[0], row[1]) for row in read_table(folder / name, header=False)[0]}
            train = [row for row in rows if (row["#1 ID"], row["#2 ID"]) not in pairs]
            return train, [row for row in rows if (row["#1 ID"], row["#2 ID"]) in pairs]
    raise UsageError(f"{folder} has msr_paraphrase_train.txt but no dev_ids.tsv, which says what is for validation")


# ---------------------------------------------------------------- files of one's own


def _from_files(args: argparse.Namespace) -> Texts:
    rows = {name: read_rows(Path(getattr(args, name))) for name in ("train_file", "validation_file")}
    names = list(rows["train_file"][0])
    where = f"{args.train_file} and {args.validation_file}"
    if set(rows["validation_file"][0]) != set(names):
        raise UsageError(f"{where} have different columns: {', '.join(names)} and {_names(rows['validation_file'])}")
    if args.task_name is not None:
        task = TASKS[args.task_name]
        train, held_out = (_task_split(part, task.columns, "label", task, where) for part in rows.values())
        return _described(train, {"": held_out}, task, where)
    if "label" not in names:
        raise UsageError(f"{args.train_file} has no column label, only {', '.join(names)}")
    columns = _text_columns(names, args.train_file)
    labels = {name: _labels(part, "label", where) for name, part in rows.items()}
    if _are_numbers(labels["train_file"]):
        classes, numbers = (), {name: [_number(value, where) for value in part] for name, part in labels.items()}
    else:
        classes = _sorted_classes(labels["train_file"])
        numbers = {name: _classified([str(v) for v in part], classes, where) for name, part in labels.items()}
    train, held_out = (Split(_columns(part, columns, where), numbers[name]) for name, part in rows.items())
    used = f"{where} ({', '.join(columns)})"
    metrics = ("accuracy",) if classes else ("pearson", "spearmanr")
    return Texts(train, {"": held_out}, classes, metrics, _line(used, train, {"": held_out}))


def _names(rows: list[Row]) -> str:
    return ", ".join(map(str, rows[0]))


def _text_columns(names: list[str], path: str) -> tuple[str, ...]:
    """sentence1 and sentence2 where both are there, else the first two columns that are neither label nor counter."""
    if "sentence1" in names and "sentence2" in names:
        return "sentence1", "sentence2"
    texts = tuple(name for name in names if name != "label" and name not in _COUNTERS)[:2]
    if not texts:
        raise UsageError(f"{path} has no column of texts besides {', '.join(names)}")
    return texts


def _columns(rows: list[Row], columns: Sequence[str | int], where: str) -> tuple[list[str], ...]:
    found = []
    for column in columns:
        if column not in rows[0]:
            raise UsageError(f"{where} lacks the column {column}: there are {_names(rows)}")
        if any(row[column] is None for row in rows):
            raise UsageError(f"{where}: the column {column} has a row without text")
        found.append([str(row[column]) for row in rows])
    return tuple(found)


def _task_split(rows: list[Row], columns: Sequence[str | int], label: str | int, task: Task, where: str) -> Split:
    if rows and label not in rows[0]:
        raise UsageError(f"{where} lacks the column {label}: there are {_names(rows)}")
    if not rows:
        raise UsageError(f"{where} has no rows for training or none for validation")
    values = _labels(rows, label, where)
    if not task.labels:
        return Split(_columns(rows, columns, where), [_number(value, where) for value in values])
    return Split(_columns(rows, columns, where), _classified([str(value) for value in values], task.labels, where))


def _labels(rows: list[Row], label: str | int, where: str) -> list[Any]:
    values = [row[label].strip() if isinstance(row[label], str) else row[label] for row in rows]
    if any(value is None or value == "" for value in values):
        raise UsageError(f"{where}: the column {label} has a row without a label")
    return values


def _classified(values: list[str], classes: tuple[str, ...], where: str) -> list[int]:
    """Class numbers; a label may be the name of a class or, where no class is called so, its number."""
    numbers = {str(number): number for number in range(len(classes))} if not _all_digits(classes) else {}
    numbers.update({name: number for number, name in enumerate(classes)})
    for value in values:
        if value not in numbers:
            raise UsageError(f"{where}: the label {value!r} is none of {', '.join(classes)}")
    return [numbers[value] for value in values]


def _all_digits(classes: tuple[str, ...]) -> bool:
    return all(map(_is_whole, classes))


def _is_whole(text: str) -> bool:
    return re.fullmatch("[+-]?[0-9]+", text) is not None


def _sorted_classes(labels: list[Any]) -> tuple[str, ...]:
    names = sorted({str(value) for value in labels})
    if len(names) < 2:
        raise UsageError(f"the training rows have one label only, {names[0]}")
    return tuple(sorted(names, key=int) if _all_digits(tuple(names)) else names)


def _are_numbers(labels: list[Any]) -> bool:
    """Whether labels are values to predict: all of them numbers, and not all of them whole numbers as written."""
    if any(isinstance(value, bool) for value in labels):
        return False
    try:
        for value in labels:
            float(value)
    except (TypeError, ValueError):
        return False
    return any(isinstance(value, float) or not _is_whole(str(value)) for value in labels)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: the label {value!r} is no number")
    return number
