"""Rotary position embeddings: the frequencies of every scaling kind, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import RopeSpec


def frequencies(spec: RopeSpec, max_context_len: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [rotary_dim / 2] in float32, and the factor of cos and sin.

    Kinds whose frequencies depend on the length of the sequence (dynamic, longrope) take `max_context_len` for
    it, so that all keys of a runtime's cache are rotated alike.

    Sources: RoPE, arXiv:2104.09864; yarn, arXiv:2309.00071; longrope, arXiv:2402.13753; llama3, the Llama 3.1
    reference implementation; linear and dynamic, as Hugging Face transformers defines them.
    """
    dim = spec.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    inverse = 1.0 / spec.theta**exponents
    factor = 1.0 if spec.attention_factor is None else spec.attention_factor
    match spec.kind:
        case "default":
            pass
        case "linear":
            inverse = inverse / spec.factor
        case "dynamic":
            if max_context_len > spec.original_max_len:
                stretch = spec.factor * max_context_len / spec.original_max_len - (spec.factor - 1)
                inverse = 1.0 / (spec.theta * stretch ** (dim / (dim - 2))) ** exponents
        case "llama3":
            inverse = _llama3(inverse, spec)
        case "yarn":
            inverse, factor = _yarn(inverse, spec)
        case "longrope":
            inverse, factor = _longrope(inverse, spec, max_context_len)
    return inverse.astype(np.float32), factor


def _llama3(inverse: np.ndarray, spec: RopeSpec) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / inverse
    low, high = spec.low_freq_factor, spec.high_freq_factor
    smooth = (spec.original_max_len / wavelengths - low) / (high - low)
    blended = (1 - smooth) * inverse / spec.factor + smooth * inverse
    scaled = np.where(wavelengths > spec.original_max_len / low, inverse / spec.factor, inverse)
    between = (wavelengths <= spec.original_max_len / low) & (wavelengths >= spec.original_max_len / high)
    return np.where(between, blended, scaled)


def _yarn(inverse: np.ndarray, spec: RopeSpec) -> tuple[np.ndarray, float]:
    """Dimensions that turn often are kept, those that turn seldom interpolated, with a linear ramp between."""

    def magnitude(mscale: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * mscale * math.log(spec.factor) + 1.0

    def dimension_of(rotations: float) -> float:
        log = math.log(spec.original_max_len / (rotations * 2 * math.pi))
        return spec.rotary_dim * log / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(spec.rotary_dim // 2) - low) / (high - low), 0, 1)
    factor = spec.attention_factor
    if factor is None and spec.mscale and spec.mscale_all_dim:
        factor = magnitude(spec.mscale) / magnitude(spec.mscale_all_dim)
    return inverse / spec.factor * ramp + inverse * (1 - ramp), magnitude(1.0) if factor is None else factor


def _longrope(inverse: np.ndarray, spec: RopeSpec, max_context_len: int) -> tuple[np.ndarray, float]:
    """Each dimension has its own factor, one table for short and one for long contexts."""
    table = spec.long_factor if max_context_len > spec.original_max_len else spec.short_factor
    factor = spec.attention_factor
    if factor is None:
        grown = spec.factor <= 1.0
        factor = 1.0 if grown else math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_max_len))
    return inverse / np.asarray(table, np.float64), factor


type RopeTable = tuple[Float[Array, "R T half"], Float[Array, "R T half"]]


def table(spec: RopeSpec, positions: Int[Array, "R T"], max_context_len: int) -> RopeTable:
    """cos and sin of every position's angles, in float32."""
    inverse, factor = frequencies(spec, max_context_len)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Float[Array, "R T N H"], cos_sin: RopeTable) -> Float[Array, "R T N H"]:
    """The first 2*half dimensions of each head turned by the position's angles; the rest passes through.

    Dimension i is paired with i + half, as Hugging Face stores the weights.
    """
    cos, sin = (t[:, :, None, :] for t in cos_sin)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
