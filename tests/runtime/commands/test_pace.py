import pytest

from millrace.runtime.commands import pace as pace_module
from millrace.runtime.commands.pace import Pace
from millrace.runtime.request import RequestMetrics


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one number."""
    now = [10.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: now[0])
    return now


def test_speed_counts_what_came_after_the_first_piece(clock):
    pace = Pace()
    for moment, tokens in ((10.5, 2), (11.0, 8), (12.5, 8)):
        clock[0] = moment
        pace.note(tokens)
    assert (pace.num_tokens, pace.first_token_s, pace.tokens_per_s) == (18, 0.5, 8.0)


def test_a_single_piece_is_timed_from_the_start(clock):
    pace = Pace()
    clock[0] = 10.5
    pace.note(4)
    assert pace.tokens_per_s == 8.0


def test_an_empty_stream_has_a_sentence(clock):
    assert Pace().sentence().startswith("0 tokens")


def test_two_pieces_are_timed_from_the_start(clock):
    pace = Pace()
    for moment, tokens in ((10.5, 1), (10.50001, 3)):
        clock[0] = moment
        pace.note(tokens)
    assert round(pace.tokens_per_s, 1) == 8.0


def test_pieces_that_were_read_late_count_when_they_were_made(clock):
    pace = Pace()
    clock[0] = 15.0
    for metrics in (None, None, RequestMetrics(time_to_first_token_s=0.5, total_s=2.5)):
        pace.note(8, metrics)
    assert (pace.first_token_s, pace.tokens_per_s) == (0.5, 8.0)
