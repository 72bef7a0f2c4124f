"""How much memory a piece of work takes at most, as the operating system sees it."""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/statm")
_INTERVAL = 0.01


class PeakMemory:
    """Measure the largest growth of the process's resident memory while the block runs.

    A thread samples it every 10 ms, so that short peaks may be missed; memory that the process had freed but not
    given back, and uses again, does not count. (The system's own peak is that since the process began, and psutil has
    nothing more than the number that is read here.) `megabytes` is in units of 10^6 bytes, None without /proc.
    """

    def __init__(self) -> None:
        self.megabytes: float | None = None
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._before = self._peak = _resident()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self._peak = max(self._peak, _resident())
        if self._peak:
            self.megabytes = (self._peak - self._before) / 1e6

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    """Bytes of resident memory; 0 where the system does not tell."""
    try:
        import resource

        return int(_STATUS.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ImportError):
        return 0
