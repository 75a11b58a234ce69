"""The decoder, the only forward: embed, periods of layers, head."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.traversals import unflatten_mapping
from jaxtyping import Array, Float, Int

from ..pallas_kernels.paged_attention import KvCache
from ..pallas_kernels.quantized_matmul import matmul
from ..sharding.specs import ParamSpec, SpecTree
from .attention import Attention
from .config import LayerSpec, MlpSpec, ModelConfig, Stage
from .embedding import Embedding
from .linear import InStack, Linear, Projection
from .mlp import Mlp
from .moe import Moe
from .norm import RMSNorm
from .step import Step

LAYERS_SCOPE = "layers"  # in the names that compiled programs and profiles give to what a layer does

type Params = dict[str, Any]  # a nested dict of arrays: modules define, pure dicts travel


class Layer(nnx.Module):
    """One attention block and one MLP block, each with its residual sum."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention = Attention(spec.attention, config, dtype=dtype, rngs=rngs)
        if isinstance(spec.mlp, MlpSpec):
            self.mlp = Mlp(spec.mlp, config.embed_dim, dtype=dtype, rngs=rngs)
        else:
            self.moe = Moe(spec.mlp, config.embed_dim, dtype=dtype, rngs=rngs)
        if spec.norms != "post":
            self.attention_norm = RMSNorm(config.embed_dim, config, dtype=dtype)
            self.mlp_norm = RMSNorm(config.embed_dim, config, dtype=dtype)
        if spec.norms != "pre":
            self.attention_post_norm = RMSNorm(config.embed_dim, config, dtype=dtype)
            self.mlp_post_norm = RMSNorm(config.embed_dim, config, dtype=dtype)
        self.spec = spec

    def __call__(
        self, x: Float[Array, "R T D"], cache: KvCache[Array] | None, layer: jax.Array, step: Step
    ) -> tuple[Float[Array, "R T D"], KvCache[Array] | None]:
        before, after = self.spec.norms != "post", self.spec.norms != "pre"
        y, cache = self.attention(self.attention_norm(x) if before else x, cache, layer, step)
        x = x + (self.attention_post_norm(y) if after else y)
        y = self.mlp_norm(x) if before else x
        y = self.mlp(y, step) if isinstance(self.spec.mlp, MlpSpec) else self.moe(y, step)
        x = x + (self.mlp_post_norm(y) if after else y)
        return step.placement.constrain(x, "shard", "tokens", "embed"), cache


def run_period(
    layers: Sequence[Layer], x: Float[Array, "R T D"], cache: KvCache[Array] | None, first_layer: jax.Array, step: Step
) -> tuple[Float[Array, "R T D"], KvCache[Array] | None]:
    """One period of layers, the first of which is the model's layer `first_layer`."""
    for offset, layer in enumerate(layers):
        x, cache = layer(x, cache, first_layer + offset, step)
    return x, cache


class Decoder(nnx.Module):
    """A decoder-only transformer; the layers of a stage are stacked by their position in its period."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.embed_dim, dtype=dtype, rngs=rngs)
        self.stages = nnx.Dict(
            {
                str(s): nnx.Dict(
                    {
                        str(p): _stack(spec, stage.num_repeats, config, dtype, rngs)
                        for p, spec in enumerate(stage.period)
                    }
                )
                for s, stage in enumerate(config.stages)
            }
        )
        self.final_norm = RMSNorm(config.embed_dim, config, dtype=dtype)
        if not config.tie_embeddings:
            shape = (config.vocab_size, config.embed_dim)
            self.head = Projection(shape, ("vocab", "embed"), format=config.head_format, dtype=dtype, rngs=rngs)

    def embed_tokens(self, tokens: Int[Array, "R T"], step: Step) -> Float[Array, "R T D"]:
        """The residual stream's start; ids out of range give an arbitrary finite row."""
        x = self.embed(tokens)
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        return step.placement.constrain(x, "shard", "tokens", "embed")

    def run_layers(
        self, x: Float[Array, "R T D"], cache: KvCache[Array] | None, step: Step
    ) -> tuple[Float[Array, "R T D"], KvCache[Array] | None]:
        """All layers: each stage scans its period. The cache is a carry, so that it is updated in place."""
        with jax.named_scope(LAYERS_SCOPE):
            for s, stage in enumerate(self.config.stages):
                stacked = [self.stages[str(s)][str(p)] for p in range(len(stage.period))]
                x, cache = _scan_stage(stage, stacked, x, cache, step)
        return x, cache

    def logits(self, x: Float[Array, "*rows D"], step: Step) -> Float[Array, "*rows V"]:
        """The head: final norm, projection to the vocabulary in float32, soft cap."""
        x = self.final_norm(x)
        if self.config.tie_embeddings:
            table, out_dtype = self.embed.weight[...], jnp.float32
            logits = matmul(x, table, kernels=step.kernels, out_dtype=out_dtype, is_partitioned=step.is_partitioned)
        else:
            logits = self.head.project(x, step, jnp.float32)
        cap = self.config.final_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _stack(spec: LayerSpec, num_layers: int, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> Layer:
    """`num_layers` layers of one kind in one module, every parameter with a leading axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> Layer:
        return Layer(spec, config, dtype=dtype, rngs=rngs)

    stacked: Layer = make(rngs)
    return stacked


def _scan_stage(
    stage: Stage, stacked: Sequence[Layer], x: Float[Array, "R T D"], cache: KvCache[Array] | None, step: Step
) -> tuple[Float[Array, "R T D"], KvCache[Array] | None]:
    graphs, states = zip(*(nnx.split(layer) for layer in stacked), strict=True)
    flat = [{path: param.get_value() for path, param in nnx.to_flat_state(state)} for state in states]
    # Gradients of a stack would be as large as the stack in every turn of the scan; only serving has a cache.
    keeps_stacks = step.kernels.platform == "cpu" and cache is not None
    kept = [_linear_weights(layer) if keeps_stacks else frozenset() for layer in stacked]
    whole = [{path: each[path] for path in paths} for each, paths in zip(flat, kept, strict=True)]
    scanned = [{path: each[path] for path in each.keys() - paths} for each, paths in zip(flat, kept, strict=True)]

    def period(carry: tuple[Array, KvCache[Array] | None], xs: tuple[list[Any], Array, Array]) -> Any:
        arrays, repeat, first = xs
        layers = []
        for graph, stacks, mine in zip(graphs, whole, arrays, strict=True):
            params = mine | {path: InStack(stack, repeat) for path, stack in stacks.items()}
            layers.append(nnx.merge(graph, unflatten_mapping(params)))
        return run_period(layers, *carry, first, step), None

    repeats = jnp.arange(stage.num_repeats, dtype=jnp.int32)
    firsts = repeats * len(stage.period) + stage.first_layer
    (x, cache), _ = jax.lax.scan(period, (x, cache), (scanned, repeats, firsts))
    return x, cache


def _linear_weights(layer: Layer) -> frozenset[tuple[Any, ...]]:
    """The paths of the arrays that the weights of a layer's linear layers are made of."""
    linear = {path for path, module in nnx.iter_modules(layer) if isinstance(module, Linear)}
    paths = (path for path, _ in nnx.to_flat_state(nnx.state(layer)))
    return frozenset(path for path in paths if path[:-1] in linear and path[-1] != "bias")


@dataclasses.dataclass(frozen=True)
class LayerParams:
    """Where one layer's parameters lie in the tree: at `index` of the stacked arrays below `path`."""

    spec: LayerSpec
    path: str  # "stages/0/1"
    index: int
    specs: SpecTree  # without the axis of layers


class AbstractDecoder:
    """The decoder before its weights exist: parameter specs, and `bind` to run it with a dict of arrays.

    Its parts can be bound apart, for weights that are not all there at once: `without_layers`, and each layer.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
        self.config = config
        self.dtype = dtype
        self._graph, state = nnx.split(abstract)
        self.specs = _specs(state)

    def bind(self, params: Params) -> Decoder:
        """The module with these arrays as its parameters; works on tracers."""
        decoder: Decoder = nnx.merge(self._graph, params)
        return decoder

    @functools.cached_property
    def without_layers(self) -> "AbstractDecoder":
        """The same embedding and head around no layer at all."""
        return AbstractDecoder(dataclasses.replace(self.config, layers=()), self.dtype)

    @functools.cached_property
    def layers(self) -> tuple[LayerParams, ...]:
        """The model's layers, in order."""
        found: dict[int, LayerParams] = {}
        for s, stage in enumerate(self.config.stages):
            for p, spec in enumerate(stage.period):
                stacked: Any = self.specs["stages"]
                specs = jax.tree.map(_one_layer, stacked[str(s)][str(p)], is_leaf=lambda x: isinstance(x, ParamSpec))
                for index, number in enumerate(stage.layer_indices(p)):
                    found[number] = LayerParams(spec, f"stages/{s}/{p}", index, specs)
        return tuple(found[number] for number in range(self.config.num_layers))

    def bind_layer(self, spec: LayerSpec, params: Params) -> Layer:
        """A layer of this kind with these arrays, which have no axis of layers, as its parameters."""
        abstract = nnx.eval_shape(lambda: Layer(spec, self.config, dtype=self.dtype, rngs=nnx.Rngs(0)))
        layer: Layer = nnx.merge(nnx.graphdef(abstract), params)
        return layer


def _specs(state: Any) -> SpecTree:
    specs: SpecTree = {}
    for path, param in nnx.to_flat_state(state):
        axes = param.get_metadata("axes")
        if path[0] == "stages":
            axes = ("layers", *axes)
        node: Any = specs
        for key in path[:-1]:
            node = node.setdefault(key, {})
        num_experts = param.get_metadata().get("num_experts")
        node[path[-1]] = ParamSpec(tuple(param.shape), param.dtype, axes, num_experts)
    return specs


def _one_layer(stacked: ParamSpec) -> ParamSpec:
    return stacked.below(1)
