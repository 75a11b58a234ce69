"""Matmuls on x86-64 CPUs, in C++: native/matmul*.{h,cc} and what they include, where the schedules are told.

A stack of layers goes to the call whole, with the layer's number: XLA would copy a slice of it on its way to a call.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .. import native
from ..dispatch import Platform
from . import xla
from .contract import LayerOf, MatmulProblem, QuantizedWeight, Weight, sliced

LEAST_GROUP = 16  # inputs; groups are multiples of it, so that no vector holds parts of two


def unsupported(problem: MatmulProblem) -> str | None:
    """Why these kernels cannot serve a problem, or would serve it worse than XLA."""
    if problem.platform != "cpu":
        return f"it is made for CPUs, not for {problem.platform}"
    if problem.is_partitioned:
        return "XLA splits this matmul over devices, and would gather its operands for a call"
    return _misfit(problem) or native.unavailable() or _slower(problem)


def matmul(
    x: jax.Array,
    weight: Weight | LayerOf,
    *,
    platform: Platform,
    out_dtype: DTypeLike,
    instruction_set: str | None = None,
) -> jax.Array:
    """See the contract; `instruction_set` is the best there is unless it is named."""
    return matmuls(x, [weight], platform=platform, out_dtype=out_dtype, instruction_set=instruction_set)[0]


def matmuls(
    x: jax.Array,
    weights: Sequence[Weight | LayerOf],
    *,
    platform: Platform,
    out_dtype: DTypeLike,
    instruction_set: str | None = None,
) -> list[jax.Array]:
    """As `matmul`, with weights of one format: x is prepared once, and threads come together once."""
    del platform
    rows = x.reshape(-1, x.shape[-1])
    name = instruction_set or native.library().instruction_sets[0]
    outputs = _products(rows, weights, np.dtype(out_dtype), name)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _misfit(problem: MatmulProblem) -> str | None:
    format = problem.format
    if format is None:
        dtype = problem.weight_dtype or problem.dtype
        return None if dtype == problem.dtype == "bfloat16" else f"plain weights of {dtype} are left to XLA"
    if format.storage not in ("int8", "uint4") or format.activations not in ("own", "int8"):
        return f"{format.name} is made for other chips"
    if format.block_rows > 1 or format.global_scale or format.scale not in ("float32", "bfloat16", "float16"):
        return f"{format.name} has scales that these kernels do not read"
    group = format.group or problem.in_dim
    is_by_row = format.storage == format.activations and format.group is None and not format.offsets
    if group % LEAST_GROUP and not is_by_row:
        return f"groups of {group} inputs are no multiple of {LEAST_GROUP}"
    return None


def _slower(problem: MatmulProblem) -> str | None:
    if problem.format is None and "avx512_bf16" not in native.library().instruction_sets:
        return "this CPU has no bfloat16 products, and XLA multiplies in float32 as well"
    return None


def _products(
    x: jax.Array, weights: Sequence[Weight | LayerOf], out_dtype: np.dtype, instruction_set: str
) -> list[jax.Array]:
    """The call, with the gradients of xla in x and in plain weights."""
    plain = [weight if isinstance(weight, jax.Array) else None for weight in weights]

    def whole(plain: list[jax.Array | None]) -> list[Weight | LayerOf]:
        return [weight if one is None else one for weight, one in zip(weights, plain, strict=True)]

    @jax.custom_vjp
    def products(x: jax.Array, plain: list[jax.Array | None]) -> list[jax.Array]:
        return _call(x, whole(plain), out_dtype, instruction_set)

    def forward(x: jax.Array, plain: list[jax.Array | None]) -> tuple[list[jax.Array], Any]:
        return products(x, plain), (x, plain)

    def backward(saved: Any, push: list[jax.Array]) -> Any:
        def by_xla(x: jax.Array, plain: list[jax.Array | None]) -> list[jax.Array]:
            return [xla.matmul(x, sliced(weight), platform="cpu", out_dtype=out_dtype) for weight in whole(plain)]

        return jax.vjp(by_xla, *saved)[1](push)

    products.defvjp(forward, backward)
    outputs: list[jax.Array] = products(x, plain)
    return outputs


def _call(
    x: jax.Array, weights: Sequence[Weight | LayerOf], out_dtype: np.dtype, instruction_set: str
) -> list[jax.Array]:
    """Arguments in the order of native/matmul.cc: every array of a weight a stack, one without elements if absent, and
    the layer."""
    none = jnp.zeros(0, jnp.float32)
    rounds_x = False
    arrays: list[jax.Array] = []
    outs: list[jax.ShapeDtypeStruct] = []
    for weight in weights:
        if isinstance(weight, LayerOf):
            stack, layer = weight.stack, weight.layer
        else:
            stack, layer = jax.tree.map(lambda array: array[None], weight), jnp.int32(0)
        if isinstance(stack, QuantizedWeight):
            parts = (stack.scales, stack.zeros, stack.offsets)
            arrays += [stack.values, *(none if part is None else part for part in parts), layer]
            rounds_x = stack.format.activations == "int8"
        else:
            arrays += [stack, none, none, none, layer]
        outs.append(jax.ShapeDtypeStruct((x.shape[0], stack.shape[1]), out_dtype))
    call = jax.ffi.ffi_call("millrace_matmul", outs, vmap_method="sequential")
    return list(call(x, *arrays, instruction_set=instruction_set, rounds_x=rounds_x))
