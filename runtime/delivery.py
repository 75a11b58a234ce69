"""Brings what the steps compute to the requests' handles, and notes which sequences must end because of it."""

import itertools

import numpy as np

from ..errors import MillraceError
from .completion import TokenEvent
from .executor import StepResult
from .handle import RequestHandle
from .logprobs import Scores
from .plan import Progress, StepPlan
from .sequence import Sequence, Status
from .turn import Ending

_NO_TOKEN = (
    "the model's logits hold NaN or infinity, or its options leave no token; use dtype=float32 if the checkpoint "
    "overflows its dtype"
)


class Delivery:
    """Of process 0; called by the step loop's thread alone. Sequences go by their arrival."""

    def __init__(self) -> None:
        self._next = itertools.count()
        self._numbers: dict[RequestHandle, int] = {}
        self._handles: dict[tuple[int, int], RequestHandle] = {}
        self._ended: list[Ending] = []

    def take(self, handle: RequestHandle) -> None:
        """A request that is about to be added to the scheduler, which numbers them alike."""
        number = self._numbers[handle] = next(self._next)
        self._handles.update({(number, index): handle for index in range(handle.request.params.n)})

    def waiting(self) -> list[RequestHandle]:
        """Handles to which something is still to come."""
        return list(self._numbers)

    def endings(self) -> tuple[Ending, ...]:
        """What must end before the next plan; it is told once."""
        ended, self._ended = self._ended, []
        return tuple(ended)

    def cancel(self, handle: RequestHandle) -> None:
        """Have a request's sequences end; the handle learns of it when they have."""
        self._ended += [Ending(arrival=arrival, reason="abort") for arrival in self._arrivals(handle)]

    def tell_end(self, sequence: Sequence) -> None:
        """A sequence has ended without another token."""
        handle = self._handles.get(sequence.arrival)
        if handle is not None:
            handle.push(_event(sequence, (), None))
            self._forget(sequence.arrival)

    def fail(self, handle: RequestHandle, error: BaseException) -> None:
        """End a request with an error."""
        handle.fail(error)
        self.cancel(handle)
        for arrival in self._arrivals(handle):
            self._forget(arrival)

    def fail_plan(self, plan: StepPlan, error: BaseException) -> None:
        """End every request that a step touched which was not computed."""
        for shard in plan.shards:
            for sequence in (*shard.decoding, *(chunk.sequence for chunk in shard.chunks)):
                handle = self._handles.get(sequence.arrival)
                if handle is not None:
                    self.fail(handle, error)

    def deliver(self, progress: Progress, result: StepResult) -> None:
        """What one committed step brought one sequence."""
        sequence = progress.sequence
        handle = self._handles.get(sequence.arrival)
        if handle is None:  # cancelled while the step was in flight
            return
        params = sequence.request.params
        if progress.chunk is not None and params.prompt_logprobs is not None and sequence.index == 0:
            _deliver_prompt(progress, handle, result)
        if sequence.status is Status.FINISHED and sequence.finish_reason == "abort":
            self.fail(handle, MillraceError(_NO_TOKEN))
            return
        scores = _rows(result.scores(), progress) if params.logprobs is not None and progress.tokens else None
        handle.num_cached_tokens = sequence.num_cached_tokens
        handle.num_preemptions = sequence.num_preemptions
        if not progress.tokens:
            return
        try:
            stop = handle.push(_event(sequence, progress.tokens, scores))
        except Exception as error:  # its text cannot be made: no business of its neighbours
            self.fail(handle, error)
            return
        if stop is not None:
            self._ended.append(Ending(arrival=sequence.arrival, reason="stop", stop_reason=stop))
        if stop is not None or sequence.status is Status.FINISHED:
            self._forget(sequence.arrival)

    def _arrivals(self, handle: RequestHandle) -> list[tuple[int, int]]:
        """Of a request's sequences to which something is still to come."""
        number = self._numbers.get(handle)
        if number is None:
            return []
        return [(number, index) for index in range(handle.request.params.n) if (number, index) in self._handles]

    def _forget(self, arrival: tuple[int, int]) -> None:
        handle = self._handles.pop(arrival)
        if not self._arrivals(handle):
            del self._numbers[handle]


def _deliver_prompt(progress: Progress, handle: RequestHandle, result: StepResult) -> None:
    chunk = progress.chunk
    assert chunk is not None
    prompt = progress.sequence.request.prompt_token_ids
    targets = prompt[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
    at = slice(progress.first_token, progress.first_token + len(targets))
    scores = Scores(*(array[progress.shard, at] for array in result.prompt_scores()))
    handle.push_prompt_scores(chunk.start + 1, targets, scores)


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
