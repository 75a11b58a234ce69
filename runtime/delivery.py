"""Brings what the steps compute to the requests' handles, and notes which sequences must end because of it."""

import itertools

from ..errors import MillraceError
from .completion import TokenEvent
from .executor import StepResult
from .handle import RequestHandle
from .logprobs import Scores
from .plan import Chunk, Progress, StepPlan
from .sequence import Sequence
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
        """What one committed step brought."""
        if not self._handles:  # another process has them
            return
        for r, (part, rows) in enumerate(zip(progress.plan.shards, progress.tokens, strict=True)):
            for row, (sequence, tokens) in enumerate(zip(part.decoding, rows, strict=False)):
                if tokens:
                    self._deliver(sequence, tokens, (r, row), result)
            first_token = len(part.decoding)
            for row, chunk in enumerate(part.chunks, start=first_token):
                if (new := rows[row]) is not None:
                    self._deliver_chunk(chunk, (r, first_token), result)
                    if new:
                        self._deliver(chunk.sequence, new, (r, row), result)
                first_token += chunk.num_tokens

    def _deliver(self, sequence: Sequence, tokens: tuple[int, ...], at: tuple[int, int], result: StepResult) -> None:
        """Tokens that stand in the step's outputs at a shard and row."""
        handle = self._handles.get(sequence.arrival)
        if handle is None:  # cancelled while the step was in flight
            return
        if sequence.finish_reason == "abort":
            self.fail(handle, MillraceError(_NO_TOKEN))
            return
        scores = _rows(result.scores(), len(tokens), at) if handle.wants_scores else None
        try:
            stop = handle.push(_event(sequence, tokens, scores))
        except Exception as error:  # its text cannot be made: no business of its neighbours
            self.fail(handle, error)
            return
        if stop is not None:
            self._ended.append(Ending(arrival=sequence.arrival, reason="stop", stop_reason=stop))
        if stop is not None or sequence.finish_reason is not None:
            self._forget(sequence.arrival)

    def _deliver_chunk(self, chunk: Chunk, at: tuple[int, int], result: StepResult) -> None:
        """What is known once a part of its prompt was computed, whose tokens begin at a shard and token of the step."""
        sequence = chunk.sequence
        handle = self._handles.get(sequence.arrival)
        if handle is None:
            return
        handle.num_cached_tokens, handle.num_preemptions = sequence.num_cached_tokens, sequence.num_preemptions
        if sequence.request.params.prompt_logprobs is not None and sequence.index == 0:
            targets = sequence.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
            shard, first = at
            scores = Scores(*(array[shard, first : first + len(targets)] for array in result.prompt_scores()))
            handle.push_prompt_scores(chunk.start + 1, targets, scores)

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


def _event(sequence: Sequence, tokens: tuple[int, ...], scores: Scores | None) -> TokenEvent:
    return TokenEvent(
        sequence.index,
        tokens,
        scores,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.weights_version,
        sequence.first_weights_version,
    )


def _rows(scores: Scores, num_tokens: int, at: tuple[int, int]) -> Scores:
    """The scores of one sequence's tokens, [num_tokens, ...]."""
    shard, row = at
    return Scores(*(array[:num_tokens, shard, row] for array in scores))
