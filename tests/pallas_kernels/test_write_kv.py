"""Claims about the write that fills the cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from millrace.pallas_kernels.paged_attention import write_kv

SHAPE = (2, 5, 2, 3, 4, 6)  # [L, P, 2, K, Z, H]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_lands_at_its_place_of_its_layer_alone(dtype: str) -> None:
    rng = np.random.default_rng(0)
    cache, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (SHAPE, (3, 3, 6), (3, 3, 6)))
    pages, offsets = np.array([4, 0, 4], np.int32), np.array([3, 1, 0], np.int32)
    expected = np.array(cache, np.float32)
    for row in range(3):
        expected[1, pages[row], 0, :, offsets[row]] = k[row]
        expected[1, pages[row], 1, :, offsets[row]] = v[row]
    written = write_kv(cache, jnp.int32(1), k, v, pages, offsets)
    assert written.dtype == cache.dtype
    np.testing.assert_array_equal(np.asarray(written, np.float32), expected)


@pytest.mark.parametrize("page", [5, 6, -1])
def test_a_row_whose_page_does_not_exist_is_dropped(page: int) -> None:
    ones = jnp.ones((2, 3, 6))
    written = write_kv(jnp.zeros(SHAPE), jnp.int32(0), ones, ones, jnp.array([page, 2]), jnp.array([0, 3]))
    assert written.sum() == 2 * 3 * 6
    assert (written[0, 2, :, :, 3] == 1).all()


def test_keys_are_rounded_to_the_caches_dtype() -> None:
    third = jnp.full((1, 3, 6), 1 / 3, jnp.float32)
    written = write_kv(jnp.zeros(SHAPE, jnp.bfloat16), jnp.int32(0), third, third, jnp.array([0]), jnp.array([0]))
    assert written[0, 0, 0, 0, 0, 0] == jnp.bfloat16(1 / 3)
