"""Blackwell's paged attention in GPU interpret mode with race detection, and lowered for the chip."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.paged_attention import (
    KvCache,
    PagedAttentionProblem,
    PagedAttentionSpec,
    PagedBatch,
    blackwell,
    paged_attention,
    reference,
)
from millrace.pallas_kernels.paged_attention.hopper import HEAD_DIMS

GB300 = "NVIDIA GB300"
NUM_KV_HEADS, PAGE_SIZE, NUM_PAGES = 2, 64, 12
# Queries and keys of each slot.
DECODE = ((1, 1), (70, 0))
SMALL = ((1, 3), (65, 5))
MIXED = ((1, 0, 70, 2), (64, 9, 131, 2))


def step(
    lens: tuple[tuple[int, ...], tuple[int, ...]], cache_dtype: str, head_dim: int, groups: int
) -> tuple[Any, ...]:
    """Queries, a cache with NaN (or what is nearest) wherever no key lies, and the batch."""
    query_lens, kv_lens = lens
    random = np.random.default_rng(sum(kv_lens) + head_dim)
    num_heads = NUM_KV_HEADS * groups
    q = jnp.asarray(random.standard_normal((sum(query_lens), num_heads, head_dim)), jnp.bfloat16)
    shape = (2, NUM_PAGES, 2, NUM_KV_HEADS, PAGE_SIZE, head_dim)
    pages = random.permutation(NUM_PAGES).reshape(len(kv_lens), -1)
    is_key = np.zeros((NUM_PAGES, PAGE_SIZE), bool)
    for slot, length in enumerate(kv_lens):
        is_key[pages[slot]] |= (np.arange(pages[slot].size * PAGE_SIZE) < length).reshape(-1, PAGE_SIZE)
    kept = is_key[None, :, None, None, :, None]
    if cache_dtype == "int8":
        values = jnp.asarray(random.integers(-127, 128, shape), jnp.int8)
        scales = jnp.where(kept[..., 0], jnp.asarray(random.uniform(0.001, 0.02, shape[:-1]), jnp.float32), jnp.nan)
    else:
        values = jnp.where(kept, jnp.asarray(random.standard_normal(shape)), jnp.nan).astype(cache_dtype)
        scales = None
    cu = jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32)
    return q, KvCache(values, scales), PagedBatch(jnp.asarray(pages, jnp.int32), cu, jnp.asarray(kv_lens, jnp.int32))


def check(
    lens: tuple[tuple[int, ...], tuple[int, ...]], spec: PagedAttentionSpec, *, cache_dtype: str = "bfloat16",
    head_dim: int = 64, groups: int = 4, has_sinks: bool = False, change: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """The kernels against the definition, on two persistent CTAs."""
    q, cache, batch = step(lens, cache_dtype, head_dim, groups)
    sinks = jnp.linspace(-1.0, 1.0, q.shape[1]) if has_sinks else None
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        output = blackwell.paged_attention(
            q,
            cache,
            jnp.int32(1),
            batch,
            spec=spec,
            sinks=sinks,
            device_kind=GB300,
            change={"sms": 2, **(change or {})},
        )
        output = np.float32(output)
    expected = np.float32(reference.paged_attention(q, cache, jnp.int32(1), batch, spec=spec, sinks=sinks))
    np.testing.assert_allclose(output, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.kernels
def test_decode_rows_follow_the_definition() -> None:
    check(DECODE, PagedAttentionSpec(scale=0.125, one_query_per_slot=True))


def test_chunks_and_decode_rows_share_a_step() -> None:
    check(SMALL, PagedAttentionSpec(scale=0.125, window=60), has_sinks=True)


@pytest.mark.kernels
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("head_dim", [size for size in HEAD_DIMS if size % 32 == 0])
@pytest.mark.parametrize("lens", [DECODE, MIXED])
def test_every_head_dimension_and_cache_dtype_follows_the_definition(
    lens: tuple[tuple[int, ...], tuple[int, ...]], head_dim: int, cache_dtype: str
) -> None:
    spec = PagedAttentionSpec(scale=head_dim**-0.5, soft_cap=20.0, one_query_per_slot=lens is DECODE)
    check(lens, spec, cache_dtype=cache_dtype, head_dim=head_dim, has_sinks=True)


@pytest.mark.kernels
@pytest.mark.parametrize("groups", [1, 20])
def test_split_slots_are_joined(groups: int) -> None:
    spec = PagedAttentionSpec(scale=0.125, one_query_per_slot=True)
    check(((1, 1), (300, 70)), spec, groups=groups, change={"min_blocks": 1})


def test_a_mixed_step_lowers_for_the_chip() -> None:
    q, cache, batch = step(MIXED, "bfloat16", 128, 8)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, cache, jnp.zeros((), jnp.int32), batch)
    )
    kernels, spec = KernelChoices("gpu", device_kind=GB300), PagedAttentionSpec(scale=0.1)
    device = AbstractDevice(device_kind=GB300, num_cores=152, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda *a: paged_attention(*a, spec=spec, kernels=kernels)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "paged_decode_blackwell" in text
    assert "paged_prefill_blackwell" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 80}, "lines of 32 bytes, which 80 does not"),
        ({"page_size": 48}, "pages must have"),
        ({"num_heads": 66}, "at most 32 heads may share a KV head before registers spill, not 33"),
    ],
)
def test_what_it_cannot_serve_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem: dict[str, Any] = {
        "platform": "gpu", "device_kind": GB300, "spec": PagedAttentionSpec(scale=1.0), "num_heads": 8,
        "num_kv_heads": 2, "head_dim": 128, "page_size": 64, "dtype": "bfloat16", "cache_dtype": "bfloat16",
        "has_sinks": False,
    }  # fmt: skip
    assert blackwell.unsupported(PagedAttentionProblem(**problem)) is None
    assert reason in (blackwell.unsupported(PagedAttentionProblem(**problem | change)) or "")
