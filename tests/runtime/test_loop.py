"""The step loop with a device that is made up: who gets which tokens, and who learns of what went wrong."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from millrace import CheckpointError, MillraceError, ProgramError, RuntimeClosedError, SamplingParams, StepError
from millrace.runtime.handle import RequestHandle
from millrace.runtime.limits import MAX_LOGPROBS
from millrace.runtime.logprobs import Scores
from millrace.runtime.loop import StepLoop
from millrace.runtime.plan import StepPlan
from millrace.runtime.request import Request
from millrace.runtime.scheduler import Scheduler, SchedulerConfig
from millrace.runtime.tokenizer import Tokenizer

WAIT_S = 20  # for what comes at once unless something is broken
CONFIG = SchedulerConfig(
    num_shards=2,
    num_slots=2,
    num_pages=24,
    page_size=4,
    max_context_len=64,
    max_step_tokens=8,
    max_decode_steps=2,
    prefix_caching=True,
)
BAD_PROMPT = (99,)  # the made-up model has no token after it


def token_at(prompt: tuple[int, ...], index: int, position: int) -> int:
    """What the made-up model samples: below 40, and never the same twice in a row."""
    return -1 if prompt == BAD_PROMPT else (7 * prompt[0] + 11 * index + position) % 40


def expected(prompt: tuple[int, ...], num_tokens: int, index: int = 0) -> list[int]:
    return [token_at(prompt, index, len(prompt) + i) for i in range(num_tokens)]


class FakeResult:
    """A step's outputs; the log probability of token t is -t."""

    def __init__(self, executor: "FakeExecutor", number: int, sampled: np.ndarray, prompt: np.ndarray) -> None:
        self.executor, self.number, self.sampled, self.prompt = executor, number, sampled, prompt

    def tokens(self) -> np.ndarray:
        self.executor.log.append(f"read {self.number}")
        if self.executor.fails_at == ("read", self.number):
            raise OSError("the device is gone")
        return self.sampled

    def scores(self) -> Scores:
        return make_scores(-self.sampled.astype(np.float32))

    def prompt_scores(self) -> Scores:
        return make_scores(-self.prompt.astype(np.float32))


def make_scores(logprob: np.ndarray) -> Scores:
    tops = np.full((*logprob.shape, MAX_LOGPROBS), -1, np.int32)
    return Scores(logprob, np.ones(logprob.shape, np.int32), tops, tops.astype(np.float32))  # type: ignore[arg-type]


class FakeExecutor:
    """Samples `token_at`, and 100 more for each version of the weights. Steps from `held_from` on wait for `open`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.plans: list[StepPlan] = []
        self.fails_at: tuple[str, int] | None = None
        self.held_from: int | None = None
        self.open, self.waits = threading.Event(), threading.Event()
        self.overlaps = True
        self.weights = 0

    def run(self, plan: StepPlan) -> FakeResult:
        number = len(self.plans)
        self.plans.append(plan)
        if self.held_from is not None and number >= self.held_from:
            self.waits.set()
            assert self.open.wait(WAIT_S)
        self.log.append(f"run {number}")
        if self.fails_at == ("run", number):
            raise ProgramError("no program holds this step")
        if self.fails_at == ("weights of", number):
            raise StepError("layer 3 could not be read")
        sampled = np.full((plan.num_steps, CONFIG.num_shards, CONFIG.num_slots), -7)
        prompt = np.full((CONFIG.num_shards, CONFIG.max_step_tokens), 1000)  # the token after each of the step's
        for r, shard in enumerate(plan.shards):
            for row, sequence in enumerate(shard.decoding):
                for step in range(shard.budgets[row]):
                    position = int(shard.positions[row]) + step + 1
                    sampled[step, r, row] = token_at(sequence.request.prompt_token_ids, sequence.index, position)
            for row, chunk in enumerate(shard.chunks, start=len(shard.decoding)):
                request, end = chunk.sequence.request, chunk.start + chunk.num_tokens
                first = len(shard.decoding) + sum(c.num_tokens for c in shard.chunks[: row - len(shard.decoding)])
                targets = request.prompt_token_ids[chunk.start + 1 : end + 1]
                prompt[r, first : first + len(targets)] = targets
                sampled[0, r, row] = token_at(request.prompt_token_ids, chunk.sequence.index, end)
        return FakeResult(self, number, np.where(sampled < 0, sampled, sampled + 100 * self.weights), prompt)

    def swap(self) -> None:
        self.log.append("swap")
        self.weights += 1


class Bench:
    """A loop over the real scheduler and the made-up device."""

    def __init__(self) -> None:
        self.scheduler, self.executor = Scheduler(CONFIG), FakeExecutor()
        self.loop = StepLoop(self.scheduler, self.executor)  # type: ignore[arg-type]

    def handle(
        self,
        prompt: tuple[int, ...],
        max_tokens: int = 5,
        tokenizer: Tokenizer | None = None,
        stop_ids: tuple[int, ...] = (),
        **options: Any,
    ) -> RequestHandle:
        request = Request(
            request_id=f"of {prompt}",
            prompt=None,
            prompt_token_ids=prompt,
            params=SamplingParams(**{"seed": 1, **options}),
            max_new_tokens=max_tokens,
            eos_ids=frozenset(),
            stop_ids=frozenset(stop_ids),
            bad_word_ids=(),
        )
        return RequestHandle(request, tokenizer, self.loop.cancel)

    def submit(self, *arguments: Any, **options: Any) -> RequestHandle:
        handle = self.handle(*arguments, **options)
        self.loop.submit([handle])
        return handle

    def hold(self, number: int = 0) -> None:
        """Let the device hang from this step on, until release()."""
        self.executor.held_from = number

    def await_step(self) -> None:
        assert self.executor.waits.wait(WAIT_S)

    def release(self) -> None:
        self.executor.open.set()

    def assert_nothing_is_held(self) -> None:
        """After close(): every slot and page came back."""
        assert not self.loop._thread.is_alive()
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(shard.pool.num_free == CONFIG.num_pages for shard in self.scheduler.shards)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.release()
    made.loop.close()


def tokens(handle: RequestHandle, index: int = 0) -> list[int]:
    return handle.result(WAIT_S).outputs[index].token_ids


def reason(handle: RequestHandle) -> str | None:
    return handle.result(WAIT_S).outputs[0].finish_reason


def test_every_request_gets_its_own_tokens(bench: Bench) -> None:
    handles = {(i, *range(i)): bench.handle((i, *range(i)), max_tokens=1 + i, n=1 + i % 3) for i in range(1, 20)}
    bench.loop.submit(list(handles.values()))
    for i, (prompt, handle) in enumerate(handles.items(), start=1):
        assert [tokens(handle, index) for index in range(1 + i % 3)] == [
            expected(prompt, 1 + i, index) for index in range(1 + i % 3)
        ]
    bench.loop.close()
    bench.assert_nothing_is_held()


def test_the_device_has_the_next_step_before_the_last_one_is_read(bench: Bench) -> None:
    tokens(bench.submit((1,), max_tokens=6))
    bench.loop.close()
    assert bench.executor.log[:6] == ["run 0", "run 1", "read 0", "run 2", "read 1", "run 3"]


def test_requests_submitted_together_are_planned_together(bench: Bench) -> None:
    handles = [bench.handle((i,)) for i in range(4)]
    bench.loop.submit(handles)
    assert [tokens(handle) for handle in handles] == [expected((i,), 5) for i in range(4)]
    assert [len(shard.chunks) for shard in bench.executor.plans[0].shards] == [2, 2]


def test_a_sequence_ends_with_its_stop_id_and_nothing_after_it(bench: Bench) -> None:
    whole = expected((3,), 9)
    handle = bench.submit((3,), max_tokens=30, stop_ids=(whole[4],))
    completion = handle.result(WAIT_S).outputs[0]
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (whole[:5], "stop", whole[4])


def test_log_probabilities_are_those_of_the_tokens_beside_them(bench: Bench) -> None:
    handles = [bench.submit((i, i), max_tokens=7, logprobs=0, n=2) for i in range(5)]
    for handle in handles:
        for completion in handle.result(WAIT_S).outputs:
            assert completion.logprobs is not None
            assert [{t: e.logprob for t, e in step.items()} for step in completion.logprobs] == [
                {t: -t} for t in completion.token_ids
            ]


def test_prompt_log_probabilities_come_once_for_all_continuations(bench: Bench) -> None:
    prompt = tuple(range(10, 30))
    neighbours = [bench.handle((i, i), max_tokens=20) for i in range(CONFIG.num_shards)]  # so that it is not the first
    handle = bench.handle(prompt, prompt_logprobs=0, n=3)
    taken: list[int] = []
    push = handle.push_prompt_scores
    handle.push_prompt_scores = lambda start, targets, scores: (  # type: ignore[method-assign]
        taken.extend(targets),
        push(start, targets, scores),
    )[1]
    bench.loop.submit([*neighbours, handle])
    output = handle.result(WAIT_S)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert [{t: e.logprob for t, e in (step or {}).items()} for step in output.prompt_logprobs[1:]] == [
        {t: -t} for t in prompt[1:]
    ]
    assert taken == list(prompt[1:])


def test_a_stop_string_ends_its_sequence_alone(bench: Bench, byte_level: Tokenizer) -> None:
    whole = byte_level.decode(expected((6,), 20), False)
    stop = whole[4:6]
    text = whole[: whole.index(stop)]
    neighbour = bench.submit((2,), max_tokens=20)
    completion = bench.submit((6,), 40, byte_level, stop=[stop]).result(WAIT_S).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", stop)
    assert tokens(neighbour) == expected((2,), 20)
    bench.loop.close()
    bench.assert_nothing_is_held()
    fed = [p for plan in bench.executor.plans for s in plan.shards for q, p in zip(s.decoding, s.positions, strict=True)
           if q.request.prompt_token_ids == (6,)]  # fmt: skip
    assert max(fed) < 12, "it runs on for one step at most"


def test_a_cancelled_request_ends_with_abort_and_leaves_its_neighbour_alone(bench: Bench) -> None:
    bench.hold(3)
    neighbour, handle = bench.submit((2,), max_tokens=30), bench.submit((3,), max_tokens=60, n=2)
    bench.await_step()
    handle.cancel()
    bench.release()
    output = handle.result(WAIT_S)
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "abort"]
    assert all(c.token_ids == expected((3,), len(c.token_ids), c.index) for c in output.outputs)
    assert tokens(neighbour) == expected((2,), 30)
    bench.loop.close()
    bench.assert_nothing_is_held()


def test_a_request_may_be_cancelled_before_it_has_a_slot(bench: Bench) -> None:
    bench.hold()
    running = [bench.submit((i,), max_tokens=40) for i in range(4)]
    bench.await_step()
    waiting = bench.submit((9,))
    waiting.cancel()
    bench.release()
    assert (reason(waiting), tokens(waiting)) == ("abort", [])
    assert [tokens(handle) for handle in running] == [expected((i,), 40) for i in range(4)]


def test_cancelling_what_has_ended_changes_nothing(bench: Bench) -> None:
    handle = bench.submit((3,))
    assert tokens(handle) == expected((3,), 5)
    handle.cancel()
    assert tokens(bench.submit((4,))) == expected((4,), 5)
    assert reason(handle) == "length"


def test_a_request_whose_logits_are_unusable_fails_alone(bench: Bench) -> None:
    handles = [bench.submit((1,), max_tokens=20), bench.submit(BAD_PROMPT, n=2), bench.submit((2,), max_tokens=20)]
    with pytest.raises(MillraceError, match="NaN"):
        handles[1].result(WAIT_S)
    assert tokens(handles[0]) == expected((1,), 20) and tokens(handles[2]) == expected((2,), 20)
    bench.loop.close()
    bench.assert_nothing_is_held()


def test_a_request_whose_text_cannot_be_made_fails_alone(bench: Bench, byte_level: Tokenizer) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(byte_level, name)

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            if ids and threading.current_thread() is not threading.main_thread():
                raise UnicodeError("no text")
            return ""

    neighbour = bench.submit((2,), max_tokens=20)
    handle = bench.submit((3,), 20, Broken(), stop=["x"])
    with pytest.raises(MillraceError, match="no text"):
        handle.result(WAIT_S)
    assert tokens(neighbour) == expected((2,), 20)
    bench.loop.close()
    bench.assert_nothing_is_held()


@pytest.mark.parametrize(("verb", "number"), [("run", 0), ("run", 2), ("read", 0), ("read", 2)])
def test_an_error_of_the_device_reaches_every_request_and_all_that_come_later(
    bench: Bench, verb: str, number: int
) -> None:
    bench.executor.fails_at = (verb, number)
    bench.hold()
    handles = [bench.handle((i,), max_tokens=30) for i in range(6)]
    bench.loop.submit(handles[:5])  # one more than there are slots
    bench.await_step()
    bench.loop.submit(handles[5:])  # not taken yet
    bench.release()
    for handle in handles:
        with pytest.raises(MillraceError, match="no program holds this step|the device is gone"):
            handle.result(WAIT_S)
    bench.loop._thread.join(WAIT_S)
    with pytest.raises(RuntimeClosedError, match="open a new Runtime"):
        bench.submit((1,))
    handles[0].cancel()
    bench.loop.close()


def test_an_error_while_requests_are_taken_in_reaches_them_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: Request) -> tuple[()]:
        raise MemoryError("no room for it")

    monkeypatch.setattr(bench.scheduler, "add", refuse)
    handles = [bench.handle((i,)) for i in range(3)]
    bench.loop.submit(handles)
    for handle in handles:
        with pytest.raises(MillraceError, match="no room for it"):
            handle.result(WAIT_S)


def test_close_aborts_what_runs_and_what_waits_and_leaves_what_was_generated(bench: Bench) -> None:
    handles = [bench.submit((i,), max_tokens=60) for i in range(6)]
    next(iter(handles[0]))
    bench.loop.close()
    for i, handle in enumerate(handles):
        assert handle.finished
        completion = handle.result(WAIT_S).outputs[0]
        assert completion.finish_reason in ("abort", "length")
        assert completion.token_ids == expected((i,), len(completion.token_ids))
    bench.assert_nothing_is_held()


def test_a_closed_loop_refuses_and_may_be_closed_again(bench: Bench) -> None:
    bench.loop.close()
    bench.loop.close()
    with pytest.raises(RuntimeClosedError, match="closed"):
        bench.submit((1,))


def test_threads_that_submit_cancel_and_close_leave_nobody_waiting(bench: Bench) -> None:
    ended: list[str | None] = []

    def use(i: int, then: Callable[[RequestHandle], object]) -> None:
        for j in range(20):
            try:
                handle = bench.submit((i, j), max_tokens=1 + j)
            except RuntimeClosedError:
                ended.append("refused")
                continue
            then(handle)
            ended.append(reason(handle))

    uses = (RequestHandle.cancel, RequestHandle.result, list, lambda handle: bench.loop.close() if handle else None)
    for group in (uses[:3], uses):
        threads = [threading.Thread(target=use, args=(i, then), daemon=True) for i, then in enumerate(group)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert len(ended) == 20 * 7 and set(ended) <= {"abort", "length", "refused"}
    bench.assert_nothing_is_held()


# ---- steps that are not computed, and steps that the host computes


def test_a_step_that_cannot_be_computed_fails_the_requests_that_it_touched_and_no_others(bench: Bench) -> None:
    bench.executor.fails_at = ("weights of", 2)
    bench.hold()
    touched = [bench.handle((i,), max_tokens=30) for i in range(3)] + [bench.handle((3,), max_tokens=30, n=2)]
    waiting = bench.handle((5,), max_tokens=30)
    bench.loop.submit([*touched, waiting])
    bench.release()
    for handle in touched:
        with pytest.raises(MillraceError, match="layer 3"):
            handle.result(WAIT_S)
    assert bench.executor.log[:4] == ["run 0", "run 1", "read 0", "run 2"] and "read 2" not in bench.executor.log
    assert tokens(waiting) == expected((5,), 30)
    assert tokens(bench.submit((6,), max_tokens=30)) == expected((6,), 30)
    bench.loop.close()
    bench.assert_nothing_is_held()


def test_what_was_in_flight_before_a_failed_step_is_delivered(bench: Bench) -> None:
    bench.executor.fails_at = ("weights of", 2)
    read: list[int] = []
    with pytest.raises(MillraceError, match="layer 3"):
        for piece in bench.submit((1,), max_tokens=30):
            read += piece.outputs[0].token_ids
    assert read == expected((1,), 3), "one token of step 0, two of step 1"


def test_a_device_that_does_not_overlap_is_read_after_every_step(bench: Bench) -> None:
    bench.executor.overlaps = False
    handles = [bench.submit((i,), max_tokens=6 + i) for i in range(6)]
    assert [tokens(handle) for handle in handles] == [expected((i,), 6 + i) for i in range(6)]
    bench.loop.close()
    runs = range(len(bench.executor.plans))
    assert bench.executor.log == [f"{verb} {number}" for number in runs for verb in ("run", "read")]
    bench.assert_nothing_is_held()


def test_a_device_that_does_not_overlap_runs_no_surplus_step(bench: Bench) -> None:
    bench.executor.overlaps = False
    whole = expected((3,), 9)
    assert tokens(bench.submit((3,), max_tokens=30, stop_ids=(whole[4],))) == whole[:5]
    bench.loop.close()
    assert len(bench.executor.plans) == 3, "one token, then two and two"


# ---- new weights


def with_versions(handle: RequestHandle) -> list[tuple[int, int]]:
    """The version of each token as its piece has it, and as the token itself shows it; one continuation."""
    pieces = [piece.outputs[0] for piece in handle]
    return [(piece.weights_version, token // 100) for piece in pieces for token in piece.token_ids]


def test_a_drained_update_waits_for_what_runs_and_holds_back_what_comes(bench: Bench) -> None:
    bench.hold(2)
    running = [bench.submit((i,), max_tokens=20 + i) for i in range(3)]
    bench.await_step()
    version = bench.loop.update_weights(bench.executor.swap, "drain")
    later = bench.submit((9,), max_tokens=4)
    bench.release()
    assert version.result(WAIT_S) == 1 == bench.loop.weights_version
    assert [with_versions(handle) for handle in running] == [[(0, 0)] * (20 + i) for i in range(3)]
    assert with_versions(later) == [(1, 1)] * 4
    output = later.result(WAIT_S).outputs[0]
    assert (output.first_weights_version, output.weights_version) == (1, 1)


def test_an_immediate_update_serves_the_next_step_of_what_runs(bench: Bench) -> None:
    bench.hold(2)
    handle = bench.submit((1,), max_tokens=20)
    bench.await_step()
    version = bench.loop.update_weights(bench.executor.swap, "immediate")
    bench.release()
    assert version.result(WAIT_S) == 1
    assert with_versions(handle) == [(0, 0)] * 5 + [(1, 1)] * 15, "steps 0 to 2 bring one token, two and two"
    output = handle.result(WAIT_S).outputs[0]
    assert (output.first_weights_version, output.weights_version) == (0, 1)


@pytest.mark.parametrize("running", ["drain", "immediate"])
def test_what_a_request_declares_wins_over_the_update(bench: Bench, running: Any) -> None:
    bench.hold(2)
    drained = bench.submit((1,), max_tokens=20, on_weights_update="drain")
    mixed = bench.submit((2,), max_tokens=60, on_weights_update="immediate")
    bench.await_step()
    version = bench.loop.update_weights(bench.executor.swap, running)
    bench.release()
    assert version.result(WAIT_S) == 1
    assert with_versions(drained) == [(0, 0)] * 20
    found = with_versions(mixed)
    assert found == sorted(found) and found[20] == (0, 0) and found[-1] == (1, 1)


def test_updates_happen_in_order(bench: Bench) -> None:
    bench.hold(2)
    handle = bench.submit((1,), max_tokens=30)
    bench.await_step()
    swapped: list[str] = []
    versions = [
        bench.loop.update_weights(lambda name=name: swapped.append(name), running)  # type: ignore[misc]
        for name, running in (("first", "drain"), ("second", "immediate"), ("third", "drain"))
    ]
    bench.release()
    assert [version.result(WAIT_S) for version in versions] == [1, 2, 3]
    assert swapped == ["first", "second", "third"] and len(tokens(handle)) == 30


def test_no_step_is_in_flight_while_weights_are_swapped(bench: Bench) -> None:
    bench.hold(3)
    handle = bench.submit((1,), max_tokens=30)
    bench.await_step()
    bench.loop.update_weights(bench.executor.swap, "immediate")
    bench.release()
    tokens(handle)
    before = bench.executor.log[: bench.executor.log.index("swap")]
    assert before[-1] == "read 3" and before[-3] == "run 3"


def test_an_update_of_an_idle_loop_happens_at_once(bench: Bench) -> None:
    assert bench.loop.update_weights(bench.executor.swap, "drain").result(WAIT_S) == 1
    assert with_versions(bench.submit((1,), max_tokens=3)) == [(1, 1)] * 3


def test_an_update_that_is_withdrawn_never_happens(bench: Bench) -> None:
    bench.hold(2)
    handles = [bench.submit((i,), max_tokens=20) for i in range(2)]
    bench.await_step()
    version = bench.loop.update_weights(bench.executor.swap, "drain")
    handles.append(bench.submit((9,), max_tokens=20))
    assert version.cancel()
    bench.release()
    assert [with_versions(handle) for handle in handles] == [[(0, 0)] * 20] * 3
    assert "swap" not in bench.executor.log


def test_an_update_that_is_refused_leaves_the_old_weights_to_all(bench: Bench) -> None:
    def refuse() -> None:
        raise CheckpointError("a chunk is missing")

    bench.hold(2)
    handle = bench.submit((1,), max_tokens=20)
    bench.await_step()
    version = bench.loop.update_weights(refuse, "immediate")
    bench.release()
    with pytest.raises(CheckpointError, match="a chunk is missing"):
        version.result(WAIT_S)
    assert with_versions(handle) == [(0, 0)] * 20 and bench.loop.weights_version == 0


def test_an_update_that_breaks_half_way_ends_the_loop(bench: Bench) -> None:
    def break_off() -> None:
        raise OSError("half of it is there")

    bench.hold(2)
    handle = bench.submit((1,), max_tokens=20)
    bench.await_step()
    versions = [bench.loop.update_weights(swap, "immediate") for swap in (break_off, bench.executor.swap)]
    bench.release()
    for version in versions:
        with pytest.raises(RuntimeClosedError, match="half of it is there"):
            version.result(WAIT_S)
    with pytest.raises(MillraceError, match="half of it is there"):
        handle.result(WAIT_S)
    with pytest.raises(RuntimeClosedError, match="open a new Runtime"):
        bench.loop.update_weights(bench.executor.swap, "drain")


def test_closing_refuses_the_updates_that_wait(bench: Bench) -> None:
    bench.hold(2)
    bench.submit((1,), max_tokens=60)
    bench.await_step()
    version = bench.loop.update_weights(bench.executor.swap, "drain")
    closer = threading.Thread(target=bench.loop.close)
    closer.start()
    with bench.loop._changed:
        assert bench.loop._changed.wait_for(lambda: bench.loop._is_closing, WAIT_S)
    bench.release()
    with pytest.raises(RuntimeClosedError, match="closed"):
        version.result(WAIT_S)
    closer.join(WAIT_S)
    assert "swap" not in bench.executor.log


def test_a_forked_process_is_told_so_and_leaves_its_parents_loop_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = bench.handle((1, 2))
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        with bench.loop._changed:  # as a thread may have, that is not in the child
            other = threading.Thread(target=lambda: refused.append(refusal(bench, handle)), daemon=True)
            refused: list[str] = []
            other.start()
            other.join(WAIT_S)
        assert len(refused) == 1 and "this process was forked from" in refused[0]
    assert bench.submit((1, 2)).result(WAIT_S).outputs[0].token_ids == expected((1, 2), 5)


def refusal(bench: Bench, handle: RequestHandle) -> str:
    """What submit() says, after all that says nothing."""
    bench.loop.cancel(handle)
    bench.loop.close()
    try:
        bench.loop.submit([handle])
    except RuntimeClosedError as error:
        return str(error)
    return ""
