"""What a model is, as data: one spec per layer, so that a new family is a new table and never a second decoder."""

import dataclasses
from typing import Literal

from ..pallas_kernels.gated_activation.contract import Activation
from ..pallas_kernels.quantized_matmul.contract import WeightFormat

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
# Formats of quantized projections by name: q, k, v and o of attention, gate, up and down of an MLP or of experts. A
# projection that is not named is plain.
type Formats = tuple[tuple[str, WeightFormat], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One rotary embedding; `rope.frequencies` turns it into numbers once a runtime's max_context_len is known.

    `attention_factor` multiplies cos and sin; None means the kind's own formula. `factor` and the fields below
    it are read only by the kinds that name them.
    """

    theta: float
    rotary_dim: int  # H of the rotated part, even
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, dynamic, yarn, llama3, longrope
    original_max_len: int = 0  # dynamic, yarn, llama3, longrope: the context the model was trained on, in tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    attention_factor: float | None = None  # yarn, longrope
    short_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention of one layer. `window` is the number of keys a query sees, itself included."""

    num_heads: int  # N
    num_kv_heads: int  # K; divides N
    head_dim: int  # H
    scale: float  # multiplies q·k
    rope: RopeSpec | None
    window: int | None = None
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    qk_norm: Literal["none", "head", "full"] = "none"  # over H (Qwen3, Gemma 3) or over N*H and K*H (OLMo 2)
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False  # one learned logit per head joins the softmax and takes no value (gpt-oss)
    formats: Formats = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """down(activation(gate(x)) * up(x)), weights [F, D], [F, D] and [D, F]."""

    mlp_dim: int  # F
    activation: Activation = "silu"
    bias: bool = False
    formats: Formats = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """A router picks `num_experts_per_token` of `num_experts` gated MLPs, weights [E, F, D], [E, F, D] and [E, D, F].

    `routing` "softmax_topk" takes the softmax over all experts first and, if `normalize`, divides the picked
    weights by their sum; "topk_softmax" takes the softmax over the picked logits alone.
    `clamp_limit` and `swiglu_alpha` select gpt-oss's clamped gate: g*sigmoid(alpha*g)*(u+1).
    """

    num_experts: int  # E
    num_experts_per_token: int
    mlp_dim: int  # F
    activation: Activation = "silu"
    routing: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    normalize: bool = True
    bias: bool = False  # on the router and on every expert
    clamp_limit: float | None = None
    swiglu_alpha: float | None = None
    formats: Formats = ()
    num_expert_parts: int = 1  # parts into which a mesh splits the experts; a checkpoint's config knows of one

    @property
    def num_places(self) -> int:
        """Expert places, as many in every part: place p holds expert p % num_experts, so the first ones twice."""
        return -(-self.num_experts // self.num_expert_parts) * self.num_expert_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """`norms`: "pre" normalises a block's input, "post" its output before the residual sum, "sandwich" both."""

    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec
    norms: Literal["pre", "post", "sandwich"] = "pre"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of layers that repeats one period: layer `first_layer + r * len(period) + p` is period[p]."""

    first_layer: int
    period: tuple[LayerSpec, ...]
    num_repeats: int

    def layer_indices(self, position: int) -> tuple[int, ...]:
        """The model's layer numbers held by one position of the period, in the order they are stacked."""
        step = len(self.period)
        return tuple(self.first_layer + r * step + position for r in range(self.num_repeats))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. `max_context_len` is the checkpoint's own limit, in tokens."""

    family: str
    vocab_size: int  # V: rows of the embedding and width of the logits
    embed_dim: int  # D
    layers: tuple[LayerSpec, ...]
    max_context_len: int
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # a norm multiplies by (offset + weight): 1.0 in Gemma
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    final_soft_cap: float | None = None
    head_format: WeightFormat | None = None  # of a head that is not tied to the embedding
    dtype: str = "bfloat16"  # as the checkpoint declares it

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def num_kv_heads(self) -> int:
        """K, the same in every layer: all layers share one cache array."""
        return self.layers[0].attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """H, the same in every layer."""
        return self.layers[0].attention.head_dim

    @property
    def unstretched_len(self) -> int | None:
        """The longest max_context_len that leaves rope's frequencies as they are for short prompts, in tokens.

        None where they do not depend on it, which is so for all kinds but dynamic and longrope.
        """
        ropes = {layer.attention.rope for layer in self.layers}
        lengths = [rope.original_max_len for rope in ropes if rope and rope.kind in ("dynamic", "longrope")]
        return min(lengths, default=None)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The layers as runs of repeating periods, with as few distinct layers to compile as possible."""
        return _split_into_stages(self.layers)


def _split_into_stages(layers: tuple[LayerSpec, ...]) -> tuple[Stage, ...]:
    """Dynamic programming over layer boundaries; a stage costs the length of its period."""
    num_layers = len(layers)
    cost: list[int] = [0] * (num_layers + 1)
    best: list[tuple[int, int]] = [(0, 0)] * (num_layers + 1)  # (period, repeats) of the stage that starts here
    for start in reversed(range(num_layers)):
        cost[start] = num_layers + 1
        for period in range(1, num_layers - start + 1):
            repeats = 1
            while layers[start : start + period] == layers[start + repeats * period : start + (repeats + 1) * period]:
                repeats += 1
            total = period + cost[start + repeats * period]
            if total < cost[start]:
                cost[start], best[start] = total, (period, repeats)
    stages, start = [], 0
    while start < num_layers:
        period, repeats = best[start]
        stages.append(Stage(first_layer=start, period=layers[start : start + period], num_repeats=repeats))
        start += period * repeats
    return tuple(stages)
