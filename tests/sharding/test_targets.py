"""Targets: what --target may say, and that programs can be compiled for hardware that is not here."""

import pytest

from millrace import ConfigError
from millrace.sharding.targets import TARGETS, TargetMachine, parse_target

GPUS = [name for name, target in TARGETS.items() if target.platform == "gpu"]


@pytest.mark.parametrize(
    "text, topology, num_devices",
    [("gb300:1x18x4", "1x18x4", 72), ("h200", "1x1x1", 1), ("h200:1x1x2", "1x1x2", 2), ("cpu:72", "1x1x72", 72)],
)
def test_a_target_names_hardware_and_how_much_of_it(text: str, topology: str, num_devices: int) -> None:
    machine = parse_target(text)
    assert (machine.topology, machine.num_devices) == (topology, num_devices)
    assert parse_target(str(machine)) == machine


@pytest.mark.parametrize("text", ["gb3000", "", ":1x1x1", "H200"])
def test_an_unknown_target_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError, match="Known targets: gb300, gb200, b200, h200, h100, a100, cpu"):
        parse_target(text)


@pytest.mark.parametrize("topology", ["", "0", "1x18", "1x18x4x1", "1x-1x4", "ax1x1", "1x18x", "²"])
def test_a_topology_that_is_none_is_refused(topology: str) -> None:
    with pytest.raises(ConfigError, match=r"as in h100:1x18x4, or a number of devices"):
        parse_target(f"h100:{topology}")


@pytest.mark.parametrize("name", GPUS)
def test_narrower_numbers_are_faster(name: str) -> None:
    flops = TARGETS[name].flops
    speeds = [flops[dtype] for dtype in ("float32", "bfloat16", "float8", "float4") if dtype in flops]
    assert speeds == sorted(speeds) and flops["float16"] == flops["bfloat16"]


@pytest.mark.parametrize("name", GPUS)
def test_the_compilers_description_has_the_targets_numbers(name: str) -> None:
    target = TARGETS[name]
    assert f"device_memory_size: {target.memory_bytes}\n" in target.description
    assert f"memory_bandwidth: {target.memory_bandwidth}\n" in target.description
    assert target.description.count("{") == target.description.count("}")


@pytest.mark.parametrize("name", GPUS)
def test_a_gpus_compiler_starts_without_the_gpu_or_says_what_to_install(name: str) -> None:
    machine = parse_target(f"{name}:1x2x4")
    try:
        devices = machine.compile_devices()
    except ConfigError as error:
        assert 'pip install "millrace[cuda]"' in str(error)
        return
    assert len(devices) == 8 and devices[0].device_kind == machine.target.device_kind
    assert [device.process_index for device in devices] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_cpu_target_takes_the_cpu_devices_that_are_here() -> None:
    assert len(parse_target("cpu:8").compile_devices()) == 8
    with pytest.raises(ConfigError, match=r"cpu:1x1x99 needs 99 CPU devices; 8 are here. Set jax_num_cpu_devices=99"):
        TargetMachine(target=TARGETS["cpu"], topology="1x1x99").compile_devices()


def test_a_runtime_leaves_some_of_a_gpus_memory_to_the_driver() -> None:
    h200, cpu = TARGETS["h200"], TARGETS["cpu"]
    assert h200.pool_bytes == int(0.93 * h200.memory_bytes)
    assert cpu.pool_bytes == cpu.memory_bytes
