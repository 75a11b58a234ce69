"""Hardware that programs are compiled for without being there. Facts from the vendor's compiler configuration."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of GPU. `description` is the text form of a `stream_executor.GpuTargetConfigProto`."""

    name: str
    memory_bytes: int
    description: str


_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4917248000000 l2_cache_size: 62914560 device_memory_size: 150109880320
  cuda_compute_capability { major: 9 minor: 0 }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  ecc_enabled: true device_address_bits: 64
}
platform_name: "CUDA" device_description_str: "NVIDIA H200 141GB HBM3e"
"""

TARGETS = {"h200": Target(name="h200", memory_bytes=150_109_880_320, description=_HOPPER)}
