"""The fastest of a peer's settings for each cell of cpu_peers.py: every peer is measured at its best.

Standard library only, of Python 3.11 on: it runs in the peers' environments.
"""

from collections.abc import Callable, Mapping
from typing import Any

NUM_TRIES = 2  # of every setting, in turns; its best one counts

Measure = Callable[[], float]  # seconds


class FastestSettings:
    """Which setting was the fastest for a cell when it was first asked for."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[Any, ...], str] = {}

    def measure(self, cell: tuple[Any, ...], settings: Mapping[str, Measure]) -> dict[str, Any]:
        """Seconds under the cell's setting, and its name; the first time all are tried, which warms up too."""
        if cell in self._chosen:
            name = self._chosen[cell]
            return {"seconds": settings[name](), "setting": name}
        tries = [{name: run() for name, run in settings.items()} for _ in range(NUM_TRIES)]
        best = {name: min(seconds[name] for seconds in tries) for name in settings}
        name = self._chosen[cell] = min(best, key=lambda name: best[name])
        return {"seconds": best[name], "setting": name}
