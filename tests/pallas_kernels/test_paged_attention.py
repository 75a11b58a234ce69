"""The contract of paged attention, held by every implementation of its table."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels import native
from millrace.pallas_kernels.dispatch import KernelChoices, anywhere
from millrace.pallas_kernels.paged_attention import (
    TABLE,
    KvCache,
    PagedAttentionSpec,
    PagedBatch,
    cpu,
    paged_attention,
    write_kv,
)

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 3, 6, 2, 16, 8
LAYER = 1
SPEC = PagedAttentionSpec(scale=0.3)
DECODE = dataclasses.replace(SPEC, one_query_per_slot=True)
PORTABLE = [entry for entry in TABLE if entry.unsupported is anywhere]  # those for a GPU have files of their own
# Every instruction set that this machine has, by name; none where the library cannot be built.
NATIVE = [f"cpu {name}" for name in cpu.instruction_sets()] if native.unavailable() is None else []

# (queries, keys) of each slot: a slot with keys and no query, an empty one, single queries, a whole prompt of several
# tiles, a chunk late in a long context, lengths on both sides of a page's and of a block's edge.
MIXED = [(0, 9), (1, 1), (0, 0), (37, 37), (1, 129), (19, 283), (2, 8), (1, 16)]
ONE_EACH = [(1, keys) for keys in (1, 8, 0, 9, 127, 128, 129, 283)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Ragged slots over a cache that is NaN wherever no slot has a key, in float64 as well for the expectation."""

    slots: list[tuple[int, int]]
    q: np.ndarray  # [T, N, H]
    keys: list[np.ndarray]  # [S, K, H] of each slot
    values: list[np.ndarray]
    cache: np.ndarray
    batch: PagedBatch

    def run(self, implementation: str, spec: PagedAttentionSpec, **change: Any) -> np.ndarray:
        """The implementation's answer; `change` replaces q, cache, batch, sinks, `dtype` or `cache_dtype`."""
        dtype = change.get("dtype", "float32")
        q = jnp.asarray(change.get("q", self.q), dtype)
        cache = stored(change.get("cache", self.cache), change.get("cache_dtype", dtype))
        out = attend(q, cache, change.get("batch", self.batch), change.get("sinks"), implementation, spec)
        assert out.dtype == dtype
        return np.asarray(out, np.float64)

    def expected(self, spec: PagedAttentionSpec, sinks: np.ndarray | None = None) -> np.ndarray:
        """Row by row from the definition of softmax attention."""
        out, row = np.zeros_like(self.q), 0
        for (num_queries, num_keys), keys, values in zip(self.slots, self.keys, self.values, strict=True):
            if num_keys:
                for query in range(num_queries):
                    end = num_keys - num_queries + query + 1
                    seen = slice(max(0, end - (spec.window or end)), end)
                    out[row + query] = attend_one(self.q[row + query], keys[seen], values[seen], spec, sinks)
            row += num_queries
        return out

    def held(self, cache_dtype: str) -> "Case":
        """The same slots with the keys and values that a cache of this dtype holds of them."""
        values, scales = stored(self.cache, cache_dtype)
        if cache_dtype == "uint8":
            values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
        held = np.asarray(values, np.float64) * (1 if scales is None else np.asarray(scales, np.float64)[..., None])
        page = held.shape[4]
        parts: list[list[np.ndarray]] = [[], []]
        for table, num_keys in zip(self.batch.page_tables, self.batch.kv_lens, strict=True):
            for which in (0, 1):
                pages = held[LAYER, table[: -(-num_keys // page)], which]  # [pages, K, Z, H]
                parts[which].append(np.moveaxis(pages, 2, 1).reshape(-1, pages.shape[1], HEAD_DIM)[:num_keys])
        return dataclasses.replace(self, keys=parts[0], values=parts[1])


def stored(cache: np.ndarray, dtype: str) -> KvCache[jax.Array]:
    """A cache of this dtype; what is NaN stays NaN, by its scale where a number cannot be."""
    if dtype == "int8":
        scales = np.abs(cache).max(axis=-1) / 127
        values = np.round(np.nan_to_num(cache / scales[..., None]))
        return KvCache(jnp.asarray(values, jnp.int8), jnp.asarray(scales, jnp.float32))
    if dtype == "uint8":
        return KvCache(jax.lax.bitcast_convert_type(jnp.asarray(cache, jnp.float8_e4m3fn), jnp.uint8), None)
    return KvCache(jnp.asarray(cache, dtype), None)


def attend_one(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, spec: PagedAttentionSpec, sinks: np.ndarray | None
) -> np.ndarray:
    """q [N, H] over keys and values [S, K, H]."""
    keys, values = (np.repeat(x, q.shape[0] // x.shape[1], axis=1) for x in (keys, values))
    scores = spec.scale * np.einsum("nh,snh->ns", q, keys)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    weights = np.exp(scores)
    total = weights.sum(axis=1) + (0 if sinks is None else np.exp(sinks))
    return np.einsum("ns,snh->nh", weights, values) / total[:, None]


@jax.jit(static_argnames=("implementation", "spec"))
def attend(
    q: jax.Array, cache: KvCache[jax.Array], batch: PagedBatch, sinks: jax.Array | None, implementation: str,
    spec: PagedAttentionSpec,
) -> jax.Array:  # fmt: skip
    if implementation in NATIVE:
        instruction_set = implementation.removeprefix("cpu ")
        return cpu.paged_attention(
            q, cache, jnp.int32(LAYER), batch, spec=spec, sinks=sinks, instruction_set=instruction_set
        )
    kernels = KernelChoices("cpu", {"paged_attention": implementation})
    return paged_attention(q, cache, jnp.int32(LAYER), batch, spec=spec, kernels=kernels, sinks=sinks)


def make_case(
    slots: list[tuple[int, int]],
    num_padding: int = 0,
    heads: tuple[int, int] = (HEADS, KV_HEADS),
    page: int = PAGE_SIZE,
) -> Case:
    rng = np.random.default_rng(7)
    num_pages = sum(-(-keys // page) for _, keys in slots) + 3
    pages_per_slot = max(-(-keys // page) for _, keys in slots) + 2
    free = list(rng.permutation(num_pages))
    cache = np.full((LAYERS, num_pages, 2, heads[1], page, HEAD_DIM), np.nan)
    tables = rng.integers(-2, 2 * num_pages, (len(slots), pages_per_slot))  # past a slot's keys: anything at all
    all_keys, all_values = [], []
    for slot, (_, num_keys) in enumerate(slots):
        # Numbers that bfloat16 holds exactly, so that both dtypes have one expectation.
        keys, values = (rounded(rng.standard_normal((num_keys, heads[1], HEAD_DIM))) for _ in range(2))
        for position in range(num_keys):
            if position % page == 0:
                tables[slot, position // page] = free.pop()
            place = cache[LAYER, tables[slot, position // page], :, :, position % page]
            place[0], place[1] = keys[position], values[position]
        all_keys.append(keys)
        all_values.append(values)
    ends = np.cumsum([0, *(queries for queries, _ in slots)])
    q = rounded(rng.standard_normal((ends[-1] + num_padding, heads[0], HEAD_DIM)))
    batch = PagedBatch(*(np.asarray(x, np.int32) for x in (tables, ends, [keys for _, keys in slots])))
    return Case(slots, q, all_keys, all_values, cache, batch)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


@pytest.fixture(params=[*(entry.name for entry in PORTABLE), *NATIVE])
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def mixed() -> Case:
    return make_case(MIXED, num_padding=11)


@pytest.fixture(scope="module")
def decode() -> Case:
    return make_case(ONE_EACH)


VARIANTS = {
    "plain": (SPEC, None),
    "window": (dataclasses.replace(SPEC, window=21), None),
    "all": (dataclasses.replace(SPEC, window=140, soft_cap=1.5), np.linspace(-2, 3, HEADS)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_steps_follow_the_definition(implementation: str, mixed: Case, variant: str) -> None:
    spec, sinks = VARIANTS[variant]
    np.testing.assert_allclose(mixed.run(implementation, spec, sinks=sinks), mixed.expected(spec, sinks), atol=3e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_steps_follow_the_definition(implementation: str, decode: Case, variant: str) -> None:
    spec, sinks = VARIANTS[variant]
    answer = decode.run(implementation, dataclasses.replace(spec, one_query_per_slot=True), sinks=sinks)
    np.testing.assert_allclose(answer, decode.expected(spec, sinks), atol=3e-6)


def test_bfloat16_steps_follow_the_definition(implementation: str, mixed: Case, decode: Case) -> None:
    np.testing.assert_allclose(mixed.run(implementation, SPEC, dtype="bfloat16"), mixed.expected(SPEC), atol=2e-2)
    np.testing.assert_allclose(decode.run(implementation, DECODE, dtype="bfloat16"), decode.expected(SPEC), atol=2e-2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["one head each", "all share one"])
def test_any_ratio_of_heads_and_small_pages_follow_the_definition(implementation: str, heads: tuple[int, int]) -> None:
    case = make_case([(1, 7), (5, 12)], heads=heads, page=4)
    np.testing.assert_allclose(case.run(implementation, SPEC), case.expected(SPEC), atol=3e-6)


def test_float32_queries_read_a_bfloat16_cache_exactly(implementation: str, decode: Case) -> None:
    answer = decode.run(implementation, DECODE, cache_dtype="bfloat16")
    np.testing.assert_allclose(answer, decode.expected(SPEC), atol=3e-6)


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn", "uint8"])
def test_mixed_steps_follow_what_a_quantized_cache_holds(implementation: str, mixed: Case, cache_dtype: str) -> None:
    spec, sinks = VARIANTS["all"]
    answer = mixed.run(implementation, spec, sinks=sinks, cache_dtype=cache_dtype)
    np.testing.assert_allclose(answer, mixed.held(cache_dtype).expected(spec, sinks), atol=3e-6)
    assert np.isfinite(answer).all(), "a NaN beyond a slot's keys came through"


def test_decode_steps_follow_what_an_int8_cache_holds(implementation: str, decode: Case) -> None:
    answer = decode.run(implementation, DECODE, cache_dtype="int8")
    np.testing.assert_allclose(answer, decode.held("int8").expected(SPEC), atol=3e-6)


@pytest.mark.parametrize(("cache_dtype", "bound"), [("int8", 1e-2), ("float8_e4m3fn", 6e-2), ("uint8", 6e-2)])
def test_a_quantized_cache_loses_no_more_than_the_contract_says(
    implementation: str, mixed: Case, cache_dtype: str, bound: float
) -> None:
    spec, sinks = VARIANTS["all"]
    exact = mixed.expected(spec, sinks)
    answer = mixed.run(implementation, spec, sinks=sinks, cache_dtype=cache_dtype)
    assert np.linalg.norm(answer - exact) < bound * np.linalg.norm(exact)
    assert np.abs(answer - exact).max() < bound * np.abs(exact).max()


def test_bfloat16_queries_read_an_int8_cache(implementation: str, decode: Case) -> None:
    answer = decode.run(implementation, DECODE, dtype="bfloat16", cache_dtype="int8")
    np.testing.assert_allclose(answer, decode.held("int8").expected(SPEC), atol=2e-2)


def test_a_single_query_is_the_same_in_a_mixed_step(implementation: str, decode: Case) -> None:
    np.testing.assert_allclose(decode.run(implementation, SPEC), decode.run(implementation, DECODE), atol=3e-6)


def test_rows_without_a_slot_or_without_keys_are_zeros(implementation: str, mixed: Case, decode: Case) -> None:
    num_used = mixed.batch.cu_query_lens[-1]
    assert num_used < len(mixed.q)
    assert not mixed.run(implementation, SPEC)[num_used:].any()
    assert not decode.run(implementation, DECODE)[2].any()
    sinks = np.ones(HEADS)
    empty = decode.batch._replace(kv_lens=np.zeros_like(decode.batch.kv_lens))
    assert not decode.run(implementation, DECODE, batch=empty, sinks=sinks).any()
    empty = mixed.batch._replace(kv_lens=np.zeros_like(mixed.batch.kv_lens))
    assert not mixed.run(implementation, SPEC, batch=empty).any()


def test_pages_before_the_window_are_not_read(implementation: str, mixed: Case, decode: Case) -> None:
    window = 21
    spec = dataclasses.replace(SPEC, window=window)
    for case, asked in ((mixed, spec), (decode, dataclasses.replace(spec, one_query_per_slot=True))):
        tables = case.batch.page_tables.copy()
        for slot, (num_queries, num_keys) in enumerate(case.slots):
            tables[slot, : max(0, num_keys - num_queries + 1 - window) // PAGE_SIZE] = len(case.cache[0]) + 5
        cache = case.cache.copy()
        unused = np.setdiff1d(np.arange(cache.shape[1]), tables[tables >= 0])
        cache[:, unused] = np.nan
        answer = case.run(implementation, asked, batch=case.batch._replace(page_tables=tables), cache=cache)
        np.testing.assert_allclose(answer, case.expected(spec), atol=3e-6)


def test_a_slot_is_bit_identical_whatever_its_neighbours_are(implementation: str, mixed: Case, decode: Case) -> None:
    full, kept = decode.run(implementation, DECODE), [0, 4]
    kv_lens = np.zeros_like(decode.batch.kv_lens)
    kv_lens[kept] = decode.batch.kv_lens[kept]
    alone = decode.run(implementation, DECODE, batch=decode.batch._replace(kv_lens=kv_lens))
    np.testing.assert_array_equal(alone[kept], full[kept])

    full, chunk = mixed.run(implementation, SPEC), 5
    start, end = mixed.batch.cu_query_lens[chunk : chunk + 2]
    ends = np.where(np.arange(len(MIXED) + 1) > chunk, end - start, 0).astype(np.int32)
    q = np.zeros_like(mixed.q)
    q[: end - start] = mixed.q[start:end]
    alone = mixed.run(implementation, SPEC, q=q, batch=mixed.batch._replace(cu_query_lens=ends))
    np.testing.assert_array_equal(alone[: end - start], full[start:end])


def test_every_implementation_lowers_for_a_gpu() -> None:
    case = make_case([(1, 3), (4, 9)])
    for entry in PORTABLE:
        kernels = KernelChoices("gpu", {"paged_attention": entry.name})

        run = jax.jit(functools.partial(paged_attention, spec=SPEC, kernels=kernels))
        run.trace(case.q, stored(case.cache, "int8"), jnp.int32(0), case.batch).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("q_shape", "spec", "message"),
    [
        ((8, HEADS, HEAD_DIM + 8), SPEC, r"expected q \[T, N, H\] and cache"),
        ((8, HEADS + 1, HEAD_DIM), SPEC, f"{HEADS + 1} heads cannot share {KV_HEADS} KV heads"),
        ((9, HEADS, HEAD_DIM), DECODE, "as many rows as slots, got 9 and 8"),
    ],
)
def test_shapes_that_disagree_raise(
    decode: Case, q_shape: tuple[int, ...], spec: PagedAttentionSpec, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        decode.run("reference", spec, q=np.zeros(q_shape))


@pytest.mark.skipif(not NATIVE, reason="needs the native kernels")
def test_a_native_call_that_the_contract_does_not_know_raises(decode: Case) -> None:
    cache = stored(decode.cache, "float32")
    wrong = {
        "numbers of the types": decode.q.astype(np.int8),
        r"expected q \[T, N, H\]": decode.q.astype(np.float32)[..., None],
    }
    for message, q in wrong.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            cpu.paged_attention(jnp.asarray(q), cache, jnp.int32(LAYER), decode.batch, spec=DECODE, sinks=None)


def test_slots_that_disagree_raise(decode: Case) -> None:
    with pytest.raises(KernelError, match="of 7 slots, as many as kv_lens has"):
        decode.run("reference", SPEC, batch=decode.batch._replace(kv_lens=decode.batch.kv_lens[:7]))


@pytest.mark.parametrize("values", ["scales missing", "scales of bfloat16", "unknown"])
def test_a_cache_without_its_scales_raises(decode: Case, values: str) -> None:
    cache = stored(decode.cache, "int8")
    wrong, message = {
        "scales missing": (KvCache(cache.values, None), r"int8 and shape .* has scales of shape .*, got None"),
        "scales of bfloat16": (KvCache(cache.values.astype("bfloat16"), cache.scales), "scales of shape None, got"),
        "unknown": (KvCache(cache.values.astype("int16"), None), "expected a cache of float32, .*int8, got int16"),
    }[values]
    with pytest.raises(KernelError, match=message):
        attend(decode.q, wrong, decode.batch, None, "reference", DECODE)


@pytest.mark.parametrize(
    ("dtype", "one_query_per_slot"),
    [("float32", True), ("float32", False), ("int8", True), ("int8", False), ("uint8", True)],
)
@pytest.mark.parametrize("implementation", ["xla", *NATIVE[:1]])
def test_layers_share_one_cache_without_a_copy(implementation: str, dtype: str, one_query_per_slot: bool) -> None:
    """A donated cache that a scan over layers writes and attention reads in place; reference gathers as it likes."""
    num_slots, num_pages = 4, 8192
    shape = (LAYERS, num_pages, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    spec = dataclasses.replace(SPEC, one_query_per_slot=one_query_per_slot)
    batch = PagedBatch(jnp.zeros((num_slots, 40), jnp.int32), jnp.arange(num_slots + 1), jnp.ones(num_slots, jnp.int32))
    kernels = KernelChoices("cpu", {"paged_attention": implementation.partition(" ")[0]})

    type Carry = tuple[jax.Array, KvCache[jax.Array]]

    def step(q: jax.Array, cache: KvCache[jax.Array], places: jax.Array) -> Carry:
        def run_layer(carry: Carry, layer: jax.Array) -> tuple[Carry, None]:
            q, cache = carry
            cache = write_kv(cache, layer, q[:, :KV_HEADS], q[:, -KV_HEADS:], places, places)
            return (paged_attention(q, cache, layer, batch, spec=spec, kernels=kernels), cache), None

        return jax.lax.scan(run_layer, (q, cache), jnp.arange(LAYERS, dtype=jnp.int32))[0]

    arguments = (
        jax.ShapeDtypeStruct((num_slots, HEADS, HEAD_DIM), jnp.float32),
        abstract_cache(shape, dtype),
        jax.ShapeDtypeStruct((num_slots,), jnp.int32),
    )
    memory = jax.jit(step, donate_argnums=1).lower(*arguments).compile().memory_analysis()
    layer_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arguments[1])) // LAYERS
    assert memory.alias_size_in_bytes >= LAYERS * layer_bytes
    assert memory.temp_size_in_bytes < layer_bytes / 4


def abstract_cache(shape: tuple[int, ...], dtype: str) -> KvCache[jax.ShapeDtypeStruct]:
    scales = jax.ShapeDtypeStruct(shape[:-1], jnp.float32) if dtype == "int8" else None
    return KvCache(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), scales)


@pytest.mark.parametrize("implementation", ["xla", *NATIVE[:1]])
def test_reading_does_not_copy_a_cache_that_is_kept(implementation: str) -> None:
    case = make_case([(1, 40), (1, 12)])
    cache = jax.ShapeDtypeStruct((64, 64, *case.cache.shape[2:]), jnp.float32)
    q = jax.ShapeDtypeStruct(case.q.shape, jnp.float32)
    memory = attend.lower(q, KvCache(cache, None), case.batch, None, implementation, DECODE).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * int(np.prod(cache.shape[1:])) / 2
