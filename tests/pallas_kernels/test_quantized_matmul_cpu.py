"""The C++ matmuls on every instruction set that this machine has, against the reference: ragged sizes, any format."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels import native
from millrace.pallas_kernels.dispatch import KernelChoices, choose
from millrace.pallas_kernels.quantized_matmul import (
    FORMATS,
    TABLE,
    LayerOf,
    MatmulProblem,
    QuantizedWeight,
    WeightFormat,
    cpu,
    matmul,
    matmuls,
    reference,
)
from millrace.pallas_kernels.quantized_matmul.formats import quantize

SETS = () if native.unavailable() else native.library().instruction_sets
needs_library = pytest.mark.skipif(not SETS, reason=native.unavailable() or "")
CPU = KernelChoices("cpu", {"quantized_matmul": "cpu"})

INT4, INT4_A8 = FORMATS["int4"], FORMATS["int4_a8"]
FORMATS_HERE: dict[str, WeightFormat | None] = {
    "plain": None,
    "int8": FORMATS["int8"],
    "int8_a16": FORMATS["int8_a16"],
    **{f"int4:{group}": dataclasses.replace(INT4, group=group) for group in (32, 64, 128)},
    **{f"int4_a8:{group}": dataclasses.replace(INT4_A8, group=group) for group in (32, 64, 128)},
    "int4 zeros": dataclasses.replace(INT4, group=32, zeros=True, scale="float16"),
    "int4_a8 zeros": dataclasses.replace(INT4_A8, zeros=True, scale="float32"),
    "int4 of whole rows": dataclasses.replace(INT4, group=None),
    # As GGUF's Q8_0, Q6_K, Q4_K and Q5_K are held.
    "int8 groups": WeightFormat(name="int8_g32", storage="int8", group=32, scale="float16"),
    "int8 small groups": WeightFormat(name="int8_g16", storage="int8", group=16, activations="int8"),
    "int4 offsets": WeightFormat(name="uint4_g32_offsets", storage="uint4", group=32, offsets=True),
    "int8 offsets": WeightFormat(name="int8_g32_offsets", storage="int8", group=32, offsets=True, scale="bfloat16"),
    "int8 rounded offsets": WeightFormat(name="int8_offsets", storage="int8", offsets=True, activations="int8"),
}
SHAPES = ((33, 48), (36, 128), (70, 200), (64, 192), (130, 640))  # [out, in], those that a format fits
ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 40, 64, 65, 130)
# Largest error of a product, beside the root of the sum of its terms' squares: many roundings to bfloat16 cancel out.
# Activations of 16 bits often lie half way between two codes, and XLA's division may put one on the other side.
BOUNDS = {"float32": 2e-3, "bfloat16": 2.0**-6, "float16": 2.0**-6}


def draw(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def weight_of(format: WeightFormat | None, *shape: int) -> jax.Array | QuantizedWeight:
    """A random weight [*lead, out, in]; one with offsets is made of random bits, for nothing is rounded to it."""
    plain = np.random.default_rng(7).standard_normal(shape).astype(np.float32)  # and not the numbers of activations
    if format is None:
        return jnp.asarray(plain, jnp.bfloat16)
    if not format.offsets:
        made: QuantizedWeight = jax.tree.map(jnp.asarray, quantize(plain, format))
        return made
    random = np.random.default_rng(7)
    *lead, out_dim, in_dim = shape
    bits = random.integers(0, 256, (*lead, *format.values_shape(out_dim, in_dim)), np.uint8)
    by_group = (*lead, *format.scales_shape(out_dim, in_dim))
    scales, offsets = (jnp.asarray(random.normal(size=by_group) / 8, format.scales_dtype) for _ in range(2))
    values = jnp.asarray(bits.view(format.values_dtype))
    return QuantizedWeight(values=values, scales=scales, offsets=offsets, format=format)


def one_of(stack: Any, index: int) -> Any:
    """A weight of a stack."""
    return jax.tree.map(lambda array: array[index], stack)


def problem_of(format: WeightFormat | None, out_dim: int, in_dim: int, dtype: str = "bfloat16") -> MatmulProblem:
    return MatmulProblem(platform="cpu", format=format, num_rows=4, in_dim=in_dim, out_dim=out_dim, dtype=dtype)


def shapes_of(format: WeightFormat | None) -> list[tuple[int, int]]:
    """Those of SHAPES that a format fits, and that the kernels serve."""
    fits = [shape for shape in SHAPES if format is None or not format.misfit(*shape)]
    return [shape for shape in fits if cpu._misfit(problem_of(format, *shape)) is None]


def run(x: jax.Array, weight: Any, instruction_set: str, out_dtype: str = "float32") -> jax.Array:
    return cpu.matmul(x, weight, platform="cpu", out_dtype=out_dtype, instruction_set=instruction_set)


def expected(x: jax.Array, weight: jax.Array | QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The products by the reference's numbers, in float64, and the root of the sum of their terms' squares."""
    wide = reference.rounded(x, weight) if isinstance(weight, QuantizedWeight) else x
    a, b = np.asarray(wide, np.float64), np.asarray(reference.dequantize(weight), np.float64)
    return a @ b.T, np.sqrt((a**2) @ (b**2).T)


def first_rows(x: jax.Array, rows: tuple[int, ...]) -> list[jax.Array]:
    """So many of them each time; not cut in the program, where XLA would compile a copy of each."""
    return [jnp.asarray(np.asarray(x)[:num_rows]) for num_rows in rows]


def assert_close(found: jax.Array, exact: np.ndarray, root: np.ndarray, bound: float, words: str) -> None:
    error = np.max(np.abs(np.asarray(found, np.float64) - exact) / root)
    assert error <= bound, f"{words}: {error:.2g} where {bound:.2g} was allowed"


def check_format(instruction_set: str, format: WeightFormat | None, dtype: str, rows: tuple[int, ...]) -> None:
    """All shapes and row counts in one compilation."""
    shapes = shapes_of(format)
    assert shapes, "the kernels serve no shape of it"
    xs = [draw(max(rows), in_dim, dtype=dtype) for _, in_dim in shapes]
    weights = [weight_of(format, *shape) for shape in shapes]

    parts = [first_rows(x, rows) for x in xs]

    @jax.jit
    def products(parts: list[list[jax.Array]], weights: list[Any]) -> list[list[jax.Array]]:
        pairs = zip(parts, weights, strict=True)
        return [[run(part, weight, instruction_set) for part in each] for each, weight in pairs]

    for x, weight, found in zip(xs, weights, products(parts, weights), strict=True):
        exact, root = expected(x, weight)
        for num_rows, y in zip(rows, found, strict=True):
            words = f"x [{num_rows}, {x.shape[1]}], weight {weight.shape}"
            assert_close(y, exact[:num_rows], root[:num_rows], BOUNDS[dtype], words)


@pytest.mark.parametrize("name", FORMATS_HERE)
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set_follows_the_reference(instruction_set: str, name: str) -> None:
    check_format(instruction_set, FORMATS_HERE[name], "bfloat16", ROWS)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", [name for name in FORMATS_HERE if name != "plain"])
@pytest.mark.parametrize("instruction_set", SETS)
def test_activations_of_more_digits_follow_the_reference(instruction_set: str, name: str, dtype: str) -> None:
    check_format(instruction_set, FORMATS_HERE[name], dtype, ROWS)


@pytest.mark.parametrize("name", ["int8", "int4:64", "int4_a8:64"])
@pytest.mark.parametrize("instruction_set", SETS)
def test_activations_in_float32_follow_the_reference(instruction_set: str, name: str) -> None:
    check_format(instruction_set, FORMATS_HERE[name], "float32", (1, 5, 33))


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("instruction_set", SETS)
def test_products_come_in_the_dtype_that_was_asked_for(instruction_set: str, out_dtype: str) -> None:
    names, rows = ("plain", "int8", "int4:64", "int4_a8:64"), (1, 17, 130)
    x, weights = draw(max(rows), 640, dtype="bfloat16"), [weight_of(FORMATS_HERE[name], 70, 640) for name in names]
    products = jax.jit(lambda xs, ws: [[run(x, w, instruction_set, out_dtype) for x in xs] for w in ws])
    for name, weight, found in zip(names, weights, products(first_rows(x, rows), weights), strict=True):
        exact, root = expected(x, weight)
        for num_rows, y in zip(rows, found, strict=True):
            assert y.dtype == out_dtype
            assert_close(y, exact[:num_rows], root[:num_rows], 2.0**-5, f"{name}, {num_rows} rows")


@pytest.mark.parametrize("name", FORMATS_HERE)
@needs_library
def test_a_layer_is_found_in_its_stack(name: str) -> None:
    format = FORMATS_HERE[name]
    shape = shapes_of(format)[-1]
    x, stack = draw(5, shape[1], dtype="bfloat16"), weight_of(format, 3, *shape)

    @jax.jit
    def of_each_layer(x: jax.Array, stack: Any) -> tuple[jax.Array, jax.Array]:
        layers = jnp.arange(3, dtype=jnp.int32)
        stacks = jax.lax.map(lambda layer: matmul(x, LayerOf(stack=stack, layer=layer), kernels=CPU), layers)
        alone = [matmul(x, one_of(stack, layer), kernels=CPU) for layer in range(3)]
        return stacks, jnp.stack(alone)

    found, alone = of_each_layer(x, stack)
    np.testing.assert_array_equal(found, alone)
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("name", ["plain", "int8", "int4:32", "int4_a8:64", "int8 offsets"])
@needs_library
def test_several_weights_at_once_are_as_each_alone(name: str) -> None:
    """In one call for those of one format; a weight of another is met by itself."""
    x, other = draw(6, 640, dtype="bfloat16"), weight_of(FORMATS_HERE["int8_a16"], 40, 640)
    weights = [weight_of(FORMATS_HERE[name], out_dim, 640) for out_dim in (70, 16, 130)]
    run = jax.jit(lambda x, weights: matmuls(x, weights, kernels=CPU))
    for each in (weights, [*weights, other]):
        found, alone = run(x, each), [matmul(x, weight, kernels=CPU) for weight in each]
        jax.tree.map(np.testing.assert_array_equal, found, alone)
    assert run.lower(x, weights).as_text().count("@millrace_matmul") == 1


@needs_library
def test_several_weights_may_be_of_different_layers_of_their_stacks() -> None:
    x, stacks = (
        draw(3, 192, dtype="bfloat16"),
        [weight_of(FORMATS_HERE["int8"], 3, out_dim, 192) for out_dim in (64, 33)],
    )
    layers = (jnp.int32(2), jnp.int32(1))
    of = [LayerOf(stack=stack, layer=layer) for stack, layer in zip(stacks, layers, strict=True)]
    each = [*of, one_of(stacks[0], 1)]
    found = jax.jit(lambda x, weights: matmuls(x, weights, kernels=CPU))(x, each)
    jax.tree.map(np.testing.assert_array_equal, found, [matmul(x, weight, kernels=CPU) for weight in each])


@needs_library
def test_several_weights_have_the_gradients_and_vmaps_of_each() -> None:
    xs, weights = draw(2, 3, 64, dtype="bfloat16"), [weight_of(None, out_dim, 64) for out_dim in (16, 40)]

    def together(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        return sum(y.astype(jnp.float32).sum() for y in matmuls(x, weights, kernels=CPU))

    def alone(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        return sum(matmul(x, weight, kernels=CPU).astype(jnp.float32).sum() for weight in weights)

    close = functools.partial(np.testing.assert_allclose, rtol=2**-6, atol=2**-6)
    jax.tree.map(close, *(jax.grad(run, (0, 1))(xs[0], weights) for run in (together, alone)))
    found = jax.vmap(lambda x: matmuls(x, weights, kernels=CPU))(xs)
    jax.tree.map(np.testing.assert_array_equal, found, [matmul(xs, weight, kernels=CPU) for weight in weights])


@pytest.mark.parametrize("name", ["plain", "int8", "int8_a16", "int4:32", "int4_a8:64", "int8 offsets"])
@pytest.mark.parametrize("instruction_set", SETS)
def test_a_row_depends_on_no_other(instruction_set: str, name: str) -> None:
    """Neither where another has NaN, nor where another is larger by orders of magnitude."""
    rows, format = (2, 16, 40, 130), FORMATS_HERE[name]
    weight, x = weight_of(format, 70, 640), draw(130, 640, dtype="bfloat16")
    products = jax.jit(lambda xs, weight: [run(x, weight, instruction_set) for x in xs])
    before = products(first_rows(x, rows), weight)
    for change in (jnp.nan, jnp.inf, 1e30):
        after = products(first_rows(x.at[1, 300].set(change), rows), weight)
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.delete(one, 1, 0), np.delete(other, 1, 0))
            assert np.isnan(other[1]).all() or not np.isnan(change)


@pytest.mark.parametrize("instruction_set", SETS)
def test_rows_of_zeros_give_zeros(instruction_set: str) -> None:
    names = ("plain", "int8", "int8_a16", "int4:64", "int4_a8:64", "int8 offsets")
    weights = [weight_of(FORMATS_HERE[name], 70, 640) for name in names]
    x = draw(17, 640, dtype="bfloat16").at[3].set(0)
    for y in jax.jit(lambda x, ws: [run(x, weight, instruction_set) for weight in ws])(x, weights):
        assert not np.any(y[3]) and np.all(np.any(np.delete(y, 3, 0), axis=1))


@pytest.mark.parametrize("name", ["plain", "int8", "int4:64", "int4_a8:64", "int8 groups"])
@needs_library
def test_gradients_are_those_of_xla(name: str) -> None:
    x, weight = draw(5, 640, dtype="bfloat16"), weight_of(FORMATS_HERE[name], 70, 640)
    push = draw(5, 70, dtype="bfloat16")
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), weight)

    def gradients(kernels: KernelChoices, x: jax.Array, weight: Any) -> Any:
        if not isinstance(weight, jax.Array):
            return jax.vjp(lambda x: matmul(x, weight, kernels=kernels), x)[1](push)
        return jax.vjp(lambda x, weight: matmul(x, weight, kernels=kernels), x, weight)[1](push)

    @jax.jit
    def all_three(x: jax.Array, weight: Any, stack: Any) -> Any:
        xla = KernelChoices("cpu", {"quantized_matmul": "xla"})
        in_stack = jax.vjp(lambda x: matmul(x, LayerOf(stack=stack, layer=jnp.int32(1)), kernels=CPU), x)[1](push)
        return gradients(CPU, x, weight), gradients(xla, x, weight), in_stack

    ours, theirs, in_stack = all_three(x, weight, stack)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.float32(one), np.float32(other))
    np.testing.assert_array_equal(np.float32(in_stack[0]), np.float32(theirs[0]))


@pytest.mark.parametrize("name", ["plain", "int8", "int4:64"])
@needs_library
def test_a_vmap_computes_what_each_would_alone(name: str) -> None:
    xs, weights = draw(3, 5, 640, dtype="bfloat16"), weight_of(FORMATS_HERE[name], 3, 70, 640)

    @jax.jit
    def together_and_alone(xs: jax.Array, weights: Any) -> Any:
        one = one_of(weights, 0)
        by_rows = jax.vmap(lambda x: matmul(x, one, kernels=CPU))(xs)
        by_both = jax.vmap(lambda x, weight: matmul(x, weight, kernels=CPU))(xs, weights)
        each = [one_of(weights, index) for index in range(3)]
        alone = [matmul(x, one, kernels=CPU) for x in xs]
        both_alone = [matmul(x, weight, kernels=CPU) for x, weight in zip(xs, each, strict=True)]
        return by_rows, jnp.stack(alone), by_both, jnp.stack(both_alone)

    by_rows, alone, by_both, both_alone = together_and_alone(xs, weights)
    np.testing.assert_array_equal(by_rows, alone)
    np.testing.assert_array_equal(by_both, both_alone)


@needs_library
def test_no_rows_give_no_products() -> None:
    assert jax.jit(lambda x, w: run(x, w, SETS[0]))(
        draw(0, 64, dtype="bfloat16"), draw(8, 64, dtype="bfloat16")
    ).shape == (0, 8)


@needs_library
def test_an_instruction_set_that_the_cpu_has_not_is_an_error() -> None:
    with pytest.raises(Exception, match="this CPU cannot run what the program was compiled for"):
        jax.block_until_ready(run(draw(2, 64, dtype="bfloat16"), draw(8, 64, dtype="bfloat16"), "avx1024"))


# ---- what is refused, and served by another


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "gpu"}, "made for CPUs, not for gpu"),
        ({"is_partitioned": True}, "XLA splits this matmul over devices"),
        ({"dtype": "float32"}, "plain weights of float32 are left to XLA"),
        ({"dtype": "float16"}, "plain weights of float16 are left to XLA"),
        ({"weight_dtype": "float32"}, "plain weights of float32 are left to XLA"),
        ({"dtype": "float32", "weight_dtype": "bfloat16"}, "plain weights of bfloat16 are left to XLA"),
        *(({"format": FORMATS[name]}, f"{name} is made for other chips") for name in ("fp8", "fp8_a16", "fp8_block")),
        *(({"format": FORMATS[name]}, f"{name} is made for other chips") for name in ("mxfp4", "mxfp8", "nvfp4")),
        ({"format": dataclasses.replace(FORMATS["int8"], block_rows=2)}, "int8 has scales that these kernels"),
        ({"format": dataclasses.replace(INT4, scale="float8_e4m3fn")}, "int4 has scales that these kernels"),
        ({"format": dataclasses.replace(INT4, global_scale=True)}, "int4 has scales that these kernels"),
        ({"format": dataclasses.replace(INT4, group=8)}, "groups of 8 inputs are no multiple of 16"),
        ({"format": FORMATS["int8_a16"], "in_dim": 200}, "groups of 200 inputs are no multiple of 16"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(problem_of(None, 64, 640), **changes)
    assert reason in str(cpu.unsupported(problem))
    with pytest.raises(KernelError, match=reason):
        choose("quantized_matmul", TABLE, problem, "cpu")


@needs_library
def test_without_bfloat16_products_plain_weights_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    library = dataclasses.replace(native.library(), instruction_sets=("avx512", "avx2"))
    monkeypatch.setattr(native, "_outcome", [library])
    assert "no bfloat16 products" in str(cpu.unsupported(problem_of(None, 64, 640)))
    assert cpu.unsupported(problem_of(FORMATS["int8"], 64, 640)) is None


@needs_library
def test_a_matmul_that_xla_splits_or_that_has_two_dtypes_is_left_to_it() -> None:
    kernels = KernelChoices("cpu")
    x, weight = draw(4, 640, dtype="bfloat16"), weight_of(FORMATS["int8"], 64, 640)
    jax.jit(lambda x, w: matmul(x, w, kernels=kernels, is_partitioned=True)).lower(x, weight)
    assert kernels.made == (("quantized_matmul", "xla"),)
    # XLA multiplies numbers of two dtypes, the kernels do not.
    jax.jit(lambda x, w: matmul(x, w, kernels=kernels)).lower(x, draw(64, 640))
    assert kernels.made == (("quantized_matmul", "xla"),)
    jax.jit(lambda x, w: matmul(x, w, kernels=kernels)).lower(x, weight)
    assert ("quantized_matmul", "cpu") in kernels.made
