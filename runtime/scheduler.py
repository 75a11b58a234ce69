"""Decides what each step computes and takes its results: two verbs, plan and commit. Deterministic, and no jax.

Commit is one step behind plan. A sequence that a commit ends may therefore be part of one step more, whose tokens for
it are dropped; and one that is preempted knows all its tokens before it can be planned again. The weights change
only while no step is in flight, so what a commit brings was computed with the version that stands.
"""

import dataclasses
import heapq
from collections.abc import Iterable

import numpy as np

from .plan import Chunk, Progress, ShardPlan, StepPlan
from .request import FinishReason, Request
from .sequence import Sequence, Status
from .shard import Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes of one runtime; slots and pages are per data shard."""

    num_shards: int
    num_slots: int
    num_pages: int
    page_size: int
    max_context_len: int
    max_step_tokens: int
    max_decode_steps: int
    prefix_caching: bool

    @property
    def pages_per_slot(self) -> int:
        """Width of a page table."""
        return -(-self.max_context_len // self.page_size)


class Scheduler:
    """Owns every Sequence, slot and page number. Not thread-safe: the step loop alone calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.num_pages >= config.pages_per_slot, "one sequence of full length must fit"
        assert config.max_step_tokens > config.num_slots, "a step holds every decode and some of a prompt"
        self.config = config
        self.shards = tuple(
            Shard(index, config.num_slots, config.num_pages, config.page_size, config.pages_per_slot)
            for index in range(config.num_shards)
        )
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap; some may have ended since
        self._num_requests = 0
        self._newest_started = -1  # the last request of which something was admitted
        self.num_preemptions = 0
        self.weights_version = 0
        self.starts_requests = True  # False while new weights wait for what has started

    def add(self, request: Request) -> tuple[Sequence, ...]:
        """Queue a request's continuations, behind those that came before."""
        sequences = []
        for index in range(request.params.n):
            sequence = Sequence(
                request=request,
                index=index,
                arrival=(self._num_requests, index),
                max_len=len(request.prompt_token_ids) + request.max_new_tokens,
                tokens=list(request.prompt_token_ids),
            )
            heapq.heappush(self._waiting, (sequence.arrival, sequence))
            sequences.append(sequence)
        self._num_requests += 1
        return tuple(sequences)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence now, whatever it is doing; nothing if it has ended."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self.shards[sequence.shard].evict(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return sum(sequence.status is Status.WAITING for _, sequence in self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return sum(self.config.num_slots - len(shard.free_slots) for shard in self.shards)

    def plan(self) -> StepPlan | None:
        """The next step, or None if there is nothing that can be computed before a commit."""
        num_preemptions = self.num_preemptions
        for shard in self.shards:
            self._reserve_decodes(shard)
        # A sequence preempted just now may have tokens in flight, so nobody is admitted before the next commit.
        admitted = self._admit() if self.num_preemptions == num_preemptions else ()
        if any(shard.prefilling for shard in self.shards):
            num_steps = 1
        else:
            num_steps = min(self._affordable_steps(shard) for shard in self.shards)
        plans = tuple(self._plan_shard(shard, num_steps) for shard in self.shards)
        if not any(plan.num_rows for plan in plans):
            return None
        return StepPlan(shards=plans, num_steps=num_steps, admitted=admitted)

    def _reserve_decodes(self, shard: Shard) -> None:
        """A page for every decode that needs one now; the youngest sequences make room if there are too few."""
        while True:
            slots = shard.decoding_slots()
            missing = shard.missing_pages(slots, 1)
            if missing.sum() <= shard.pool.num_free:
                break
            active = [shard.sequences[slot] for slot in slots]
            self._preempt(shard, max((s for s in [*active, *shard.prefilling] if s), key=lambda s: s.arrival))
        _extend(shard, slots, missing)

    def _preempt(self, shard: Shard, sequence: Sequence) -> None:
        """Back to waiting; its tokens are computed again when there is room."""
        shard.evict(sequence)
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.arrival, sequence))
        self.num_preemptions += 1
        sequence.num_preemptions += 1

    def _admit(self) -> tuple[Sequence, ...]:
        """First come, first served, each to the shard with the most room, as long as a step has tokens for it."""
        admitted = []
        room = [self._prefill_room(shard) for shard in self.shards]
        while self._waiting:
            sequence = self._waiting[0][1]
            if sequence.status is Status.FINISHED:
                heapq.heappop(self._waiting)
                continue
            if not self.starts_requests and sequence.arrival[0] > self._newest_started:
                break
            sequence.begin(self.weights_version)
            candidates = [shard for shard in self.shards if room[shard.index] > 0]
            candidates.sort(key=lambda shard: (-len(shard.free_slots), -shard.pool.num_free, shard.index))
            find = self.config.prefix_caching and sequence.request.params.prompt_logprobs is None
            if not any(shard.try_admit(sequence, find) for shard in candidates):
                break
            heapq.heappop(self._waiting)
            self._newest_started = max(self._newest_started, sequence.arrival[0])
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed
            room[sequence.shard] -= len(sequence.tokens) - sequence.num_computed
            admitted.append(sequence)
        return tuple(admitted)

    def _prefill_room(self, shard: Shard) -> int:
        pending = sum(len(s.tokens) - s.num_computed for s in shard.prefilling)
        return self.config.max_step_tokens - int(shard.is_decoding.sum()) - pending

    def _affordable_steps(self, shard: Shard) -> int:
        """How many decode steps in one dispatch have pages, without preempting anyone; pages are given here."""
        slots = shard.decoding_slots()
        num_steps = self.config.max_decode_steps
        if len(slots):
            num_steps = min(num_steps, int(shard.remaining[slots].max()))
        while num_steps > 1 and shard.missing_pages(slots, num_steps).sum() > shard.pool.num_free:
            num_steps //= 2
        return num_steps

    def _plan_shard(self, shard: Shard, num_steps: int) -> ShardPlan:
        slots = shard.decoding_slots()
        _extend(shard, slots, shard.missing_pages(slots, num_steps))
        budgets = np.minimum(num_steps, shard.remaining[slots])
        positions = shard.positions[slots]  # a copy, as are all arrays indexed by an array
        decoding = tuple(s for slot in slots if (s := shard.sequences[slot]) is not None)
        shard.positions[slots] += budgets
        shard.remaining[slots] -= budgets
        shard.is_decoding[slots] = shard.remaining[slots] > 0
        chunks = self._plan_chunks(shard, self.config.max_step_tokens - len(slots))
        rows = np.concatenate([slots, np.array([c.slot for c in chunks], np.int64)])
        return ShardPlan(
            decoding=decoding,
            slots=slots.astype(np.int32),
            positions=positions,
            budgets=budgets,
            chunks=chunks,
            page_tables=shard.page_tables[rows],
        )

    def _plan_chunks(self, shard: Shard, num_tokens: int) -> tuple[Chunk, ...]:
        chunks = []
        for sequence in tuple(shard.prefilling):
            size = min(num_tokens, len(sequence.tokens) - sequence.num_computed)
            if size == 0:
                break
            start = sequence.num_computed
            sequence.num_computed += size
            num_tokens -= size
            is_last = sequence.num_computed == len(sequence.tokens)
            chunks.append(
                Chunk(
                    sequence=sequence,
                    slot=sequence.slot,
                    start=start,
                    num_tokens=size,
                    samples=is_last,
                )
            )
            if is_last:
                shard.start_decoding(sequence)
        return tuple(chunks)

    def commit(self, plan: StepPlan, tokens: np.ndarray) -> list[Progress]:
        """Take a step's sampled tokens [num_steps, R, B]; sequences that end give back their slot and pages."""
        progress = []
        for r, shard_plan in enumerate(plan.shards):
            columns = tokens[:, r].T.tolist()
            decodes = zip(shard_plan.decoding, shard_plan.budgets, strict=True)
            for row, (sequence, budget) in enumerate(decodes):
                if sequence.status is not Status.FINISHED:
                    new = self._append(sequence, columns[row][:budget], None)
                    progress.append(_progress(sequence, new, r, row))
            first_token = len(shard_plan.decoding)
            for row, chunk in enumerate(shard_plan.chunks, start=len(shard_plan.decoding)):
                sequence = chunk.sequence
                if sequence.status is not Status.FINISHED:
                    new = self._append(sequence, columns[row][:1] if chunk.samples else [], chunk)
                    progress.append(_progress(sequence, new, r, row, chunk, first_token))
                first_token += chunk.num_tokens
        return progress

    def _append(self, sequence: Sequence, new: list[int], chunk: Chunk | None) -> tuple[int, ...]:
        """Append what counts of a step's tokens, up to the one that ends the sequence."""
        request = sequence.request
        ending = next((i for i, token in enumerate(new) if token < 0 or token in request.stop_ids), None)
        if ending is not None:
            new = new[: ending + 1]
        if ending is not None and new[-1] < 0:  # sampling found no usable logits
            self.finish(sequence, "abort")
            return tuple(new)
        sequence.tokens.extend(new)
        if new:
            sequence.weights_version = self.weights_version
        if sequence.status is Status.RUNNING:  # else it was preempted since, and has no pages
            num_written = len(sequence.tokens) - 1 if new else chunk.start + chunk.num_tokens if chunk else 0
            self.shards[sequence.shard].remember_pages(sequence, num_written)
        if ending is not None:
            self.finish(sequence, "stop", None if new[-1] in request.eos_ids else new[-1])
        elif len(sequence.tokens) >= sequence.max_len:
            self.finish(sequence, "length")
        return tuple(new)

    def sequences(self) -> Iterable[Sequence]:
        """All that have not ended, running ones first."""
        for shard in self.shards:
            yield from (s for s in shard.sequences if s is not None)
        yield from (s for _, s in self._waiting if s.status is Status.WAITING)

    def started(self) -> Iterable[Sequence]:
        """All that have not ended, of requests of which something was admitted: preempted ones and siblings too."""
        return (sequence for sequence in self.sequences() if sequence.arrival[0] <= self._newest_started)


def _extend(shard: Shard, slots: np.ndarray, missing: np.ndarray) -> None:
    for i in np.flatnonzero(missing):
        sequence = shard.sequences[slots[i]]
        assert sequence is not None
        shard.extend(sequence, int(missing[i]))


def _progress(
    sequence: Sequence, tokens: tuple[int, ...], shard: int, row: int, chunk: Chunk | None = None, first_token: int = 0
) -> Progress:
    return Progress(sequence=sequence, tokens=tokens, shard=shard, row=row, chunk=chunk, first_token=first_token)
