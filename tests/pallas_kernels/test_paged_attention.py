"""What every implementation of paged attention owes its contract, against a definition in numpy.

Pages that nobody owns, and places past a slot's keys, hold NaN: nothing may be read there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from millrace import KernelError
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.paged_attention import TABLE, PagedAttentionSpec, PagedBatch, paged_attention, write_kv

NUM_LAYERS, LAYER = 2, 1


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries and keys of each slot, and the shapes around them."""

    slots: tuple[tuple[int, int], ...]  # (query_len, kv_len)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    num_padding: int = 3

    def arrays(self, dtype: Any) -> tuple[np.ndarray, np.ndarray, PagedBatch]:
        random = np.random.default_rng(0)
        num_rows = sum(q for q, _ in self.slots) + self.num_padding
        q = random.normal(size=(num_rows, self.num_heads, self.head_dim)).astype(dtype)
        pages_per_slot = max(-(-kv // self.page_size) for _, kv in self.slots) + 2
        num_pages = sum(-(-kv // self.page_size) for _, kv in self.slots) + 3
        shape = (NUM_LAYERS, num_pages, 2, self.num_kv_heads, self.page_size, self.head_dim)
        cache = np.full(shape, np.nan, dtype)
        free = random.permutation(num_pages).tolist()
        tables = np.full((len(self.slots), pages_per_slot), num_pages + 7, np.int32)
        for slot, (_, kv_len) in enumerate(self.slots):
            for place in range(kv_len):
                if place % self.page_size == 0:
                    tables[slot, place // self.page_size] = free.pop()
                page = tables[slot, place // self.page_size]
                kv = random.normal(size=(2, self.num_kv_heads, self.head_dim))
                cache[LAYER, page, :, :, place % self.page_size] = kv.astype(dtype)
        cu = np.cumsum([0, *(q for q, _ in self.slots)]).astype(np.int32)
        kv_lens = np.array([kv for _, kv in self.slots], np.int32)
        return q, cache, PagedBatch(tables, cu, kv_lens)  # type: ignore[arg-type]


def defined(
    q: np.ndarray, cache: np.ndarray, batch: PagedBatch, spec: PagedAttentionSpec, sinks: np.ndarray | None
) -> np.ndarray:
    """The contract, one query and head at a time, in float64."""
    output = np.zeros(q.shape)
    group, page_size = q.shape[1] // cache.shape[3], cache.shape[4]
    for slot, kv_len in enumerate(np.asarray(batch.kv_lens)):
        first, end = batch.cu_query_lens[slot], batch.cu_query_lens[slot + 1]
        for row in range(first, end if kv_len else first):
            position = kv_len - (end - first) + (row - first)
            low = 0 if spec.window is None else max(0, position - spec.window + 1)
            places = [(batch.page_tables[slot, p // page_size], p % page_size) for p in range(low, position + 1)]
            for head in range(q.shape[1]):
                kv = np.array([cache[LAYER, page, :, head // group, z] for page, z in places], np.float64)
                scores = spec.scale * kv[:, 0] @ q[row, head].astype(np.float64)
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                extra = [] if sinks is None else [float(sinks[head])]
                weights = np.exp(np.array([*scores, *extra]) - max([*scores, *extra]))
                weights /= weights.sum()
                output[row, head] = weights[: len(places)] @ kv[:, 1]
    return output


# Chunks longer than any tile, lengths at and beside page boundaries, single queries, empty slots, a long one.
MIXED = Case(((1, 1), (1, 9), (0, 0), (37, 37), (5, 12), (4, 4), (1, 130), (70, 200), (0, 0)))
DECODE = Case(((1, 1), (1, 4), (0, 0), (1, 5), (1, 131), (1, 8)), num_padding=0)
SPECS = {
    "plain": PagedAttentionSpec(scale=0.25),
    "window": PagedAttentionSpec(scale=0.25, window=6),
    "wide window": PagedAttentionSpec(scale=0.25, window=90),
    "soft cap": PagedAttentionSpec(scale=1.5, soft_cap=2.0),
}


@pytest.fixture(params=[entry.name for entry in TABLE])
def kernels(request: pytest.FixtureRequest) -> KernelChoices:
    return KernelChoices("cpu", {"paged_attention": request.param})


def check(case: Case, spec: PagedAttentionSpec, kernels: KernelChoices, dtype: Any, with_sinks: bool = False) -> None:
    q, cache, batch = case.arrays(dtype)
    sinks = np.linspace(-1, 2, case.num_heads).astype(dtype) if with_sinks else None
    if spec.one_query_per_slot:  # one row for each slot, those of empty slots included
        rows = np.random.default_rng(1).normal(size=(len(case.slots), *q.shape[1:])).astype(dtype)
        q, batch = rows, batch._replace(cu_query_lens=np.arange(len(case.slots) + 1, dtype=np.int32))  # type: ignore[arg-type]
    run = jax.jit(functools.partial(paged_attention, spec=spec, kernels=kernels))
    found = np.asarray(run(q, cache, jnp.int32(LAYER), batch, sinks=sinks), np.float64)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == ml_dtypes.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    np.testing.assert_allclose(found, defined(q, cache, batch, spec, sinks), **tolerance)


@pytest.mark.parametrize("name", SPECS)
def test_a_mixed_step_equals_the_definition(kernels: KernelChoices, name: str) -> None:
    check(MIXED, SPECS[name], kernels, np.float32)


@pytest.mark.parametrize("name", SPECS)
def test_a_decode_step_equals_the_definition(kernels: KernelChoices, name: str) -> None:
    check(DECODE, dataclasses.replace(SPECS[name], one_query_per_slot=True), kernels, np.float32)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)], ids=["MHA", "MQA", "GQA of 3"])
def test_any_ratio_of_heads_is_served_with_sinks_and_in_bfloat16(kernels: KernelChoices, heads: tuple[int, int]) -> None:
    case = dataclasses.replace(MIXED, num_heads=heads[0], num_kv_heads=heads[1], page_size=8)
    check(case, SPECS["window"], kernels, ml_dtypes.bfloat16, with_sinks=True)


def test_a_step_without_any_query_gives_zeros(kernels: KernelChoices) -> None:
    check(Case(((0, 0), (0, 0)), num_padding=8), SPECS["plain"], kernels, np.float32)


def test_wrong_shapes_are_refused(kernels: KernelChoices) -> None:
    q, cache, batch = MIXED.arrays(np.float32)
    for wrong in (q[:, :3], q[..., :5], q[0]):
        with pytest.raises(KernelError):
            paged_attention(wrong, cache, jnp.int32(0), batch, spec=SPECS["plain"], kernels=kernels)


def test_written_keys_and_values_lie_at_their_page_and_offset_and_rows_without_a_page_nowhere() -> None:
    _, cache, _ = MIXED.arrays(np.float32)
    num_pages = cache.shape[1]
    k, v = np.random.default_rng(2).normal(size=(2, 3, 2, 16)).astype(np.float32)
    pages, offsets = np.array([4, num_pages, 0], np.int32), np.array([3, 0, 1], np.int32)
    found = np.asarray(write_kv(jnp.array(cache), jnp.int32(LAYER), k, v, pages, offsets))
    expected = cache.copy()
    for row in (0, 2):
        expected[LAYER, pages[row], 0, :, offsets[row]] = k[row]
        expected[LAYER, pages[row], 1, :, offsets[row]] = v[row]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [entry.name for entry in TABLE if entry.name != "reference"])
def test_neither_a_write_nor_an_attention_copies_the_cache(name: str) -> None:
    kernels = KernelChoices("cpu", {"paged_attention": name})
    cache = jax.ShapeDtypeStruct((4, 256, 2, 2, 16, 64), jnp.float32)
    rows = jax.ShapeDtypeStruct((4, 2, 64), jnp.float32)
    batch = PagedBatch(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 8), (5,), (4,))))
    spec = PagedAttentionSpec(scale=1.0, one_query_per_slot=True)

    def step(cache: jax.Array, q: jax.Array, batch: PagedBatch) -> tuple[jax.Array, jax.Array]:
        def layer(cache: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            cache = write_kv(cache, index, q, q, batch.kv_lens, batch.kv_lens)
            return cache, paged_attention(q, cache, index, batch, spec=spec, kernels=kernels)

        return jax.lax.scan(layer, cache, jnp.arange(4))

    memory = jax.jit(step, donate_argnums=0).lower(cache, rows, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < np.prod(cache.shape) * 4 / 8
