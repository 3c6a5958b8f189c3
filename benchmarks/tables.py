"""Markdown tables of results, and their places in a page of the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "subspace.md"


def mean_and_error(values: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean and standard error of the mean; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its first column is text and stands left, the others stand right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rewrite(page: Path, name: str, table: str) -> None:
    """Put a table between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: the page lacks one of the two lines, or they stand the wrong way round.
    """
    text = page.read_text()
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    start, end = text.find(first), text.find(last)
    if not 0 <= start < end:
        raise ValueError(f"{page.name} needs the lines {first} and {last}, in this order")
    page.write_text(text[: start + len(first)] + f"\n\n{table}\n\n" + text[end:])
