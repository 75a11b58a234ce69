"""A request on its way: result, iteration, async iteration, cancel. Thread-safe."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from ..errors import MillraceError
from .completion import Continuation, TokenEvent, entry, join
from .logprobs import Scores
from .request import CompletionOutput, Logprob, Request, RequestMetrics, RequestOutput
from .tokenizer import Tokenizer


class RequestHandle:
    """What `Runtime.submit` returns. The step loop pushes events; whoever reads turns them into text.

    Only a request with stop strings is detokenized by the step loop, which must know where it ends.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, cancel: Callable[["RequestHandle"], None]
    ) -> None:
        self.request = request
        self._tokenizer = tokenizer
        self._cancel = cancel
        self._changed = threading.Condition()
        self._continuations = [Continuation(request, index, tokenizer) for index in range(request.params.n)]
        self._pieces: list[list[CompletionOutput]] = [[] for _ in range(request.params.n)]
        self._events: deque[TokenEvent | CompletionOutput] = deque()
        self._num_unfinished = request.params.n
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
        with self._changed:
            item: TokenEvent | CompletionOutput = event
            finish_reason = event.finish_reason
            if self.request.params.stop:
                piece = self._continuations[event.index].take(event)
                if piece is None:
                    return None
                item, finish_reason = piece, piece.finish_reason
                stop = piece.stop_reason if isinstance(piece.stop_reason, str) else None
            self._events.append(item)
            now = time.monotonic()
            if event.tokens and self._first_token_s is None:
                self._first_token_s = now
            if finish_reason is not None:
                self._num_unfinished -= 1
                self._finished_s = now
            self._notify()
        return stop

    def push_prompt_scores(self, start: int, targets: tuple[int, ...], scores: Scores) -> None:
        """Scores of the tokens at positions start, start + 1, ...; positions already known are kept."""
        count = self.request.params.prompt_logprobs
        assert count is not None
        with self._changed:
            for i, token in enumerate(targets):
                if start + i not in self._prompt_entries:
                    self._prompt_entries[start + i] = entry(self._tokenizer, scores, i, token, count)

    def fail(self, error: BaseException) -> None:
        """End the request with an error that every reader gets."""
        with self._changed:
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
        with self._changed:
            return self._is_over()

    def cancel(self) -> None:
        """End what is still running with finish_reason "abort"; what was generated remains readable."""
        self._cancel(self)

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """The whole output, once it is finished.

        Raises:
          TimeoutError: it was not within `timeout_s`; the request goes on.
          MillraceError: the request or the runtime failed.
        """
        with self._changed:
            if not self._changed.wait_for(self._is_over, timeout_s):
                raise TimeoutError(f"request {self.request.request_id} is not finished after {timeout_s} s")
            self._drain()
            self._raise_error()
            return self._output([join(pieces) for pieces in self._pieces], finished=True)

    def __iter__(self) -> Iterator[RequestOutput]:
        """Outputs that hold only what is new, each of one continuation; one reader at a time."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._is_over())
                pieces = self._drain()
                done = self._is_over()
                if not pieces:
                    self._raise_error()
            yield from self._stream(pieces, done)
            if done:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """As iteration, without blocking the event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(listener)
            changed.set()
        try:
            while True:
                await changed.wait()
                changed.clear()
                with self._changed:
                    pieces = self._drain()
                    done = self._is_over()
                    if not pieces:
                        self._raise_error()
                for output in self._stream(pieces, done):
                    yield output
                if done:
                    return
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def _is_over(self) -> bool:
        return self._num_unfinished == 0 or self._error is not None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise MillraceError(f"request {self.request.request_id} failed: {self._error}") from self._error

    def _drain(self) -> list[CompletionOutput]:
        """Turn the events that came into pieces; the condition is held."""
        pieces = []
        while self._events:
            item = self._events.popleft()
            piece = self._continuations[item.index].take(item) if isinstance(item, TokenEvent) else item
            if piece is not None:
                self._pieces[piece.index].append(piece)
                pieces.append(piece)
        return pieces

    def _stream(self, pieces: list[CompletionOutput], done: bool) -> Iterator[RequestOutput]:
        for i, piece in enumerate(pieces):
            yield self._output([piece], finished=done and i == len(pieces) - 1)

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
