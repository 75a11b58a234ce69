"""Every deployment of configs/ fits the hardware that it names, from shapes alone."""

import math
import pkgutil

import pytest

from millrace import configs
from millrace.models.decoder import AbstractDecoder
from millrace.models.quantization import without_formats
from millrace.runtime.deployment import deploy
from millrace.runtime.memory_plan import plan_memory, planned_mesh
from millrace.runtime.model_source import ARCHITECTURES, compute_dtype, open_model_config
from millrace.runtime.overrides import load_config
from millrace.runtime.param_tree import flatten
from millrace.sharding.mesh import mesh_sizes
from millrace.sharding.targets import parse_target

NAMES = [module.name for module in pkgutil.iter_modules(configs.__path__) if not module.ispkg]


@pytest.mark.parametrize("name", NAMES)
def test_a_deployment_fits_its_target(name: str) -> None:
    config = load_config(name)
    assert config.target is not None, "plan and compile need no more than --config"
    machine = parse_target(config.target)
    mesh = planned_mesh(machine, dict(config.mesh or ()))
    model = open_model_config(config.model, None, config.quantization)
    deployment = deploy(config, model, mesh, machine.target.pool_bytes)
    assert math.prod(mesh_sizes(mesh).values()) == machine.num_devices
    assert plan_memory(deployment, machine.target.pool_bytes).free > 0


@pytest.mark.parametrize("sizes", [{"data": 72}, {"data": 36, "tensor": 2}, {"data": 18, "tensor": 4},
                                   {"data": 9, "tensor": 8}], ids=str)  # fmt: skip
def test_the_racks_other_meshes_fit_too(sizes: dict[str, int]) -> None:
    config = load_config("llama2_70b_gb300_nvl72").replace(mesh=sizes)
    machine = parse_target(str(config.target))
    mesh = planned_mesh(machine, sizes)
    model = open_model_config(config.model, None, config.quantization)
    deployment = deploy(config, model, mesh, machine.target.pool_bytes)
    assert deployment.scheduler.num_shards == sizes["data"]


@pytest.mark.parametrize(
    "model, num_params",
    [
        ("meta-llama/Llama-2-70b-hf", 68.98e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03e9),
        ("Qwen/Qwen3-30B-A3B", 30.53e9),
        ("Qwen/Qwen3-235B-A22B", 235.09e9),
        ("openai/gpt-oss-120b", 116.83e9),
    ],
)
def test_a_bundled_architecture_has_as_many_parameters_as_published(model: str, num_params: float) -> None:
    config = without_formats(open_model_config(model, None))
    decoder = AbstractDecoder(config, compute_dtype(config, "bfloat16"))
    found = sum(spec.num_bytes for spec in flatten(decoder.specs)[0].values()) / 2
    assert found == pytest.approx(num_params, rel=1e-3)


def test_every_bundled_architecture_is_read() -> None:
    for path in ARCHITECTURES.glob("*.json"):
        assert open_model_config(path.stem.replace("--", "/"), None).num_layers > 0
