"""Ctrl-C and SIGTERM set a flag; the training loop looks at it after every update."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Catches the first SIGINT or SIGTERM; a second one of the same kind acts as it always does.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.asked
        False
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
