"""A gated MLP's down projection on Hopper: activation(gate) * up becomes rows of float8 before it is ever in memory.

Schedule. A row is a thread block's, its columns lie in registers, an equal run of them in each warpgroup: gate and up
are read once, all of their loads in flight at once; the products, rounded to the operands' dtype as they would be in
memory, wait in registers for the row's maximum, for which warpgroups meet once; values are written once. XLA's two
fusions read gate and up twice: 1536 rows of 28672 columns took them 180 us of an H200, where reading and writing once
takes 52.

No wgmma runs here, so no operand can be overwritten under one.
"""

import functools
from typing import Any, cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float8e4m3fn

from ..dispatch import KernelChoices
from ..gated_activation.contract import Activation
from ..gated_activation.reference import ACTIVATIONS
from ..mosaic import store
from ..quantized_matmul import hopper as matmul_hopper
from ..quantized_matmul.contract import MAX_VALUE, LayerOf, QuantizedWeight, sliced
from ..tuning import tuned
from .contract import GatedMatmulProblem

_DTYPE = "float8_e4m3fn"
_VECTOR = 8  # neighbours in a register, 16 bytes of a load
_UNIT = 128 * _VECTOR  # columns of a load of a warpgroup
_MOST_WARPGROUPS = 8  # of a block
_ONE_EACH = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


def unsupported(problem: GatedMatmulProblem) -> str | None:
    """Why this file cannot serve a problem."""
    format = problem.format
    if format is None or matmul_hopper.unsupported_format(format) or format.activations != _DTYPE:
        return f"the weight must be float8 beside activations in float8, not {format.name if format else 'plain'}"
    if problem.activation == "gelu":
        return "Mosaic has no error function"
    if problem.dtype != "bfloat16":
        return f"gates must be bfloat16, not {problem.dtype}"
    if problem.out_dim % 64:
        return f"out must be a multiple of 64, not {problem.out_dim}"
    if num_warpgroups(problem.in_dim, problem.device_kind) is None:
        return f"rows of {problem.in_dim} columns do not divide into warpgroups of whole loads of {_UNIT}"
    return None


def gated_matmul(
    gate: jax.Array, up: jax.Array, weight: QuantizedWeight | LayerOf, *, activation: Activation,
    kernels: KernelChoices, out_dtype: DTypeLike, device_kind: str,
) -> jax.Array:  # fmt: skip
    """See the contract."""
    del kernels
    rows = [each.reshape(-1, each.shape[-1]) for each in (gate, up)]
    warpgroups = num_warpgroups(gate.shape[-1], device_kind)
    assert warpgroups is not None, "unsupported() says which widths fit"
    values, scales = gated_rows(*rows, activation=activation, warpgroups=warpgroups)
    whole: Any = sliced(weight)
    product = matmul_hopper.matmul_of_rows(values, scales, whole, out_dtype=out_dtype, device_kind=device_kind)
    return product.reshape(*gate.shape[:-1], product.shape[-1])


def num_warpgroups(width: int, device_kind: str) -> int | None:
    """Those that share a row; None where rows of so many columns do not fit this kernel."""
    most, units = tuned("gated_matmul", device_kind, "rows")["units"], width // _UNIT
    fits = (n for n in range(1, _MOST_WARPGROUPS + 1) if units % n == 0 and units // n <= most)
    return None if width % _UNIT else next(fits, None)


def gated_rows(
    gate: Float[Array, "T F"],
    up: Float[Array, "T F"],
    *,
    activation: Activation,
    warpgroups: int,
    interpret: Any = None,
) -> tuple[Float8e4m3fn[Array, "T F"], Float[Array, "T 1"]]:
    """Rows of activation(gate) * up and their scales, as `formats.quantize_rows` makes them of the product."""
    num_rows, width = gate.shape
    run = plgpu.kernel(
        functools.partial(_body, activation=activation, is_interpreted=bool(interpret)),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, width), jnp.dtype(_DTYPE)),
            jax.ShapeDtypeStruct((num_rows, 128), jnp.float32),
        ),
        scratch_types={
            "peaks": plgpu.SMEM((warpgroups, 128), jnp.float32),
            "met": plgpu.Barrier(num_arrivals=warpgroups),
        },
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name="gated_rows_hopper",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpret else {}),
    )
    values, scales = run(gate, up)
    return values, scales[:, :1]


def _body(
    *refs: Any,  # gate and up, values and scales
    peaks: Any,  # [warpgroups, threads]: of a thread's warp
    met: Any,
    activation: Activation,
    is_interpreted: bool,
) -> None:
    """One row: each warpgroup has a run of its columns."""
    gate, up, values, scales = refs
    row, wg = lax.axis_index("row"), lax.axis_index("wg")
    warpgroups = peaks.shape[0]
    columns = gate.shape[1] // warpgroups
    mine, layout = pl.ds(wg * columns, columns), plgpu.Layout.WG_STRIDED((columns,), vec_size=_VECTOR)

    def load(ref: Any) -> jax.Array:
        loaded: jax.Array = plgpu.load(ref.at[row, mine], layout=layout, optimized=False)
        return loaded.astype(jnp.float32)

    product = ACTIVATIONS[activation](load(gate)) * load(up)
    product = product.astype(gate.dtype).astype(jnp.float32)
    store(peaks.at[wg], _greatest_of_warps(jnp.abs(product), layout, is_interpreted))
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)
    everywhere = [peaks[i, 32 * warp] for i in range(warpgroups) for warp in range(4)]
    scale = functools.reduce(jnp.maximum, everywhere) * jnp.float32(1 / MAX_VALUE[_DTYPE])
    scaled = product / jnp.where(scale == 0, 1.0, scale)
    store(values.at[row, mine], _to_float8(scaled, layout, is_interpreted))

    @pl.when(wg == 0)
    def _() -> None:
        store(scales.at[row], plgpu.layout_cast(jnp.full((128,), scale, jnp.float32), _ONE_EACH))


def _greatest_of_warps(x: jax.Array, layout: Any, is_interpreted: bool) -> jax.Array:
    """The greatest number that a thread's warp has, for each of 128 threads.

    Pallas' own reduction over warps goes through scratch memory that a block has once: of several warpgroups at the
    same time, some found each other's maxima on an H200.
    """
    if is_interpreted:
        return jnp.full((128,), jnp.max(x), jnp.float32)
    result = plgpu.ShapeDtypeStruct((128,), jnp.dtype(jnp.float32), layout=_ONE_EACH)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)  # type: ignore[untyped-decorator]
    def reduce(context: Any, array: Any) -> Any:
        vectors = functools.reduce(arith.maximumf, array.registers.flat)
        numbers = [vector.extract(vectors, dynamic_position=[], static_position=[i]) for i in range(_VECTOR)]
        greatest = functools.reduce(arith.maximumf, numbers)
        for distance in (16, 8, 4, 2, 1):
            greatest = arith.maximumf(greatest, mosaic.utils.shfl_bfly(greatest, distance))
        registers = np.empty(_ONE_EACH.to_mgpu().registers_shape((128,)), object)
        registers.flat[0] = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), greatest)
        return mosaic.FragmentedArray(_registers=registers, _layout=_ONE_EACH.to_mgpu(), _is_signed=None)

    return cast(jax.Array, reduce(x))


def _to_float8(x: jax.Array, layout: Any, is_interpreted: bool) -> jax.Array:
    """Rounded to the nearest, ties to even; Mosaic has no such conversion."""
    if is_interpreted:
        return x.astype(_DTYPE)
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(_DTYPE), layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)  # type: ignore[untyped-decorator]
    def convert(context: Any, array: Any) -> Any:
        kind = ir.VectorType.get((_VECTOR,), ir.Float8E4M3FNType.get())
        registers = np.empty_like(array.registers)
        for at, register in np.ndenumerate(array.registers):
            registers[at] = mosaic.utils.bitcast(_float8_pairs(register), kind)
        return mosaic.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return cast(jax.Array, convert(x))


def _float8_pairs(register: Any) -> Any:
    """A vector of float32 as a vector of half as many int16, two float8 each."""
    half = ir.IntegerType.get_signless(16)
    pairs = llvm.mlir_undef(ir.VectorType.get((_VECTOR // 2,), half))
    for i in range(_VECTOR // 2):
        low, high = (vector.extract(register, dynamic_position=[], static_position=[2 * i + which]) for which in (0, 1))
        pair = llvm.inline_asm(half, [high, low], "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f")
        pairs = vector.insert(pair, pairs, dynamic_position=[], static_position=[i])
    return pairs
