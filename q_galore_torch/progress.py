"""A progress bar for work on large models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

DELAY = 2.0  # seconds without a bar, so that what is done soon shows none


def shown(items: Iterable[Item], doing: str, total: int) -> Iterator[Item]:
    """The same items, with a bar on stderr where that is a terminal, tqdm is installed and it takes some seconds.

    ``TQDM_DISABLE=1`` in the environment turns it off. No item is kept while the next one is made.

    Args:
        items: what is worked through.
        doing: what stands before the bar.
        total: number of items.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    iterator = iter(items)
    with tqdm(desc=doing, total=total, unit="layer", leave=False, disable=None, delay=DELAY) as bar:
        while held := [*islice(iterator, 1)]:
            yield held.pop()
            bar.update()
