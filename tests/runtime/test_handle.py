"""A handle between one thread that pushes events and any number that read."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from millrace import InvalidRequestError, MillraceError, RequestOutput, SamplingParams
from millrace.runtime.completion import TokenEvent
from millrace.runtime.handle import RequestHandle
from millrace.runtime.limits import MAX_LOGPROBS
from millrace.runtime.logprobs import Scores
from millrace.runtime.request import Request
from millrace.runtime.tokenizer import Tokenizer

WAIT_S = 20  # for what comes at once unless something is broken


def make_handle(
    tokenizer: Tokenizer | None = None,
    cancel: Callable[[RequestHandle], None] = lambda handle: None,
    prompt: tuple[int, ...] = (5, 6, 7, 8),
    **options: Any,
) -> RequestHandle:
    params = SamplingParams(**{"seed": 1, **options})
    request = Request(
        request_id="r",
        prompt=None,
        prompt_token_ids=prompt,
        params=params,
        max_new_tokens=1000,
        eos_ids=frozenset(),
        stop_ids=frozenset(),
        bad_word_ids=(),
    )
    return RequestHandle(request, tokenizer, cancel)


def push(handle: RequestHandle, *tokens: int, index: int = 0, reason: Any = None) -> str | None:
    event = TokenEvent(index=index, tokens=tokens, scores=None, finish_reason=reason, stop_reason=None)
    return handle.push(event)


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def started(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


async def collect(handle: RequestHandle) -> list[RequestOutput]:
    return [output async for output in handle]


def test_a_result_joins_what_came_and_is_the_same_twice() -> None:
    handle = make_handle()
    push(handle, 1, 2)
    push(handle, 3, reason="length")
    for _ in range(2):
        output = handle.result()
        assert output.finished and ids([output]) == [[1, 2, 3]] and output.outputs[0].finish_reason == "length"


def test_continuations_end_each_on_its_own_and_the_request_with_the_last() -> None:
    handle = make_handle(n=2)
    push(handle, 1, index=1, reason="length")
    push(handle, 2, index=0)
    assert not handle.finished
    push(handle, 3, index=0, reason="length")
    assert handle.finished
    assert [(o.index, o.token_ids) for o in handle.result().outputs] == [(0, [2, 3]), (1, [1])]
    assert [(o.outputs[0].index, o.finished) for o in handle] == [(1, False), (0, False), (0, True)]


def test_every_iteration_starts_at_the_first_output_even_after_a_result() -> None:
    handle = make_handle()
    push(handle, 1)
    push(handle, 2, reason="length")
    assert handle.result().finished
    assert ids(list(handle)) == ids(list(handle)) == [[1], [2]]


def test_an_iteration_waits_for_what_comes() -> None:
    handle = make_handle()
    outputs = iter(handle)
    push(handle, 1)
    assert ids([next(outputs)]) == [[1]]
    thread = started(lambda: push(handle, 2, reason="length"))
    assert ids(list(outputs)) == [[2]]
    thread.join()


def test_readers_do_not_take_from_each_other() -> None:
    handle = make_handle()
    seen: list[list[list[int]]] = []
    readers = [started(lambda: seen.append(ids(list(handle)))) for _ in range(4)]
    for token in range(300):
        push(handle, token, reason="length" if token == 299 else None)
    assert ids([handle.result(WAIT_S)]) == [list(range(300))]
    for reader in readers:
        reader.join(WAIT_S)
    assert seen == [[[token] for token in range(300)]] * 4


def test_a_result_that_does_not_come_in_time_leaves_the_request_running() -> None:
    handle = make_handle()
    with pytest.raises(TimeoutError, match="not finished"):
        handle.result(timeout_s=0)
    push(handle, 1, reason="length")
    assert ids([handle.result(timeout_s=0)]) == [[1]]


@pytest.mark.parametrize("timeout_s", ["a", True, float("nan")])
def test_a_timeout_that_is_no_number_is_refused(timeout_s: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout_s must be a number of seconds"):
        make_handle().result(timeout_s)


def test_a_timeout_may_be_endless() -> None:
    handle = make_handle()
    push(handle, 1, reason="length")
    assert ids([handle.result(timeout_s=float("inf"))]) == [[1]]


def test_a_failure_reaches_every_reader_with_its_cause() -> None:
    handle, cause = make_handle(), OSError("the device is gone")
    handle.fail(cause)
    assert handle.finished
    with pytest.raises(MillraceError, match="the device is gone") as caught:
        handle.result()
    assert caught.value.__cause__ is cause
    with pytest.raises(MillraceError, match="the device is gone"):
        list(handle)
    with pytest.raises(MillraceError, match="the device is gone"):
        asyncio.run(collect(handle))


def test_a_stream_that_fails_gives_what_came_and_then_raises_and_never_says_finished() -> None:
    handle = make_handle()
    push(handle, 1)
    handle.fail(OSError("gone"))
    outputs = iter(handle)
    first = next(outputs)
    assert ids([first]) == [[1]] and not first.finished
    with pytest.raises(MillraceError, match="gone"):
        next(outputs)


def test_a_failure_wakes_who_waits() -> None:
    handle = make_handle()
    caught: list[type[BaseException]] = []

    def wait(read: Callable[[], object]) -> None:
        try:
            read()
        except MillraceError as error:
            caught.append(type(error))

    readers = [started(lambda read=read: wait(read)) for read in (handle.result, lambda: list(handle))]
    handle.fail(OSError("gone"))
    for reader in readers:
        reader.join(WAIT_S)
    assert caught == [MillraceError] * 2


def test_a_finished_request_cannot_fail_any_more() -> None:
    handle = make_handle()
    push(handle, 1, reason="length")
    handle.fail(OSError("too late"))
    assert ids([handle.result()]) == [[1]]


def test_cancel_hands_the_handle_over() -> None:
    cancelled: list[RequestHandle] = []
    handle = make_handle(cancel=cancelled.append)
    handle.cancel()
    assert cancelled == [handle] and not handle.finished


def test_an_aborted_request_keeps_what_was_generated() -> None:
    handle = make_handle()
    push(handle, 1)
    push(handle, reason="abort")
    output = handle.result()
    assert ids([output]) == [[1]] and output.outputs[0].finish_reason == "abort"


def test_push_tells_the_loop_of_a_stop_string_once_and_drops_what_comes_after(byte_level: Tokenizer) -> None:
    handle = make_handle(byte_level, stop=["cat"])
    tokens = byte_level.encode("the cat sat", add_special_tokens=False)
    assert push(handle, *tokens[:1]) is None
    assert push(handle, *tokens[1:]) == "cat"
    assert handle.finished
    assert push(handle, *tokens, reason="length") is None
    output = handle.result().outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("the ", "stop", "cat")


def test_text_is_made_by_the_reader_whom_the_loop_never_waits_for(byte_level: Tokenizer) -> None:
    entered, pushed = threading.Event(), threading.Event()
    in_time: list[bool] = []

    class Slow:
        """Decodes once the loop has pushed another event."""

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_level, name)

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                in_time.append(pushed.wait(WAIT_S))
            return byte_level.decode(ids, skip_special_tokens)

    handle = make_handle(Slow())  # type: ignore[arg-type]
    tokens = byte_level.encode("the cat", add_special_tokens=False)
    push(handle, *tokens[:1])
    reader = started(lambda: list(handle))
    assert entered.wait(WAIT_S)
    push(handle, *tokens[1:], reason="length")
    pushed.set()
    reader.join(WAIT_S)
    assert all(in_time) and handle.result().outputs[0].text == "the cat"


def scores_of(tokens: tuple[int, ...], logprob: float) -> Scores:
    tops = np.zeros((len(tokens), MAX_LOGPROBS), np.int32)
    column = np.full(len(tokens), logprob, np.float32)
    return Scores(column, np.ones(len(tokens), np.int32), tops, tops.astype(np.float32))  # type: ignore[arg-type]


def test_prompt_logprobs_begin_with_none_and_the_first_scores_of_a_position_stay() -> None:
    handle = make_handle(prompt=(5, 6, 7, 8), prompt_logprobs=0)
    handle.push_prompt_scores(1, (6, 7), scores_of((6, 7), -1.0))
    handle.push_prompt_scores(1, (6,), scores_of((6,), -9.0))  # computed again after a preemption
    handle.push_prompt_scores(3, (8,), scores_of((8,), -2.0))
    push(handle, 1, reason="length")
    first, *rest = handle.result().prompt_logprobs or []
    assert first is None
    assert [{id: e.logprob for id, e in (step or {}).items()} for step in rest] == [{6: -1.0}, {7: -1.0}, {8: -2.0}]
    assert next(iter(handle)).prompt_logprobs == handle.result().prompt_logprobs


def test_prompt_logprobs_are_none_where_nobody_asked() -> None:
    handle = make_handle()
    push(handle, 1, reason="length")
    assert handle.result().prompt_logprobs is None


def test_metrics_have_the_first_token_and_in_the_end_the_whole() -> None:
    handle = make_handle()
    push(handle, 1)
    push(handle, 2, reason="length")
    first, last = [output.metrics for output in handle]
    assert first is not None and last is not None
    assert first.total_s is None and first.time_to_first_token_s is not None
    assert last.total_s is not None and last.total_s >= first.time_to_first_token_s >= 0


def test_async_iteration_gives_what_iteration_gives() -> None:
    handle = make_handle()

    async def read() -> list[list[int]]:
        reading = asyncio.create_task(collect(handle))
        await asyncio.sleep(0)  # the reader is waiting now
        pushing = started(lambda: [push(handle, t, reason="length" if t == 49 else None) for t in range(50)])
        outputs = await asyncio.wait_for(reading, WAIT_S)
        pushing.join()
        assert [output.finished for output in outputs] == [False] * 49 + [True]
        return ids(outputs)

    assert asyncio.run(read()) == [[token] for token in range(50)]
    assert ids(asyncio.run(collect(handle))) == [[token] for token in range(50)]


def test_one_event_loop_reads_many_requests_at_once() -> None:
    handles = [make_handle() for _ in range(5)]

    async def read() -> list[list[RequestOutput]]:
        reading = [asyncio.create_task(collect(handle)) for handle in handles]
        await asyncio.sleep(0)
        for token in (1, 2):
            for handle in handles:
                push(handle, token, reason="length" if token == 2 else None)
        return await asyncio.wait_for(asyncio.gather(*reading), WAIT_S)

    assert [ids(outputs) for outputs in asyncio.run(read())] == [[[1], [2]]] * 5


def test_a_reader_whose_event_loop_was_closed_does_not_disturb_the_step_loop() -> None:
    handle = make_handle()
    push(handle, 1)
    loop = asyncio.new_event_loop()
    reader = handle.__aiter__()
    assert ids([loop.run_until_complete(anext(reader))]) == [[1]]
    loop.close()
    push(handle, 2, reason="length")
    assert ids([handle.result()]) == [[1, 2]]


def test_an_async_reader_that_leaves_early_is_called_no_more() -> None:
    handle = make_handle()
    push(handle, 1)

    async def read_one() -> None:
        reader = handle.__aiter__()
        await anext(reader)
        await reader.aclose()  # type: ignore[attr-defined]

    asyncio.run(read_one())
    assert handle._listeners == []
