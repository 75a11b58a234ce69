"""Scheduler and pages under random traffic, played as the step loop plays them, against a model of the cache.

The fake device keeps what every step writes: (shard, page, offset) -> token and, as keys and values depend on all that
came before, a hash of the tokens up to it. A query is right if what it would read are the tokens of its own sequence.
The fake model's next token depends on all tokens before it, so that a token that is lost, doubled or read from a wrong
page changes everything after it.
"""

import dataclasses
from collections.abc import Sequence as Items

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace import SamplingParams
from millrace.runtime.buckets import make_buckets, pick
from millrace.runtime.plan import Progress, StepPlan
from millrace.runtime.request import Request
from millrace.runtime.scheduler import Scheduler, SchedulerConfig
from millrace.runtime.sequence import Sequence, Status

VOCAB, STOP, UNPLANNED = 11, 7, 5


def request(prompt: Items[int], max_new: int, n: int = 1, stops: bool = True) -> Request:
    return Request(
        request_id="r",
        prompt=None,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_new, n=n, seed=1),
        max_new_tokens=max_new,
        eos_ids=frozenset(),
        stop_ids=frozenset({STOP} if stops else ()),
        bad_word_ids=(),
    )


def next_token(tokens: Items[int], index: int) -> int:
    return (sum((i + 1) * t for i, t in enumerate(tokens)) + len(tokens) + index) % VOCAB


def expected_tokens(request: Request, index: int) -> list[int]:
    """What a loop over one sequence alone gives."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_new_tokens):
        tokens.append(next_token(tokens, index))
        if tokens[-1] in request.stop_ids:
            break
    return tokens


VERY_MANY = 10**6
MIXED = -1


class Device:
    """Executes plans in order, and as programs do: a row does nothing more once it has sampled one of its stop ids."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.max_steps = config.max_decode_steps  # its outputs have room for them in every step
        self.cache: dict[tuple[int, int, int], tuple[int, int]] = {}
        self.last_token: dict[tuple[int, int], int] = {}
        self.weights_version = 0
        self.written_with: dict[tuple[int, int, int], int] = {}

    def run(self, plan: StepPlan) -> np.ndarray:
        rows = max(shard.num_rows for shard in plan.shards)
        tokens = np.full((self.max_steps, len(plan.shards), rows), UNPLANNED)
        for r, shard in enumerate(plan.shards):
            for row, sequence in enumerate(shard.decoding):
                slot, table = (r, int(shard.slots[row])), shard.page_tables[row]
                for step in range(shard.budgets[row]):
                    position = int(shard.positions[row]) + step
                    self.write(r, table, position, self.last_token[slot])
                    token = next_token(self.read(r, table, position + 1), sequence.index)
                    self.last_token[slot] = tokens[step, r, row] = token
                    if token in sequence.request.stop_ids:
                        break
            for row, chunk in enumerate(shard.chunks, start=len(shard.decoding)):
                table, end = shard.page_tables[row], chunk.start + chunk.num_tokens
                for position in range(chunk.start, end):
                    self.write(r, table, position, chunk.sequence.tokens[position])
                assert self.read(r, table, end) == chunk.sequence.tokens[:end], "found pages hold other tokens"
                found = range(chunk.start if chunk.sequence in plan.admitted else 0)
                versions = {self.written_with[self.place(r, table, position)] for position in found}
                assert versions <= {self.weights_version}, "found pages are of other weights"
                if chunk.samples:
                    token = next_token(self.read(r, table, end), chunk.sequence.index)
                    self.last_token[r, chunk.slot] = tokens[0, r, row] = token
        return tokens

    def write(self, shard: int, table: np.ndarray, position: int, token: int) -> None:
        before = self.cache.get(self.place(shard, table, position - 1), (-1, -1))[1] if position else 0
        self.cache[self.place(shard, table, position)] = (token, hash((before, token)))
        version = self.weights_version  # what depends on keys of other weights is as bad as they are
        is_pure = not position or self.written_with.get(self.place(shard, table, position - 1)) == version
        self.written_with[self.place(shard, table, position)] = version if is_pure else MIXED

    def place(self, shard: int, table: np.ndarray, position: int) -> tuple[int, int, int]:
        return shard, int(table[position // self.page_size]), position % self.page_size

    def read(self, shard: int, table: np.ndarray, num_tokens: int) -> list[int]:
        """Tokens, each a 1000 where it was written after other tokens than those before it."""
        tokens, before = [], 0
        for position in range(num_tokens):
            token, digest = self.cache.get(self.place(shard, table, position), (-1, -1))
            before = hash((before, token))
            tokens.append(token if before == digest else 1000)
        return tokens


def check_pages(scheduler: Scheduler, plan: StepPlan) -> None:
    """Pages that a step writes belong to one sequence alone; no owner is lost."""
    size = scheduler.config.page_size
    for shard, part in zip(scheduler.shards, plan.shards, strict=True):
        written: list[int] = []
        for row in range(len(part.decoding)):
            first, budget = int(part.positions[row]), int(part.budgets[row])
            pages = {p // size for p in range(first, first + budget)}
            written += [int(part.page_tables[row, page]) for page in pages]
        for row, chunk in enumerate(part.chunks, start=len(part.decoding)):
            pages = {p // size for p in range(chunk.start, chunk.start + chunk.num_tokens)}
            written += [int(part.page_tables[row, page]) for page in pages]
        assert len(written) == len(set(written)), "two writers of one page"
        assert all(shard.pool.num_owners(page) == 1 for page in written), "a shared page is written"
        assert not shard.pool._digest_of.keys() & set(written), "a page that others may find is written"
        assert all(len(s.pages) <= -(-s.max_len // size) for s in shard.sequences if s is not None)
        held = [page for s in shard.sequences if s is not None for page in s.pages]
        assert shard.pool.num_free == shard.pool.num_pages - len(set(held))


def check_progress(progress: Progress, running: list[Sequence], known: list[int]) -> None:
    """A commit says of each row what it brought, of whom nothing because it had ended, and who ended just now."""
    brought = {}
    for part, rows in zip(progress.plan.shards, progress.tokens, strict=True):
        for sequence, new in zip([*part.decoding, *(c.sequence for c in part.chunks)], rows, strict=True):
            assert (new is None) == (sequence not in running)
            brought[sequence] = list(new or ())
    for sequence, num_tokens in zip(running, known, strict=True):
        assert sequence.tokens[num_tokens:] == brought.get(sequence, [])
    assert set(progress.ended) == {sequence for sequence in running if sequence.status is Status.FINISHED}


@dataclasses.dataclass
class Play:
    """One run of the loop: arrivals and cancellations by step."""

    config: SchedulerConfig
    arrivals: list[tuple[int, Request]]
    cancellations: dict[int, int]  # step -> number of a sequence
    stop_strings: dict[int, int] = dataclasses.field(default_factory=dict)  # number of a sequence -> tokens it has then
    updates: dict[int, str] = dataclasses.field(default_factory=dict)  # of the weights: step -> "drain" or "immediate"

    def run(self) -> tuple[Scheduler, list[Sequence], list[StepPlan]]:
        scheduler, device = Scheduler(self.config), Device(self.config)
        buckets = make_buckets(self.config.num_slots, self.config.max_step_tokens)
        sequences: list[Sequence] = []
        plans: list[StepPlan] = []
        in_flight: tuple[StepPlan, np.ndarray] | None = None
        updates: list[str] = []
        waiting = sorted(self.arrivals, key=lambda arrival: arrival[0])
        for step in range(4000):
            while waiting and waiting[0][0] <= step:
                sequences += scheduler.add(waiting.pop(0)[1])
            if self.cancellations.get(step, len(sequences)) < len(sequences):
                scheduler.finish(sequences[self.cancellations[step]], "abort")
            updates += [self.updates[step]] if step in self.updates else []
            while updates and (updates[0] == "immediate" or not any(scheduler.started())):
                if in_flight is not None:
                    self.commit(scheduler, sequences, in_flight)
                in_flight = None
                scheduler.weights_version = device.weights_version = scheduler.weights_version + 1
                updates.pop(0)
            scheduler.starts_requests = not updates
            plan = scheduler.plan()
            if plan is not None:
                check_pages(scheduler, plan)
                assert plan.num_tokens <= self.config.max_step_tokens
                assert 1 <= plan.num_steps <= (self.config.max_decode_steps if plan.is_decode else 1)
                assert pick(buckets, plan.is_decode, plan.num_tokens)
                plans.append(plan)
            tokens = device.run(plan) if plan is not None else None
            if in_flight is not None:
                self.commit(scheduler, sequences, in_flight)
            in_flight = (plan, tokens) if plan is not None and tokens is not None else None
            if plan is None and in_flight is None and not waiting and not scheduler.num_waiting:
                return scheduler, sequences, plans
        raise AssertionError("the loop does not end")

    def commit(self, scheduler: Scheduler, sequences: list[Sequence], step: tuple[StepPlan, np.ndarray]) -> None:
        running = [sequence for sequence in sequences if sequence.status is not Status.FINISHED]
        known = [len(sequence.tokens) for sequence in running]
        progress = scheduler.commit(*step)
        check_progress(progress, running, known)
        for part, rows in zip(progress.plan.shards, progress.tokens, strict=True):
            for sequence, new in zip([*part.decoding, *(c.sequence for c in part.chunks)], rows, strict=True):
                number = sequences.index(sequence)
                if new is not None and sequence.num_generated >= self.stop_strings.get(number, VERY_MANY):
                    scheduler.finish(sequence, "stop", "a string")


@st.composite
def plays(draw: st.DrawFn) -> Play:
    page_size = draw(st.integers(1, 5))
    max_len = draw(st.integers(6, 30))
    num_slots = draw(st.integers(1, 4))
    config = SchedulerConfig(
        num_shards=draw(st.integers(1, 2)),
        num_slots=num_slots,
        num_pages=-(-max_len // page_size) + draw(st.integers(0, 8)),
        page_size=page_size,
        max_context_len=max_len,
        max_step_tokens=num_slots + draw(st.integers(1, 12)),
        max_decode_steps=draw(st.integers(1, 4)),
        prefix_caching=draw(st.booleans()),
    )
    arrivals = []
    for _ in range(draw(st.integers(1, 10))):
        prompt_len = draw(st.integers(1, max_len - 1))
        fork = draw(st.integers(0, prompt_len))  # many share their beginning
        head = draw(st.integers(0, 1))
        prompt = [
            *(head if i == 0 else i % 3 for i in range(fork)),
            *((i + fork) % 5 for i in range(prompt_len - fork)),
        ]
        max_new = draw(st.integers(1, max_len - prompt_len))
        arrivals.append((draw(st.integers(0, 12)), request(prompt, max_new, n=draw(st.integers(1, 3)))))
    cancellations = draw(st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=3))
    stop_strings = draw(st.dictionaries(st.integers(0, 9), st.integers(1, 6), max_size=3))
    updates = draw(st.dictionaries(st.integers(0, 20), st.sampled_from(["drain", "immediate"]), max_size=3))
    return Play(config, arrivals, cancellations, stop_strings, updates)


@given(plays())
@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
def test_every_sequence_ends_with_its_own_tokens_and_no_page_is_leaked(play: Play) -> None:
    scheduler, sequences, _ = play.run()
    for number, sequence in enumerate(sequences):
        assert sequence.status is Status.FINISHED
        alone = expected_tokens(sequence.request, sequence.index)
        if sequence.finish_reason == "abort" or sequence.stop_reason == "a string":
            assert number in (play.stop_strings if sequence.stop_reason else play.cancellations.values())
            assert sequence.tokens == alone[: len(sequence.tokens)]
        else:
            assert sequence.tokens == alone
            assert sequence.finish_reason == ("stop" if alone[-1] == STOP else "length")
    for shard in scheduler.shards:
        assert shard.pool.num_free == shard.pool.num_pages
        assert sorted(shard.free_slots) == list(range(play.config.num_slots))


@given(plays())
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_what_starts_before_a_drained_update_ends_on_the_old_weights(play: Play) -> None:
    play.updates = dict.fromkeys(play.updates, "drain")
    for sequence in play.run()[1]:
        assert sequence.first_weights_version == sequence.weights_version


@given(plays())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_traffic_gives_the_same_plans(play: Play) -> None:
    first, second = ([_summary(plan) for plan in play.run()[2]] for _ in range(2))
    assert first == second


def _summary(plan: StepPlan) -> list[object]:
    parts = [
        (s.slots.tolist(), s.positions.tolist(), s.budgets.tolist(), s.page_tables.tolist(), len(s.chunks))
        for s in plan.shards
    ]
    return [plan.num_steps, *parts]


CONFIG = SchedulerConfig(
    num_shards=1,
    num_slots=4,
    num_pages=16,
    page_size=4,
    max_context_len=32,
    max_step_tokens=12,
    max_decode_steps=4,
    prefix_caching=True,
)


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    long = request([1] * 28, 2, stops=False)
    plans = Play(CONFIG, [(0, request([2], 20, stops=False)), (3, long)], {}).run()[2]
    mixed = [plan for plan in plans if plan.shards[0].chunks and plan.shards[0].decoding]
    assert len(mixed) >= 3 and all(plan.num_tokens <= 12 for plan in mixed)


def test_several_decode_steps_share_a_dispatch_when_no_prompt_is_computed() -> None:
    plans = Play(CONFIG, [(0, request([2], 13, stops=False))], {}).run()[2]
    assert [plan.num_steps for plan in plans] == [1, 4, 4, 4]


def test_the_youngest_is_preempted_when_pages_run_out() -> None:
    small = dataclasses.replace(CONFIG, num_pages=8, prefix_caching=False)
    requests = [request([i] * 8, 20, stops=False) for i in range(3)]
    scheduler, sequences, _ = Play(small, [(0, r) for r in requests], {}).run()
    assert scheduler.num_preemptions > 0 and sequences[0].num_preemptions == 0


def test_a_finished_sequence_leaves_its_full_pages_to_be_found() -> None:
    prompt = [1, 2, 3, 4] * 3
    _, sequences, _ = Play(CONFIG, [(0, request(prompt, 2)), (10, request(prompt, 2))], {}).run()
    assert [s.num_cached_tokens for s in sequences] == [0, 8]


def test_what_ends_while_it_waits_is_never_admitted() -> None:
    scheduler = Scheduler(CONFIG)
    sequences = [scheduler.add(request([1], 3))[0] for _ in range(6)]
    for sequence in sequences[:5]:
        scheduler.finish(sequence, "abort")
    assert scheduler.num_waiting == 1 and list(scheduler.sequences()) == [sequences[5]]
    plan = scheduler.plan()
    assert plan is not None and plan.admitted == (sequences[5],) and scheduler.num_waiting == 0


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    small = dataclasses.replace(CONFIG, num_pages=8)
    _, sequences, plans = Play(small, [(0, request([i] * 8, 20, stops=False)) for i in range(2)], {}).run()
    assert sequences[1].num_preemptions > 0
    admissions = [plan.shards[0].chunks for plan in plans if sequences[1] in plan.admitted]
    starts = [chunk.start for chunks in admissions for chunk in chunks if chunk.sequence is sequences[1]]
    assert starts[0] == 0 and len(starts) > 1 and all(starts[1:])
    assert sequences[1].num_cached_tokens == 0, "what it computed itself was not cached"


def test_who_asks_for_prompt_logprobs_gets_every_prompt_token_computed() -> None:
    prompt = [1, 2, 3, 4] * 3
    asked = request(prompt, 2)
    asked = dataclasses.replace(asked, params=asked.params.replace(prompt_logprobs=1))
    _, sequences, _ = Play(CONFIG, [(0, request(prompt, 2)), (10, asked)], {}).run()
    assert [s.num_cached_tokens for s in sequences] == [0, 0]


@pytest.mark.parametrize("update_at", [5, 25])  # while the first one is in the middle of it, and after its end
def test_pages_of_old_weights_are_not_found_by_what_starts_later(update_at: int) -> None:
    prompt = [1, 2, 3, 4] * 3
    arrivals = [(0, request(prompt, 12, stops=False)), (30, request(prompt, 2)), (40, request(prompt, 2))]
    sequences = Play(CONFIG, arrivals, {}, updates={update_at: "immediate"}).run()[1]
    assert [s.num_cached_tokens for s in sequences] == [0, 0, 8]


def test_a_request_starts_as_a_whole_before_an_update_or_after_it() -> None:
    arrivals = [(0, request([1], 9, n=7, stops=False)), (0, request([2], 9, stops=False))]
    sequences = Play(CONFIG, arrivals, {}, updates={1: "drain"}).run()[1]
    assert [s.weights_version for s in sequences] == [0] * 7 + [1]


def test_a_preempted_sequence_ends_on_its_weights_before_a_drained_update() -> None:
    small = dataclasses.replace(CONFIG, num_pages=8)
    arrivals = [(0, request([i] * 8, 20, stops=False)) for i in range(3)]
    sequences = Play(small, arrivals, {}, updates={3: "drain"}).run()[1]
    assert [(s.num_preemptions > 0, s.weights_version) for s in sequences] == [(False, 0), (True, 0), (True, 0)]


def test_without_prefix_caching_nothing_is_found() -> None:
    prompt = [1, 2, 3, 4] * 3
    config = dataclasses.replace(CONFIG, prefix_caching=False)
    _, sequences, _ = Play(config, [(0, request(prompt, 2)), (10, request(prompt, 2))], {}).run()
    assert [s.num_cached_tokens for s in sequences] == [0, 0]


def test_first_come_is_first_served() -> None:
    requests = [request([i], 6, stops=False) for i in range(9)]
    plans = Play(CONFIG, [(0, r) for r in requests], {}).run()[2]
    admitted = [sequence.arrival for plan in plans for sequence in plan.admitted]
    assert admitted == sorted(admitted) and len(admitted) == 9


@pytest.mark.parametrize("num_shards", [1, 2])
def test_requests_spread_over_the_data_shards(num_shards: int) -> None:
    config = dataclasses.replace(CONFIG, num_shards=num_shards)
    plans = Play(config, [(0, request([i], 3)) for i in range(4)], {}).run()[2]
    assert [len(part.chunks) for part in plans[0].shards] == [4 // num_shards] * num_shards
