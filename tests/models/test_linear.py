"""Layers that are given the same activations: one call of the native kernels where their weights are of one format."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig
from millrace.models.decoder import AbstractDecoder
from millrace.models.linear import Linear, linear_each
from millrace.models.quantization import named_format, uniformly, with_formats
from millrace.models.step import Step
from millrace.pallas_kernels import native
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.quantized_matmul import FORMATS, WeightFormat
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

LAYER = LayerSpec(
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=1.0, rope=None), mlp=MlpSpec(mlp_dim=128)
)
MODEL = ModelConfig(family="llama", vocab_size=64, embed_dim=64, layers=(LAYER,) * 2, max_context_len=32)


def mean_of_values(q: Any, k: Any, v: Any, cache: Any, *_: Any) -> tuple[Any, Any]:
    """What stands for attention."""
    return jnp.broadcast_to(v.mean(2, keepdims=True), q.shape), cache


def step_on(mesh: dict[str, int]) -> Step:
    return Step(placement=Placement(make_mesh(mesh)), kernels=KernelChoices("cpu"), attend=mean_of_values, ropes={})


@pytest.mark.skipif(native.unavailable() is not None, reason="needs the native kernels")
def test_a_layer_calls_for_qkv_for_o_for_gate_and_up_and_for_down() -> None:
    decoder = AbstractDecoder(with_formats(MODEL, uniformly(named_format("int8", None))), jnp.dtype("bfloat16"))
    x = jax.ShapeDtypeStruct((1, 3, 64), jnp.bfloat16)

    def run(params: Any, x: Any) -> Any:
        return decoder.bind(params).run_layers(x, None, step_on({}))[0]

    shapes = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype),
        decoder.specs,
        is_leaf=lambda node: not isinstance(node, dict),
    )
    assert jax.jit(run).lower(shapes, x).as_text().count("@millrace_matmul") == 4


@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}], ids=["alone", "tensor=2"])
@pytest.mark.parametrize("names", [(None, None), ("int8", "int8"), ("int8", None), ("int8", "int8_a16")])
def test_layers_together_are_as_each_alone(names: tuple[str | None, str | None], mesh: dict[str, int]) -> None:
    formats: list[WeightFormat | None] = [None if name is None else FORMATS[name] for name in names]
    rngs, step = nnx.Rngs(0), step_on(mesh)
    axes = (("heads", "embed"), ("kv_heads", "embed"))
    layers = [
        Linear((out_dim, 64), axis, bias=True, dtype=jnp.dtype("bfloat16"), rngs=rngs, format=format)
        for out_dim, axis, format in zip((64, 32), axes, formats, strict=True)
    ]
    for layer in layers:
        layer.weight.set_value(jax.random.randint(rngs.params(), layer.weight.shape, -9, 9).astype(layer.weight.dtype))
    x = jax.random.normal(jax.random.key(1), (1, 3, 64), jnp.bfloat16)
    found = jax.jit(lambda x: linear_each(layers, x, step))(x)
    alone = jax.jit(lambda x: [layer(x, step) for layer in layers])(x)
    jax.tree.map(np.testing.assert_array_equal, found, alone)
