"""mxfp8, nvfp4 and mxfp4 weights on Blackwell's block-scaled tensor cores, through `jax.nn.scaled_matmul` (cuDNN).

Both operands of these instructions are block scaled, but activations are to stay their own: so they go as a sum of
terms, each the rest of the one before, quantized as the weight is. Two terms of mxfp8 or three of nvfp4 hold what
bfloat16 holds, to a thousandth of a row. The terms are more rows of the same product: free while reading the weight
bounds it, and after that no slower than bfloat16, whose arithmetic is two (fp8) and four to six (fp4) times as slow.

XLA rearranges the scales as cuDNN wants them on every call: a twelfth (mxfp8) to a quarter (nvfp4) more bytes. mxfp4 is
no format of cuDNN's: its numbers become those of mxfp8, which holds them all, on every call as well: 2.5 bytes a weight
are read and written, where dequantizing moves 4.5.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..dispatch import Platform
from ..tuning import generation
from .contract import FORMATS, MAX_VALUE, MatmulProblem, QuantizedWeight, WeightFormat

# (storage, inputs that share a scale, its dtype): the format that cuDNN multiplies, and the terms that make up for
# bfloat16.
_PRODUCTS: Mapping[tuple[str, int | None, str], tuple[str, int]] = {
    ("float8_e4m3fn", 32, "float8_e8m0fnu"): ("mxfp8", 2),
    ("float4_e2m1", 32, "float8_e8m0fnu"): ("mxfp8", 2),
    ("float4_e2m1", 16, "float8_e4m3fn"): ("nvfp4", 3),
}
_NUMBERS = {"float8_e4m3fn": "float8_e4m3fn", "float4_e2m1": "float4_e2m1fn"}
_TINY = 2.0**-100  # a scale that is no zero, nor any of those that XLA flushes, for blocks of zeros
_LEAST_SCALE = 2.0**-9  # of float8_e4m3fn, beside which a block of zeros stays one
TILE = 128  # rows, outputs and inputs that cuDNN's layout of scales is made of; XLA would copy a weight to pad it


def unsupported(problem: MatmulProblem) -> str | None:
    """Why this file cannot serve a problem, or would serve it worse than XLA."""
    format = problem.format
    if problem.platform != "gpu" or generation(problem.device_kind) != "blackwell":
        return f"block-scaled products are Blackwell's, not of {problem.device_kind or problem.platform}"
    product = product_of(format) if format else None
    if format is None or product is None:
        return f"weights must be mxfp8, nvfp4 or mxfp4, not {format.name if format else 'plain'}"
    if problem.dtype != "bfloat16":
        return f"activations must be bfloat16, not {problem.dtype}"
    if problem.in_dim % TILE or problem.out_dim % TILE:
        return f"in and out must be multiples of {TILE}, not {problem.in_dim} and {problem.out_dim}"
    # The terms' products are float32, written and read; a dequantized weight is bfloat16, written and read, and one of
    # another format half of that.
    most = problem.in_dim // ((4 if product.format.storage != format.storage else 2) * product.num_terms)
    if problem.num_rows > most:
        return f"more than {most} rows move more bytes than a dequantized weight does, got {problem.num_rows}"
    return None


class BlockScaledProduct(NamedTuple):
    """How weights are multiplied; `num_terms` block-scaled terms, in their format, are what activations are the sum of.

    The chip multiplies that many times what a plain product would.
    """

    format: WeightFormat
    num_terms: int


def product_of(format: WeightFormat) -> BlockScaledProduct | None:
    """The product of weights of a format; None for those that cuDNN does not multiply."""
    found = _PRODUCTS.get((format.storage, format.group, format.scale))
    if format.activations != "own" or found is None:
        return None
    return BlockScaledProduct(FORMATS[found[0]], found[1])


def matmul(
    x: Float[Array, "*rows in"], weight: QuantizedWeight, *, platform: Platform, out_dtype: DTypeLike
) -> Float[Array, "*rows out"]:
    """See the contract."""
    del platform
    format, rows = weight.format, x.reshape(-1, x.shape[-1])
    found = product_of(format)
    assert found is not None  # unsupported() said so
    num_terms = found.num_terms
    numbers, scales, row_scales = split(rows, found.format, num_terms)
    num_rows = row_scales.shape[1]
    padding = -num_terms * num_rows % TILE
    product = jax.nn.scaled_matmul(
        _flat(numbers, padding)[None],
        _as_numbers(weight.values, format).astype(numbers.dtype)[None],
        _flat(scales, padding)[None],
        weight.scales[None],
        preferred_element_type=jnp.float32,
    )[0, : num_terms * num_rows].reshape(num_terms, num_rows, -1)
    output = jnp.sum(product * row_scales[..., None], axis=0)
    if weight.global_scale is not None:
        output = output * weight.global_scale
    return output.astype(out_dtype).reshape(*x.shape[:-1], -1)


def split(
    rows: Float[Array, "M in"], format: WeightFormat, num_terms: int
) -> tuple[Float[Array, "terms M stored_in"], Float[Array, "terms M groups"], Float[Array, "terms M"]]:
    """Terms whose sum is the rows: numbers and scales as the weight has them, and a scale of each whole row.

    A row has a scale of its own where the format has a global one, so that no row depends on its neighbours.
    """
    rest, terms = rows.astype(jnp.float32), []
    for _ in range(num_terms):
        numbers, scales, row_scales = _quantize(rest, format)
        terms.append((numbers, scales, row_scales))
        wide = numbers.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32), format.group or 1, axis=1)
        # Without the barrier XLA writes out every term's arithmetic again in each later one.
        rest = jax.lax.optimization_barrier(rest - wide * row_scales[:, None])
    numbers, scales, row_scales = (jnp.stack(parts) for parts in zip(*terms, strict=True))
    return numbers, scales, row_scales


def _quantize(rows: jax.Array, format: WeightFormat) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows in float32 as numbers [M, in], scales [M, groups] and row scales [M]."""
    dtype = jnp.dtype(_NUMBERS[format.storage])
    largest, group = MAX_VALUE[format.storage], format.group or 1
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // group, group)
    wanted = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1) / largest, _TINY)
    row_scales = jnp.ones(rows.shape[0])
    if format.global_scale:
        row_scales = jnp.max(wanted, axis=-1) / MAX_VALUE["float8_e4m3fn"]
        scales = jnp.maximum(wanted / row_scales[:, None], _LEAST_SCALE).astype(format.scale)
    else:
        fraction, exponent = jnp.frexp(wanted)
        scales = jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5)).astype(format.scale)
    scaled = blocks / (scales.astype(jnp.float32) * row_scales[:, None])[..., None]
    return jnp.clip(scaled, -largest, largest).astype(dtype).reshape(rows.shape), scales, row_scales


def _flat(terms: jax.Array, padding: int) -> jax.Array:
    """[terms, M, n] as rows, and so many zeros below."""
    flat = terms.reshape(-1, terms.shape[-1])
    zeros = jnp.zeros((padding, flat.shape[1]), flat.dtype)
    return jnp.concatenate([flat, zeros]) if padding else flat


def _as_numbers(values: jax.Array, format: WeightFormat) -> jax.Array:
    """Packed bytes [M, in // 2] as 4-bit floats [M, in], which costs nothing: the low nibble comes first in both."""
    if not format.is_packed:
        return values
    return jax.lax.bitcast_convert_type(values, jnp.float4_e2m1fn).reshape(values.shape[0], -1)
