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
from .shard import Shard, SlotArrays

_FINISHED, _RUNNING = Status.FINISHED, Status.RUNNING  # looked up for every row of a step


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
        self._slots = SlotArrays(config.num_shards, config.num_slots, config.page_size, config.pages_per_slot)
        self.shards = tuple(Shard(index, self._slots, config.num_pages) for index in range(config.num_shards))
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap; some may have ended since
        self._stop_ids: set[int] = set()  # of all requests so far
        self._num_requests = 0
        self._newest_started = -1  # the last request of which something was admitted
        self.num_preemptions = 0
        self.weights_version = 0
        self.starts_requests = True  # False while new weights wait for what has started

    def add(self, request: Request) -> tuple[Sequence, ...]:
        """Queue a request's continuations, behind those that came before."""
        self._stop_ids |= request.stop_ids
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
        self._reserve_decodes()
        # A sequence preempted just now may have tokens in flight, so nobody is admitted before the next commit.
        admitted = self._admit() if self.num_preemptions == num_preemptions else ()
        num_steps = 1 if any(shard.prefilling for shard in self.shards) else self._affordable_steps()
        plans = self._plan_shards(num_steps)
        if not any(plan.num_rows for plan in plans):
            return None
        return StepPlan(shards=plans, num_steps=num_steps, admitted=admitted)

    def _reserve_decodes(self) -> None:
        """A page for every decode that needs one now; a shard's youngest sequences make room if there are too few."""
        while short := self._short_of_pages(missing := self._slots.missing_pages(1)):
            for shard in short:
                active = [shard.sequences[slot] for slot in np.flatnonzero(shard.is_decoding)]
                self._preempt(shard, max((s for s in [*active, *shard.prefilling] if s), key=lambda s: s.arrival))
        self._extend(missing)

    def _short_of_pages(self, missing: np.ndarray) -> list[Shard]:
        """The shards with fewer free pages than their slots miss."""
        wanted = missing.sum(axis=1).tolist()
        return [shard for shard, num_pages in zip(self.shards, wanted, strict=True) if num_pages > shard.pool.num_free]

    def _extend(self, missing: np.ndarray) -> None:
        for r, slot in np.argwhere(missing).tolist():
            sequence = self.shards[r].sequences[slot]
            assert sequence is not None
            self.shards[r].extend(sequence, int(missing[r, slot]))

    def _preempt(self, shard: Shard, sequence: Sequence) -> None:
        """Back to waiting; its tokens are computed again when there is room."""
        shard.evict(sequence)
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.arrival, sequence))
        self.num_preemptions += 1
        sequence.num_preemptions += 1

    def _admit(self) -> tuple[Sequence, ...]:
        """First come, first served, each to the shard with the most room, as long as a step has tokens for it."""
        if not self._waiting:
            return ()
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
        return self.config.max_step_tokens - int(np.count_nonzero(shard.is_decoding)) - pending

    def _affordable_steps(self) -> int:
        """How many decode steps in one dispatch have pages, without preempting anyone; at most what a shard can use."""
        num_steps, slots = self.config.max_decode_steps, self._slots
        usable = (slots.remaining * slots.is_decoding).max(axis=1)
        if usable.any():
            num_steps = min(num_steps, int(usable[usable > 0].min()))
        while num_steps > 1 and self._short_of_pages(slots.missing_pages(num_steps)):
            num_steps //= 2
        return num_steps

    def _plan_shards(self, num_steps: int) -> tuple[ShardPlan, ...]:
        """Every decoding slot's part, taken from the arrays of all shards at once; then each shard's chunks."""
        arrays = self._slots
        self._extend(arrays.missing_pages(num_steps))
        at = np.nonzero(arrays.is_decoding)
        ends = np.count_nonzero(arrays.is_decoding, axis=1).cumsum().tolist()
        slots, numbers = at[1].astype(np.int32), at[1].tolist()
        positions, tables = arrays.positions[at], arrays.page_tables[at]  # copies, as all arrays indexed by arrays
        budgets = np.minimum(num_steps, arrays.remaining[at])
        arrays.positions[at] += budgets
        arrays.remaining[at] -= budgets
        arrays.is_decoding[at] = arrays.remaining[at] > 0
        plans = []
        for shard, start, end in zip(self.shards, [0, *ends], ends, strict=False):
            chunks = self._plan_chunks(shard, self.config.max_step_tokens - (end - start)) if shard.prefilling else ()
            page_tables = tables[start:end]
            if chunks:
                page_tables = np.concatenate([page_tables, shard.page_tables[[chunk.slot for chunk in chunks]]])
            plans.append(
                ShardPlan(
                    decoding=tuple(map(shard.sequences.__getitem__, numbers[start:end])),  # type: ignore[arg-type]
                    slots=slots[start:end],
                    positions=positions[start:end],
                    budgets=budgets[start:end],
                    chunks=chunks,
                    page_tables=page_tables,
                )
            )
        return tuple(plans)

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
        progress: list[Progress] = []
        columns = tokens.transpose(1, 2, 0).tolist()
        may_end = ((tokens < 0) | np.isin(tokens, list(self._stop_ids))).any(axis=0).tolist()
        for r, (shard_plan, rows) in enumerate(zip(plan.shards, columns, strict=True)):
            budgets = shard_plan.budgets.tolist()
            self._commit_decodes(shard_plan.decoding, rows, budgets, may_end[r], r, progress)
            first_token = len(budgets)
            for row, chunk in enumerate(shard_plan.chunks, start=len(budgets)):
                if chunk.sequence.status is not _FINISHED:
                    new = self._append(chunk.sequence, rows[row][:1] if chunk.samples else [], chunk)
                    progress.append(Progress(chunk.sequence, new, r, row, chunk, first_token))
                first_token += chunk.num_tokens
        return progress

    def _commit_decodes(
        self, decoding: tuple[Sequence, ...], rows: list[list[int]], budgets: list[int], may_end: list[bool], r: int,
        progress: list[Progress],
    ) -> None:  # fmt: skip
        """Append a shard's decoded tokens; for nearly every row nothing else happens, so that way is short."""
        page_size, version = self.config.page_size, self.weights_version
        for row, sequence in enumerate(decoding):
            if sequence.status is _FINISHED:
                continue
            new = rows[row][: budgets[row]]
            num_tokens = len(sequence.tokens) + len(new)
            fills_no_page = num_tokens <= (sequence.num_findable_pages + 1) * page_size
            if fills_no_page and num_tokens < sequence.max_len and new and not may_end[row]:
                sequence.tokens += new
                sequence.weights_version = version
                progress.append(Progress(sequence, tuple(new), r, row))
            else:
                progress.append(Progress(sequence, self._append(sequence, new, None), r, row))

    def _append(self, sequence: Sequence, new: list[int], chunk: Chunk | None) -> tuple[int, ...]:
        """Append what counts of a step's tokens, up to the one that ends the sequence."""
        stop_ids = sequence.request.stop_ids
        ending = None  # the token that ends it
        for i, token in enumerate(new):
            if token < 0 or token in stop_ids:
                new, ending = new[: i + 1], token
                break
        if ending is not None and ending < 0:  # sampling found no usable logits
            self.finish(sequence, "abort")
            return tuple(new)
        sequence.tokens += new
        num_tokens = len(sequence.tokens)
        if new:
            sequence.weights_version = self.weights_version
        if sequence.status is _RUNNING:  # else it was preempted since, and has no pages
            num_written = num_tokens - 1 if new else chunk.start + chunk.num_tokens if chunk else 0
            if (sequence.num_findable_pages + 1) * self._slots.page_size <= num_written:
                self.shards[sequence.shard].remember_pages(sequence, num_written)
        if ending is not None:
            self.finish(sequence, "stop", None if ending in sequence.request.eos_ids else ending)
        elif num_tokens >= sequence.max_len:
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
