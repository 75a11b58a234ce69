"""The step loop: plan, run, commit, with commit one step behind, so that the host plans while the device computes."""

import threading
from collections.abc import Sequence as Items

import numpy as np

from ..errors import MillraceError, RuntimeClosedError
from .completion import TokenEvent
from .executor import Executor, StepResult
from .handle import RequestHandle
from .logprobs import Scores
from .plan import Progress, StepPlan
from .scheduler import Scheduler
from .sequence import Sequence, Status

_NO_TOKEN = (
    "the model's logits hold NaN or infinity, or its options leave no token; use dtype=float32 if the checkpoint "
    "overflows its dtype"
)


class StepLoop:
    """One thread that owns scheduler and executor; others reach it through an inbox."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._inbox: list[RequestHandle] = []
        self._cancelled: list[RequestHandle] = []
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
            if self._error is not None:
                raise RuntimeClosedError(f"the step loop died of {self._error!r}; open a new Runtime") from self._error
            if self._is_closing:
                raise RuntimeClosedError("the runtime is closed; open a new one")
            self._inbox += handles
            self._changed.notify()

    def cancel(self, handle: RequestHandle) -> None:
        """End a request before the next plan; nothing if it has ended."""
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify()

    def close(self) -> None:
        """Abort what is running and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
            self._abort(list(self._sequences))
        except BaseException as error:  # every waiting reader must learn of it, whatever it is
            with self._changed:
                self._error = error
                waiting = [*self._inbox, *self._sequences]
            for handle in waiting:
                handle.fail(error)

    def _take_inbox(self) -> bool:
        """Wait for work, take what arrived; False when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._cancelled or self._is_closing or self._has_work())
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

    def _has_work(self) -> bool:
        return bool(self._sequences) or self._in_flight is not None

    def _step(self) -> None:
        plan = self._scheduler.plan()
        result = self._executor.run(plan) if plan is not None else None
        if self._in_flight is not None:
            self._commit(*self._in_flight)
        self._in_flight = (plan, result) if plan is not None and result is not None else None

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        for progress in self._scheduler.commit(plan, result.tokens()):
            self._deliver(progress, result)

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
        event = TokenEvent(
            index=sequence.index,
            tokens=progress.tokens,
            scores=scores,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        try:
            stop = handle.push(event)
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
                handle.push(
                    TokenEvent(index=sequence.index, tokens=(), scores=None, finish_reason="abort", stop_reason=None)
                )

    def _drop(self, handle: RequestHandle) -> list[Sequence]:
        """Forget a request; returns its sequences that had not ended, which the scheduler ends."""
        dropped = [s for s in self._sequences.pop(handle, ()) if self._handles.pop(s, None) is not None]
        for sequence in dropped:
            self._scheduler.finish(sequence, "abort")
        return dropped


def _rows(scores: Scores, progress: Progress) -> Scores:
    """The scores of one sequence's tokens, [len(tokens), ...]."""
    steps = np.arange(len(progress.tokens))
    return Scores(*(array[steps, progress.shard, progress.row] for array in scores))
