"""The Hopper kernels of the quantized matmul, in GPU interpret mode with race detection, and lowered for the chip."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from millrace.pallas_kernels import tuning
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.hopper_operands import words_of
from millrace.pallas_kernels.quantized_matmul import FORMATS, MatmulProblem, WeightFormat, hopper, matmul, matmuls
from millrace.pallas_kernels.quantized_matmul.contract import QuantizedWeight
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, pack_nibbles, quantize, quantize_rows
from millrace.pallas_kernels.quantized_matmul.hopper_tiles import Tile
from millrace.pallas_kernels.quantized_matmul.hopper_unpack import (
    decoder,
    in_order_of_pairs,
    missing_power,
    operand,
)

H200 = "NVIDIA H200"
INT4 = FORMATS["int4"]
WITH_ZEROS = dataclasses.replace(INT4, zeros=True, group=32, scale="float16")
GPTQ = dataclasses.replace(INT4, group=128, zeros=True, scale="float16")  # as most checkpoints have it
LARGEST = dataclasses.replace(WITH_ZEROS, group=128, scale="float32")  # in shared memory
SERVED = [format for name, format in FORMATS.items() if name not in ("fp8_block", "int4_a8")]
# (out, in) of Llama-2-70B and Llama-3.1-8B, whole and over 8 devices; of Llama-2-7B and 13B, Qwen2.5-7B and 32B
SHAPES = (
    (8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672), (14336, 4096), (4096, 14336), (128256, 4096),
    (4096, 11008), (5120, 5120), (5120, 13824), (3584, 3584), (512, 3584), (3584, 18944), (5120, 27648),
)  # fmt: skip


def tile(**sizes: int) -> Tile:
    return Tile(**{"m": 64, "n": 8, "k": 128, "stages": 2, "warpgroups": 1, "blocks": 2, "panel": 2} | sizes)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)


def check(format: WeightFormat, num_rows: int, shape: tuple[int, int], tile: Tile, out_dtype: str = "bfloat16") -> None:
    """The kernel against the float32 product of what it was given."""
    x, weight = draw(num_rows, shape[1]), quantize(draw(*shape), format)
    output = hopper.matmul(
        x, weight, platform="gpu", out_dtype=out_dtype, device_kind=H200, tile=tile,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    wide = np.float32(x)
    if format.activations != "own":
        values, scales = quantize_rows(x, format.activations)
        wide = np.float32(values) * np.float32(scales)
    expected = wide @ np.float32(dequantize(weight)).T
    assert (output.shape, output.dtype) == ((num_rows, shape[0]), out_dtype)
    np.testing.assert_allclose(np.float32(output), expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_fp8_of_many_rows_multicasts_weights_and_goes_on_over_tiles() -> None:
    wide = tile(n=128, stages=3, warpgroups=2, cluster=2, blocks=2)
    check(FORMATS["fp8"], 300, (256, 256), dataclasses.replace(wide, m=64))


def test_int8_of_few_rows_in_splits_adds_up() -> None:
    check(FORMATS["int8"], 5, (128, 512), tile(splits=2))


def test_int4_of_few_rows_multicasts_activations() -> None:
    check(INT4, 5, (128, 1024), tile(k=256, cluster=2))


def test_int4_with_zero_points_comes_in_pieces() -> None:
    check(WITH_ZEROS, 5, (128, 1024), tile(k=256, warpgroups=2, pieces=4, n_slots=5), "float32")


def test_int4_stages_begin_before_the_one_before_ends() -> None:
    check(INT4, 5, (128, 1536), tile(k=256, stages=2, ahead=1))


@pytest.mark.parametrize("splits", [1, 2])
def test_panels_of_scales_and_splits_may_be_short(splits: int) -> None:
    check(GPTQ, 5, (128, 1280), tile(k=256, warpgroups=2, stages=3, splits=splits))  # 5 stages, 8 of a panel


@pytest.mark.kernels
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    ("format", "in_dim", "splits"),
    [
        *((GPTQ, 3584, splits) for splits in (1, 2, 3, 7)),  # 14 stages
        *((GPTQ, 4608, splits) for splits in (1, 2)),  # 18: of both 9 and 18 the last panel is short
        *((INT4, 1792, splits) for splits in (1, 2, 4)),  # 7
        *((dataclasses.replace(INT4, group=128), 512, splits) for splits in (1, 2)),
        *((INT4, 11008, splits) for splits in (1, 8)),  # 43
        *((FORMATS["mxfp8"], 896, splits) for splits in (1, 2)),
        (FORMATS["nvfp4"], 768, 2),
        (FORMATS["int8_a16"], 640, 2),
    ],
    ids=lambda given: f"{given.name}-{given.group}" if isinstance(given, WeightFormat) else str(given),
)
def test_inputs_may_be_any_number_of_stages(format: WeightFormat, in_dim: int, splits: int, ahead: int) -> None:
    sizes = tile(k=decoder(format.storage).inputs, stages=3, ahead=ahead, splits=splits)
    check(format, 5, (64 if splits > 1 else 256, in_dim), sizes)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**28])
def test_scales_of_any_size_are_those_of_the_product(scale: float) -> None:
    x, weight = draw(5, 512), quantize(draw(64, 512), INT4)
    sized = dataclasses.replace(weight, scales=weight.scales * jnp.bfloat16(scale))
    options = {"platform": "gpu", "out_dtype": "float32", "device_kind": H200, "tile": tile(k=256)}
    outputs = [
        hopper.matmul(x, each, **options, interpret=plgpu.InterpretGPUParams())  # type: ignore[arg-type]
        for each in (weight, sized)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1] / np.float32(scale))


def test_small_tiles_take_turns() -> None:
    assert tile(m=64, k=256, blocks=2).fitted(256, 8, 8).splits == 1
    assert tile(m=64, k=256, blocks=2, turns=8).fitted(256, 8, 8).splits == 4


def check_several(name: str, num_rows: int, shapes: Sequence[tuple[int, int]], tile: Tile) -> None:
    """Weights in one launch against each alone, and without a cluster, bit by bit."""
    x, weights = draw(num_rows, shapes[0][1]), [quantize(draw(*shape), FORMATS[name]) for shape in shapes]
    weights = [dataclasses.replace(weight, scales=weight.scales * (1 + i)) for i, weight in enumerate(weights)]
    run = functools.partial(
        hopper.matmuls, x, platform="gpu", out_dtype="bfloat16", device_kind=H200,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    together = run(weights, tile=tile, most=len(weights))
    for found, weight in zip(together, weights, strict=True):
        np.testing.assert_array_equal(found, run([weight], tile=dataclasses.replace(tile, cluster=1))[0])


def test_weights_of_many_rows_in_one_launch_are_as_each_alone() -> None:
    check_several("fp8", 130, [(128, 256), (64, 256)], tile(n=64, stages=3, warpgroups=2, cluster=2))


@pytest.mark.parametrize("splits", [1, 2])
def test_weights_of_few_rows_in_one_launch_are_as_each_alone(splits: int) -> None:
    check_several("int8", 5, [(128, 512), (64, 512), (64, 512)], tile(splits=splits))


@pytest.mark.kernels
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_blocks_of_a_cluster_may_be_in_different_weights(name: str, splits: int) -> None:
    check_several(name, 5, [(128, 512)] * 4, tile(splits=splits, cluster=4, blocks=4, warpgroups=2))


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_three_weights_of_many_rows_go_on_over_tiles(name: str) -> None:
    check_several(name, 300, [(256, 512), (128, 512), (128, 512)], tile(n=128, stages=3, warpgroups=2, cluster=2))


@pytest.mark.kernels
@pytest.mark.parametrize("num_rows", [1, 8, 130])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_eight_bit_operands_agree_with_the_product(name: str, num_rows: int) -> None:
    narrow = tile(n=8, k=256)
    check(FORMATS[name], num_rows, (256, 512), narrow if num_rows < 100 else tile(n=64, warpgroups=2))


@pytest.mark.kernels
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    "format",
    [
        *(FORMATS[name] for name in ("int8_a16", "fp8_a16", "mxfp8", "mxfp4", "nvfp4", "int4")),
        dataclasses.replace(INT4, group=32),
        dataclasses.replace(INT4, group=128, scale="float32"),
        WITH_ZEROS,
        dataclasses.replace(WITH_ZEROS, group=128),
    ],
    ids=lambda format: f"{format.name}-{format.group}-{format.scale}-{format.zeros}",
)
def test_decoded_weights_agree_with_the_product(format: WeightFormat, splits: int) -> None:
    sizes = tile(n=16, k=decoder(format.storage).inputs, stages=3, warpgroups=2, splits=splits)
    check(format, 20, (256, 4096), sizes, "float32")


@pytest.mark.kernels
def test_clusters_of_eight_take_turns() -> None:
    check(INT4, 40, (2048, 512), tile(n=8, k=256, cluster=8, blocks=16))


@pytest.mark.parametrize("name", ["int4", "int8_a16", "fp8_a16", "mxfp4"])
def test_every_stored_value_is_decoded_exactly(name: str) -> None:
    format = FORMATS[name]
    size = 16 if format.is_packed else 256
    codes = np.tile(np.arange(size), 64 * 256 // size).reshape(64, 256)[:, : decoder(format.storage).inputs]
    stored = jnp.asarray(codes, jnp.uint8)
    if format.storage == "float8_e4m3fn":
        stored = jnp.where(stored & 0x7F == 0x7F, jnp.uint8(0), stored)  # NaN, which nothing that quantizes stores
    values = pack_nibbles(stored) if format.is_packed else jax.lax.bitcast_convert_type(stored, format.values_dtype)
    scales = jnp.ones(format.scales_shape(64, codes.shape[1]), format.scales_dtype)
    expected = np.float32(dequantize(QuantizedWeight(values=values, scales=scales, format=format)))
    words, pairs = words_of(values, is_interpreted=True), decoder(format.storage).pairs
    operands = [operand(words, index, format.storage, None, None, is_interpreted=True) for index in range(pairs)]
    lacking = missing_power(format.storage, has_scales=False, has_zeros=False)
    np.testing.assert_array_equal(np.concatenate(operands, axis=1) * 2.0**lacking, in_order_of_pairs(expected, pairs))


def problem(**fields: object) -> MatmulProblem:
    usual = {"platform": "gpu", "format": INT4, "num_rows": 8, "in_dim": 8192, "out_dim": 8192, "dtype": "bfloat16"}
    return MatmulProblem(**usual | {"device_kind": H200} | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": None}, "not quantized"),
        ({"dtype": "float32"}, "must be bfloat16, not float32"),
        ({"format": FORMATS["fp8_block"]}, "scales for blocks of channels"),
        ({"format": dataclasses.replace(INT4, offsets=True)}, "int4 has offsets"),
        ({"format": FORMATS["int4_a8"]}, "int4_a8 quantizes activations, but not to the weight's uint4"),
        ({"format": dataclasses.replace(INT4, group=1024)}, "groups of 1024 inputs do not divide"),
        ({"out_dim": 8200}, "out must be a multiple of 64 and in of 256, not 8200 and 8192"),
        ({"in_dim": 11136}, "in of 256, not 8192 and 11136"),
        ({"in_dim": 8256, "format": FORMATS["int8_a16"]}, "in of 128, not 8192 and 8256"),
        ({"format": dataclasses.replace(GPTQ, group=256), "in_dim": 3840}, "even number of scales or zero points"),
        ({"num_rows": 4096}, "more than 2048 rows, not 4096"),
    ],
)
def test_what_it_cannot_serve_is_said(fields: dict[str, object], reason: str) -> None:
    assert reason in str(hopper.unsupported(problem(**fields)))


@pytest.mark.parametrize("format", [*SERVED, GPTQ], ids=lambda format: f"{format.name}-{format.zeros}")
@pytest.mark.parametrize("num_rows", [1, 9, 17, 33, 64, 65, 300, 2048])
def test_tiles_divide_the_weights_of_models(format: WeightFormat, num_rows: int) -> None:
    for out_dim, in_dim in SHAPES:
        assert not hopper.unsupported(problem(format=format, num_rows=num_rows, out_dim=out_dim, in_dim=in_dim))
        chosen = hopper.tile_for(format, num_rows, out_dim, in_dim, H200)
        assert in_dim % chosen.k == 0
        num_stages = in_dim // chosen.k
        assert (chosen.splits - 1) * -(-num_stages // chosen.splits) < num_stages, "a split without inputs"
        is_wide = format.name in ("fp8", "int8") and num_rows > 128
        assert out_dim % (chosen.n if is_wide else chosen.block_m * chosen.cluster) == 0
        tiles = math.prod((out_dim // chosen.block_m, -(-num_rows // chosen.n)))
        assert chosen.splits * tiles <= max(tiles, chosen.blocks)


def lower(x: jax.Array | jax.ShapeDtypeStruct, *weights: QuantizedWeight, out_dtype: str = "bfloat16") -> int:
    """The kernels of a program for an H200, which must choose those of this file."""
    kernels = KernelChoices("gpu", device_kind=H200)
    device = AbstractDevice(device_kind=H200, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        run = jax.jit(lambda x, weights: matmuls(x, weights, kernels=kernels, out_dtype=out_dtype))
        lowered = run.trace(x, weights).lower(lowering_platforms=("cuda",))
    assert kernels.made == (("quantized_matmul", "hopper"),)
    return lowered.as_text().count("@mosaic_gpu")


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_problems_beside_a_hopper_choose_it(name: str) -> None:
    lower(draw(4, 512), quantize(draw(128, 512), FORMATS[name]))


@pytest.mark.parametrize("in_dim", [256, 2560, 3584, 11008])
@pytest.mark.parametrize("format", [INT4, GPTQ], ids=["symmetric", "zeros"])
def test_weights_of_any_number_of_stages_choose_it(format: WeightFormat, in_dim: int) -> None:
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((128, in_dim)), format))
    lower(jax.ShapeDtypeStruct((4, in_dim), jnp.bfloat16), weight)


def test_few_tiles_are_split_where_no_number_divides_the_stages() -> None:
    assert hopper.tile_for(GPTQ, 1, 4096, 11008, H200).splits == 8  # 43 stages; 7 times 6 and one


@pytest.fixture
def shared_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which three weights share a launch."""
    read = tuning._read
    monkeypatch.setattr(tuning, "_read", lambda path: {**read(path), "w8a8_launch": {"weights": 3}})


# q, k and v, and gate and up, of Llama-2-70B and Llama-3.1-8B, whole and over 8 devices.
@pytest.mark.usefixtures("shared_launches")
@pytest.mark.parametrize("num_rows", [1, 64, 1536])
@pytest.mark.parametrize(
    "out_dims", [(8192, 1024, 1024), (28672, 28672), (4096, 1024, 1024), (14336, 14336), (512, 128, 128), (3584, 3584)]
)
def test_weights_of_models_that_meet_the_same_activations_are_one_kernel(
    out_dims: tuple[int, ...], num_rows: int
) -> None:
    assert kernels_of("fp8", num_rows, out_dims) == 1


@pytest.mark.usefixtures("shared_launches")
@pytest.mark.parametrize(("name", "out_dims"), [("fp8", (256, 64)), ("int8_a16", (256, 256))])
def test_weights_that_would_narrow_a_tile_and_those_decoded_have_a_kernel_each(
    name: str, out_dims: tuple[int, ...]
) -> None:
    assert kernels_of(name, 16, out_dims) == 2


def kernels_of(name: str, num_rows: int, out_dims: Sequence[int]) -> int:
    """Of a program that multiplies weights of so many channels."""
    weights = [
        jax.eval_shape(lambda out_dim=out_dim: quantize(jnp.zeros((out_dim, 1024)), FORMATS[name]))
        for out_dim in out_dims
    ]
    return lower(jax.ShapeDtypeStruct((num_rows, 1024), jnp.bfloat16), *weights)


@pytest.mark.parametrize("num_rows", [128, 512, 1024])
def test_logits_have_room_beside_the_tuned_stages(num_rows: int) -> None:
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((8192, 1024)), FORMATS["fp8"]))
    lower(jax.ShapeDtypeStruct((num_rows, 1024), jnp.bfloat16), weight, out_dtype="float32")


def test_problems_beside_a_cpu_are_left_to_what_serves_there() -> None:
    kernels = KernelChoices("cpu", device_kind="cpu")
    matmul(draw(4, 512), quantize(draw(128, 512), INT4), kernels=kernels)
    ((_, chosen),) = kernels.made
    assert chosen in ("cpu", "xla")


@pytest.mark.kernels
@pytest.mark.parametrize("out_dim", [1024, 8192])
@pytest.mark.parametrize("num_rows", [1, 16, 32, 64, 128, 512, 2048])
@pytest.mark.parametrize("format", [*SERVED, LARGEST], ids=lambda format: f"{format.name}-{format.scale}")
def test_tuned_sizes_lower_for_the_chip(format: WeightFormat, num_rows: int, out_dim: int) -> None:
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((out_dim, 8192)), format))
    lower(jax.ShapeDtypeStruct((num_rows, 8192), jnp.bfloat16), weight)
