"""The compiled programs: exactly one per bucket, made before the first request; nothing compiles after start."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jaxtyping import Array, Int
from tqdm import tqdm

from ..models.batch import StepBatch
from ..models.decoder import AbstractDecoder, Decoder, Params
from ..models.kv_cache import CACHE_AXES, PagedAttend
from ..models.step import Step, rope_tables
from ..pallas_kernels.dispatch import KernelChoices
from ..sharding.axes import Axes
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec
from . import slot_state
from .batching import FROM_SLOT, NUM_FLAGS, Layout, unpack
from .buckets import Bucket
from .logprobs import Scores, no_scores, prompt_logprobs
from .sampling import Sampled, SamplingRows, Wants, sample
from .slot_state import SlotState, empty_slots

_SLOT_AXES: dict[str, Axes] = {
    "last_tokens": ("shard", "slots"),
    "counts": ("shard", "slots", "vocab"),
    "bias": ("shard", "slots", "vocab"),
    "recent": ("shard", "slots", None),
    "bad_words": ("shard", "slots", None, None),
    "stop_ids": ("shard", "slots", None),
}


class DeviceState(NamedTuple):
    """What stays on the device from step to step, donated to every program."""

    cache: Array  # [R, L, P, 2, K, Z, H]
    slots: SlotState  # [R, S, ...]


class StepOutputs(NamedTuple):
    """What a step gives back: per decode step and row, and per prompt token if any row asked."""

    sampled: Sampled  # arrays [num_steps, R, B, ...]
    prompt: Scores | None  # arrays [R, T, ...]; None in decode buckets


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepModel:
    """Everything a step program is a function of, apart from its arguments."""

    decoder: AbstractDecoder
    placement: Placement
    kernels: KernelChoices
    cache: ParamSpec
    num_slots: int  # S, of each data shard
    pages_per_slot: int
    max_context_len: int
    max_decode_steps: int

    def forward(
        self, model: Decoder, batch: StepBatch, cache: Array, is_decode: bool
    ) -> tuple[Array, Array, Step]:  # [R, T, D], the cache, and the step for the head
        """Embed and all layers."""
        step = Step(
            placement=self.placement,
            kernels=self.kernels,
            attend=PagedAttend(batch, self.placement, self.kernels, one_query_per_slot=is_decode),
            ropes=rope_tables(self.decoder.config, batch.positions, self.max_context_len),
        )
        x, new_cache = model.run_layers(model.embed_tokens(batch.tokens, step), cache, step)
        assert new_cache is not None
        return x, new_cache, step


def _input_tokens(batch: StepBatch, slots: SlotState, row_slots: Int[Array, "R B"]) -> Int[Array, "R T"]:
    """The step's tokens, FROM_SLOT ones taken from their slots."""

    def one_shard(tokens: Array, rows: Array, row_slots: Array, last: Array) -> Array:
        by_row = slot_state.rows_of(last, row_slots)
        return jnp.where(tokens == FROM_SLOT, slot_state.rows_of(by_row, rows), tokens)

    return jax.vmap(one_shard)(batch.tokens, batch.rows, row_slots, slots.last_tokens)


@jax.jit  # programs with as many rows share its trace
def _sample_and_record(
    logits: Array, slots: SlotState, rows: SamplingRows, positions: Array, active: Array, wants: Wants
) -> tuple[Sampled, SlotState]:
    """Sample each row's token at `positions` [R, B] and remember those of the active rows."""
    sampled = jax.vmap(sample, in_axes=(0, 0, 0, 0, None))(logits, slots, rows, positions, wants)
    return sampled, jax.vmap(slot_state.record)(slots, rows.slots, sampled.tokens, active)


def mixed_step(
    model: StepModel, layout: Layout, params: Params, state: DeviceState, packed: Array, flags: Array
) -> tuple[DeviceState, StepOutputs]:
    """One step in which rows may have any number of queries."""
    inputs = unpack(layout, packed, flags)
    decoder = model.decoder.bind(params)
    tokens = _input_tokens(inputs.batch, state.slots, inputs.sampling.slots)
    x, cache, step = model.forward(decoder, inputs.batch._replace(tokens=tokens), state.cache, is_decode=False)
    last = jnp.maximum(inputs.batch.cu_query_lens[:, 1:] - 1, 0)
    rows = model.placement.constrain(jax.vmap(slot_state.rows_of)(x, last), "shard", "slots", "embed")
    logits = model.placement.constrain(decoder.logits(rows, step), "shard", "slots", "vocab")
    sampled, slots = _sample_and_record(
        logits, state.slots, inputs.sampling, inputs.batch.kv_lens, inputs.budgets > 0, inputs.wants
    )
    scored = jax.vmap(prompt_logprobs, in_axes=(0, None, 0, None))
    prompt = scored(x, lambda block: decoder.logits(block, step), inputs.targets, inputs.any_prompt_logprobs)
    return DeviceState(cache, slots), StepOutputs(jax.tree.map(lambda a: a[None], sampled), prompt)


def decode_steps(
    model: StepModel, layout: Layout, params: Params, state: DeviceState, packed: Array, flags: Array
) -> tuple[DeviceState, StepOutputs]:
    """`num_steps` steps of one query per row, each feeding the token that the one before sampled.

    A row is active until its budget is spent or it samples one of its stop ids; the steps end when no row is active.
    """
    inputs = unpack(layout, packed, flags)
    decoder = model.decoder.bind(params)
    num_rows = layout.bucket.num_rows

    def one(i: Array, state: DeviceState, stopped: Array) -> tuple[DeviceState, Array, Sampled]:
        active = (i < inputs.budgets) & ~stopped
        batch = inputs.batch._replace(
            tokens=_input_tokens(inputs.batch, state.slots, inputs.sampling.slots),
            positions=inputs.batch.positions + i,
            rows=jnp.where(active, inputs.batch.rows, num_rows),
            kv_lens=jnp.where(active, inputs.batch.kv_lens + i, 0),
        )
        x, cache, step = model.forward(decoder, batch, state.cache, is_decode=True)
        logits = model.placement.constrain(decoder.logits(x, step), "shard", "slots", "vocab")
        sampled, slots = _sample_and_record(
            logits, state.slots, inputs.sampling, batch.positions + 1, active, inputs.wants
        )
        stop_ids = jax.vmap(slot_state.rows_of)(slots.stop_ids, inputs.sampling.slots)
        stopped |= jnp.any(stop_ids == sampled.tokens[..., None], axis=-1)
        return DeviceState(cache, slots), stopped, sampled

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, state, stopped, outputs = carry
        state, stopped, sampled = one(i, state, stopped)
        outputs = jax.tree.map(lambda all, new: all.at[i].set(new), outputs, sampled)
        return i + 1, state, stopped, outputs

    def goes_on(carry: tuple[Any, ...]) -> Array:
        i, _, stopped, _ = carry
        unfinished: Array = (i < inputs.num_steps) & jnp.any((i < inputs.budgets) & ~stopped)
        return unfinished

    shape = (model.max_decode_steps, *inputs.budgets.shape)
    one_row = jax.eval_shape(lambda: Sampled(jnp.zeros(1, jnp.int32), *no_scores(1)))
    outputs = jax.tree.map(lambda a: jnp.zeros((*shape, *a.shape[1:]), a.dtype), one_row)
    stopped = jnp.zeros(inputs.budgets.shape, bool)
    _, state, _, outputs = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, stopped, outputs))
    return state, StepOutputs(outputs, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """All that a runtime ever runs on its devices."""

    steps: dict[Bucket, Compiled]  # (params, state, packed, flags) -> (state, outputs); the state is donated
    install: Compiled  # (state, slot of each shard [R], SlotState of one slot) -> state; the state is donated
    initial_state: Compiled  # () -> state


def _abstract(spec: ParamSpec, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placement.sharding(spec.axes))


def abstract_params(model: StepModel) -> Any:
    """The parameters as shapes with shardings."""
    is_spec = lambda x: isinstance(x, ParamSpec)  # noqa: E731
    return jax.tree.map(lambda s: _abstract(s, model.placement), model.decoder.specs, is_leaf=is_spec)


def _make_state(model: StepModel) -> DeviceState:
    one = empty_slots(model.num_slots, model.decoder.config.vocab_size)
    shards = model.placement.num_shards
    slots = jax.tree.map(lambda a: jnp.broadcast_to(a, (shards, *a.shape)), one)
    return DeviceState(jnp.zeros(model.cache.shape, model.cache.dtype), slots)


def _state_shardings(placement: Placement) -> DeviceState:
    slots: dict[str, Any] = {name: placement.sharding(axes) for name, axes in _SLOT_AXES.items()}
    cache: Any = placement.sharding(CACHE_AXES)
    return DeviceState(cache, SlotState(**slots))


def compile_programs(model: StepModel, buckets: tuple[Bucket, ...], *, show_progress: bool) -> Programs:
    """Lower and compile every program of a runtime, from shapes alone: no weight need exist."""
    shardings = _state_shardings(model.placement)
    shapes = jax.eval_shape(lambda: _make_state(model))
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    steps = {}
    with tqdm(total=len(buckets) + 2, desc="compiling", unit="program", delay=1, disable=not show_progress) as bar:
        for bucket in buckets:
            bar.set_postfix_str(str(bucket))
            steps[bucket] = _compile_step(model, bucket, state)
            bar.update()
        install = _compile_install(model, state)
        bar.update()
        initial_state = jax.jit(lambda: _make_state(model), out_shardings=shardings).lower().compile()
        bar.update()
    return Programs(steps=steps, install=install, initial_state=initial_state)


def _compile_step(model: StepModel, bucket: Bucket, state: DeviceState) -> Compiled:
    placement = model.placement
    layout = Layout(bucket, model.pages_per_slot)
    packed = ParamSpec((placement.num_shards, layout.width), np.dtype(np.int32), ("shard", None))
    flags = ParamSpec((NUM_FLAGS,), np.dtype(np.int32), (None,))
    step = functools.partial(decode_steps if bucket.is_decode else mixed_step, model, layout)
    out_shardings = (_state_shardings(placement), _output_shardings(bucket, placement))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=out_shardings)
    return jitted.lower(abstract_params(model), state, *(_abstract(s, placement) for s in (packed, flags))).compile()


def _output_shardings(bucket: Bucket, placement: Placement) -> StepOutputs:
    rows = placement.sharding((None, "shard", "slots"))
    tops = placement.sharding((None, "shard", "slots", None))
    sampled: Any = {"tokens": rows, "logprob": rows, "rank": rows, "top_ids": tops, "top_logprobs": tops}
    if bucket.is_decode:
        return StepOutputs(Sampled(**sampled), None)
    tokens, token_tops = placement.sharding(("shard", "tokens")), placement.sharding(("shard", "tokens", None))
    prompt: Any = {"logprob": tokens, "rank": tokens, "top_ids": token_tops, "top_logprobs": token_tops}
    return StepOutputs(Sampled(**sampled), Scores(**prompt))


def _compile_install(model: StepModel, state: DeviceState) -> Compiled:
    everywhere = model.placement.sharding(())
    row = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype, sharding=everywhere), state.slots)
    slot = _abstract(ParamSpec((model.placement.num_shards,), np.dtype(np.int32), ("shard",)), model.placement)

    def install(state: DeviceState, slot: Array, row: SlotState) -> DeviceState:
        slots = jax.vmap(slot_state.install, in_axes=(0, 0, None))(state.slots, slot, row)
        return DeviceState(state.cache, slots)

    jitted = jax.jit(install, donate_argnums=0, out_shardings=_state_shardings(model.placement))
    return jitted.lower(state, slot, row).compile()
