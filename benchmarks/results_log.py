"""The rows and claims of a long benchmark as they come, each told on stderr at once."""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

_COLUMNS = ("measure", "of", "batch", "median", "unit", "tokens_per_s", "lowest", "highest", "runs", "note")


class Results:
    """What `report` is given in the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.claims: dict[str, bool] = {}
        self._started_s = time.perf_counter()

    def say(self, text: str) -> None:
        """Progress."""
        print(f"[{time.perf_counter() - self._started_s:4.0f} s] {text}", file=sys.stderr, flush=True)

    def add(self, measure: str, of: str, values: Sequence[float], unit: str, *, batch: int | None = None) -> float:
        """A row; returns its median. With a batch, the values are a step's seconds."""
        median = statistics.median(values)
        row = {"measure": measure, "of": of, "median": median, "unit": unit}
        row |= {"lowest": min(values), "highest": max(values), "runs": len(values)}
        if batch is not None:
            row |= {"batch": batch} | ({"tokens_per_s": batch / median} if unit == "s" else {})
        self._append(row)
        self.say(f"{measure}, {of}{f', batch {batch}' if batch else ''}: {median:.4g} {unit}")
        return median

    def absent(self, measure: str, of: str, reason: str) -> None:
        """A row for what could not be measured."""
        self._append({"measure": measure, "of": of, "note": f"absent: {reason}"})
        self.say(f"{measure}, {of}: absent, {reason}")

    def claim(self, text: str, value: float, *, at_least: float = float("-inf"), at_most: float = float("inf")) -> None:
        """Whether a value is as it should be; the text names the bound, the value is added."""
        self.claims[f"{text} ({value:.3g})"] = at_least <= value <= at_most

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.append({column: row.get(column, "") for column in _COLUMNS})
