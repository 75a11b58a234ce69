"""What a step computes, as functions for `programs` to compile: whole, or in the parts that weight streaming runs.

A step embeds its tokens, runs the layers, and ends with the head: logits, sampling, scores. Each of the three is
written once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..models.batch import StepBatch
from ..models.config import LayerSpec
from ..models.decoder import AbstractDecoder, Decoder, Params, run_period
from ..models.kv_cache import PagedAttend
from ..models.step import Step, rope_tables
from ..pallas_kernels.dispatch import KernelChoices
from ..pallas_kernels.paged_attention import KvCache
from ..sharding.rules import RULES, Placement
from ..sharding.specs import ParamSpec
from . import slot_state
from .batching import FROM_SLOT, Layout, StepInputs, unpack
from .logprobs import Scores, no_scores, prompt_logprobs, sharded_top_k
from .sampling import Sampled, SamplingRows, Wants, sample
from .slot_state import SlotState


class DeviceState(NamedTuple):
    """What stays on the device from step to step, donated to every program."""

    cache: KvCache[Array]  # values [R, L, P, 2, K, Z, H], scales [R, L, P, 2, K, Z] or None
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
    cache: KvCache[ParamSpec]
    num_slots: int  # S, of each data shard
    pages_per_slot: int
    max_context_len: int
    max_decode_steps: int

    def step(self, batch: StepBatch, is_decode: bool) -> Step:
        """What the layers of one step share."""
        return Step(
            placement=self.placement,
            kernels=self.kernels,
            attend=PagedAttend(batch, self.placement, self.kernels, one_query_per_slot=is_decode),
            ropes=rope_tables(self.decoder.config, batch.positions, self.max_context_len),
        )


# ---- whole steps


def mixed_step(
    model: StepModel, layout: Layout, params: Params, state: DeviceState, packed: Array, flags: Array
) -> tuple[DeviceState, StepOutputs]:
    """One step in which rows may have any number of queries."""
    inputs = unpack(layout, packed, flags)
    decoder = model.decoder.bind(params)
    step = model.step(inputs.batch, is_decode=False)
    x = decoder.embed_tokens(_input_tokens(inputs, state.slots), step)
    x, cache = decoder.run_layers(x, state.cache, step)
    assert cache is not None
    slots, outputs = _finish_mixed(decoder, x, step, state.slots, inputs)
    return DeviceState(cache, slots), outputs


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
            positions=inputs.batch.positions + i,
            rows=jnp.where(active, inputs.batch.rows, num_rows),
            kv_lens=jnp.where(active, inputs.batch.kv_lens + i, 0),
        )
        step = model.step(batch, is_decode=True)
        x = decoder.embed_tokens(_input_tokens(inputs._replace(batch=batch), state.slots), step)
        x, cache = decoder.run_layers(x, state.cache, step)
        assert cache is not None
        slots, sampled = _finish_decode(decoder, x, step, state.slots, inputs, batch.positions + 1, active)
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


# ---- the same in parts, `control` being (packed, flags); a decode is one step only, whatever the flags say


def embed_step(
    model: StepModel, layout: Layout, params: Params, slots: SlotState, control: tuple[Array, Array]
) -> Array:  # [R, T, D]
    """The residual stream's start; `params` are those of the decoder without layers."""
    inputs = unpack(layout, *control)
    step = model.step(inputs.batch, layout.bucket.is_decode)
    return model.decoder.without_layers.bind(params).embed_tokens(_input_tokens(inputs, slots), step)


def layer_step(
    model: StepModel, layout: Layout, spec: LayerSpec, params: Params, x: Array,
    cache: KvCache[Array], layer: Array, control: tuple[Array, Array],
) -> tuple[Array, KvCache[Array]]:  # fmt: skip
    """One layer of the kind `spec`: the residual stream [R, T, D] behind it, and the cache."""
    inputs = unpack(layout, *control)
    step = model.step(inputs.batch, layout.bucket.is_decode)
    x, new_cache = run_period([model.decoder.bind_layer(spec, params)], x, cache, layer, step)
    assert new_cache is not None
    return x, new_cache


def head_step(
    model: StepModel, layout: Layout, params: Params, slots: SlotState, x: Array, control: tuple[Array, Array]
) -> tuple[SlotState, StepOutputs]:
    """Logits, sampling and scores; `params` are those of the decoder without layers."""
    inputs = unpack(layout, *control)
    decoder = model.decoder.without_layers.bind(params)
    step = model.step(inputs.batch, layout.bucket.is_decode)
    if not layout.bucket.is_decode:
        return _finish_mixed(decoder, x, step, slots, inputs)
    positions = inputs.batch.positions + 1
    slots, sampled = _finish_decode(decoder, x, step, slots, inputs, positions, inputs.budgets > 0)
    return slots, StepOutputs(jax.tree.map(lambda a: a[None], sampled), None)


# ---- the beginning and the end of a step


def _input_tokens(inputs: StepInputs, slots: SlotState) -> Int[Array, "R T"]:
    """The step's tokens, FROM_SLOT ones taken from their slots."""

    def one_shard(tokens: Array, rows: Array, row_slots: Array, last: Array) -> Array:
        by_row = slot_state.rows_of(last, row_slots)
        return jnp.where(tokens == FROM_SLOT, slot_state.rows_of(by_row, rows), tokens)

    batch = inputs.batch
    return jax.vmap(one_shard)(batch.tokens, batch.rows, inputs.sampling.slots, slots.last_tokens)


def _finish_mixed(
    decoder: Decoder, x: Array, step: Step, slots: SlotState, inputs: StepInputs
) -> tuple[SlotState, StepOutputs]:
    """Sample behind each row's last query, and score the prompts of those who asked."""
    last = jnp.maximum(inputs.batch.cu_query_lens[:, 1:] - 1, 0)
    rows = step.placement.constrain(jax.vmap(slot_state.rows_of)(x, last), "shard", "slots", "embed")
    slots, sampled = _finish_decode(decoder, rows, step, slots, inputs, inputs.batch.kv_lens, inputs.budgets > 0)
    logits_of = lambda block: decoder.logits(block, step)  # noqa: E731
    scored = jax.vmap(prompt_logprobs, in_axes=(0, None, 0, None, None), spmd_axis_name=RULES["shard"])
    prompt = scored(x, logits_of, inputs.targets, inputs.any_prompt_logprobs, sharded_top_k(step.placement))
    return slots, StepOutputs(jax.tree.map(lambda a: a[None], sampled), prompt)


def _finish_decode(
    decoder: Decoder, rows: Array, step: Step, slots: SlotState, inputs: StepInputs, positions: Array, active: Array
) -> tuple[SlotState, Sampled]:
    """Sample the token at `positions` [R, B] of each row [R, B, D]."""
    logits = step.placement.constrain(decoder.logits(rows, step), "shard", "slots", "vocab")
    slots, sampled = _sample_and_record(step.placement, logits, slots, inputs.sampling, positions, active, inputs.wants)
    return slots, sampled


@functools.partial(jax.jit, static_argnums=0)  # programs with as many rows share its trace
def _sample_and_record(
    placement: Placement, logits: Array, slots: SlotState, rows: SamplingRows, positions: Array, active: Array,
    wants: Wants,
) -> tuple[SlotState, Sampled]:  # fmt: skip
    """Sample each row's token at `positions` [R, B] and remember those of the active rows."""
    sample_shard = functools.partial(sample, wants=wants, top_k=sharded_top_k(placement))
    sampled = jax.vmap(sample_shard, spmd_axis_name=RULES["shard"])(logits, slots, rows, positions)
    recorded: SlotState = jax.vmap(slot_state.record)(slots, rows.slots, sampled.tokens, active)
    return recorded, sampled
