"""Decides what each step computes and takes its results: two verbs, plan and commit. Deterministic, and no jax.

Commit is one step behind plan. A sequence that a commit ends may therefore be part of one step more, whose tokens for
it are dropped; and one that is preempted knows all its tokens before it can be planned again. The weights change
only while no step is in flight, so what a commit brings was computed with the version that stands.
"""

import dataclasses
import heapq
from collections.abc import Iterable

import numpy as np

from .plan import Chunk, Progress, ShardPlan, StepPlan, numbered
from .request import FinishReason, Request
from .sequence import Sequence, Status
from .shard import Shard, SlotArrays

_FINISHED = Status.FINISHED  # looked up for every row of a step


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
        """Give decoding sequences the pages that they miss, which must be free."""
        at = np.nonzero(missing)
        if not len(at[0]):
            return
        counts = missing[at]
        pages: list[int] = []
        for r, slot, count in zip(at[0].tolist(), at[1].tolist(), counts.tolist(), strict=True):
            shard = self.shards[r]
            taken = [shard.pool.take() for _ in range(count)]
            shard.sequences[slot].pages += taken
            pages += taken
        self._slots.append_pages(at, counts, pages)

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
        width = int(arrays.num_pages.max())
        positions, tables = arrays.positions[at], arrays.page_tables[:, :, :width][at]  # copies, as at holds arrays
        remaining = arrays.remaining[at]
        budgets = np.minimum(num_steps, remaining)
        remaining -= budgets
        is_last = remaining == 0
        arrays.positions[at] = positions + budgets
        arrays.remaining[at] = remaining
        arrays.is_decoding[at] = ~is_last
        plans = []
        for shard, start, end in zip(self.shards, [0, *ends], ends, strict=False):
            chunks = self._plan_chunks(shard, self.config.max_step_tokens - (end - start)) if shard.prefilling else ()
            page_tables = tables[start:end]
            if chunks:
                page_tables = np.concatenate([page_tables, shard.page_tables[[c.slot for c in chunks], :width]])
            plans.append(
                ShardPlan(
                    decoding=tuple([shard.sequences[slot] for slot in numbers[start:end]]),  # type: ignore[misc]
                    slots=slots[start:end],
                    positions=positions[start:end],
                    budgets=budgets[start:end],
                    is_last=is_last[start:end],
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

    def commit(self, plan: StepPlan, tokens: np.ndarray) -> Progress:
        """Take a step's sampled tokens [>= num_steps, R, B]; sequences that end give back their slot and pages."""
        tokens = tokens[: plan.num_steps]  # a program has room for the most steps that there may be
        ended: list[Sequence] = []
        by_shard = []
        is_eventful, start = self._find_eventful(plan, tokens).tolist(), 0
        for r, part in enumerate(plan.shards):
            sampled: list[tuple[int, ...]] = list(zip(*tokens[:, r].tolist(), strict=True))
            end = start + len(part.decoding)
            rows = self._commit_decodes(part, sampled, is_eventful[start:end], ended)
            for chunk, new in zip(part.chunks, sampled[end - start :], strict=False):
                rows.append(self._append(chunk.sequence, new[:1] if chunk.samples else (), chunk, ended))
            by_shard.append(rows)
            start = end
        return Progress(plan=plan, tokens=tuple(by_shard), ended=tuple(ended))

    def _find_eventful(self, plan: StepPlan, tokens: np.ndarray) -> np.ndarray:
        """Whether each decoding row of all shards may do more than take its tokens: end, or fill a page."""
        at = numbered([len(part.decoding) for part in plan.shards])
        may_end = ((tokens < 0) | np.isin(tokens, list(self._stop_ids))).any(axis=0)[at]
        before = np.concatenate([part.positions for part in plan.shards])
        after = before + np.concatenate([part.budgets for part in plan.shards])
        fills_page = after // self.config.page_size > before // self.config.page_size
        return np.asarray(may_end | fills_page | np.concatenate([part.is_last for part in plan.shards]))

    def _commit_decodes(
        self, part: ShardPlan, sampled: list[tuple[int, ...]], is_eventful: list[bool], ended: list[Sequence]
    ) -> list[tuple[int, ...] | None]:
        """Append a shard's decoded tokens; for nearly every row nothing else happens, so that way is short."""
        version, rows = self.weights_version, []
        for row, (sequence, new, eventful) in enumerate(zip(part.decoding, sampled, is_eventful, strict=False)):
            if eventful or sequence.status is _FINISHED:
                rows.append(self._append(sequence, new[: part.budgets[row]], None, ended))
            else:
                sequence.tokens += new
                sequence.weights_version = version
                rows.append(new)
        return rows

    def _append(
        self, sequence: Sequence, new: tuple[int, ...], chunk: Chunk | None, ended: list[Sequence]
    ) -> tuple[int, ...] | None:
        """Append what counts of a step's tokens, up to the one that ends the sequence; None if it had ended before."""
        if sequence.status is _FINISHED:
            return None
        stop_ids = sequence.request.stop_ids
        ending = None  # the token that ends it
        for i, token in enumerate(new):
            if token < 0 or token in stop_ids:
                new, ending = new[: i + 1], token
                break
        if ending is None or ending >= 0:  # else sampling found no usable logits
            sequence.tokens += new
            if sequence.status is Status.RUNNING:  # else it was preempted since, and has no pages
                num_written = chunk.start + chunk.num_tokens if chunk else len(sequence.tokens) - 1
                self.shards[sequence.shard].remember_pages(sequence, num_written)
        if new:
            sequence.weights_version = self.weights_version
        if ending is not None:
            by_model = ending in sequence.request.eos_ids
            self.finish(sequence, "abort" if ending < 0 else "stop", None if ending < 0 or by_model else ending)
        elif len(sequence.tokens) >= sequence.max_len:
            self.finish(sequence, "length")
        if sequence.status is _FINISHED:
            ended.append(sequence)
        return new

    def sequences(self) -> Iterable[Sequence]:
        """All that have not ended, running ones first."""
        for shard in self.shards:
            yield from (s for s in shard.sequences if s is not None)
        yield from (s for _, s in self._waiting if s.status is Status.WAITING)

    def started(self) -> Iterable[Sequence]:
        """All that have not ended, of requests of which something was admitted: preempted ones and siblings too."""
        return (sequence for sequence in self.sequences() if sequence.arrival[0] <= self._newest_started)
