"""Claims about the write that fills the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.pallas_kernels.paged_attention import KvCache, write_kv

SHAPE = (2, 5, 2, 3, 4, 6)  # [L, P, 2, K, Z, H]


def empty(dtype: str) -> KvCache[jax.Array]:
    return KvCache(jnp.zeros(SHAPE, dtype), jnp.zeros(SHAPE[:-1]) if dtype == "int8" else None)


def written(cache: KvCache[jax.Array], row: jax.Array) -> tuple[np.ndarray, KvCache[jax.Array]]:
    """What layer 1 holds of `row` [K, H] as a key, and all of the cache."""
    one, zero = jnp.array([2]), jnp.array([3])
    cache = write_kv(cache, jnp.int32(1), row[None], jnp.zeros_like(row)[None], one, zero)
    return np.asarray(cache.values[1, 2, 0, :, 3]), cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_lands_at_its_place_of_its_layer_alone(dtype: str) -> None:
    rng = np.random.default_rng(0)
    cache, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (SHAPE, (3, 3, 6), (3, 3, 6)))
    pages, offsets = np.array([4, 0, 4], np.int32), np.array([3, 1, 0], np.int32)
    expected = np.array(cache, np.float32)
    for row in range(3):
        expected[1, pages[row], 0, :, offsets[row]] = k[row]
        expected[1, pages[row], 1, :, offsets[row]] = v[row]
    after = write_kv(KvCache(cache, None), jnp.int32(1), k, v, pages, offsets)
    assert after.values.dtype == cache.dtype and after.scales is None
    np.testing.assert_array_equal(np.asarray(after.values, np.float32), expected)


@pytest.mark.parametrize("page", [5, 6, -1])
def test_a_row_whose_page_does_not_exist_is_dropped(page: int) -> None:
    ones = jnp.full((2, 3, 6), 127.0)
    after = write_kv(empty("int8"), jnp.int32(0), ones, ones, jnp.array([page, 2]), jnp.array([0, 3]))
    assert after.values.sum() == 127 * 2 * 3 * 6 and after.scales is not None and after.scales.sum() == 2 * 3
    assert (after.values[0, 2, :, :, 3] == 127).all() and (after.scales[0, 2, :, :, 3] == 1).all()


def test_keys_are_rounded_to_the_caches_dtype() -> None:
    third = jnp.full((1, 3, 6), 1 / 3, jnp.float32)
    assert (written(empty("bfloat16"), third[0])[0] == jnp.bfloat16(1 / 3)).all()


def test_an_int8_cache_scales_each_head_of_a_token_by_its_largest_number() -> None:
    row = np.random.default_rng(0).standard_normal((3, 6)) * [[1e-3], [1], [1e3]]
    values, cache = written(empty("int8"), jnp.asarray(row, jnp.float32))
    assert cache.scales is not None
    scales = np.asarray(cache.scales)[1, 2, 0, :, 3]
    np.testing.assert_allclose(scales, np.abs(row).max(axis=1) / 127, rtol=1e-6)
    assert np.abs(values).max(axis=1).tolist() == [127, 127, 127]
    assert (np.abs(values * scales[:, None] - row) <= scales[:, None] * 0.5001).all()


def test_a_head_of_zeros_is_zeros_in_int8() -> None:
    values, cache = written(empty("int8"), jnp.zeros((3, 6)))
    assert cache.scales is not None and not cache.scales.any() and not values.any()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8"])
def test_float8_saturates_where_a_number_is_too_large(dtype: str) -> None:
    row = np.array([1e6, -1e30, 448, 1.0625, 2e-3, 460], np.float32)
    values, _ = written(empty(dtype), jnp.tile(row, (3, 1)))
    numbers = values.view(jnp.float8_e4m3fn).astype(np.float32)  # type: ignore[no-untyped-call]
    assert numbers[0].tolist() == [448, -448, 448, 1, 2**-9, 448]
