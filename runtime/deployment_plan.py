"""A deployment's memory and speed before anything is loaded, on its mesh and on every other that fits."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ..errors import ConfigError, KernelError
from ..models.config import ModelConfig, MoeSpec
from ..models.decoder import AbstractDecoder
from ..models.partition import partition, with_places
from ..models.quantization import format_paths
from ..sharding.axes import MeshAxis
from ..sharding.mesh import make_mesh, mesh_sizes, mesh_text
from ..sharding.rules import Placement
from ..sharding.targets import TargetMachine
from .buckets import Bucket
from .config import RuntimeConfig
from .deployment import Deployment, deploy, device_weight_bytes
from .memory_plan import MemoryPlan, Temporaries, num_fitting, plan_memory, planned_mesh
from .model_source import compute_dtype
from .programs import compile_programs
from .records import Record, records_of
from .roofline import DeviceModel, Prediction, Workload, predict
from .sizes import resolve, usable_bytes

_FIRST_CONTEXT = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How many sequences of a length the memory holds, beside everything else."""

    context_len: int
    shard_sequences: int  # of one data shard, whose devices share them
    num_sequences: int  # of all


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeploymentPlan:
    """What `millrace plan` shows."""

    model: str
    target: str
    mesh: str
    num_devices: int
    dtype: str
    formats: tuple[str, ...]  # of quantized weights, by name
    kv_cache_dtype: str
    token_bytes: int  # of the KV cache on each device, for one token
    weights: str  # where they are: resident, stream, host
    num_slots: int
    max_step_tokens: int
    workload: Workload
    memory: MemoryPlan
    fits: tuple[Fit, ...]
    prediction: Prediction
    records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """One line of a sweep: a mesh with as many slots as its memory holds."""

    mesh: str
    weights: int  # bytes of each device
    prediction: Prediction


def plan_deployment(
    config: RuntimeConfig, model: ModelConfig, machine: TargetMachine, workload: Workload, *, compiles: bool
) -> DeploymentPlan:
    """The plan for a target's devices.

    Raises:
      ConfigError, KernelError, OutOfMemoryError: what does not fit, and what mends it.
    """
    target = machine.target
    deployment = deploy(config, model, planned_mesh(machine, dict(config.mesh or ())), target.pool_bytes)
    temporaries = compiled_temporaries(deployment, model, machine) if compiles else None
    memory = plan_memory(deployment, target.pool_bytes, temporaries)
    config, placement = deployment.config, deployment.model.placement
    assert config.num_slots and config.max_step_tokens and config.max_context_len
    cached_tokens = deployment.model.cache.values.shape[2] * config.page_size
    device_model = _device_model(config, model, placement, deployment.weight_bytes)
    prediction = predict(
        device_model,
        target,
        workload,
        num_sequences=min(config.num_slots, cached_tokens // workload.mean_context_len),
        num_step_tokens=config.max_step_tokens,
    )
    return DeploymentPlan(
        model=config.model,
        target=f"{target.name}:{machine.topology}",
        mesh=mesh_text(mesh_sizes(placement.mesh)),
        num_devices=placement.mesh.size,
        dtype=str(config.dtype),
        formats=tuple(sorted({format.name for format in format_paths(model).values()})),
        kv_cache_dtype=device_model.cache_dtype,
        token_bytes=device_model.cache_bytes(),
        weights=config.weights,
        num_slots=config.num_slots,
        max_step_tokens=config.max_step_tokens,
        workload=workload,
        memory=memory,
        fits=tuple(_fits(deployment, model, memory)),
        prediction=prediction,
        records=records_of(target.name, config.model),
    )


def _device_model(config: RuntimeConfig, model: ModelConfig, placement: Placement, weight_bytes: int) -> DeviceModel:
    assert config.dtype and config.kv_cache_dtype
    return DeviceModel(
        config=model,
        mesh=mesh_sizes(placement.mesh),
        dtype=config.dtype,
        itemsize=jnp.dtype(config.dtype).itemsize,
        cache_dtype=config.kv_cache_dtype,
        weight_bytes=weight_bytes,
    )


def _fits(deployment: Deployment, model: ModelConfig, memory: MemoryPlan) -> Iterator[Fit]:
    """For contexts of 512 tokens, four times as many, and so on up to the model's own."""
    placement, context_len = deployment.model.placement, min(_FIRST_CONTEXT, model.max_context_len)
    while True:
        count = num_fitting(deployment.config, model, placement, memory.usable_bytes - memory.weights, context_len)
        yield Fit(context_len=context_len, shard_sequences=count, num_sequences=count * placement.num_shards)
        if context_len == model.max_context_len:
            return
        context_len = min(4 * context_len, model.max_context_len)


# ---- temporaries, from compiled programs


def compiled_temporaries(deployment: Deployment, model: ModelConfig, machine: TargetMachine) -> Temporaries | None:
    """What XLA says of the largest decode and the largest mixed program, from shapes; None where it cannot be asked.

    The target's own compiler is asked where it is installed, else the CPU's, for as many devices.
    """
    is_exact = True
    try:
        devices = machine.compile_devices()
    except ConfigError:
        devices, is_exact = jax.devices("cpu"), machine.target.platform == "cpu"
    size = deployment.model.placement.mesh.size
    if len(devices) < size or deployment.streams:
        return None
    config = deployment.config if is_exact else deployment.config.replace(kernels=())
    mesh = make_mesh(dict(config.mesh or ()), devices)
    try:
        compiled = deploy(config, model, mesh, None)
    except KernelError:
        return None
    buckets = tuple(max(b for b in compiled.buckets if b.is_decode is kind) for kind in (True, False))
    options = machine.target.compiler_options if is_exact else None
    programs = compile_programs(compiled.model, buckets, show_progress=config.progress, compiler_options=options)
    return Temporaries(
        num_bytes=max(_temporary_bytes(programs.steps, bucket) for bucket in buckets),
        source=f"XLA for {machine.target.device_kind}" if is_exact else "XLA for CPUs",
        is_estimate=not is_exact,
    )


def _temporary_bytes(steps: object, bucket: Bucket) -> int:
    analysis = steps[bucket].memory_analysis()  # type: ignore[index]  # resident programs have it, see compile_programs
    return int(analysis.temp_size_in_bytes)


# ---- every mesh


def sweep(
    config: RuntimeConfig, model: ModelConfig, machine: TargetMachine, workload: Workload
) -> tuple[MeshPlan, ...]:
    """Every mesh of all the target's devices over which the model splits and in which it fits, the fastest first.

    Each has as many slots as its memory holds at the workload's mean context.
    """
    found = []
    has_experts = any(isinstance(layer.mlp, MoeSpec) for layer in model.layers)
    for sizes in _factorisations(machine.num_devices, has_experts=has_experts):
        try:
            plan = _plan_mesh(config, model, machine, workload, sizes)
        except ConfigError:  # the model does not split over it
            continue
        if plan is not None:
            found.append(plan)
    # Of equally fast ones, to three digits, the one with fewer links to cross stays first.
    return tuple(sorted(found, key=lambda plan: -float(f"{plan.prediction.tokens_per_s:.3g}")))


def _plan_mesh(
    config: RuntimeConfig, model: ModelConfig, machine: TargetMachine, workload: Workload, sizes: dict[MeshAxis, int]
) -> MeshPlan | None:
    """None where the weights leave no room for a sequence."""
    target = machine.target
    mesh = planned_mesh(machine, {str(axis): size for axis, size in sizes.items()})
    placement = partition(model, mesh)
    dtype = compute_dtype(model, config.dtype)
    config = resolve(config, model, dtype)
    decoder = AbstractDecoder(with_places(model, mesh), dtype)
    weights = device_weight_bytes(decoder, placement)
    room = usable_bytes(placement, target.pool_bytes) - weights
    num_slots = num_fitting(config, model, placement, room, workload.mean_context_len)
    if num_slots == 0:
        return None
    assert config.max_step_tokens is not None
    prediction = predict(
        _device_model(config, model, placement, weights),
        target,
        workload,
        num_sequences=num_slots,
        num_step_tokens=max(config.max_step_tokens, 2 * num_slots),
    )
    return MeshPlan(mesh=mesh_text(sizes), weights=weights, prediction=prediction)


def _factorisations(num_devices: int, *, has_experts: bool) -> Iterator[dict[MeshAxis, int]]:
    for expert in range(1, (num_devices if has_experts else 1) + 1):
        for tensor in range(1, num_devices + 1):
            if num_devices % (expert * tensor) == 0:
                yield {"data": num_devices // (expert * tensor), "expert": expert, "tensor": tensor}
