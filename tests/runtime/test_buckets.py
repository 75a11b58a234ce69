"""The finite set of step shapes: it covers every step, and picks the smallest that holds it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace import ProgramError
from millrace.runtime.buckets import Bucket, make_buckets, pick


@given(num_slots=st.integers(1, 5000), surplus=st.integers(1, 5000), data=st.data())
@settings(max_examples=60)
def test_every_step_has_a_bucket_of_the_smallest_size(num_slots: int, surplus: int, data: st.DataObject) -> None:
    max_step_tokens = num_slots + surplus
    buckets = make_buckets(num_slots, max_step_tokens)
    assert len(set(buckets)) == len(buckets) <= 18
    for is_decode, most in ((True, num_slots), (False, max_step_tokens)):
        num_tokens = data.draw(st.integers(1, most))
        bucket = pick(buckets, is_decode, num_tokens)
        assert bucket.is_decode == is_decode and bucket.num_tokens >= num_tokens
        assert not [b for b in buckets if b.is_decode == is_decode and num_tokens <= b.num_tokens < bucket.num_tokens]
        assert bucket.num_rows >= (num_tokens if is_decode else num_slots)


def test_buckets_grow_by_four_from_eight_rows() -> None:
    assert make_buckets(20, 512) == (
        Bucket(True, 1, 1), Bucket(True, 8, 8), Bucket(True, 20, 20),
        Bucket(False, 64, 20), Bucket(False, 256, 20), Bucket(False, 512, 20),
    )  # fmt: skip
    assert make_buckets(1, 2) == (Bucket(True, 1, 1), Bucket(False, 2, 1))


@pytest.mark.parametrize(("is_decode", "kind"), [(True, "decode"), (False, "mixed")])
def test_a_step_that_fits_no_bucket_is_a_program_error_that_names_those_there_are(is_decode: bool, kind: str) -> None:
    with pytest.raises(ProgramError, match=f"no {kind} program holds 65 tokens.*decode of 4.*mixed step of 64"):
        pick(make_buckets(4, 64), is_decode, 65)
