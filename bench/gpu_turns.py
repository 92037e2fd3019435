"""Turns on a GPU that several processes share: each runs beside the others until one asks to have
the GPU to itself for a measurement. Files are locked; nothing of CUDA is known here."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Turns:
    """One process's place at the GPU of this number; `folder` is the same for all that share it.

    A process that waits to be alone keeps the gate shut, so that those who pass through it after
    every step stop there.
    """

    def __init__(self, folder: Path, gpu: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._gate: IO[str] = (folder / f"gpu{gpu}.gate").open("a")
        self._room: IO[str] = (folder / f"gpu{gpu}.room").open("a")

    def beside(self) -> None:
        """Wait until nobody is alone, then be there beside others; called again after each step to
        let in who waits."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)

    def leave(self) -> None:
        """No longer there: who wants to be alone need not wait."""
        fcntl.flock(self._room, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Alone among the processes that take turns; left, not beside, afterwards."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._room, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
