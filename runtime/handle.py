"""A request on its way: result, iteration, async iteration, cancel. Thread-safe."""

import asyncio
import contextlib
import functools
import math
import numbers
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from ..errors import InvalidRequestError, MillraceError
from .completion import Continuation, TokenEvent, entry, join
from .logprobs import Scores
from .request import CompletionOutput, Logprob, Request, RequestMetrics, RequestOutput
from .spelling import shown
from .tokenizer import Tokenizer


class RequestHandle:
    """What `Runtime.submit` returns. The step loop pushes events; whoever reads turns them into text.

    Only a request with stop strings is detokenized by the step loop, which must know where it ends. Two locks, so
    that the loop never waits for a reader's detokenizing: `_lock` guards what the loop pushes, `_reading` what
    readers make of it.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, cancel: Callable[["RequestHandle"], None]
    ) -> None:
        self.request = request
        self._tokenizer = tokenizer
        self._cancel = cancel
        self.wants_scores = request.params.logprobs is not None
        self._finds_stop_strings = bool(request.params.stop)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0  # threads
        self._continuations = [Continuation(request, index, tokenizer) for index in range(request.params.n)]
        self._reading = threading.Lock()
        self._pieces: list[CompletionOutput] = []  # one for each event, in order
        self._events: deque[TokenEvent | CompletionOutput] = deque()
        self._num_events = 0  # read ones too
        self._num_unfinished = request.params.n
        self._prompt_scores: deque[tuple[int, tuple[int, ...], Scores]] = deque()
        self._prompt_entries: dict[int, dict[int, Logprob]] = {}  # by position
        self._listeners: list[Callable[[], None]] = []
        self._error: BaseException | None = None
        self._submitted_s = time.monotonic()
        self._first_token_s: float | None = None
        self._finished_s: float | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0

    # ---- the step loop's side

    def push(self, event: TokenEvent) -> str | None:
        """Take a step's event; returns the stop string that ended the continuation, if one did."""
        stop = None
        with self._lock:
            item: TokenEvent | CompletionOutput = event
            finish_reason = event.finish_reason
            if self._finds_stop_strings:
                piece = self._continuations[event.index].take(event)
                if piece is None:
                    return None
                item, finish_reason = piece, piece.finish_reason
                stop = piece.stop_reason if isinstance(piece.stop_reason, str) else None
            self._events.append(item)
            self._num_events += 1
            if self._first_token_s is None and event.tokens:
                self._first_token_s = time.monotonic()
            if finish_reason is not None:
                self._num_unfinished -= 1
                self._finished_s = time.monotonic()
            if self._num_waiting or self._listeners:
                self._notify()
        return stop

    def push_prompt_scores(self, start: int, targets: tuple[int, ...], scores: Scores) -> None:
        """Scores of the tokens at positions start, start + 1, ...; positions already known are kept."""
        self._prompt_scores.append((start, targets, scores))

    def fail(self, error: BaseException) -> None:
        """End the request with an error that every reader gets."""
        with self._lock:
            if self._num_unfinished and self._error is None:
                self._error = error
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    # ---- the user's side

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        with self._lock:
            return self._is_over()

    def cancel(self) -> None:
        """End what is still running with finish_reason "abort"; what was generated remains readable."""
        self._cancel(self)

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """The whole output, once it is finished.

        Raises:
          TimeoutError: it was not within `timeout_s`; the request goes on.
          InvalidRequestError: `timeout_s` is no number of seconds; the request goes on.
          MillraceError: the request or the runtime failed.
        """
        _check_seconds(timeout_s)
        with self._lock:
            if not self._wait_for(self._is_over, timeout_s):
                raise TimeoutError(f"request {self.request.request_id} is not finished after {timeout_s} s")
            self._raise_error()
        self._read()
        by_index: list[list[CompletionOutput]] = [[] for _ in self._continuations]
        for piece in self._pieces:
            by_index[piece.index].append(piece)
        return self._output([join(pieces) for pieces in by_index], finished=True)

    def __iter__(self) -> Iterator[RequestOutput]:
        """Outputs that hold only what is new, each of one continuation; every iteration starts at the first.

        Raises:
          MillraceError: after what came before the request or the runtime failed.
        """
        num_read, is_over = 0, False
        while not is_over:
            with self._lock:
                self._wait_for(functools.partial(self._has_more, num_read))
            outputs, is_over = self._outputs_from(num_read)
            num_read += len(outputs)
            yield from outputs
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """As iteration, without blocking the event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed: no business of the step loop's
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.append(listener)
        try:
            num_read, is_over = 0, False
            while not is_over:
                changed.clear()
                outputs, is_over = self._outputs_from(num_read)
                num_read += len(outputs)
                for output in outputs:
                    yield output
                if not is_over:
                    await changed.wait()
        finally:
            with self._lock:
                self._listeners.remove(listener)
        self._raise_error()

    def _wait_for(self, holds: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Until it holds, or the time is over; with the lock held."""
        self._num_waiting += 1
        try:
            return self._changed.wait_for(holds, None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))
        finally:
            self._num_waiting -= 1

    def _is_over(self) -> bool:
        return self._num_unfinished == 0 or self._error is not None

    def _has_more(self, num_read: int) -> bool:
        return self._num_events > num_read or self._is_over()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise MillraceError(f"request {self.request.request_id} failed: {self._error}") from self._error

    def _read(self) -> bool:
        """Turn the events that came into pieces; returns whether nothing more will come."""
        with self._reading:
            with self._lock:  # both at once: what comes later is read next time, with what is over then
                is_over, count = self._is_over(), len(self._events)
            for _ in range(count):
                item = self._events[0]
                piece = self._continuations[item.index].take(item) if isinstance(item, TokenEvent) else item
                assert piece is not None, "the loop pushed past the end"
                self._pieces.append(piece)
                self._events.popleft()
            while self._prompt_scores:
                self._take_prompt_scores(*self._prompt_scores.popleft())
        return is_over

    def _take_prompt_scores(self, start: int, targets: tuple[int, ...], scores: Scores) -> None:
        count = self.request.params.prompt_logprobs
        assert count is not None
        for i, token in enumerate(targets):
            if start + i not in self._prompt_entries:
                self._prompt_entries[start + i] = entry(self._tokenizer, scores, i, token, count)

    def _outputs_from(self, num_read: int) -> tuple[list[RequestOutput], bool]:
        """What came after the first `num_read` outputs, and whether that is all."""
        is_over = self._read()
        pieces = self._pieces[num_read:]
        is_finished = is_over and self._error is None
        last = len(pieces) - 1
        return [self._output([piece], finished=is_finished and i == last) for i, piece in enumerate(pieces)], is_over

    def _output(self, outputs: list[CompletionOutput], finished: bool) -> RequestOutput:
        request = self.request
        total = None if self._finished_s is None else self._finished_s - self._submitted_s
        first = None if self._first_token_s is None else self._first_token_s - self._submitted_s
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(),
            outputs=outputs,
            finished=finished,
            metrics=RequestMetrics(
                time_to_first_token_s=first, total_s=total if finished else None, num_preemptions=self.num_preemptions
            ),
            num_cached_tokens=self.num_cached_tokens,
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.request.params.prompt_logprobs is None:
            return None
        positions = range(1, len(self.request.prompt_token_ids))
        return [None, *(self._prompt_entries[p] for p in positions if p in self._prompt_entries)]


def _check_seconds(timeout_s: Any) -> None:
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, numbers.Real) or math.isnan(timeout_s):
        raise InvalidRequestError(f"timeout_s must be a number of seconds, or None to wait on; got {shown(timeout_s)}")
