"""Every program of a runtime before it is compiled: what it computes, what goes in and out, and where that lies.

All of it follows from shapes, so that a program that was compiled elsewhere can be called without tracing its function.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from jaxtyping import Array

from ..models.decoder import LayerParams
from ..sharding.axes import Axes, LogicalAxis
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec, SpecTree
from . import slot_state
from .batching import NUM_FLAGS, Layout
from .buckets import Bucket
from .logprobs import Scores, no_scores
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

_SLOT_AXES: dict[str, Axes] = {
    "last_tokens": ("shard", "slots"),
    "counts": ("shard", "slots", "vocab"),
    "bias": ("shard", "slots", "vocab"),
    "recent": ("shard", "slots", None),
    "bad_words": ("shard", "slots", None, None),
    "stop_ids": ("shard", "slots", None),
}
INSTALL, INITIAL_STATE = "install", "initial-state"  # their names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """One program; arguments and outputs are trees of shapes with shardings."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: Any
    donated: tuple[int, ...] = ()  # arguments whose memory becomes that of outputs

    def lower(self) -> Lowered:
        """Traced, for the devices of its shardings."""
        shardings = jax.tree.map(lambda a: a.sharding, self.outputs)
        jitted = jax.jit(self.function, donate_argnums=self.donated, out_shardings=shardings)
        lowered = jitted.lower(*self.arguments)
        found, expected = (jax.tree.map(lambda a: (a.shape, a.dtype), t) for t in (lowered.out_info, self.outputs))
        assert found == expected, f"{self.name}: {found} is not {expected}"
        return lowered


def step_name(bucket: Bucket) -> str:
    """The name of a bucket's program, or the beginning of the names of its parts."""
    return f"{'decode' if bucket.is_decode else 'mixed'}-{bucket.num_tokens}"


def layer_names(model: StepModel, bucket: Bucket) -> list[str]:
    """The name of each layer's program in a streamed step; layers of one kind share theirs."""
    kinds = list(dict.fromkeys(layer.spec for layer in model.decoder.layers))
    return [f"{step_name(bucket)}-layer-{kinds.index(layer.spec)}" for layer in model.decoder.layers]


def program_specs(model: StepModel, buckets: tuple[Bucket, ...], *, streams: bool) -> dict[str, ProgramSpec]:
    """All programs of a runtime by name: one for each bucket, or where weights are streamed its parts, and two more."""
    state = _abstract_state(model)
    specs = [_install(model, state), _initial_state(model, state)]
    for bucket in buckets:
        specs += _streamed(model, bucket, state) if streams else [_step(model, bucket, state)]
    return {spec.name: spec for spec in specs}


# ---- shapes and shardings


def abstract_params(model: StepModel) -> Any:
    """The parameters as shapes with shardings."""
    return _abstract_tree(model.decoder.specs, model.placement)


def abstract_control(model: StepModel, layout: Layout) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The packed array and the flags of a bucket's steps."""
    packed = ParamSpec((model.placement.num_shards, layout.width), np.dtype(np.int32), ("shard", None))
    flags = ParamSpec((NUM_FLAGS,), np.dtype(np.int32), (None,))
    return _abstract(packed, model.placement), _abstract(flags, model.placement)


def layer_number(model: StepModel) -> jax.ShapeDtypeStruct:
    """The number of a layer, as the program of a streamed layer takes it."""
    return _abstract(ParamSpec((), np.dtype(np.int32), ()), model.placement)


def _abstract(spec: ParamSpec, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placement.sharding(spec.axes))


def _abstract_tree(specs: SpecTree, placement: Placement) -> Any:
    is_spec = lambda x: isinstance(x, ParamSpec)  # noqa: E731
    return jax.tree.map(lambda s: _abstract(s, placement), specs, is_leaf=is_spec)


def _make_state(model: StepModel) -> DeviceState:
    one = empty_slots(model.num_slots, model.decoder.config.vocab_size)
    shards = model.placement.num_shards
    slots = jax.tree.map(lambda a: jnp.broadcast_to(a, (shards, *a.shape)), one)
    return DeviceState(jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), model.cache), slots)


def _abstract_state(model: StepModel) -> DeviceState:
    shapes = jax.eval_shape(lambda: _make_state(model))
    slots: dict[str, Any] = {name: model.placement.sharding(axes) for name, axes in _SLOT_AXES.items()}
    cache: Any = jax.tree.map(lambda spec: model.placement.sharding(spec.axes), model.cache)
    abstract: DeviceState = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, DeviceState(cache, SlotState(**slots))
    )
    return abstract


def _outputs(model: StepModel, bucket: Bucket, num_steps: int) -> StepOutputs:
    """Sampled tokens and scores [num_steps, R, B, ...], and in mixed steps the scores of prompts [R, T, ...]."""
    placement, shards = model.placement, model.placement.num_shards
    if len({device.process_index for device in placement.mesh.devices.flat}) > 1:  # every process plans with all tokens
        placement = dataclasses.replace(placement, replicated=frozenset(get_args(LogicalAxis)))

    def scores(lead: tuple[int, ...], axes: Axes) -> Any:
        def one(a: Any) -> jax.ShapeDtypeStruct:
            spec = ParamSpec((*lead, *a.shape[1:]), a.dtype, (*axes, *(None,) * (a.ndim - 1)))
            return _abstract(spec, placement)

        return jax.tree.map(one, jax.eval_shape(lambda: no_scores(1)))

    rows: Scores = scores((num_steps, shards, bucket.num_rows), (None, "shard", "slots"))
    tokens: Any = jax.ShapeDtypeStruct(rows.rank.shape, jnp.int32, sharding=rows.rank.sharding)
    prompt = None if bucket.is_decode else scores((shards, bucket.num_tokens), ("shard", "tokens"))
    return StepOutputs(Sampled(tokens, *rows), prompt)


# ---- one program each


def _step(model: StepModel, bucket: Bucket, state: DeviceState) -> ProgramSpec:
    layout = Layout(bucket, model.pages_per_slot)
    return ProgramSpec(
        name=step_name(bucket),
        function=functools.partial(decode_steps if bucket.is_decode else mixed_step, model, layout),
        arguments=(abstract_params(model), state, *abstract_control(model, layout)),
        outputs=(state, _outputs(model, bucket, model.max_decode_steps if bucket.is_decode else 1)),
        donated=(1,),
    )


def _streamed(model: StepModel, bucket: Bucket, state: DeviceState) -> list[ProgramSpec]:
    """Embed, a layer of each kind, and head."""
    placement, layout, name = model.placement, Layout(bucket, model.pages_per_slot), step_name(bucket)
    control = abstract_control(model, layout)
    top = _abstract_tree(model.decoder.without_layers.specs, placement)
    shape = (placement.num_shards, bucket.num_tokens, model.decoder.config.embed_dim)
    x = _abstract(ParamSpec(shape, model.decoder.dtype, ("shard", "tokens", "embed")), placement)

    def layer_spec(layer: LayerParams, name: str) -> ProgramSpec:
        return ProgramSpec(
            name=name,
            function=functools.partial(layer_step, model, layout, layer.spec),
            arguments=(_abstract_tree(layer.specs, placement), x, state.cache, layer_number(model), control),
            outputs=(x, state.cache),
            donated=(2,),
        )

    kinds = dict(zip(layer_names(model, bucket), model.decoder.layers, strict=True))
    embed = ProgramSpec(
        name=f"{name}-embed",
        function=functools.partial(embed_step, model, layout),
        arguments=(top, state.slots, control),
        outputs=x,
    )
    head = ProgramSpec(
        name=f"{name}-head",
        function=functools.partial(head_step, model, layout),
        arguments=(top, state.slots, x, control),
        outputs=(state.slots, _outputs(model, bucket, num_steps=1)),
        donated=(1,),
    )
    return [embed, *(layer_spec(layer, name) for name, layer in kinds.items()), head]


def _initial_state(model: StepModel, state: DeviceState) -> ProgramSpec:
    return ProgramSpec(name=INITIAL_STATE, function=lambda: _make_state(model), arguments=(), outputs=state)


def _install(model: StepModel, state: DeviceState) -> ProgramSpec:
    everywhere = model.placement.sharding(())
    row = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype, sharding=everywhere), state.slots)
    slot = _abstract(ParamSpec((model.placement.num_shards,), np.dtype(np.int32), ("shard",)), model.placement)

    def install(state: DeviceState, slot: Array, row: SlotState) -> DeviceState:
        slots = jax.vmap(slot_state.install, in_axes=(0, 0, None))(state.slots, slot, row)
        return DeviceState(state.cache, slots)

    return ProgramSpec(name=INSTALL, function=install, arguments=(state, slot, row), outputs=state, donated=(0,))
