"""The step loop: plan, run, commit, with commit one step behind, so that the host plans while the device computes."""

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, InvalidStateError

import numpy as np

from ..errors import MillraceError, RuntimeClosedError, StepError
from .completion import TokenEvent
from .executor import Executor, StepResult
from .handle import RequestHandle
from .logprobs import Scores
from .plan import Progress, StepPlan
from .sampling_params import OnWeightsUpdate
from .scheduler import Scheduler
from .sequence import Sequence, Status

_NO_TOKEN = (
    "the model's logits hold NaN or infinity, or its options leave no token; use dtype=float32 if the checkpoint "
    "overflows its dtype"
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    """New weights that wait for their turn."""

    swap: Callable[[], None]
    running: OnWeightsUpdate  # what happens to requests that do not say it themselves
    version: Future[int]

    def waits_for(self, sequence: Sequence) -> bool:
        """Whether a sequence that has started must end first."""
        return (sequence.request.params.on_weights_update or self.running) == "drain"


class StepLoop:
    """One thread that owns scheduler and executor; others reach it through an inbox."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._inbox: list[RequestHandle] = []
        self._cancelled: list[RequestHandle] = []
        self._updates: deque[_Update] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._error: BaseException | None = None
        self._handles: dict[Sequence, RequestHandle] = {}
        self._sequences: dict[RequestHandle, tuple[Sequence, ...]] = {}
        self._in_flight: tuple[StepPlan, StepResult] | None = None
        self._thread = threading.Thread(target=self._run, name="millrace-step-loop", daemon=True)
        self._thread.start()

    def submit(self, handles: Items[RequestHandle]) -> None:
        """Queue requests, all before the same plan.

        Raises:
          RuntimeClosedError: the loop has ended.
        """
        with self._changed:
            self.check_open()
            self._inbox += handles
            self._changed.notify()

    def cancel(self, handle: RequestHandle) -> None:
        """End a request before the next plan; nothing if it has ended."""
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify()

    def update_weights(self, swap: Callable[[], None], running: OnWeightsUpdate) -> "Future[int]":
        """Queue new weights: `swap` is called between two steps, once what must end on the old weights has ended.

        Until then no request starts. An error of the tree that `swap` raises says that the old weights stand; any
        other ends the loop. The future brings the new version; cancelling it withdraws what has not begun.

        Raises:
          RuntimeClosedError: the loop has ended; the future brings it if that happens later.
        """
        with self._changed:
            self.check_open()
            update = _Update(swap, running, Future())
            self._updates.append(update)
            self._changed.notify()
        return update.version

    @property
    def weights_version(self) -> int:
        """How many times the weights were updated."""
        return self._scheduler.weights_version

    def check_open(self) -> None:
        """Raises RuntimeClosedError if the loop has ended."""
        with self._changed:
            if self._error is not None or self._is_closing:
                raise self._ended() from self._error

    def close(self) -> None:
        """Abort what is running and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ended(self) -> RuntimeClosedError:
        if self._error is not None:
            return RuntimeClosedError(f"the step loop died of {self._error!r}; open a new Runtime")
        return RuntimeClosedError("the runtime is closed; open a new one")

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._swap_weights()
                self._step()
            self._abort(list(self._sequences))
        except BaseException as error:  # every waiting reader must learn of it, whatever it is
            with self._changed:
                self._error = error
                waiting = [*self._inbox, *self._sequences]
            for handle in waiting:
                handle.fail(error)
        for update in self._updates:
            with contextlib.suppress(InvalidStateError):  # withdrawn
                update.version.set_exception(self._ended())

    def _take_inbox(self) -> bool:
        """Wait for work, take what arrived; False when closing."""
        with self._changed:
            self._changed.wait_for(self._has_news)
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            is_closing = self._is_closing
        self._sequences.update(dict.fromkeys(arrived, ()))  # should add() fail, its handles are among the waiting
        for handle in arrived:
            sequences = self._scheduler.add(handle.request)
            self._sequences[handle] = sequences
            self._handles.update(dict.fromkeys(sequences, handle))
        self._abort(cancelled)
        return not is_closing

    def _has_news(self) -> bool:
        is_busy = self._sequences or self._in_flight is not None
        return bool(is_busy or self._inbox or self._cancelled or self._updates or self._is_closing)

    def _swap_weights(self) -> None:
        """Take the new weights whose turn has come; while some wait, no request starts."""
        while self._updates:
            update = self._updates[0]
            if not update.version.cancelled() and any(map(update.waits_for, self._scheduler.started())):
                break
            self._commit_in_flight()  # with the version that computed it; and the device lets go of the old weights
            if update.version.set_running_or_notify_cancel():
                try:
                    update.swap()
                except MillraceError as error:
                    update.version.set_exception(error)
                else:
                    self._scheduler.weights_version += 1
                    update.version.set_result(self._scheduler.weights_version)
            self._updates.popleft()
        self._scheduler.starts_requests = not self._updates

    def _step(self) -> None:
        plan = self._scheduler.plan()
        result, failure = None, None
        if plan is not None:
            try:
                result = self._executor.run(plan)
            except StepError as error:
                failure = error
        self._commit_in_flight()
        if plan is not None and failure is not None:
            self._fail(plan, failure)
        if plan is not None and result is not None:
            self._in_flight = plan, result
            if not self._executor.overlaps:  # all of the step is behind us: nothing is gained by planning ahead
                self._commit_in_flight()

    def _commit_in_flight(self) -> None:
        if self._in_flight is None:
            return
        plan, result = self._in_flight
        for progress in self._scheduler.commit(plan, result.tokens()):
            self._deliver(progress, result)
        self._in_flight = None

    def _fail(self, plan: StepPlan, error: StepError) -> None:
        """End every request that a step touched which was not computed."""
        for shard in plan.shards:
            for sequence in (*shard.decoding, *(chunk.sequence for chunk in shard.chunks)):
                handle = self._handles.get(sequence)
                if handle is not None:
                    handle.fail(error)
                    self._drop(handle)

    def _deliver(self, progress: Progress, result: StepResult) -> None:
        sequence = progress.sequence
        handle = self._handles.get(sequence)
        if handle is None:  # cancelled while the step was in flight
            return
        params = sequence.request.params
        if progress.chunk is not None and params.prompt_logprobs is not None and sequence.index == 0:
            self._deliver_prompt(progress, handle, result)
        if sequence.status is Status.FINISHED and sequence.finish_reason == "abort":
            handle.fail(MillraceError(_NO_TOKEN))
            self._drop(handle)
            return
        scores = _rows(result.scores(), progress) if params.logprobs is not None and progress.tokens else None
        handle.num_cached_tokens = sequence.num_cached_tokens
        handle.num_preemptions = sequence.num_preemptions
        if not progress.tokens:
            return
        try:
            stop = handle.push(_event(sequence, progress.tokens, scores))
        except Exception as error:  # its text cannot be made: no business of its neighbours
            handle.fail(error)
            self._drop(handle)
            return
        if stop is not None:
            self._scheduler.finish(sequence, "stop", stop)
        if sequence.status is Status.FINISHED:
            self._forget(sequence)

    def _deliver_prompt(self, progress: Progress, handle: RequestHandle, result: StepResult) -> None:
        chunk = progress.chunk
        assert chunk is not None
        prompt = progress.sequence.request.prompt_token_ids
        targets = prompt[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
        at = slice(progress.first_token, progress.first_token + len(targets))
        scores = Scores(*(array[progress.shard, at] for array in result.prompt_scores()))
        handle.push_prompt_scores(chunk.start + 1, targets, scores)

    def _forget(self, sequence: Sequence) -> None:
        handle = self._handles.pop(sequence)
        if not any(other in self._handles for other in self._sequences[handle]):
            del self._sequences[handle]

    def _abort(self, handles: Items[RequestHandle]) -> None:
        for handle in handles:
            for sequence in self._drop(handle):
                handle.push(_event(sequence, (), None))

    def _drop(self, handle: RequestHandle) -> list[Sequence]:
        """Forget a request; returns its sequences that had not ended, which the scheduler ends."""
        dropped = [s for s in self._sequences.pop(handle, ()) if self._handles.pop(s, None) is not None]
        for sequence in dropped:
            self._scheduler.finish(sequence, "abort")
        return dropped


def _event(sequence: Sequence, tokens: tuple[int, ...], scores: Scores | None) -> TokenEvent:
    return TokenEvent(
        index=sequence.index,
        tokens=tokens,
        scores=scores,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        weights_version=sequence.weights_version,
        first_weights_version=sequence.first_weights_version,
    )


def _rows(scores: Scores, progress: Progress) -> Scores:
    """The scores of one sequence's tokens, [len(tokens), ...]."""
    steps = np.arange(len(progress.tokens))
    return Scores(*(array[steps, progress.shard, progress.row] for array in scores))
