"""What happened to the subspaces of a run, for its log."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

Entry = dict[str, Any]

# What is logged of a matrix whenever it changes. The last record of a run has everything.
FOLLOWED = ("name", "id", "refreshes", "gap", "similarity", "captured_energy", "held_out_energy", "seconds")


def count_refreshes(entries: Iterable[Entry]) -> int:
    """Subspaces computed so far, over all matrices."""
    return sum(int(entry.get("refreshes", 0)) for entry in entries)


class SubspaceLog:
    """Follows an optimizer's telemetry and finds what is new in it.

    A subspace changes once in a hundred updates, so records of the changes alone lose nothing and stay small.

    Args:
        optimizer: Any optimizer; those without subspaces have no entries.
        earlier: Records of the same run that are in its log already. Seconds go on from theirs, since the
            optimizer counts those of its own process.
    """

    def __init__(self, optimizer: Optimizer, earlier: Iterable[dict[str, Any]] = ()) -> None:
        self._telemetry = getattr(optimizer, "telemetry", list)
        self._logged: dict[str, Entry] = {}
        for record in earlier:
            for entry in record.get("parameters", ()) if record["kind"] == "telemetry" else ():
                self._logged[entry["name"]] = _followed(entry)
        self._seconds_before = {name: entry.get("seconds") or 0.0 for name, entry in self._logged.items()}

    def entries(self) -> list[Entry]:
        """One entry for each parameter, as plain JSON values; empty without subspaces."""
        return [self._plain(entry) for entry in self._telemetry()]

    def changed(self, entries: Iterable[Entry]) -> list[Entry]:
        """Short entries of the matrices that have a new basis, gap or judgement since the last call."""
        short = [_followed(entry) for entry in entries if entry.get("refreshes", 0) > 0]
        new = [entry for entry in short if entry != self._logged.get(entry["name"])]
        self._logged.update((entry["name"], entry) for entry in new)
        return new

    def _plain(self, entry: Entry) -> Entry:
        """A microsecond, or a millionth of the energy, is below anything worth reading."""
        entry = dict(entry)
        if "seconds" in entry:
            entry["seconds"] += self._seconds_before.get(entry["name"], 0.0)
        for key, value in entry.items():
            if isinstance(value, float):
                entry[key] = round(value, 6) if math.isfinite(value) else None
        return entry


def _followed(entry: Entry) -> Entry:
    return {key: entry[key] for key in FOLLOWED if key in entry}
