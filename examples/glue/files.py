"""Rows out of TSV, CSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from pretrain.errors import UsageError

Row = dict[Any, Any]
SUFFIXES = (".tsv", ".csv", ".json", ".jsonl")


def read_rows(path: Path) -> list[Row]:
    """All rows of a file whose first line names the columns, or of JSON objects.

    Args:
        path: ``.tsv`` (quotation marks are letters, as in GLUE), ``.csv``, ``.json`` (a list of objects, or one object
            a line) or ``.jsonl``; UTF-8.

    Raises:
        UsageError: The file cannot be read, has no rows, or a row has other columns than the first.
    """
    text = _text(path)
    if path.suffix in (".json", ".jsonl"):
        rows = _json_rows(path, text)
    else:
        try:
            first, *rest = _cells(text, path.suffix == ".csv") or [[]]
        except csv.Error as error:
            raise UsageError(f"{path} is not CSV: {error}") from None
        rows = [dict(zip(first, cells, strict=False)) for cells in rest]
        for number, cells in enumerate(rest, start=2):
            if len(cells) != len(first):
                raise UsageError(f"{path}: row {number} has {len(cells)} columns, the first one {len(first)}")
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def read_table(path: Path, header: bool) -> tuple[list[Row], int]:
    """The rows of one of GLUE's own files, without those that are broken (some of QQP's are).

    Args:
        path: A tab-separated file.
        header: Whether the first line names the columns; they are numbered from 0 where it does not.

    Returns:
        Rows, and the number of rows that were left out for a wrong number of columns.

    Raises:
        UsageError: The file cannot be read, or has no rows.
    """
    cells = _cells(_text(path), quoted=False)
    names: list[Any] = cells.pop(0) if header and cells else list(range(len(cells[0]) if cells else 0))
    rows = [dict(zip(names, row, strict=True)) for row in cells if len(row) == len(names)]
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows, len(cells) - len(rows)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # not read_text: a carriage return alone ends no row
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8") from None


def _cells(text: str, quoted: bool) -> list[list[str]]:
    # Never splitlines: a text may hold one of the other line ends of Unicode.
    if quoted:
        return [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip("\r")]


def _json_rows(path: Path, text: str) -> list[Row]:
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} must hold objects such as {{'sentence': ..., 'label': ...}}")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise UsageError(f"{path}: an object has other keys than the first one ({', '.join(map(str, rows[0]))})")
    return rows
