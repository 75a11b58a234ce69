"""What a deployment takes of each device's memory, and how much more would fit; devices need not be there."""

import bisect
import dataclasses
import math

from jax.sharding import Mesh

from ..errors import ConfigError
from ..models.config import ModelConfig
from ..models.kv_cache import cache_bytes
from ..sharding.mesh import make_mesh
from ..sharding.rules import Placement
from ..sharding.targets import TargetMachine
from .batching import NUM_FLAGS, Layout
from .config import RuntimeConfig
from .deployment import Deployment
from .limits import MAX_LOGPROBS
from .sizes import bytes_of_page, slot_bytes, usable_bytes
from .temporaries import step_temporaries

_MOST_SLOTS = 2**14  # of one data shard that a search considers
_STEPS_ALIVE = 2  # the step that runs and the one whose tokens are being fetched, or that is being planned
_SCORE_BYTES = 4 * (3 + 2 * MAX_LOGPROBS)  # of one token's outputs: id, log probability, rank, the likeliest


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """Stands in a mesh for a device that is not here: shapes and shardings ask for no more."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


def planned_mesh(machine: TargetMachine, sizes: dict[str, int]) -> Mesh:
    """A mesh of a target's devices, for shapes alone.

    Raises:
      ConfigError: it has more devices than the target.
    """
    num_devices = math.prod(sizes.values())
    if num_devices > machine.num_devices:
        raise ConfigError(
            f"mesh {','.join(f'{axis}={size}' for axis, size in sizes.items())} needs {num_devices} devices; target "
            f"{machine.target.name}:{machine.topology} has {machine.num_devices}. Choose a smaller mesh, or a larger "
            f"topology, as in --target={machine.target.name}:1x1x{num_devices}."
        )
    target = machine.target
    planned = [PlannedDevice(i, target.platform, target.device_kind) for i in range(machine.num_devices)]
    return make_mesh(sizes, planned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temporaries:
    """What a step needs on the way, and who says so; an estimate unless the target's own compiler does."""

    num_bytes: int
    source: str
    is_estimate: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of each device."""

    weights: int
    kv_cache: int
    slot_state: int
    control: int  # packed arrays of the steps under way
    outputs: int  # of the steps under way
    temporaries: Temporaries
    memory_bytes: int  # of the device's, that arrays may take
    usable_bytes: int  # without what is kept for fragments

    @property
    def total(self) -> int:
        """All that the deployment takes."""
        fixed = self.weights + self.kv_cache + self.slot_state + self.control + self.outputs
        return fixed + self.temporaries.num_bytes

    @property
    def free(self) -> int:
        """What is left; less than nothing where it does not fit."""
        return self.usable_bytes - self.total


def plan_memory(deployment: Deployment, memory_bytes: int, temporaries: Temporaries | None = None) -> MemoryPlan:
    """The plan of a deployment on devices of `memory_bytes` each; temporaries are estimated unless they are given."""
    config, placement = deployment.config, deployment.model.placement
    assert config.num_slots is not None
    if temporaries is None:
        size = step_temporaries(config, deployment.model.decoder.config, placement)
        temporaries = Temporaries(num_bytes=size, source="shapes", is_estimate=True)
    layouts = [Layout(bucket, deployment.model.pages_per_slot) for bucket in deployment.buckets]
    num_scores = max(
        bucket.num_rows * config.max_decode_steps if bucket.is_decode else bucket.num_rows + bucket.num_tokens
        for bucket in deployment.buckets
    )
    return MemoryPlan(
        weights=deployment.weight_bytes,
        kv_cache=cache_bytes(deployment.model.cache, placement),
        slot_state=slot_bytes(config.num_slots, deployment.model.decoder.config, placement),
        control=_STEPS_ALIVE * 4 * (max(layout.width for layout in layouts) + NUM_FLAGS),
        outputs=_STEPS_ALIVE * num_scores * _SCORE_BYTES,
        temporaries=temporaries,
        memory_bytes=memory_bytes,
        usable_bytes=usable_bytes(placement, memory_bytes),
    )


def num_fitting(config: RuntimeConfig, model: ModelConfig, placement: Placement, room: int, context_len: int) -> int:
    """How many sequences of `context_len` tokens one data shard holds in `room` bytes of each device beside weights.

    `config` is complete, but for num_slots, which would be the answer, and max_step_tokens, which is raised with it.
    """
    assert config.max_step_tokens is not None
    sequence_bytes = -(-context_len // config.page_size) * bytes_of_page(config, model, placement)
    one_slot = slot_bytes(1, model, placement)
    step_tokens = config.max_step_tokens

    def taken(num_slots: int) -> int:
        sized = config.replace(num_slots=num_slots, max_step_tokens=max(step_tokens, 2 * num_slots))
        return num_slots * (sequence_bytes + one_slot) + step_temporaries(sized, model, placement)

    return max(bisect.bisect_right(range(1, _MOST_SLOTS + 1), room, key=taken), 0)
