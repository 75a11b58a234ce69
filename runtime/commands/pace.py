"""How fast one streamed completion came."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..request import RequestMetrics

_FEWEST_PIECES = 3  # the time between two says little: both may have been waiting when the first was read


class Pace:
    """Counts the tokens of a stream from the moment it is made."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = self._started_s
        self._num_first = self._num_pieces = 0
        self.num_tokens = 0

    def note(self, num_tokens: int, metrics: "RequestMetrics | None" = None) -> None:
        """`num_tokens` more have come now; the last piece's metrics say when the first and the last were made."""
        if num_tokens:
            self._last_s = time.perf_counter()
            if self._first_s is None:
                self._first_s, self._num_first = self._last_s, num_tokens
            self.num_tokens += num_tokens
            self._num_pieces += 1
        if metrics is not None and metrics.time_to_first_token_s is not None and metrics.total_s is not None:
            self._first_s = self._started_s + metrics.time_to_first_token_s
            self._last_s = self._started_s + metrics.total_s

    @property
    def first_token_s(self) -> float:
        """Seconds from the start to the first token."""
        return (self._last_s if self._first_s is None else self._first_s) - self._started_s

    @property
    def decode_s(self) -> float:
        """Seconds from the first piece to the last."""
        return 0.0 if self._first_s is None else self._last_s - self._first_s

    @property
    def num_decoded(self) -> int:
        """Tokens that came within decode_s: all but the first piece."""
        return self.num_tokens - self._num_first

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed after the first piece; over the whole time where there were too few to tell."""
        if self._num_pieces >= _FEWEST_PIECES and self.decode_s:
            return self.num_decoded / self.decode_s
        return self.num_tokens / max(self._last_s - self._started_s, 1e-9)

    def sentence(self) -> str:
        """`64 tokens, 812.5 tokens/s, first token after 9 ms`."""
        first_ms = 1000 * self.first_token_s
        return f"{self.num_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, first token after {first_ms:.0f} ms"
