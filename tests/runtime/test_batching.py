"""Packing a plan on the host and unpacking it in a program are inverse; padding touches nobody."""

from typing import Any

import jax
import numpy as np
import pytest

from millrace import SamplingParams
from millrace.runtime.batching import _PARAMS, FROM_SLOT, Batcher, StepInputs, unpack
from millrace.runtime.buckets import Bucket
from millrace.runtime.plan import Chunk, ShardPlan, StepPlan
from millrace.runtime.request import Request
from millrace.runtime.sampling import Wants
from millrace.runtime.sequence import Sequence

NUM_SHARDS, NUM_SLOTS, PAGES_PER_SLOT = 2, 6, 5
DECODE, MIXED = Bucket(True, 4, 4), Bucket(False, 16, NUM_SLOTS)


def make_sequence(batcher: Batcher, slot: int, shard: int = 0, num_tokens: int = 9, **options: Any) -> Sequence:
    """A sequence of the tokens 100, 101 ... in a slot, its sampling parameters taken over."""
    params = SamplingParams(**{"seed": 1, **options})
    tokens = list(range(100, 100 + num_tokens))
    request = Request(
        request_id="r",
        prompt=None,
        prompt_token_ids=tuple(tokens),
        params=params,
        max_new_tokens=8,
        eos_ids=frozenset(),
        stop_ids=frozenset(params.stop_token_ids),
        bad_word_ids=((3,),) if params.bad_words else (),
    )
    sequence = Sequence(
        request=request, index=slot % 3, arrival=(slot, 0), max_len=64, tokens=tokens, shard=shard, slot=slot
    )
    batcher.admit(sequence)
    return sequence


def shard_plan(
    decoding: tuple[Sequence, ...] = (),
    positions: tuple[int, ...] = (),
    budgets: tuple[int, ...] = (),
    chunks: tuple[Chunk, ...] = (),
) -> ShardPlan:
    """Row b's page table is 10 b, 10 b + 1 ..."""
    num_rows = len(decoding) + len(chunks)
    return ShardPlan(
        decoding=decoding,
        slots=np.array([s.slot for s in decoding], np.int32),
        positions=np.array(positions, np.int32),
        budgets=np.array(budgets, np.int32),
        is_last=np.zeros(len(decoding), bool),
        chunks=chunks,
        page_tables=(10 * np.arange(num_rows)[:, None] + np.arange(PAGES_PER_SLOT)).astype(np.int32),
    )


def step_plan(*shards: ShardPlan, num_steps: int = 1) -> StepPlan:
    return StepPlan(shards=shards, num_steps=num_steps, admitted=())


def chunk(sequence: Sequence, start: int, num_tokens: int) -> Chunk:
    samples = start + num_tokens == len(sequence.tokens)
    return Chunk(sequence=sequence, slot=sequence.slot, start=start, num_tokens=num_tokens, samples=samples)


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(NUM_SHARDS, NUM_SLOTS, PAGES_PER_SLOT)


_unpack = jax.jit(unpack, static_argnums=0)  # one compilation a layout, for all tests


def packed_and_unpacked(batcher: Batcher, plan: StepPlan, bucket: Bucket) -> StepInputs:
    control = batcher.pack(plan, bucket)
    inputs: StepInputs = jax.tree.map(np.asarray, _unpack(batcher.layout(bucket), control.packed, control.flags))
    return inputs


def decode_plan(batcher: Batcher) -> StepPlan:
    """Three rows in shard 0, one in shard 1."""
    first = tuple(make_sequence(batcher, slot) for slot in (1, 3, 5))
    second = (make_sequence(batcher, 2, shard=1),)
    return step_plan(shard_plan(first, (8, 0, 30), (4, 1, 2)), shard_plan(second, (63,), (4,)), num_steps=4)


def mixed_plan(batcher: Batcher) -> StepPlan:
    """A decode and two chunks in shard 0, the second chunk its prompt's last; nothing in shard 1."""
    decoding = (make_sequence(batcher, 4),)
    middle, last = make_sequence(batcher, 0), make_sequence(batcher, 2)
    chunks = (chunk(middle, 2, 5), chunk(last, 6, 3))
    return step_plan(shard_plan(decoding, (11,), (1,), chunks), shard_plan())


def test_decode_rows_feed_their_slots_last_token_where_the_plan_says(batcher: Batcher) -> None:
    inputs = packed_and_unpacked(batcher, decode_plan(batcher), DECODE)
    assert inputs.sampling.slots.tolist() == [[1, 3, 5, NUM_SLOTS], [2, NUM_SLOTS, NUM_SLOTS, NUM_SLOTS]]
    assert (inputs.batch.tokens == FROM_SLOT).all() and (inputs.targets == -1).all()
    assert inputs.batch.positions.tolist() == [[8, 0, 30, 0], [63, 0, 0, 0]]
    assert inputs.batch.kv_lens.tolist() == [[9, 1, 31, 0], [64, 0, 0, 0]]
    assert inputs.budgets.tolist() == [[4, 1, 2, 0], [4, 0, 0, 0]]
    assert inputs.batch.rows.tolist() == [[0, 1, 2, 4], [0, 4, 4, 4]], "a padding row must not write to the cache"
    assert inputs.batch.cu_query_lens.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert inputs.batch.page_tables[0, 2].tolist() == [20, 21, 22, 23, 24]
    assert inputs.num_steps == 4


def test_mixed_rows_are_the_decodes_and_then_the_chunks(batcher: Batcher) -> None:
    inputs = packed_and_unpacked(batcher, mixed_plan(batcher), MIXED)
    assert inputs.sampling.slots.tolist() == [[4, 0, 2, *[NUM_SLOTS] * 3], [NUM_SLOTS] * 6]
    assert inputs.batch.tokens[0, :9].tolist() == [FROM_SLOT, 102, 103, 104, 105, 106, 106, 107, 108]
    assert inputs.batch.positions[0, :9].tolist() == [11, 2, 3, 4, 5, 6, 6, 7, 8]
    assert inputs.batch.rows[0, :9].tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert inputs.batch.cu_query_lens[0].tolist() == [0, 1, 6, 9, 9, 9, 9]
    assert inputs.batch.kv_lens[0].tolist() == [12, 7, 9, 0, 0, 0]
    assert inputs.budgets[0].tolist() == [1, 0, 1, 0, 0, 0], "only the last chunk of a prompt samples"
    assert inputs.batch.page_tables[0, :3, 0].tolist() == [0, 10, 20]


def test_padding_tokens_belong_to_no_row(batcher: Batcher) -> None:
    inputs = packed_and_unpacked(batcher, mixed_plan(batcher), MIXED)
    assert (inputs.batch.rows[0, 9:] == NUM_SLOTS).all() and (inputs.targets == -1).all()
    assert (inputs.batch.tokens[:, 9:] >= 0).all(), "FROM_SLOT would read a slot"
    empty = inputs.batch
    assert (empty.rows[1] == NUM_SLOTS).all() and not empty.kv_lens[1].any() and not empty.cu_query_lens[1].any()
    assert not inputs.budgets[1].any()


def test_padding_rows_sample_with_parameters_that_make_no_nan(batcher: Batcher) -> None:
    sampling = packed_and_unpacked(batcher, mixed_plan(batcher), MIXED).sampling
    assert (sampling.repetition[:, 3:] == 1).all() and (sampling.top_p[:, 3:] == 1).all()


def test_each_row_has_its_own_sampling_parameters_to_the_last_bit(batcher: Batcher) -> None:
    options = {
        "temperature": 0.7, "top_p": 0.123456789, "min_p": 1e-7, "presence_penalty": -1.5, "frequency_penalty": 2.0,
        "repetition_penalty": 1.1, "top_k": 7, "seed": 2**64 - 2, "min_tokens": 3,
    }  # fmt: skip
    sequences = (make_sequence(batcher, 5, **options), make_sequence(batcher, 1, temperature=0))
    plan = step_plan(shard_plan(sequences, (9, 9), (1, 1)), shard_plan())
    sampling = packed_and_unpacked(batcher, plan, DECODE).sampling
    row = {name: getattr(sampling, name)[0, 0] for name in sampling._fields}
    assert row["temperature"] == np.float32(0.7) and row["top_p"] == np.float32(0.123456789)
    assert row["min_p"] == np.float32(1e-7) and row["repetition"] == np.float32(1.1)
    assert (row["presence"], row["frequency"], row["top_k"]) == (-1.5, 2.0, 7)
    assert (row["seed_hi"], row["seed_lo"]) == (2**32 - 1, 2**32 - 2) and sampling.seed_hi.dtype == np.uint32
    assert (row["n_index"], row["min_position"]) == (2, 9 + 3)
    assert (sampling.temperature[0, 1], sampling.top_k[0, 1], sampling.seed_lo[0, 1]) == (0, 0, 1)


def test_a_slots_next_sequence_leaves_nothing_of_the_one_before(batcher: Batcher) -> None:
    make_sequence(batcher, 0, temperature=0.5, top_k=3, logprobs=1, min_tokens=2, presence_penalty=1, top_p=0.5)
    plan = step_plan(shard_plan((make_sequence(batcher, 0, temperature=0),), (9,), (1,)), shard_plan())
    inputs = packed_and_unpacked(batcher, plan, DECODE)
    assert not any(inputs.wants)
    assert (inputs.sampling.top_k[0, 0], inputs.sampling.top_p[0, 0], inputs.sampling.presence[0, 0]) == (0, 1, 0)


WANTED: list[tuple[dict[str, Any], set[str]]] = [
    ({"temperature": 0}, set()),
    ({}, {"any_random"}),
    ({"top_k": 4}, {"any_random", "any_top_k"}),
    ({"top_p": 0.5}, {"any_random", "any_top_p"}),
    ({"temperature": 0, "top_k": 4, "top_p": 0.5}, set()),
    ({"temperature": 0, "logit_bias": {3: 1.0}}, {"any_biased"}),
    ({"temperature": 0, "allowed_token_ids": [3]}, {"any_biased"}),
    ({"temperature": 0, "presence_penalty": -0.1}, {"any_penalized"}),
    ({"temperature": 0, "frequency_penalty": 0.1}, {"any_penalized"}),
    ({"temperature": 0, "repetition_penalty": 0.9}, {"any_penalized"}),
    ({"temperature": 0, "bad_words": ["x"]}, {"any_bad_words"}),
    ({"temperature": 0, "min_tokens": 1}, {"any_min_tokens"}),
    ({"temperature": 0, "logprobs": 0}, {"any_logprobs"}),
]


@pytest.mark.parametrize(("options", "wanted"), WANTED, ids=lambda value: "+".join(sorted(value)) or "nothing")
def test_a_step_computes_what_one_of_its_rows_wants_and_no_more(
    batcher: Batcher, options: dict[str, Any], wanted: set[str]
) -> None:
    rows = (make_sequence(batcher, 0, **options), make_sequence(batcher, 1, shard=1, temperature=0))
    make_sequence(batcher, 2, temperature=0.5, top_p=0.5, logprobs=3)  # has a slot, but no part in the step
    plan = step_plan(shard_plan(rows[:1], (9,), (1,)), shard_plan(rows[1:], (9,), (1,)))
    flags = batcher.pack(plan, DECODE).flags
    assert {name for i, name in enumerate(Wants._fields) if flags[2 + i]} == wanted


def test_prompt_logprobs_are_of_the_token_after_each_even_past_the_chunk(batcher: Batcher) -> None:
    asked, other = make_sequence(batcher, 0, prompt_logprobs=1), make_sequence(batcher, 1)
    plan = step_plan(shard_plan(chunks=(chunk(other, 0, 3), chunk(asked, 2, 4))), shard_plan())
    inputs = packed_and_unpacked(batcher, plan, MIXED)
    assert inputs.targets[0, :8].tolist() == [-1, -1, -1, 103, 104, 105, 106, -1]
    assert inputs.any_prompt_logprobs


def test_the_last_token_of_a_prompt_has_none_after_it(batcher: Batcher) -> None:
    asked, other = make_sequence(batcher, 0, prompt_logprobs=1), make_sequence(batcher, 1)
    plan = step_plan(shard_plan(chunks=(chunk(asked, 6, 3), chunk(other, 0, 2))), shard_plan())
    inputs = packed_and_unpacked(batcher, plan, MIXED)
    assert inputs.targets[0, :6].tolist() == [107, 108, -1, -1, -1, -1]


def test_nobody_pays_for_prompt_logprobs_that_nobody_asked_for(batcher: Batcher) -> None:
    assert not packed_and_unpacked(batcher, mixed_plan(batcher), MIXED).any_prompt_logprobs


def test_a_step_that_fills_its_bucket_has_no_padding(batcher: Batcher) -> None:
    sequences = tuple(make_sequence(batcher, slot, num_tokens=16) for slot in range(NUM_SLOTS))
    chunks = (chunk(sequences[5], 0, 11),)
    plan = step_plan(shard_plan(sequences[:5], (20,) * 5, (1,) * 5, chunks), shard_plan())
    inputs = packed_and_unpacked(batcher, plan, MIXED)
    assert inputs.batch.rows[0].tolist() == [0, 1, 2, 3, 4, *[5] * 11]
    assert inputs.batch.cu_query_lens[0].tolist() == [0, 1, 2, 3, 4, 5, 16]


def test_every_step_is_packed_into_arrays_of_its_own(batcher: Batcher) -> None:
    plan = decode_plan(batcher)
    first, second = batcher.pack(plan, DECODE), batcher.pack(plan, DECODE)
    assert not np.shares_memory(first.packed, second.packed) and not np.shares_memory(first.flags, second.flags)
    table = plan.shards[0].page_tables
    assert not np.shares_memory(first.packed, table)


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=str)
def test_the_fields_of_a_layout_fill_it_without_overlap(batcher: Batcher, bucket: Bucket) -> None:
    layout = batcher.layout(bucket)
    row = np.zeros(layout.width, np.int32)
    for view in layout.views(row).values():
        assert np.shares_memory(view, row)
        view.view(np.int32)[...] += 1
    assert (row == 1).all()


def test_host_views_and_device_split_agree_on_every_field(batcher: Batcher) -> None:
    layout = batcher.layout(MIXED)
    packed = np.random.default_rng(0).integers(0, 2**30, (NUM_SHARDS, layout.width)).astype(np.int32)
    split = jax.tree.map(np.asarray, layout.split(packed))  # type: ignore[arg-type]
    for r in range(NUM_SHARDS):
        views = layout.views(packed[r])
        views |= dict(zip(_PARAMS, views.pop("params"), strict=True))
        assert views.keys() == split.keys()
        for name, view in views.items():
            assert split[name][r].tobytes() == view.tobytes(), name
