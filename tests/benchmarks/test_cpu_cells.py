"""What the numbers of the CPU comparison mean: cells, ratios, claims."""

import pytest
from cpu_cells import OURS, TARGETS, Cell, Entrant, claims, parse_cells, parse_entrants, ratios, step_bytes

ONE, PROMPT = Cell("decode", 1), Cell("prefill", 1024)
MILLRACE_INT8, MILLRACE_INT4 = Entrant(OURS, "int8"), Entrant(OURS, "int4")
LLAMA = {precision: Entrant("llama.cpp", precision) for precision in ("int4", "int8", "bf16")}
KNOWN = [MILLRACE_INT4, MILLRACE_INT8, *LLAMA.values()]


def test_a_ratio_is_to_the_best_peer_of_the_same_or_a_higher_precision():
    speeds = {
        (MILLRACE_INT8, ONE): 30.0,
        (LLAMA["int4"], ONE): 50.0,
        (LLAMA["int8"], ONE): 20.0,
        (LLAMA["bf16"], ONE): 10.0,
    }
    (found,) = ratios(speeds)
    assert (found.peer, found.value, found.target) == (LLAMA["int8"], 1.5, 1.0)


def test_a_higher_precision_that_is_faster_is_the_one_to_beat():
    speeds = {(MILLRACE_INT4, PROMPT): 120.0, (LLAMA["int4"], PROMPT): 80.0, (LLAMA["bf16"], PROMPT): 100.0}
    (found,) = ratios(speeds)
    assert (found.peer, found.value) == (LLAMA["bf16"], 1.2)


def test_where_no_peer_was_measured_there_is_no_ratio():
    assert ratios({(MILLRACE_INT8, ONE): 30.0, (LLAMA["int4"], ONE): 50.0, (LLAMA["int8"], PROMPT): 9.0}) == []


def test_ratios_stand_by_cell_and_then_by_precision():
    speeds = {(e, cell): 1.0 for e in (MILLRACE_INT8, LLAMA["bf16"], MILLRACE_INT4) for cell in (PROMPT, ONE)}
    found = [(ratio.cell, ratio.precision) for ratio in ratios(speeds)]
    assert found == [(PROMPT, "int4"), (PROMPT, "int8"), (ONE, "int4"), (ONE, "int8")]


def test_a_claim_holds_from_its_target_on():
    speeds = {(MILLRACE_INT8, PROMPT): 120.0, (LLAMA["int8"], PROMPT): 100.0}
    assert list(claims(ratios(speeds)).values()) == [True]
    assert list(claims(ratios(speeds | {(MILLRACE_INT8, PROMPT): 119.0})).values()) == [False]


def test_a_cell_without_a_target_is_no_claim():
    cell = Cell("prefill", 128)
    assert cell not in TARGETS
    assert claims(ratios({(MILLRACE_INT8, cell): 2.0, (LLAMA["int8"], cell): 1.0})) == {}


def test_a_step_has_a_token_of_every_sequence_and_a_prompt_all_of_its_own():
    assert Cell("decode", 8).tokens_per_s(0.5) == 16.0
    assert Cell("prefill", 1024).tokens_per_s(2.0) == 512.0


def test_a_step_reads_the_weights_once_and_every_sequences_cache():
    assert step_bytes(1000, Cell("decode", 4), cached_tokens=10, token_bytes=2) == 1080


@pytest.mark.parametrize(
    ("names", "cells"),
    [
        ("all", [("decode", 1), ("decode", 8), ("prefill", 128)]),
        ("decode", [("decode", 1), ("decode", 8)]),
        ("prefill128,decode1", [("prefill", 128), ("decode", 1)]),
        ("decode1,decode", [("decode", 1), ("decode", 8)]),
    ],
)
def test_cells_are_named_by_kind_or_one_by_one(names, cells):
    assert parse_cells(names, (128,), (1, 8)) == cells


def test_an_unknown_cell_is_told_which_there_are():
    with pytest.raises(ValueError, match="some of decode1, prefill128; got 'decode2'"):
        parse_cells("decode2", (128,), (1,))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("all", KNOWN),
        ("llama.cpp", list(LLAMA.values())),
        ("int8", [MILLRACE_INT8, LLAMA["int8"]]),
        ("llama.cpp-bf16,Millrace-int8", [MILLRACE_INT8, LLAMA["bf16"]]),
    ],
)
def test_entrants_are_named_by_peer_by_precision_or_both(names, chosen):
    assert parse_entrants(names, KNOWN) == chosen


def test_an_unknown_entrant_is_told_which_there_are():
    with pytest.raises(ValueError, match="millrace-int4, millrace-int8.*got 'vllm'"):
        parse_entrants("vllm", KNOWN)
