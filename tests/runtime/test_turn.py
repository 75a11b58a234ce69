"""Turns as they travel, and the digest of what is planned."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from millrace import SamplingParams
from millrace.runtime.request import Request
from millrace.runtime.scheduler import Scheduler, SchedulerConfig
from millrace.runtime.turn import Ending, Turn, plan_digest

SIZES = SchedulerConfig(
    num_shards=2, num_slots=2, num_pages=24, page_size=4, max_context_len=64, max_step_tokens=8, max_decode_steps=2,
    prefix_caching=True,
)  # fmt: skip


def request(number: int, **options: object) -> Request:
    return Request(
        request_id=str(number),
        prompt=None,
        prompt_token_ids=(number, 2, 3),
        params=SamplingParams(**options),
        max_new_tokens=7,
        eos_ids=frozenset({3, 1}),
        stop_ids=frozenset({9, 1, 3}),
        bad_word_ids=((1, 2), (3,)),
    )


@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0.01, 100, allow_subnormal=False),
    bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100)),
    stop=st.lists(st.text(min_size=1), max_size=3),
)
def test_a_turn_arrives_as_it_was_sent(seed: int, temperature: float, bias: dict[int, float], stop: list[str]) -> None:
    turn = Turn(
        arrived=(request(1, seed=seed, temperature=temperature, logit_bias=bias, stop=stop), request(2, n=3, seed=1)),
        ended=(Ending(arrival=(0, 1), reason="abort"), Ending(arrival=(4, 0), reason="stop", stop_reason="\ud800 é")),
        weights=("/a/store",),
        starts_requests=False,
        is_last=True,
        digest=0,
    )
    assert Turn.from_json(json.loads(json.dumps(turn.to_json()))) == turn


def test_an_ordinary_turn_is_as_good_as_empty() -> None:
    assert Turn().to_json() == {} and Turn.from_json({}) == Turn()


def test_the_digest_tells_plans_apart_and_knows_their_order() -> None:
    def digests(first: int, second: int) -> list[int]:
        scheduler, found = Scheduler(SIZES), [0]
        for number in (first, second):
            scheduler.add(request(number, n=number))
            plan = scheduler.plan()
            assert plan is not None
            found.append(plan_digest(plan, found[-1]))
            changed = dataclasses.replace(plan, num_steps=plan.num_steps + 1)
            assert plan_digest(changed, found[-2]) != found[-1]
        return found

    assert digests(1, 2) == digests(1, 2)
    assert digests(1, 2)[-1] != digests(2, 1)[-1]
