"""Hardware that programs are planned and compiled for without being there.

Sizes, clocks and memory bandwidth are those of the vendor's compiler configuration, which jaxlib's CUDA plugin carries
(stream_executor.GpuTargetConfigProto); arithmetic and links are those of the data sheets that each target names.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
from jax.experimental import topologies

from ..errors import ConfigError

_TERA, _PETA, _GIGA = 1e12, 1e15, 1e9


# Of a GPU's memory, that XLA takes for arrays: the rest is the driver's, programs' and collectives'.
POOL_SHARE = 0.93


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of device, at its peaks. `description` is a GpuTargetConfigProto in text form, "" for a CPU."""

    name: str
    platform: Literal["cpu", "gpu"]
    device_kind: str
    memory_bytes: int
    memory_bandwidth: float  # bytes per second
    flops: Mapping[str, float]  # dense, per second, by dtype; int8, float8 and float4 where the chip has them
    link_bandwidth: float  # bytes per second in one direction, of one device into its domain of fast links
    num_linked: int  # devices of such a domain
    description: str

    @property
    def pool_bytes(self) -> int:
        """Of its memory, what a runtime on it takes for arrays."""
        return self.memory_bytes if self.platform == "cpu" else int(POOL_SHARE * self.memory_bytes)

    @property
    def compiler_options(self) -> dict[str, bool | int]:
        """What XLA is told where the target's devices are not here.

        Without the chip it cannot tune: it compiles every candidate of a Triton matmul to take the first, of the
        smallest tiles, which also copies weights out of a scan. cuBLASLt has heuristics, and XLA less to compile.
        """
        return {} if self.platform == "cpu" else {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetMachine:
    """Devices of one kind: `topology` counts racks, processes of each and devices of each, as in 1x18x4."""

    target: Target
    topology: str

    @property
    def num_devices(self) -> int:
        """All devices."""
        return math.prod(map(int, self.topology.split("x")))

    def __str__(self) -> str:
        return f"{self.target.name}:{self.topology}"

    def compile_devices(self) -> list[jax.Device]:
        """Devices that programs can be compiled for; those of a GPU target need not be here.

        Raises:
          ConfigError: jax has no compiler for the target, or fewer CPU devices than asked for.
        """
        if self.target.platform == "cpu":
            devices: list[jax.Device] = jax.devices("cpu")
            if len(devices) < self.num_devices:
                raise ConfigError(
                    f"target {self} needs {self.num_devices} CPU devices; {len(devices)} are here. Set "
                    f"jax_num_cpu_devices={self.num_devices} before jax starts."
                )
            return devices[: self.num_devices]
        try:
            topology = topologies.get_topology_desc(
                self.target.name, platform="cuda", target_config=self.target.description, topology=self.topology
            )
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
            raise ConfigError(
                f"compiling for {self} needs jax's CUDA compiler, which does not start here ({error}). Install it, no "
                'GPU is needed: pip install "millrace[cuda]".'
            ) from error
        return list(topology.devices)


def stay_on_cpus(num_devices: int) -> None:
    """Keep jax away from GPUs that happen to be here, and let it have at least so many CPU devices."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # jax runs already, with the devices that it has
        jax.config.update("jax_num_cpu_devices", max(num_devices, jax.config.jax_num_cpu_devices))


def parse_target(text: str) -> TargetMachine:
    """What --target names: a target, and how many of it, as in gb300:1x18x4, h200:1x1x2, cpu:72 or h100.

    Raises:
      ConfigError: the target is not known, or the topology is not one.
    """
    name, colon, topology = text.partition(":")
    if name not in TARGETS:
        raise ConfigError(f"target {name!r} is not known. Known targets: {', '.join(TARGETS)}.")
    counts = topology.split("x") if colon else ["1"]
    if len(counts) not in (1, 3) or not all(n.isascii() and n.isdecimal() and 0 < int(n) <= 2**20 for n in counts):
        raise ConfigError(
            f"target {text!r}: expected racks x processes x devices of each, as in {name}:1x18x4, or a number of "
            f"devices, as in {name}:4; got {topology!r}."
        )
    counts = [str(int(n)) for n in counts]
    return TargetMachine(target=TARGETS[name], topology="x".join(["1"] * (3 - len(counts)) + counts))


def _cuda_target(
    name: str,
    device_kind: str,
    *,
    capability: tuple[int, int],
    chip: Mapping[str, float],
    flops: Mapping[str, float],
    link_bandwidth: float,
    num_linked: int,
) -> Target:
    """A target whose `chip` has the fields of a GpuDeviceInfoProto in which GPUs differ."""
    facts = {**_CUDA_FACTS, **chip}
    fields = "\n".join(f"  {field}: {value}" for field, value in facts.items())
    major, minor = capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    description = f"""
gpu_device_info {{
{fields}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation" name: "{device_kind}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" cub_version: "3.1.2"
  ecc_enabled: true device_address_bits: 64
}}
platform_name: "CUDA"
device_description_str: "{device_kind}"
"""
    return Target(
        name=name,
        platform="gpu",
        device_kind=device_kind,
        memory_bytes=int(chip["device_memory_size"]),
        memory_bandwidth=chip["memory_bandwidth"],
        flops=flops,
        link_bandwidth=link_bandwidth,
        num_linked=num_linked,
        description=description,
    )


_CUDA_FACTS: Mapping[str, float] = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    "shared_memory_per_block": 49152, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448,
    "fpus_per_core": 128,
}  # fmt: skip
# NVIDIA H100 and H200 data sheets, SXM: 989 TFLOPS in 16 bits, 1,979 in FP8, half of the sheets' numbers with sparsity;
# INT8 as FP8; 67 in FP32; NVLink 900 GB/s, both directions together.
_HOPPER_FLOPS = {
    "bfloat16": 989.4 * _TERA, "float16": 989.4 * _TERA, "float32": 66.9 * _TERA, "float8": 1978.9 * _TERA,
    "int8": 1978.9 * _TERA,
}  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        # NVIDIA GB300 NVL72 data sheet, a rack's 72: FP4 1,080 PFLOPS dense; FP8 720 and 16 bits 360 with sparsity,
        # twice the dense, as INT8 24; FP32 6; NVLink 130 TB/s, both directions of 1.8 TB/s each.
        _cuda_target(
            "gb300",
            "NVIDIA GB300",
            capability=(10, 3),
            chip={
                "core_count": 152, "clock_rate_ghz": 2.07, "memory_bandwidth": 7_928_064_000_000,
                "l2_cache_size": 135_528_448, "device_memory_size": 297_021_079_552,
            },
            flops={
                "bfloat16": 2.5 * _PETA, "float16": 2.5 * _PETA, "float32": 83 * _TERA, "float8": 5 * _PETA,
                "float4": 15 * _PETA, "int8": 0.167 * _PETA,
            },
            link_bandwidth=900 * _GIGA,
            num_linked=72,
        ),
        # NVIDIA GB200 NVL72 data sheet, a rack's 72: FP4 1,440, FP8 and INT8 720, 16 bits 360 PFLOPS with sparsity,
        # twice the dense; FP32 5.76; NVLink as GB300.
        _cuda_target(
            "gb200",
            "NVIDIA GB200",
            capability=(10, 0),
            chip={
                "core_count": 152, "clock_rate_ghz": 2.062, "memory_bandwidth": 7_928_064_000_000,
                "l2_cache_size": 135_528_448, "device_memory_size": 197_897_748_480,
            },
            flops={
                "bfloat16": 2.5 * _PETA, "float16": 2.5 * _PETA, "float32": 80 * _TERA, "float8": 5 * _PETA,
                "float4": 10 * _PETA, "int8": 5 * _PETA,
            },
            link_bandwidth=900 * _GIGA,
            num_linked=72,
        ),
        # NVIDIA HGX data sheet, a board's 8 B200: FP4 144, FP8 and INT8 72, 16 bits 36 PFLOPS with sparsity, twice the
        # dense; FP32 600 TFLOPS; NVLink 1.8 TB/s each, both directions together.
        _cuda_target(
            "b200",
            "NVIDIA B200",
            capability=(10, 0),
            chip={
                "core_count": 148, "clock_rate_ghz": 1.965, "memory_bandwidth": 7_672_320_000_000,
                "l2_cache_size": 132_644_864, "device_memory_size": 191_514_411_008,
            },
            flops={
                "bfloat16": 2.25 * _PETA, "float16": 2.25 * _PETA, "float32": 75 * _TERA, "float8": 4.5 * _PETA,
                "float4": 9 * _PETA, "int8": 4.5 * _PETA,
            },
            link_bandwidth=900 * _GIGA,
            num_linked=8,
        ),
        _cuda_target(
            "h200",
            "NVIDIA H200",
            capability=(9, 0),
            chip={
                "core_count": 132, "clock_rate_ghz": 1.98, "memory_bandwidth": 4_800_000_000_000,
                "l2_cache_size": 52_428_800, "device_memory_size": 151_397_597_184,
            },
            flops=_HOPPER_FLOPS,
            link_bandwidth=450 * _GIGA,
            num_linked=8,
        ),
        _cuda_target(
            "h100",
            "NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            chip={
                "core_count": 132, "clock_rate_ghz": 1.98, "memory_bandwidth": 3_352_320_000_000,
                "l2_cache_size": 52_428_800, "device_memory_size": 84_942_979_072,
            },
            flops=_HOPPER_FLOPS,
            link_bandwidth=450 * _GIGA,
            num_linked=8,
        ),
        # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOPS dense in 16 bits, 624 in INT8, 19.5 in FP32; NVLink 600 GB/s,
        # both ways.
        _cuda_target(
            "a100",
            "NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            chip={
                "core_count": 108, "clock_rate_ghz": 1.41, "memory_bandwidth": 2_039_040_000_000,
                "l2_cache_size": 41_943_040, "device_memory_size": 85_100_068_864, "fpus_per_core": 64,
                "shared_memory_per_core": 167_936, "shared_memory_per_block_optin": 166_912,
            },
            flops={"bfloat16": 312 * _TERA, "float16": 312 * _TERA, "float32": 19.5 * _TERA, "int8": 624 * _TERA},
            link_bandwidth=300 * _GIGA,
            num_linked=8,
        ),
        # Nobody's data sheet: what XLA reached on two cores of an AMD EPYC (Zen 4), which all devices of it share.
        Target(
            name="cpu",
            platform="cpu",
            device_kind="cpu",
            memory_bytes=8 * 2**30,
            memory_bandwidth=20 * _GIGA,
            flops={"bfloat16": 0.3 * _TERA, "float16": 0.1 * _TERA, "float32": 0.2 * _TERA, "int8": 0.4 * _TERA},
            link_bandwidth=10 * _GIGA,
            num_linked=1024,
            description="",
        ),
    )
}  # fmt: skip
