"""How much memory a step needs beside what stays: an upper estimate from shapes, before anything is compiled."""

import math

import jax.numpy as jnp

from ..models.config import LayerSpec, ModelConfig, MoeSpec
from ..models.quantization import quantized_projections
from ..sharding.rules import Placement
from .config import RuntimeConfig
from .limits import MAX_BAD_WORD_LEN, MAX_BAD_WORDS
from .logprobs import BLOCK_LEN

# How many arrays of a kind are alive at once, at most; read off `memory_analysis` of programs (tests/runtime).
_STREAMS = 6  # [T, D]: the residual stream, its norm, and both again in float32
_QUERIES = 4  # [T, N H]: queries before and after rope, and the attended values
_INNER = 4  # [T, F]: gate, up, their product, and one of them in float32
_RECEIVED = 3  # [received rows, D]: as they came, in the order of places, and on their way back
_LOGITS = 6  # [B, V] in float32: what sampling makes of the logits
_FLOAT = 4  # bytes
_BLOCK_KEYS = 64  # keys and values of a row that attention has gathered at once, at least


def step_temporaries(config: RuntimeConfig, model: ModelConfig, placement: Placement) -> int:
    """Bytes on each device that the largest step of a complete config needs for what it computes on the way."""
    assert config.dtype and config.num_slots and config.max_step_tokens
    itemsize = jnp.dtype(config.dtype).itemsize
    num_rows, num_tokens = config.num_slots, config.max_step_tokens
    of_layers = max((_layer(layer, model, placement, itemsize) for layer in dict.fromkeys(model.layers)), default=0)
    vocab_len = model.vocab_size // placement.num_parts("vocab")
    logits = _LOGITS * (num_rows + BLOCK_LEN) * vocab_len * _FLOAT
    copied = _copied_weights(model, placement, itemsize) if placement.on_host else 0
    copied += _dequantized_weight(model, placement, itemsize)
    return num_tokens * of_layers + num_rows * _row(model, placement) + logits + copied


def _layer(layer: LayerSpec, model: ModelConfig, placement: Placement, itemsize: int) -> int:
    """Bytes for each token of the step while it is in this layer."""
    attention, mlp, n = layer.attention, layer.mlp, placement.size("tensor")
    stream = _STREAMS * model.embed_dim * (itemsize + _FLOAT) // 2
    heads = (attention.num_heads + 2 * max(attention.num_kv_heads, n)) / n
    queries = _QUERIES * math.ceil(heads * attention.head_dim) * (itemsize + _FLOAT) // 2
    if isinstance(mlp, MoeSpec):
        rows = mlp.num_experts_per_token
        inner = rows * (_INNER * mlp.mlp_dim // n + 4 * model.embed_dim) * (itemsize + _FLOAT) // 2
        inner += _received(mlp, model, placement) * itemsize
    else:
        inner = _INNER * (mlp.mlp_dim // n) * (itemsize + _FLOAT) // 2
    return stream + max(queries, inner)


def _received(mlp: MoeSpec, model: ModelConfig, placement: Placement) -> int:
    """Numbers for each token that the rows of other devices take: room for the most that all of them may send."""
    e, n = placement.size("expert"), placement.size("tensor")
    if e == 1:
        return 0
    rows = e * min(mlp.num_experts_per_token, -(-mlp.num_experts // e))
    return rows * max(_RECEIVED * model.embed_dim, 2 * model.embed_dim + 3 * mlp.mlp_dim // n)


def _row(model: ModelConfig, placement: Placement) -> int:
    """Bytes for each row of the batch: the keys and values that it is at, and its bad words beside its last tokens."""
    heads = max(model.num_kv_heads, placement.size("tensor")) // placement.size("tensor")
    return 4 * _BLOCK_KEYS * heads * model.head_dim * _FLOAT + 2 * MAX_BAD_WORDS * MAX_BAD_WORD_LEN * _FLOAT


def _dequantized_weight(model: ModelConfig, placement: Placement, itemsize: int) -> int:
    """Without a kernel of its own, a weight whose stored values no dot takes is dequantized before, one at a time."""
    sizes = (
        math.prod(shape)
        for _, format, shape in quantized_projections(model)
        if format.activations == "own" or format.group is not None or placement.on_host
    )
    unpacked = itemsize + (_FLOAT if placement.on_host else 1)
    return max(sizes, default=0) * unpacked // placement.size("tensor")


def _copied_weights(model: ModelConfig, placement: Placement, itemsize: int) -> int:
    """XLA on a CPU copies the weights of the period that a scan is at, and in float32 those that are narrower."""
    n, e, dim = placement.size("tensor"), placement.size("expert"), model.embed_dim
    bytes_each = _FLOAT if itemsize == _FLOAT else itemsize + _FLOAT

    def num_weights(layer: LayerSpec) -> int:
        attention, mlp = layer.attention, layer.mlp
        of_attention = dim * attention.head_dim * (2 * attention.num_heads + 2 * max(attention.num_kv_heads, n)) // n
        num_mlps = -(-mlp.num_experts // e) if isinstance(mlp, MoeSpec) else 1
        return of_attention + num_mlps * 3 * dim * mlp.mlp_dim // n

    of_period = max((sum(map(num_weights, stage.period)) for stage in model.stages), default=0)
    head = model.vocab_size // placement.num_parts("vocab") * dim * (0 if itemsize == _FLOAT else _FLOAT)
    return bytes_each * of_period + head
