"""A token's randomness: it depends on (seed, n_index, position, vocabulary index) and on nothing else."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

# jax.random on a CPU keeps threefry's rounds in a loop that writes its arrays five times, and follows a global flag
# (jax_threefry_partitionable). Written out, the 20 rounds fuse with what uses them (4 times as fast for 32 x 32k) and
# nothing can repin them. Bit for bit it is jax.random.bits(fold_in(fold_in(key, n_index), position), (V,)).
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)

Words = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]


def threefry2x32(key: Words, count: Words) -> Words:
    """Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    schedule = (*key, key[0] ^ key[1] ^ PARITY)
    a, b = count[0] + key[0], count[1] + key[1]
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(turn)) | (b >> np.uint32(32 - turn)))
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def fold_in(key: Words, data: Int[Array, "..."]) -> Words:
    """A key of its own for each number, as jax.random.fold_in makes it."""
    number = data.astype(jnp.uint32)
    return threefry2x32(key, (jnp.zeros_like(number), number))


def random_bits(
    seed: Words, n_index: Int[Array, " B"], positions: Int[Array, " B"], vocab_len: int
) -> UInt32[Array, "B V"]:
    """32 random bits for every vocabulary index of every row; a longer vocabulary begins with the same bits."""
    high, low = fold_in(fold_in(seed, n_index), positions)
    index = lax.broadcasted_iota(jnp.uint32, (*high.shape, vocab_len), high.ndim)
    first, second = threefry2x32((high[..., None], low[..., None]), (jnp.zeros_like(index), index))
    return first ^ second


def gumbel(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Standard Gumbel noise, finite for all bits.

    log1p keeps all 32 bits where the noise is large, which is where the winner comes from: a uniform of 24 bits would
    never let a token of probability below 1e-7 win.
    """
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return -jnp.log(-jnp.log1p(-uniform))
