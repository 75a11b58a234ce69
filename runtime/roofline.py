"""What bounds a step on a kind of hardware: arithmetic, memory or links, from shapes alone.

Each formula is of one device and one step of T query tokens of its data shard; n is the tensor axis, e the expert axis.
They count what no implementation can avoid, so what they predict is a ceiling: Williams, Waterman and Patterson,
"Roofline", 2009.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Literal

from ..models.config import AttentionSpec, LayerSpec, ModelConfig, MoeSpec
from ..models.kv_cache import cached_head_bytes
from ..pallas_kernels.quantized_matmul import WeightFormat
from ..pallas_kernels.quantized_matmul.block_scaled import product_of
from ..sharding.axes import MeshAxis
from ..sharding.targets import Target

Term = Literal["compute", "memory", "links"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A request on average, in tokens; the default is that of the record (24,576 OpenOrca prompts)."""

    prompt_len: int = 260
    output_len: int = 294

    @property
    def mean_context_len(self) -> int:
        """Keys of a running sequence, averaged over its output."""
        return self.prompt_len + self.output_len // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one step takes of one device."""

    flops: float
    memory_bytes: float
    link_bytes: float  # sent by the device to others
    format_flops: Mapping[WeightFormat, float] = dataclasses.field(default_factory=dict)  # part of flops: with weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The seconds that each term of a cost takes by itself; the step takes as long as the longest."""

    compute_s: float
    memory_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        """The least that the step takes."""
        return max(self.compute_s, self.memory_s, self.links_s)

    @property
    def term(self) -> Term:
        """What binds."""
        terms: dict[Term, float] = {"compute": self.compute_s, "memory": self.memory_s, "links": self.links_s}
        return max(terms, key=terms.__getitem__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """A model as one device of a mesh has it."""

    config: ModelConfig
    mesh: Mapping[MeshAxis, int]
    dtype: str  # of weights and activations
    itemsize: int  # bytes of a number in it
    cache_dtype: str
    weight_bytes: int  # of this device

    def cost(self, *, num_tokens: float, num_sampled: float, num_keys: float, num_cached: float) -> Cost:
        """A step of `num_tokens` query tokens of which each sees `num_keys` keys; `num_sampled` rows go to the head.

        `num_cached` tokens' keys and values are read or written. Units: FLOP and bytes.

        FLOPs: 2 T (weights that a token meets) / n + 4 T N H keys / n for scores and mixing + 2 V D sampled / n.
        Memory: the device's weights once, but for the input embedding, of which T rows are read; and the cache.
        Links: see `_link_bytes`.
        """
        config, n = self.config, self.mesh["tensor"]
        flops = 2 * num_sampled * config.vocab_size * config.embed_dim / n
        by_format = collections.defaultdict[WeightFormat | None, float](float, {config.head_format: flops})
        cached_bytes = 0.0
        for layer, count in collections.Counter(config.layers).items():
            window = layer.attention.window or num_keys
            scores = 4 * layer.attention.num_heads * layer.attention.head_dim * min(num_keys, window) / n
            met = self._met_weights(layer)
            flops += count * num_tokens * (2 * sum(met.values()) + scores)
            for format, weights in met.items():
                by_format[format] += 2 * count * num_tokens * weights
            seen = min(1.0, window / num_keys) if num_keys else 1.0
            cached_bytes += count * num_cached * seen * self._cached_token_bytes(layer.attention)
        unread = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim * self.itemsize // n
        memory_bytes = self.weight_bytes - unread + cached_bytes
        return Cost(
            flops=flops,
            memory_bytes=memory_bytes,
            link_bytes=self._link_bytes(num_tokens),
            format_flops={format: part for format, part in by_format.items() if format is not None},
        )

    def cache_bytes(self) -> int:
        """Of one token of one sequence, over all layers, scales included, with a KV head at least per device."""
        return sum(self._cached_token_bytes(layer.attention) for layer in self.config.layers)

    def _cached_token_bytes(self, attention: AttentionSpec) -> int:
        n = self.mesh["tensor"]
        num_heads = max(attention.num_kv_heads, n) // n
        return 2 * num_heads * cached_head_bytes(attention.head_dim, self.cache_dtype)

    def _met_weights(self, layer: LayerSpec) -> Mapping[WeightFormat | None, float]:
        """Weights of this device that a token of its shard meets in a layer, by their format; of an expert group's
        devices on average.

        D H (2 N + 2 K) / n of attention; 3 D F / n of an MLP, k times that of experts and D E of the router, which
        every device computes whole, as it does K where K does not split over n.
        """
        n, dim, attention, mlp = self.mesh["tensor"], self.config.embed_dim, layer.attention, layer.mlp
        kv_heads = attention.num_kv_heads if attention.num_kv_heads % n else attention.num_kv_heads / n
        heads = {"q": attention.num_heads / n, "o": attention.num_heads / n, "k": kv_heads, "v": kv_heads}
        met = collections.defaultdict[WeightFormat | None, float](float)
        for name, count in heads.items():
            met[dict(attention.formats).get(name)] += dim * attention.head_dim * count
        num_mlps = mlp.num_experts_per_token if isinstance(mlp, MoeSpec) else 1
        for name in ("gate", "up", "down"):
            met[dict(mlp.formats).get(name)] += num_mlps * dim * mlp.mlp_dim / n
        met[None] += dim * mlp.num_experts if isinstance(mlp, MoeSpec) else 0
        return met

    def _link_bytes(self, num_tokens: float) -> float:
        """Bytes that a device sends: activations [T, D] by collectives.

        An all-reduce over tensor, twice a layer and once for the embedding, sends 2 (n - 1) / n of them (a ring:
        Patarasuk and Yuan 2009). Experts get T k rows of D and return them, (e - 1) / e of which cross a link.
        """
        n, e = self.mesh["tensor"], self.mesh["expert"]
        activations = num_tokens * self.config.embed_dim * self.itemsize
        sent = 2 * (n - 1) / n * activations * (1 + 2 * self.config.num_layers)
        for layer in self.config.layers:
            if isinstance(layer.mlp, MoeSpec):
                sent += 2 * (e - 1) / e * activations * layer.mlp.num_experts_per_token
        return sent


def bound(cost: Cost, target: Target, dtype: str) -> Bound:
    """A cost at the target's dense peaks; products with quantized weights at those of their format."""
    plain = cost.flops - sum(cost.format_flops.values())
    compute_s = plain / target.flops[dtype]
    for format, flops in cost.format_flops.items():
        compute_s += flops / product_flops(format, target, dtype)
    return Bound(
        compute_s=compute_s,
        memory_s=cost.memory_bytes / target.memory_bandwidth,
        links_s=cost.link_bytes / target.link_bandwidth if cost.link_bytes else 0.0,
    )


def product_flops(format: WeightFormat, target: Target, dtype: str) -> float:
    """FLOP per second of products with weights of a format and activations of dtype, as the kernels compute them.

    Quantized activations multiply at the rate of what they are stored in, though not beside weights of 4 bits. Those of
    their own dtype do so too beside block-scaled weights, on a chip that multiplies these, but as a sum of terms; a
    dequantized weight may be faster.
    """
    plain = target.flops[dtype]
    quantized = {"float8_e4m3fn": "float8", "int8": "int8"}.get(format.activations)
    if quantized and not format.is_packed:
        return target.flops.get(quantized, plain)
    product = product_of(format)
    if product is None or "float4" not in target.flops:
        return plain
    narrow = "float4" if product.format.is_packed else "float8"
    return max(plain, target.flops[narrow] / product.num_terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The ceiling of a workload on a mesh."""

    num_sequences: int  # that run at once on each data shard
    prefill: Bound  # a step of nothing but prompts
    decode: Bound  # a step of every running sequence, one token each
    tokens_per_s: float  # generated, of all devices
    num_devices: int

    @property
    def device_tokens_per_s(self) -> float:
        """Generated tokens per second and device."""
        return self.tokens_per_s / self.num_devices


def predict(
    model: DeviceModel, target: Target, workload: Workload, *, num_sequences: int, num_step_tokens: int
) -> Prediction:
    """Steps of prompts and steps of decodes take turns; each takes as long as its longest term.

    B sequences of a shard give B output_len tokens in B prompt_len / T prefill steps and output_len decode steps.
    """
    context = workload.mean_context_len
    prefill_cost = model.cost(
        num_tokens=num_step_tokens,
        num_sampled=num_step_tokens / workload.prompt_len,
        num_keys=workload.prompt_len / 2,
        num_cached=2 * num_step_tokens,
    )
    decode_cost = model.cost(
        num_tokens=num_sequences, num_sampled=num_sequences, num_keys=context, num_cached=num_sequences * context
    )
    prefill, decode = (bound(cost, target, model.dtype) for cost in (prefill_cost, decode_cost))
    num_prefills = num_sequences * workload.prompt_len / num_step_tokens
    seconds = num_prefills * prefill.seconds + workload.output_len * decode.seconds
    mesh = model.mesh
    num_shards = mesh["data"] * mesh["expert"]
    return Prediction(
        num_sequences=num_sequences,
        prefill=prefill,
        decode=decode,
        tokens_per_s=num_shards * num_sequences * workload.output_len / seconds if num_sequences else 0.0,
        num_devices=num_shards * mesh["tensor"],
    )
