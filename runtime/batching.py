"""From a StepPlan to the arrays of a bucket: one packed int32 array per step, and its inverse inside the program."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..models.batch import StepBatch
from .buckets import Bucket
from .plan import ShardPlan, StepPlan, numbered
from .sampling import SamplingRows, Wants
from .sequence import Sequence

# Sampling parameters of a row, as they lie in the packed array; floats by their bits.
_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
_INTS = ("top_k", "seed_hi", "seed_lo", "n_index", "min_position")
_PARAMS = (*_FLOATS, *_INTS)
_TOKEN_FIELDS = ("tokens", "positions", "rows", "targets")
NUM_FLAGS = 2 + len(Wants._fields)  # num_steps, any_prompt_logprobs, then those of Wants
FROM_SLOT = -1  # in place of a token: the one that its slot sampled last, which only the device knows


class Control(NamedTuple):
    """One step's packed inputs, on the host."""

    packed: Int[np.ndarray, "R C"]
    flags: Int[np.ndarray, " F"]  # as NUM_FLAGS says


class StepInputs(NamedTuple):
    """The unpacked inputs, inside a program."""

    batch: StepBatch
    sampling: SamplingRows  # arrays [R, B]
    budgets: Int[Array, "R B"]  # decode: steps in which the row is active; mixed: 1 if the row samples
    targets: Int[Array, "R T"]  # mixed: the token after each, for prompt logprobs; -1 none
    num_steps: Int[Array, ""]
    any_prompt_logprobs: Array
    wants: Wants


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each field of a bucket's step lies in a row of the packed array."""

    bucket: Bucket
    pages_per_slot: int

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape, in order."""
        tokens, rows = self.bucket.num_tokens, self.bucket.num_rows
        fields: dict[str, tuple[int, ...]] = {
            "slots": (rows,),
            "budgets": (rows,),
            "kv_lens": (rows,),
            "page_tables": (rows, self.pages_per_slot),
            "params": (len(_PARAMS), rows),
        }
        if not self.bucket.is_decode:
            fields |= {"cu_query_lens": (rows + 1,), **dict.fromkeys(_TOKEN_FIELDS, (tokens,))}
        return fields

    @property
    def width(self) -> int:
        """C, in int32 words."""
        return sum(math.prod(shape) for shape in self.fields().values())

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Each field as a view into the packed array [..., C]."""
        views, offset = {}, 0
        for name, shape in self.fields().items():
            size = math.prod(shape)
            views[name] = packed[..., offset : offset + size].reshape(*packed.shape[:-1], *shape, copy=False)
            offset += size
        return views

    def split(self, packed: Int[Array, "R C"]) -> dict[str, Array]:
        """Each field as an array [R, ...], and each sampling parameter as one of its own dtype."""
        arrays, offset = {}, 0
        for name, shape in self.fields().items():
            size = math.prod(shape)
            arrays[name] = packed[:, offset : offset + size].reshape(packed.shape[0], *shape)
            offset += size
        params = arrays.pop("params")
        for i, name in enumerate(_PARAMS):
            dtype = jnp.float32 if name in _FLOATS else jnp.uint32 if name.startswith("seed") else jnp.int32
            arrays[name] = jax.lax.bitcast_convert_type(params[:, i], dtype)
        return arrays


def unpack(layout: Layout, packed: Int[Array, "R C"], flags: Int[Array, " F"]) -> StepInputs:
    """The inverse of `Batcher.pack`; a decode bucket's tokens are all FROM_SLOT."""
    f = layout.split(packed)
    num_shards, rows = packed.shape[0], layout.bucket.num_rows
    if layout.bucket.is_decode:
        row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (num_shards, rows))
        f["rows"] = jnp.where(f["budgets"] > 0, row, rows)
        f["positions"] = jnp.maximum(f["kv_lens"] - 1, 0)
        f["tokens"] = f["targets"] = jnp.full((num_shards, rows), FROM_SLOT, jnp.int32)
        cu = jnp.arange(rows + 1, dtype=jnp.int32)
        f["cu_query_lens"] = jnp.broadcast_to(cu, (num_shards, rows + 1))
    batch = StepBatch(**{name: f[name] for name in StepBatch._fields})
    sampling = SamplingRows(**{name: f[name] for name in SamplingRows._fields})
    wants = Wants(*(flags[2 + i] != 0 for i in range(len(Wants._fields))))
    return StepInputs(batch, sampling, f["budgets"], f["targets"], flags[0], flags[1] != 0, wants)


class Batcher:
    """Keeps each slot's sampling parameters as arrays, and packs steps from them."""

    def __init__(self, num_shards: int, num_slots: int, pages_per_slot: int) -> None:
        shape = (num_shards, num_slots)
        self._params = np.zeros((*shape, len(_PARAMS)), np.int32)
        self._wants = np.zeros((*shape, len(Wants._fields)), bool)
        self._pages_per_slot = pages_per_slot
        self._num_slots = num_slots

    def layout(self, bucket: Bucket) -> Layout:
        """The packed layout of a bucket's steps."""
        return Layout(bucket, self._pages_per_slot)

    def admit(self, sequence: Sequence) -> None:
        """Take over the sampling parameters of a sequence that has just got its slot."""
        at = (sequence.shard, sequence.slot)
        params = sequence.request.params
        assert params.seed is not None
        seed = params.seed % 2**64
        values: dict[str, float | int] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
            "repetition": params.repetition_penalty,
            "top_k": params.top_k,
            "seed_hi": _signed(seed >> 32),
            "seed_lo": _signed(seed & 0xFFFFFFFF),
            "n_index": sequence.index,
            "min_position": sequence.prompt_len + params.min_tokens,
        }
        self._params[at] = [_bits(values[name]) if name in _FLOATS else values[name] for name in _PARAMS]
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
        is_random = params.temperature > 0
        wants = {
            "any_random": is_random,
            "any_top_k": is_random and params.top_k > 0,
            "any_top_p": is_random and params.top_p < 1,
            "any_biased": bool(params.logit_bias) or params.allowed_token_ids is not None,
            "any_penalized": any(penalties),
            "any_bad_words": bool(sequence.request.bad_word_ids),
            "any_min_tokens": params.min_tokens > 0,
            "any_logprobs": params.logprobs is not None,
        }
        self._wants[at] = [wants[name] for name in Wants._fields]

    def pack(self, plan: StepPlan, bucket: Bucket) -> Control:
        """Fresh arrays each step: on a CPU the device reads the host's memory, possibly after this returns."""
        layout = self.layout(bucket)
        packed = np.zeros((len(plan.shards), layout.width), np.int32)
        flags = np.zeros(NUM_FLAGS, np.int32)
        views = layout.views(packed)
        at = numbered([part.num_rows for part in plan.shards])
        shard, slots = at[0], _slots(plan)
        self._fill_rows(views, plan, at, slots)
        if not bucket.is_decode:
            for r, shard_plan in enumerate(plan.shards):
                _fill_tokens({name: view[r] for name, view in views.items()}, shard_plan, bucket)
        chunks = (chunk for shard_plan in plan.shards for chunk in shard_plan.chunks)
        flags[0] = plan.num_steps
        flags[1] = any(c.sequence.request.params.prompt_logprobs is not None for c in chunks)
        flags[2:] = self._wants[shard, slots].any(axis=0)
        return Control(packed, flags)

    def _fill_rows(
        self, views: dict[str, np.ndarray], plan: StepPlan, at: tuple[np.ndarray, np.ndarray], slots: np.ndarray
    ) -> None:
        """Every row of every shard at once: decodes from the arrays of the plan, chunks one by one."""
        views["slots"][...] = self._num_slots  # padding rows have no slot: what they would record is dropped
        views["slots"][at] = slots
        tables = np.concatenate([part.page_tables for part in plan.shards])
        views["page_tables"][..., : tables.shape[1]][at] = tables
        params = views["params"].swapaxes(1, 2)  # [R, B, parameter]
        params[...] = _PADDING
        params[at] = self._params[at[0], slots]
        decodes = at if plan.is_decode else numbered([len(part.decoding) for part in plan.shards])
        views["budgets"][decodes] = np.concatenate([part.budgets for part in plan.shards])
        views["kv_lens"][decodes] = np.concatenate([part.positions for part in plan.shards]) + 1
        for r, part in enumerate(plan.shards):
            for b, chunk in enumerate(part.chunks, start=len(part.decoding)):
                views["budgets"][r, b] = chunk.samples
                views["kv_lens"][r, b] = chunk.start + chunk.num_tokens


def _slots(plan: StepPlan) -> np.ndarray:
    """Of all rows, shard by shard."""
    parts = []
    for part in plan.shards:
        parts.append(part.slots)
        if part.chunks:
            parts.append(np.array([chunk.slot for chunk in part.chunks], np.int32))
    return np.concatenate(parts)


def _fill_tokens(views: dict[str, np.ndarray], shard: ShardPlan, bucket: Bucket) -> None:
    """Decodes first, one token each; then each chunk's tokens."""
    end = len(shard.slots)
    views["rows"][:] = bucket.num_rows
    views["rows"][:end] = np.arange(end)
    views["tokens"][:end] = FROM_SLOT
    views["targets"][:] = -1
    views["positions"][:end] = shard.positions
    views["cu_query_lens"][: end + 1] = np.arange(end + 1)
    for row, chunk in enumerate(shard.chunks, start=end):
        at = slice(end, end + chunk.num_tokens)
        stop = chunk.start + chunk.num_tokens
        views["tokens"][at] = chunk.sequence.tokens[chunk.start : stop]
        views["positions"][at] = np.arange(chunk.start, stop)
        views["rows"][at] = row
        if chunk.sequence.request.params.prompt_logprobs is not None:
            following = chunk.sequence.tokens[chunk.start + 1 : stop + 1]
            views["targets"][end : end + len(following)] = following
        end += chunk.num_tokens
        views["cu_query_lens"][row + 1] = end
    views["cu_query_lens"][len(shard.slots) + len(shard.chunks) + 1 :] = end


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _bits(value: float) -> int:
    """A float32's, as an int32."""
    return int(np.float32(value).view(np.int32))


_PADDING = np.array([_bits(float(name in ("top_p", "repetition"))) for name in _PARAMS], np.int32)
"""The parameters of rows that nobody has."""
