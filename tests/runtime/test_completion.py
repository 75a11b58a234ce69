"""From tokens to pieces, and the pieces joined make the whole."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace import SamplingParams
from millrace.runtime.completion import Continuation, TokenEvent, entry, join
from millrace.runtime.limits import MAX_LOGPROBS
from millrace.runtime.logprobs import Scores
from millrace.runtime.request import CompletionOutput, Request
from millrace.runtime.tokenizer import Tokenizer

TEXT = "the cat sat on the mat, größer 日本語 😀\n    return a + b"
PROMPT = (5, 6)


def make_request(stop_ids: tuple[int, ...] = (), eos_ids: tuple[int, ...] = (), **options: Any) -> Request:
    return Request(
        request_id="r",
        prompt=None,
        prompt_token_ids=PROMPT,
        params=SamplingParams(**{"seed": 9, **options}),
        max_new_tokens=1000,
        eos_ids=frozenset(eos_ids),
        stop_ids=frozenset((*stop_ids, *eos_ids)),
        bad_word_ids=(),
    )


def event(*tokens: int, reason: Any = None, stop_reason: int | None = None, scores: Scores | None = None) -> TokenEvent:
    return TokenEvent(index=0, tokens=tokens, scores=scores, finish_reason=reason, stop_reason=stop_reason)


def make_scores(tokens: tuple[int, ...]) -> Scores:
    """Token t has log probability -t and rank t + 1; the likeliest are 0, 1, 2 ..."""
    tops = np.arange(MAX_LOGPROBS, dtype=np.int32)[None].repeat(len(tokens), 0)
    ids = np.array(tokens, np.int32)
    scores = Scores(logprob=-ids.astype(np.float32), rank=ids + 1, top_ids=tops, top_logprobs=-tops.astype(np.float32))  # type: ignore[arg-type]
    return scores


def play(request: Request, tokenizer: Tokenizer | None, *events: TokenEvent) -> list[CompletionOutput]:
    continuation = Continuation(request, 0, tokenizer)
    return [piece for e in events if (piece := continuation.take(e)) is not None]


def cut(ids: list[int], places: list[int], reason: str = "length") -> list[TokenEvent]:
    """The ids as events, cut at these places; the last one ends the continuation."""
    edges = [0, *sorted({place % len(ids) for place in places} - {0}), len(ids)]
    parts = [tuple(ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return [event(*part, reason=reason if i == len(parts) - 1 else None) for i, part in enumerate(parts)]


def test_a_piece_says_which_weights_made_its_tokens_and_the_whole_the_last_of_them() -> None:
    events = [
        dataclasses.replace(event(3), weights_version=4, first_weights_version=4),
        dataclasses.replace(event(5, reason="length"), weights_version=6, first_weights_version=4),
    ]
    pieces = play(make_request(), None, *events)
    assert [piece.weights_version for piece in pieces] == [4, 6]
    assert (join(pieces).first_weights_version, join(pieces).weights_version) == (4, 6)


@given(places=st.lists(st.integers(0, 200), max_size=12))
@settings(max_examples=25)
def test_the_pieces_make_the_text_however_the_steps_cut_it(byte_level: Tokenizer, places: list[int]) -> None:
    ids = byte_level.encode(TEXT, add_special_tokens=False)
    pieces = play(make_request(), byte_level, *cut(ids, places))
    whole = join(pieces)
    assert whole.text == TEXT and whole.token_ids == ids and whole.finish_reason == "length"
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@given(places=st.lists(st.integers(0, 200), max_size=12))
@settings(max_examples=25)
def test_a_stop_string_ends_tokens_and_text_at_the_same_place_however_the_steps_cut_it(
    byte_level: Tokenizer, places: list[int]
) -> None:
    ids = byte_level.encode(TEXT, add_special_tokens=False)
    request = make_request(stop=["mat,", "never"], logprobs=0)
    events = [dataclasses.replace(e, scores=make_scores(e.tokens)) for e in cut(ids, places)]
    whole = join(play(request, byte_level, *events))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("the cat sat on the ", "stop", "mat,")
    assert byte_level.decode(whole.token_ids, False).endswith("mat,")
    assert whole.logprobs is not None and len(whole.logprobs) == len(whole.token_ids)


def test_nothing_is_taken_after_a_stop_string(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the cat sat", add_special_tokens=False)
    pieces = play(make_request(stop=["cat"]), byte_level, event(*ids), event(*ids), event(*ids, reason="length"))
    assert len(pieces) == 1 and pieces[0].finish_reason == "stop"


def test_a_stop_string_in_the_last_step_counts_more_than_the_length(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the cat sat", add_special_tokens=False)
    (piece,) = play(make_request(stop=["cat"]), byte_level, event(*ids, reason="length"))
    assert (piece.finish_reason, piece.stop_reason, piece.text) == ("stop", "cat", "the ")


def test_text_that_might_have_begun_a_stop_string_comes_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the cat", add_special_tokens=False)
    pieces = play(make_request(stop=["cattle"]), byte_level, event(*ids), event(reason="abort"))
    assert [piece.text for piece in pieces] == ["the ", "cat"]


@pytest.mark.parametrize("is_eos", [True, False])
def test_the_ending_token_is_no_text(byte_level: Tokenizer, is_eos: bool) -> None:
    ids = byte_level.encode("the cat", add_special_tokens=False)
    (end,) = byte_level.encode("s", add_special_tokens=False)
    request = make_request(eos_ids=(end,)) if is_eos else make_request(stop_ids=(end,))
    (piece,) = play(request, byte_level, event(*ids, end, reason="stop", stop_reason=None if is_eos else end))
    assert (piece.text, piece.token_ids) == ("the cat", [*ids, end])
    assert piece.stop_reason == (None if is_eos else end)


def test_half_a_character_is_given_out_when_no_more_comes(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("😀", add_special_tokens=False)[:-1]
    assert ids, "a character of several tokens"
    pieces = play(make_request(), byte_level, event(*ids), event(reason="abort"))
    assert pieces[0].text == "" and set(pieces[1].text) == {"\N{REPLACEMENT CHARACTER}"}


def test_without_a_tokenizer_text_is_empty_and_tokens_have_none() -> None:
    (piece,) = play(make_request(logprobs=2), None, event(3, 4, reason="length", scores=make_scores((3, 4))))
    assert piece.text == "" and piece.token_ids == [3, 4] and piece.logprobs is not None
    assert [e.decoded_token for step in piece.logprobs for e in step.values()] == [None] * 6


def test_without_detokenizing_text_is_empty(byte_level: Tokenizer) -> None:
    assert play(make_request(detokenize=False), byte_level, event(3, 4, reason="length"))[0].text == ""


def test_the_seed_is_reported_in_every_piece() -> None:
    assert [piece.seed for piece in play(make_request(seed=77), None, event(1), event(2, reason="length"))] == [77, 77]


def test_an_entry_has_the_sampled_token_and_the_likeliest() -> None:
    scores = make_scores((30, 1))
    assert {id: e.rank for id, e in entry(None, scores, 0, 30, 2).items()} == {30: 31, 0: 1, 1: 2}
    assert {id: e.rank for id, e in entry(None, scores, 1, 1, 2).items()} == {1: 2, 0: 1}
    assert list(entry(None, scores, 0, 30, 0)) == [30]


def test_an_entry_leaves_out_what_a_small_vocabulary_does_not_have() -> None:
    scores = make_scores((0,))
    tops = np.array(scores.top_ids)
    tops[:, 3:] = -1
    assert list(entry(None, scores._replace(top_ids=tops), 0, 0, 20)) == [0, 1, 2]  # type: ignore[arg-type]


def test_logprobs_are_summed_over_the_pieces() -> None:
    events = [event(3, 4, scores=make_scores((3, 4))), event(5, reason="length", scores=make_scores((5,)))]
    pieces = play(make_request(logprobs=1), None, *events)
    assert [piece.cumulative_logprob for piece in pieces] == [-7.0, -5.0]
    whole = join(pieces)
    assert whole.cumulative_logprob == -12.0 and whole.logprobs is not None
    assert [step[token].logprob for step, token in zip(whole.logprobs, whole.token_ids, strict=True)] == [-3, -4, -5]


@pytest.mark.parametrize(("logprobs", "expected"), [(None, (None, None)), (0, (0.0, []))])
def test_a_continuation_that_is_aborted_before_its_first_token_is_whole(logprobs: int | None, expected: object) -> None:
    whole = join(play(make_request(logprobs=logprobs), None, event(reason="abort")))
    assert (whole.token_ids, whole.text, whole.finish_reason) == ([], "", "abort")
    assert (whole.cumulative_logprob, whole.logprobs) == expected


def test_logprobs_are_none_where_nobody_asked() -> None:
    whole = join(play(make_request(), None, event(3), event(4, reason="length")))
    assert whole.logprobs is None and whole.cumulative_logprob is None
