"""The Hopper kernels of paged attention, in GPU interpret mode with race detection, and lowered for the chip."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from millrace.pallas_kernels import hopper_operands
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.paged_attention import (
    KvCache,
    PagedAttentionProblem,
    PagedAttentionSpec,
    PagedBatch,
    hopper,
    paged_attention,
    reference,
)
from millrace.pallas_kernels.paged_attention.hopper_work import (
    BLOCK_KEYS,
    Place,
    Split,
    Units,
    choose_split,
    item_of,
    make_tiles,
)
from millrace.pallas_kernels.tuning import tuned

# Keys that may not be seen are NaN until their scores are masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

H200 = "NVIDIA H200"
LAYERS, LAYER = 2, 1
# One persistent CTA for each of two SMs, so that units follow each other in one; interpret mode has no operands in
# registers, so the weights, and 8-bit keys and values, go through shared memory.
SMALL = {"sms": 2, "ctas_per_sm": 1, "weights_in_registers": 0}
SPLIT = {**SMALL, "num_items": 64, "max_splits": 3, "min_blocks": 1, "max_blocks": 1}
WIDE = {**SMALL, "block_keys": 128, "stages": 2}
# (queries, keys): empty, one key, a page's and a block's edge and one past it, several blocks.
DECODE = [(1, 1), (1, 16), (1, 0), (1, 65)]
# A slot with keys and no query, a single query, a prompt, a chunk late in a context that crosses tiles and blocks.
MIXED = [(0, 9), (1, 70), (5, 5), (0, 0), (17, 66)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The static sizes of a case."""

    heads: tuple[int, int] = (8, 1)  # N, K
    head_dim: int = 64
    page: int = 16
    cache_dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Case:
    """Ragged slots over a cache that is NaN wherever no slot has a key; its page tables hold anything past the end."""

    q: jax.Array
    cache: KvCache[jax.Array]
    batch: PagedBatch
    sinks: jax.Array

    def run(self, spec: PagedAttentionSpec, change: dict[str, int] = SMALL, *, has_sinks: bool = False) -> np.ndarray:
        run = functools.partial(hopper.paged_attention, spec=spec, device_kind=H200, change=change)
        sinks = self.sinks if has_sinks else None
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            return np.float32(jax.jit(run)(self.q, self.cache, jnp.int32(LAYER), self.batch, sinks=sinks))

    def expected(self, spec: PagedAttentionSpec, *, has_sinks: bool = False) -> np.ndarray:
        """The reference in float32."""
        values = self.cache.values if self.cache.scales is not None else self.cache.values.astype(jnp.float32)
        cache, sinks = KvCache(values, self.cache.scales), self.sinks if has_sinks else None
        q = self.q.astype(jnp.float32)
        return np.float32(reference.paged_attention(q, cache, jnp.int32(LAYER), self.batch, spec=spec, sinks=sinks))


def make_case(slots: list[tuple[int, int]], shape: Shape, *, num_padding: int = 0) -> Case:
    rng = np.random.default_rng(5)
    (num_heads, num_kv_heads), page = shape.heads, shape.page
    pages_of = [-(-keys // page) for _, keys in slots]
    num_pages = sum(pages_of) + 2
    free = list(rng.permutation(num_pages))
    cache = np.full((LAYERS, num_pages, 2, num_kv_heads, page, shape.head_dim), np.nan, np.float32)
    tables = rng.integers(-9, 3 * num_pages, (len(slots), max(pages_of) + 2))
    for slot, (_, num_keys) in enumerate(slots):
        tables[slot, : pages_of[slot]] = [free.pop() for _ in range(pages_of[slot])]
        for key in range(num_keys):
            place = cache[LAYER, tables[slot, key // page], :, :, key % page]
            place[...] = rng.standard_normal(place.shape)
    ends = np.cumsum([0, *(queries for queries, _ in slots)])
    q = rng.standard_normal((ends[-1] + num_padding, num_heads, shape.head_dim))
    batch = PagedBatch(*(jnp.asarray(x, jnp.int32) for x in (tables, ends, [keys for _, keys in slots])))
    sinks = jnp.asarray(rng.standard_normal(num_heads), jnp.float32)
    return Case(jnp.asarray(q, jnp.bfloat16), stored(cache, shape.cache_dtype), batch, sinks)


def stored(cache: np.ndarray, dtype: str) -> KvCache[jax.Array]:
    """A cache of this dtype; what is NaN stays NaN, by its scale where a number cannot be."""
    if dtype != "int8":
        return KvCache(jnp.asarray(cache, dtype), None)
    scales = np.abs(cache).max(axis=-1) / 127
    values = np.nan_to_num(np.round(cache / scales[..., None]), nan=99)
    return KvCache(jnp.asarray(values, jnp.int8), jnp.asarray(scales, jnp.float32))


def make_spec(shape: Shape, **change: Any) -> PagedAttentionSpec:
    return PagedAttentionSpec(scale=shape.head_dim**-0.5, **change)


def check(case: Case, spec: PagedAttentionSpec, change: dict[str, int] = SMALL, *, has_sinks: bool = False) -> None:
    """Within 1e-2 of the largest number, in every row; NaN in what may not be read would show."""
    answer, expected = case.run(spec, change, has_sinks=has_sinks), case.expected(spec, has_sinks=has_sinks)
    np.testing.assert_allclose(answer, expected, atol=1e-2 * np.abs(expected).max(), rtol=0)


def test_decode_with_a_window_a_cap_and_sinks_follows_the_reference() -> None:
    shape = Shape()
    check(make_case(DECODE, shape), make_spec(shape, window=40, soft_cap=3.0, one_query_per_slot=True), has_sinks=True)


def test_split_slots_follow_the_reference() -> None:
    shape = Shape(heads=(4, 1), page=64)
    case = make_case([(1, 150), (1, 0), (1, 30)], shape)
    check(case, make_spec(shape, one_query_per_slot=True), SPLIT, has_sinks=True)


def test_mixed_steps_follow_the_reference() -> None:
    shape = Shape(page=32)
    check(make_case(MIXED, shape, num_padding=3), make_spec(shape, window=30))


@pytest.mark.parametrize(
    "change",
    [
        {**WIDE, "overlapped": 1},
        pytest.param(WIDE, marks=pytest.mark.kernels),
        pytest.param({**SMALL, "overlapped": 1}, marks=pytest.mark.kernels),
    ],
)
def test_prompts_in_wide_or_overlapped_blocks_follow_the_reference(change: dict[str, int]) -> None:
    """Of one block and of several, their last one ragged, and tiles without any."""
    shape = Shape(head_dim=128, page=32)
    case = make_case([(2, 3), (20, 300), (0, 0), (3, 0), (17, 128)], shape, num_padding=3)
    check(case, make_spec(shape), change, has_sinks=True)


@pytest.mark.parametrize("groups", [4, 8, pytest.param(16, marks=pytest.mark.kernels)])
def test_rows_without_keys_and_rows_of_nobody_are_zeros(groups: int) -> None:
    """Of more than one tile; the output is NaN where no kernel writes it."""
    shape, slots = Shape(heads=(2 * groups, 2), page=64), [(1, 0), (20, 0), (0, 0), (3, 67), (1, 5), (2, 0)]
    case, spec = make_case(slots, shape, num_padding=19), make_spec(shape)
    answer = case.run(spec, has_sinks=True)
    assert not answer[:21].any() and not answer[25:].any()
    np.testing.assert_allclose(answer, case.expected(spec, has_sinks=True), atol=1e-2, rtol=0)


@pytest.mark.parametrize("cache_dtype", [pytest.param("float8_e4m3fn", marks=pytest.mark.kernels), "int8"])
def test_steps_over_an_8_bit_cache_follow_the_reference(cache_dtype: str) -> None:
    """Of queries that are large, too, which show scales that were rounded."""
    shape = Shape(page=32, cache_dtype=cache_dtype)
    case = make_case([(1, 70), (3, 35), (8, 90)], shape)
    check(dataclasses.replace(case, q=16 * case.q), make_spec(shape))


LARGE_DECODE = [(1, keys) for keys in (1, 8, 0, 63, 64, 65, 130, 513)]
LARGE_MIXED = [(0, 9), (1, 1), (0, 0), (37, 37), (1, 129), (19, 283), (2, 64), (1, 16), (3, 65)]
SHAPES = {
    "one head each": Shape(heads=(2, 2), page=8),
    "all share one": Shape(heads=(24, 1), page=16),
    "seven heads each": Shape(heads=(14, 2), page=128),
    "head 80": Shape(heads=(4, 1), head_dim=80, page=32),
    "head 96": Shape(heads=(16, 2), head_dim=96, page=64),
    "head 128": Shape(heads=(16, 2), head_dim=128, page=64),
    "head 256": Shape(heads=(8, 1), head_dim=256, page=64),
    "sixteen heads each": Shape(heads=(32, 2), page=32),
    "sixty-four heads each": Shape(heads=(64, 1), page=64),
}
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "window": {"window": 100}, "cap": {"soft_cap": 2.0}}


@pytest.mark.kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_decode_of_every_shape_follows_the_reference(name: str, variant: str) -> None:
    spec = make_spec(SHAPES[name], one_query_per_slot=True, **VARIANTS[variant])
    check(make_case(LARGE_DECODE, SHAPES[name]), spec, has_sinks=variant == "window")
    check(make_case(LARGE_DECODE, SHAPES[name]), spec, SPLIT, has_sinks=variant == "window")


@pytest.mark.kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_mixed_steps_of_every_shape_follow_the_reference(name: str, variant: str) -> None:
    case = make_case(LARGE_MIXED, SHAPES[name], num_padding=5)
    check(case, make_spec(SHAPES[name], **VARIANTS[variant]), has_sinks=variant == "window")


@pytest.mark.kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_wide_and_overlapped_blocks_of_every_shape_follow_the_reference(name: str, variant: str) -> None:
    case = make_case(LARGE_MIXED, SHAPES[name], num_padding=5)
    check(case, make_spec(SHAPES[name], **VARIANTS[variant]), {**WIDE, "overlapped": 1}, has_sinks=variant == "window")


@pytest.mark.kernels
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_8_bit_caches_of_every_head_follow_the_reference(head_dim: int, cache_dtype: str) -> None:
    shape = Shape(heads=(8, 2), head_dim=head_dim, page=32, cache_dtype=cache_dtype)
    check(make_case(LARGE_DECODE, shape), make_spec(shape, one_query_per_slot=True), SPLIT)
    check(make_case(LARGE_MIXED, shape), make_spec(shape, window=100), has_sinks=True)
    check(make_case(LARGE_MIXED, shape), make_spec(shape, window=100), {**WIDE, "overlapped": 1}, has_sinks=True)


@pytest.mark.kernels
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "int8"])
def test_8_bit_operands_in_registers_follow_the_reference_with_a_window_a_cap_and_sinks(cache_dtype: str) -> None:
    """Two parts of a head, NaN past each slot's last key, slots without keys; split and not."""
    shape = Shape(heads=(9, 3), head_dim=256, page=64, cache_dtype=cache_dtype)
    spec = make_spec(shape, window=100, soft_cap=2.0, one_query_per_slot=True)
    case = make_case([(1, keys) for keys in (1, 0, 65, 130)], shape)
    check(case, spec, has_sinks=True)
    check(case, spec, {**SPLIT, "max_splits": 9}, has_sinks=True)


@pytest.mark.kernels
@pytest.mark.parametrize("change", [SMALL, SPLIT])
def test_slots_without_keys_are_zeros(change: dict[str, int]) -> None:
    """Whatever their memory held: nothing but the kernel writes them."""
    shape = Shape(head_dim=128, page=32, cache_dtype="float8_e4m3fn")
    case = make_case([(1, 0), (1, 70), (1, 0)], shape)
    answer = case.run(make_spec(shape, one_query_per_slot=True), change)
    assert not answer[[0, 2]].any() and np.isfinite(answer[1]).all()


@pytest.mark.kernels
def test_float16_queries_over_an_int8_cache_follow_the_reference() -> None:
    """Values are small, so that their scales, times weights, are below what float16 holds."""
    shape = Shape(head_dim=128, page=32, cache_dtype="int8")
    case = make_case([(1, 70), (1, 3), (6, 200)], shape)
    assert case.cache.scales is not None
    small = case.cache._replace(scales=case.cache.scales.at[:, :, 1].multiply(1e-3))
    case = dataclasses.replace(case, q=4 * case.q.astype(jnp.float16), cache=small)
    check(case, make_spec(shape))


@pytest.mark.kernels
def test_a_slot_is_bit_identical_whatever_its_neighbours_are() -> None:
    shape = Shape()
    case, spec = make_case(LARGE_DECODE, shape), make_spec(shape, one_query_per_slot=True)
    kept = np.array([3, 7])
    lens = np.zeros(len(LARGE_DECODE), np.int32)
    lens[kept] = np.asarray(case.batch.kv_lens)[kept]
    alone = dataclasses.replace(case, batch=case.batch._replace(kv_lens=jnp.asarray(lens)))
    np.testing.assert_array_equal(alone.run(spec, SPLIT)[kept], case.run(spec, SPLIT)[kept])
    assert not alone.run(spec, SPLIT)[lens == 0].any()


PROBLEM = PagedAttentionProblem(
    platform="gpu", device_kind=H200, spec=PagedAttentionSpec(scale=1.0), num_heads=64, num_kv_heads=8, head_dim=128,
    page_size=64, dtype="bfloat16", cache_dtype="bfloat16", has_sinks=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 112}, "head dimensions are 64, 80, 96, 128, 256, not 112"),
        ({"dtype": "float32", "cache_dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"cache_dtype": "float16"}, "must be bfloat16, float8_e4m3fn or int8, not float16"),
        ({"page_size": 48}, "8, 16, 32 or a multiple of 64 tokens, not 48"),
        ({"page_size": 16, "cache_dtype": "int8"}, "at least 32 tokens, not 16"),
        ({"num_heads": 128, "num_kv_heads": 1}, "at most 64 heads may share a KV head, not 128"),
    ],
)
def test_what_it_cannot_serve_is_named(change: dict[str, Any], reason: str) -> None:
    assert hopper.unsupported(PROBLEM) is None
    assert reason in str(hopper.unsupported(dataclasses.replace(PROBLEM, **change)))


@pytest.mark.parametrize(
    ("one_query_per_slot", "cache_dtype", "head_dim"),
    [
        (True, "bfloat16", 128),
        (False, "bfloat16", 128),
        (True, "float8_e4m3fn", 128),
        (True, "int8", 128),
        (False, "int8", 128),
        (False, "bfloat16", 256),
    ],
)
def test_a_hopper_chip_gets_these_kernels(one_query_per_slot: bool, cache_dtype: str, head_dim: int) -> None:
    """Lowered for it on a machine without one, with the sizes that are tuned for it; 64 heads share two KV heads."""
    kernels = KernelChoices("gpu", device_kind=H200)
    device = AbstractDevice(device_kind=H200, num_cores=132, platform="gpu")
    spec = PagedAttentionSpec(scale=0.1, one_query_per_slot=one_query_per_slot)

    def attend(q: jax.Array, cache: KvCache[jax.Array], batch: PagedBatch) -> jax.Array:
        return paged_attention(q, cache, jnp.int32(1), batch, spec=spec, kernels=kernels)

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = PagedBatch(of(jnp.int32, 8, 4), of(jnp.int32, 9), of(jnp.int32, 8))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        scales = of(jnp.float32, 2, 9, 2, 2, 64) if cache_dtype == "int8" else None
        cache = KvCache(of(jnp.dtype(cache_dtype), 2, 9, 2, 2, 64, head_dim), scales)
        traced = jax.jit(attend).trace(of(jnp.bfloat16, 8, 128, head_dim), cache, batch)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernels.made == (("paged_attention", "hopper"),)


def test_every_head_and_cache_has_tuned_sizes() -> None:
    for head_dim in hopper.HEAD_DIMS:
        for kind in ("16bit", "float8_e4m3fn", "int8"):
            for kernel in ("decode", "prefill"):
                assert tuned("paged_attention", H200, f"{kernel}_{kind}_{head_dim}")["stages"] >= 2


MOST, NUM_SLOTS, NUM_ROWS = 3, 6, 160


@pytest.mark.parametrize(("page", "window"), [(16, None), (64, 100), (128, 1)])
def test_items_cover_every_visible_key_of_a_slot_once(page: int, window: int | None) -> None:
    units, split = Units(page), Split(MOST, 2)
    find = jax.jit(functools.partial(item_of, place=Place(units, window), split=split))

    @settings(max_examples=60)
    @given(st.integers(0, 700))
    def hold(num_keys: int) -> None:
        first, end, num_items = (np.asarray(x) for x in find(jnp.int32(num_keys), np.arange(MOST + 1, dtype=np.int32)))
        assert 0 <= num_items <= MOST and (first[num_items:] >= end[num_items:]).all()
        assert bool(num_items) == bool(num_keys)
        if num_keys:
            first_key = 0 if window is None else max(num_keys - window, 0)
            assert first[0] == first_key // units.keys and end[num_items - 1] == -(-num_keys // units.keys)
            assert (first[1:num_items] == end[: num_items - 1]).all() and (first[:num_items] < end[:num_items]).all()
            assert ((end - first)[: num_items - 1] % units.per_block == 0).all()

    hold()


@pytest.mark.parametrize(("tile_queries", "window"), [(16, None), (5, 7)])
def test_tiles_cover_every_query_of_every_chunk_once(tile_queries: int, window: int | None) -> None:
    place = Place(Units(16), window)

    @jax.jit
    def make(batch: PagedBatch, query_lens: jax.Array) -> Any:
        return make_tiles(batch, query_lens, NUM_ROWS, tile_queries, place)

    @settings(max_examples=25)
    @given(st.lists(st.tuples(st.integers(0, 26), st.integers(0, 90)), min_size=NUM_SLOTS, max_size=NUM_SLOTS))
    def hold(slots: list[tuple[int, int]]) -> None:
        query_lens = np.array([queries if queries > 1 else 0 for queries, _ in slots], np.int32)
        kv_lens = np.array([queries + before for queries, before in slots], np.int32)
        cu = np.cumsum([0, *(queries for queries, _ in slots)], dtype=np.int32)
        batch = PagedBatch(np.zeros((NUM_SLOTS, 1), np.int32), cu, kv_lens)  # type: ignore[arg-type]
        tiles = jax.tree.map(np.asarray, make(batch, query_lens))
        rows = tiles.rows[: tiles.num_used[0]]
        num_padding = NUM_ROWS - cu[-1]
        assert tiles.num_used[0] == sum(-(-query_lens // tile_queries)) + -(-num_padding // tile_queries)
        padding = rows[rows[:, 1] >= cu[-1]]
        assert (padding[:, 4] == padding[:, 5]).all() and sum(padding[:, 2]) == num_padding
        rows = rows[rows[:, 1] < cu[-1]]
        for slot, queries in enumerate(query_lens):
            own = rows[rows[:, 0] == slot]
            assert len(own) == -(-queries // tile_queries)
            for i, (_, row, num_queries, position, first, end) in enumerate(own):
                assert row == cu[slot] + i * tile_queries
                assert num_queries == min(tile_queries, queries - i * tile_queries)
                assert position == kv_lens[slot] - queries + i * tile_queries
                assert end == (min(position + tile_queries, kv_lens[slot]) - 1) // 16 + 1
                assert first == (0 if window is None else max(position - window + 1, 0) // 16)

    hold()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_operands_and_transposed_operands_are_what_words_hold(dtype: str) -> None:
    """The twins of inline Mosaic: columns in the orders of the other side; transposed, every other column."""
    stored = jnp.asarray(np.random.default_rng(3).integers(-120, 120, (64, 128)), jnp.int8)
    stored = stored if dtype == "int8" else stored.astype(jnp.float32).astype(dtype)
    plain, values = hopper_operands.words_of(stored, True), np.float32(stored)
    transposed = hopper_operands.transposed_words_of(stored, True)
    pairs = hopper_operands.both_pairs(plain, stored.dtype, True)
    ordered = np.float32(hopper_operands.in_order_of_pairs(jnp.asarray(values)))
    np.testing.assert_array_equal(np.concatenate([np.float32(pair) for pair in pairs], axis=1), ordered)
    tiles = hopper_operands.both_pairs(transposed, stored.dtype, True)
    np.testing.assert_array_equal(np.float32(tiles[0]), values.T[::2])
    np.testing.assert_array_equal(np.float32(hopper_operands.joined(*tiles, True)), values.T)


def test_few_slots_are_split_and_many_are_not_until_they_are_long() -> None:
    sizes = tuned("paged_attention", H200, "split")
    few, many = choose_split(4, 8, 65536, sizes), choose_split(256, 8, 65536, sizes)
    assert few == Split(64, 8) and many.min_blocks * BLOCK_KEYS >= 4096
    assert few.most * 4 * 8 >= 3 * sizes["sms"]
    assert choose_split(2048, 8, 4096, sizes).most == 1
