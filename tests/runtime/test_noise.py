import jax
import jax.numpy as jnp
import numpy as np

from millrace.runtime.noise import gumbel, random_bits


def words(*seeds):
    return tuple(np.asarray([seed >> shift & 0xFFFFFFFF for seed in seeds], np.uint32) for shift in (32, 0))


def ints(*values):
    return np.asarray(values, np.int32)


def test_bits_are_those_of_jax_random_for_the_folded_key():
    seed = 0x0123456789ABCDEF
    bits = random_bits(words(seed, 7), ints(3, 0), ints(1000, 1), 50)
    for row, (high, low, n_index, position) in enumerate([(seed >> 32, seed & 0xFFFFFFFF, 3, 1000), (0, 7, 0, 1)]):
        key = jax.random.wrap_key_data(np.asarray([high, low], np.uint32), impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, n_index), position)
        np.testing.assert_array_equal(bits[row], jax.random.bits(key, (50,)))


def test_bits_do_not_follow_the_global_threefry_flag():
    with jax.threefry_partitionable(False):
        unpartitioned = random_bits(words(5), ints(0), ints(9), 8)
    np.testing.assert_array_equal(unpartitioned, random_bits(words(5), ints(0), ints(9), 8))


def test_a_longer_vocabulary_begins_with_the_same_bits():
    short, long = (random_bits(words(5), ints(0), ints(9), length) for length in (24, 40))
    np.testing.assert_array_equal(short, long[:, :24])


def test_gumbel_noise_is_finite_and_rises_with_less_bits_to_spare():
    noise = gumbel(jnp.asarray([0, 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32))
    assert np.isfinite(noise).all()
    assert (np.diff(noise) <= 0).all() and noise[0] > 20


def test_gumbel_noise_has_its_mean_and_variance():
    noise = np.asarray(gumbel(random_bits(words(1), ints(0), ints(0), 100_000)), np.float64)
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.04
