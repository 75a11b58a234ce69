"""The compiled programs, made before the first request from the functions of `steps`; nothing compiles after start.

Resident weights: exactly one program per bucket. Streamed weights: three per bucket, embed, layer (one for each kind
of layer) and head, which `StreamedStep` runs one after the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jaxtyping import Array
from tqdm import tqdm

from ..errors import CheckpointError
from ..models.kv_cache import CACHE_AXES
from ..sharding.axes import Axes
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec, SpecTree
from . import slot_state
from .batching import NUM_FLAGS, Layout
from .buckets import Bucket
from .logprobs import Scores
from .sampling import Sampled
from .slot_state import SlotState, empty_slots
from .steps import (
    DeviceState,
    StepModel,
    StepOutputs,
    decode_steps,
    embed_step,
    head_step,
    layer_step,
    mixed_step,
)
from .weight_streaming import StreamedParams

_SLOT_AXES: dict[str, Axes] = {
    "last_tokens": ("shard", "slots"),
    "counts": ("shard", "slots", "vocab"),
    "bias": ("shard", "slots", "vocab"),
    "recent": ("shard", "slots", None),
    "bad_words": ("shard", "slots", None, None),
    "stop_ids": ("shard", "slots", None),
}

# (params, state, packed, flags) -> (state, outputs); the state is donated
type StepProgram = Callable[[Any, DeviceState, Any, Any], tuple[DeviceState, StepOutputs]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """All that a runtime ever runs on its devices."""

    steps: dict[Bucket, Compiled] | dict[Bucket, "StreamedStep"]
    install: Compiled  # (state, slot of each shard [R], SlotState of one slot) -> state; the state is donated
    initial_state: Compiled  # () -> state


class StepInterrupted(Exception):
    """A step that stopped between two layers; `state` is what it left, in which its own rows mean nothing."""

    def __init__(self, reason: str, state: DeviceState) -> None:
        super().__init__(reason)
        self.state = state


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedStep:
    """One step, layer by layer, each as soon as its weights are there; called as the program of a whole step is."""

    embed: Compiled
    layers: tuple[Compiled, ...]  # of each of the model's layers; layers of one kind share theirs
    head: Compiled
    layer_numbers: tuple[Array, ...]
    control_shardings: tuple[Any, Any]  # of packed and flags

    def __call__(
        self, params: StreamedParams, state: DeviceState, packed: Any, flags: Any
    ) -> tuple[DeviceState, StepOutputs]:
        """Raises StepInterrupted if the weights of a layer cannot be read."""
        control = jax.device_put((packed, flags), self.control_shardings)
        cache, slots = state
        x = self.embed(params.top, slots, control)
        for number, layer in enumerate(self.layers):
            try:
                weights = params.stream.take(number)
            except CheckpointError as error:
                reason = f"the weights of layer {number} could not be read: {error}"
                raise StepInterrupted(reason, DeviceState(cache, slots)) from error
            x, cache = layer(weights, x, cache, self.layer_numbers[number], control)
            del weights  # the room's arrays, where they are the device's, must go before it is filled again
            params.stream.give_back(number, after=x)
        slots, outputs = self.head(params.top, slots, x, control)
        return DeviceState(cache, slots), outputs


def compile_programs(
    model: StepModel,
    buckets: tuple[Bucket, ...],
    *,
    streams: bool = False,
    show_progress: bool,
    before_each: Callable[[], object] = lambda: None,
) -> Programs:
    """Lower and compile every program of a runtime, from shapes alone: no weight need exist.

    `before_each` is called before each program, and may raise to stop.
    """
    state = _abstract_state(model)
    jobs: dict[Any, Callable[[], Any]] = {
        bucket: functools.partial(_compile_streamed if streams else _compile_step, model, bucket, state)
        for bucket in buckets
    }
    jobs["install"] = functools.partial(_compile_install, model, state)
    jobs["initial state"] = functools.partial(_compile_initial_state, model)
    made = {}
    bar = tqdm(total=len(jobs), desc="compiling", unit="program", delay=1, disable=not show_progress)
    with bar:
        for name, compile_one in jobs.items():
            before_each()
            bar.set_postfix_str(str(name))
            made[name] = compile_one()
            bar.update()
    install, initial_state = made.pop("install"), made.pop("initial state")
    return Programs(steps=made, install=install, initial_state=initial_state)


# ---- shapes and shardings


def _abstract(spec: ParamSpec, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placement.sharding(spec.axes))


def _abstract_tree(specs: SpecTree, placement: Placement) -> Any:
    is_spec = lambda x: isinstance(x, ParamSpec)  # noqa: E731
    return jax.tree.map(lambda s: _abstract(s, placement), specs, is_leaf=is_spec)


def abstract_params(model: StepModel) -> Any:
    """The parameters as shapes with shardings."""
    return _abstract_tree(model.decoder.specs, model.placement)


def _make_state(model: StepModel) -> DeviceState:
    one = empty_slots(model.num_slots, model.decoder.config.vocab_size)
    shards = model.placement.num_shards
    slots = jax.tree.map(lambda a: jnp.broadcast_to(a, (shards, *a.shape)), one)
    return DeviceState(jnp.zeros(model.cache.shape, model.cache.dtype), slots)


def _state_shardings(placement: Placement) -> DeviceState:
    slots: dict[str, Any] = {name: placement.sharding(axes) for name, axes in _SLOT_AXES.items()}
    cache: Any = placement.sharding(CACHE_AXES)
    return DeviceState(cache, SlotState(**slots))


def _abstract_state(model: StepModel) -> DeviceState:
    shapes, shardings = jax.eval_shape(lambda: _make_state(model)), _state_shardings(model.placement)
    abstract: DeviceState = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
    return abstract


def _abstract_control(model: StepModel, layout: Layout) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The packed array and the flags of a bucket's steps."""
    packed = ParamSpec((model.placement.num_shards, layout.width), np.dtype(np.int32), ("shard", None))
    flags = ParamSpec((NUM_FLAGS,), np.dtype(np.int32), (None,))
    return _abstract(packed, model.placement), _abstract(flags, model.placement)


def _output_shardings(bucket: Bucket, placement: Placement) -> StepOutputs:
    rows = placement.sharding((None, "shard", "slots"))
    tops = placement.sharding((None, "shard", "slots", None))
    sampled: Any = {"tokens": rows, "logprob": rows, "rank": rows, "top_ids": tops, "top_logprobs": tops}
    if bucket.is_decode:
        return StepOutputs(Sampled(**sampled), None)
    tokens, token_tops = placement.sharding(("shard", "tokens")), placement.sharding(("shard", "tokens", None))
    prompt: Any = {"logprob": tokens, "rank": tokens, "top_ids": token_tops, "top_logprobs": token_tops}
    return StepOutputs(Sampled(**sampled), Scores(**prompt))


# ---- one program each


def _compile_step(model: StepModel, bucket: Bucket, state: DeviceState) -> Compiled:
    layout = Layout(bucket, model.pages_per_slot)
    step = functools.partial(decode_steps if bucket.is_decode else mixed_step, model, layout)
    out_shardings = (_state_shardings(model.placement), _output_shardings(bucket, model.placement))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=out_shardings)
    return jitted.lower(abstract_params(model), state, *_abstract_control(model, layout)).compile()


def _compile_streamed(model: StepModel, bucket: Bucket, state: DeviceState) -> StreamedStep:
    placement, layout = model.placement, Layout(bucket, model.pages_per_slot)
    control = _abstract_control(model, layout)
    top = _abstract_tree(model.decoder.without_layers.specs, placement)
    stream = placement.sharding(("shard", "tokens", "embed"))
    shardings = _state_shardings(placement)
    embed = jax.jit(functools.partial(embed_step, model, layout), out_shardings=stream)
    embedded = embed.lower(top, state.slots, control).compile()
    shape = (placement.num_shards, bucket.num_tokens, model.decoder.config.embed_dim)
    x = jax.ShapeDtypeStruct(shape, model.decoder.dtype, sharding=stream)
    number = _abstract(ParamSpec((), np.dtype(np.int32), ()), placement)
    kinds = {}
    for layer in model.decoder.layers:
        if layer.spec not in kinds:
            step = jax.jit(
                functools.partial(layer_step, model, layout, layer.spec),
                donate_argnums=2,
                out_shardings=(stream, shardings.cache),
            )
            weights = _abstract_tree(layer.specs, placement)
            kinds[layer.spec] = step.lower(weights, x, state.cache, number, control).compile()
    head = jax.jit(
        functools.partial(head_step, model, layout),
        donate_argnums=1,
        out_shardings=(shardings.slots, _output_shardings(bucket, placement)),
    )
    return StreamedStep(
        embed=embedded,
        layers=tuple(kinds[layer.spec] for layer in model.decoder.layers),
        head=head.lower(top, state.slots, x, control).compile(),
        layer_numbers=tuple(jax.device_put(np.int32(n), number.sharding) for n in range(len(model.decoder.layers))),
        control_shardings=(control[0].sharding, control[1].sharding),
    )


def _compile_initial_state(model: StepModel) -> Compiled:
    return jax.jit(lambda: _make_state(model), out_shardings=_state_shardings(model.placement)).lower().compile()


def _compile_install(model: StepModel, state: DeviceState) -> Compiled:
    everywhere = model.placement.sharding(())
    row = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype, sharding=everywhere), state.slots)
    slot = _abstract(ParamSpec((model.placement.num_shards,), np.dtype(np.int32), ("shard",)), model.placement)

    def install(state: DeviceState, slot: Array, row: SlotState) -> DeviceState:
        slots = jax.vmap(slot_state.install, in_axes=(0, 0, None))(state.slots, slot, row)
        return DeviceState(state.cache, slots)

    jitted = jax.jit(install, donate_argnums=0, out_shardings=_state_shardings(model.placement))
    return jitted.lower(state, slot, row).compile()
