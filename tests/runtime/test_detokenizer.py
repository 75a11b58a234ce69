"""Text in pieces is the text of the whole, and a stop string is found wherever the pieces are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.runtime.detokenizer import IncrementalDetokenizer, StopChecker, TextStream
from millrace.runtime.sampling_params import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
KINDS = ("byte_level", "byte_fallback", "word_level")


def pieces_of(tokenizer, prompt_ids, ids, skip=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip)
    return [*(detokenizer.push([id]) for id in ids), detokenizer.finish()]


def text_of(tokenizer, prompt_ids, ids, skip=True):
    """What the pieces must add up to."""
    return tokenizer.decode([*prompt_ids, *ids], skip)[len(tokenizer.decode(prompt_ids, skip)) :]


@given(prompt=st.text(max_size=8), output=st.text(max_size=30))
def test_pieces_of_unicode_text_are_the_text(byte_level, prompt, output):
    prompt_ids = byte_level.encode("a" + prompt)
    assert "".join(pieces_of(byte_level, prompt_ids, byte_level.encode(output), skip=False)) == output


@given(prompt_ids=st.lists(st.integers(0, 299), max_size=12), ids=st.lists(st.integers(0, 310), max_size=60))
def test_pieces_of_any_tokens_are_the_decoded_whole(byte_level, prompt_ids, ids):
    assert "".join(pieces_of(byte_level, prompt_ids, ids)) == text_of(byte_level, prompt_ids, ids)


@given(data=st.data())
def test_pieces_of_broken_bytes_are_the_decoded_whole(byte_level, data):
    parts = [id for id in range(byte_level.vocab_size) if byte_level.token_text(id) == REPLACEMENT]
    ids = data.draw(st.lists(st.sampled_from(parts), max_size=40))
    assert "".join(pieces_of(byte_level, [], ids)) == text_of(byte_level, [], ids)


@given(text=st.text(max_size=20))
def test_pieces_of_fallback_bytes_are_the_text(byte_fallback, text):
    assert "".join(pieces_of(byte_fallback, [258], [1 + byte for byte in text.encode()])) == text


def test_character_of_several_tokens_is_held_back_until_it_is_whole(byte_fallback):
    smile = [1 + byte for byte in "😀".encode()]
    assert pieces_of(byte_fallback, [258], smile) == ["", "", "", "😀", ""]


def test_unfinished_character_is_flushed_at_the_end(byte_fallback):
    assert pieces_of(byte_fallback, [258], [1 + 0xE4]) == ["", REPLACEMENT]


def test_leading_space_is_kept_after_a_prompt_and_stripped_without_one(byte_fallback):
    the, cat = 258, 259
    assert pieces_of(byte_fallback, [the], [cat, cat]) == [" cat", " cat", ""]
    assert pieces_of(byte_fallback, [], [the, cat]) == ["the", " cat", ""]


def test_lone_spaces_are_not_lost(byte_fallback):
    space, cat = 257, 259
    ids = [space, space, cat, space, cat] + [space] * 80
    assert "".join(pieces_of(byte_fallback, [258], ids)) == text_of(byte_fallback, [258], ids)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_token_have_no_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert pieces_of(tokenizer, [1], [tokenizer.vocab_size, 10**6]) == ["", "", ""]


def test_words_without_a_decoder_are_joined_by_spaces(word_level):
    assert pieces_of(word_level, [0], [1, 2]) == [" cat", " sat", ""]


def test_special_tokens_are_skipped_or_shown(byte_level):
    ids = [*byte_level.encode("cat"), byte_level.eos_id, *byte_level.encode(" sat")]
    assert "".join(pieces_of(byte_level, [0], ids)) == "cat sat"
    assert "".join(pieces_of(byte_level, [0], ids, skip=False)) == "cat</s> sat"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("id", [1 + 0xFF, 0, 257])
def test_decoded_window_stays_short_whatever_is_generated(kind, id, request, monkeypatch):
    tokenizer = request.getfixturevalue(kind)
    lengths = []
    decode = type(tokenizer)._decode
    monkeypatch.setattr(type(tokenizer), "_decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    pieces_of(tokenizer, [1], [id] * 200, skip=False)
    assert max(lengths) <= 40


def search(pieces, stop, include=False):
    """Text given out and the stop string found, over pieces."""
    checker, shown = StopChecker(stop, include), ""
    for piece in pieces:
        new, found = checker.push(piece)
        shown += new
        if found is not None:
            return shown, found
    return shown + checker.flush(), None


def definition(text, stop, include):
    """The stop string that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True),
    include=st.booleans(),
)
def test_stop_string_is_found_however_the_text_is_cut(pieces, stop, include):
    assert search(pieces, stop, include) == definition("".join(pieces), stop, include)


def test_text_that_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(["END"])
    assert [checker.push(piece) for piece in ("xE", "N", "dEN", "D")] == [
        ("x", None),
        ("", None),
        ("ENd", None),
        ("", "END"),
    ]


def test_included_stop_string_is_not_held_back():
    checker = StopChecker(["END"], include_stop_str_in_output=True)
    assert [checker.push(piece) for piece in ("xE", "NDy")] == [("xE", None), ("ND", "END")]


def test_stop_string_that_ends_too_early_does_not_count():
    checker = StopChecker(["END"])
    assert checker.push("END", may_stop=False) == ("END", None)
    assert checker.push("EN", may_stop=False) == ("", None)
    assert checker.push("D") == ("", "END")


def test_stream_holds_stop_strings_until_min_tokens(byte_level):
    ids = byte_level.encode("cat cat", add_special_tokens=False)
    params = SamplingParams(stop="cat", min_tokens=len(ids) - 1, max_tokens=None)
    stream = TextStream(byte_level, [0], params)
    pushed = [stream.push(id) for id in ids]
    assert "".join(text for text, _ in pushed) == "cat "
    assert [stop for _, stop in pushed] == [None] * (len(ids) - 1) + ["cat"]


def test_stream_flushes_what_it_held(byte_level):
    stream = TextStream(byte_level, [0], SamplingParams(stop="cats"))
    text = "".join(stream.push(id)[0] for id in byte_level.encode("the cat", add_special_tokens=False))
    assert (text, stream.finish()) == ("the ", "cat")


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(detokenize=False)])
def test_stream_without_text_is_empty(params, byte_level):
    stream = TextStream(byte_level if not params.detokenize else None, [0], params)
    assert (stream.push(5), stream.finish()) == (("", None), "")
