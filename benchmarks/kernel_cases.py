"""The problems that kernels are compiled, checked and timed for: shapes of models, steps of decode and of prefill.

A case makes its random arguments from a key and calls its operation on them; everything else is read off their shapes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from millrace.pallas_kernels import gated_matmul as gated
from millrace.pallas_kernels import grouped_matmul as grouped
from millrace.pallas_kernels import paged_attention as paged
from millrace.pallas_kernels import quantized_matmul as quantized
from millrace.pallas_kernels.dispatch import Implementation, KernelChoices, Operation
from millrace.pallas_kernels.gated_matmul import gated_matmul
from millrace.pallas_kernels.grouped_matmul import grouped_matmul
from millrace.pallas_kernels.paged_attention import PagedAttentionSpec, PagedBatch, paged_attention
from millrace.pallas_kernels.paged_attention.contract import KvCache
from millrace.pallas_kernels.quantized_matmul import matmul, matmuls
from millrace.pallas_kernels.quantized_matmul.contract import FORMATS, WeightFormat
from millrace.pallas_kernels.quantized_matmul.formats import quantize

TABLES: Mapping[str, Sequence[Implementation[Any]]] = {
    "paged_attention": paged.TABLE,
    "quantized_matmul": quantized.TABLE,
    "grouped_matmul": grouped.TABLE,
    "gated_matmul": gated.TABLE,
}
_ARITHMETIC = {"own": "bfloat16", "float8_e4m3fn": "float8", "int8": "int8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `arguments(key)` and `call(kernels, *arguments)` are traceable."""

    operation: Operation
    name: str
    arguments: Callable[[jax.Array], tuple[Any, ...]]
    call: Callable[..., Any]  # an array, or several
    flops: float
    arithmetic: str  # the peak that bounds it, as in Target.flops
    tolerance: float  # of max|x - reference| over max|reference|
    cache_bytes: int | None = None  # that attention reads of its cache: the rest of it is not touched
    is_decode: bool = False  # attention of one query a slot

    def shapes(self) -> tuple[Any, ...]:
        """The arguments as shapes."""
        shapes: tuple[Any, ...] = jax.eval_shape(self.arguments, jax.random.key(0))
        return shapes

    def moved_bytes(self) -> int:
        """What must be read and written once, at least."""
        arguments = self.shapes()
        output = jax.eval_shape(functools.partial(self.call, KernelChoices("gpu")), *arguments)
        total = num_bytes((arguments, output))
        if self.cache_bytes is None:
            return total
        return total - num_bytes([x for x in arguments if isinstance(x, KvCache)]) + self.cache_bytes


def num_bytes(tree: Any) -> int:
    """Of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class _Probe(KernelChoices):
    """Choices that remember which problem the operation that they name was asked for."""

    problem: Any = None

    def choose(self, operation: Any, table: Sequence[Implementation[Any]], problem: Any) -> Implementation[Any]:
        if operation in self._named:
            self.problem = problem
        return super().choose(operation, table, problem)


def implementations(case: Case, device_kind: str) -> dict[str, str | None]:
    """Those of a GPU's table in its order, each with why it does not serve the case, None if it does."""
    table = TABLES[case.operation]
    (anyones,) = {"reference", "apart"} & {entry.name for entry in table}
    probe = _Probe("gpu", {case.operation: anyones}, device_kind=device_kind)
    jax.eval_shape(functools.partial(case.call, probe), *case.shapes())
    return {entry.name: entry.unsupported(probe.problem) for entry in table}


def cases() -> tuple[Case, ...]:
    """All cases, those first for which there is a target (gpu/summary.py)."""
    found = [*_attention_cases(), *_matmul_cases(), *_gated_cases(), *_grouped_cases()]
    return tuple(sorted(found, key=lambda case: not has_target(case)))


def has_target(case: Case) -> bool:
    """Whether it is one of those that gpu/summary.py asks for, or that bounds them."""
    return _TARGETED.fullmatch(case.name) is not None


_TARGETED = re.compile(
    r"decode \w+ (256 x 2k|4 x 64k)|prefill bfloat16 \d+k|(fp8|int4|bf16) 70b_gate M=\d+|fp8 70b_down M=\d+|gated .*"
)


# Linear layers [out, in] of Llama-2-70B and 7B and Llama-3.1-8B.
WEIGHTS = {
    "70b_gate": (28672, 8192), "70b_down": (8192, 28672), "70b_q": (8192, 8192), "70b_k": (1024, 8192),
    "8b_gate": (14336, 4096), "8b_down": (4096, 14336), "8b_q": (4096, 4096), "8b_k": (1024, 4096),
    "70b_head": (32000, 8192), "70b_down_of_4": (8192, 7168), "7b_down": (4096, 11008),
}  # fmt: skip
# Those whose outputs are float32: logits, and what devices add up, here the part of one of four.
_FLOAT32_OUT = ("70b_head", "70b_down_of_4")
_INT4 = FORMATS["int4"]
_FORMATS: Mapping[str, WeightFormat | None] = {
    "bf16": None,
    **FORMATS,
    "int4_g32": dataclasses.replace(_INT4, group=32),
    "int4_g128_zeros": dataclasses.replace(_INT4, group=128, zeros=True, scale="float16"),
}
# Rows for each format and weight: decode steps of few and of many slots, steps that hold prompts.
_ROWS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("fp8", "70b_gate"): (1, 16, 64, 256, 1024, 4096),
    ("fp8", "70b_down"): (64, 256, 1024, 4096),
    ("fp8", "70b_k"): (64, 4096),
    ("fp8", "8b_gate"): (64, 1536),
    ("fp8", "8b_down"): (64,),
    ("int4", "70b_gate"): (1, 4, 16, 64, 256, 4096),
    ("int4", "70b_k"): (16,),
    ("int4", "8b_down"): (1, 64),
    ("bf16", "70b_gate"): (1, 16, 64, 256, 4096),
    ("int4_g32", "8b_gate"): (16,),
    ("int4_g128_zeros", "8b_gate"): (1, 64),
    ("int4_g128_zeros", "7b_down"): (1, 64),
    ("int8", "70b_gate"): (64, 4096),
    ("int8_a16", "8b_gate"): (16,),
    ("fp8_a16", "8b_gate"): (16,),
    ("fp8_block", "70b_gate"): (64, 4096),
    ("mxfp8", "70b_gate"): (64, 4096),
    ("mxfp4", "70b_gate"): (16, 64, 4096),
    ("nvfp4", "70b_gate"): (16, 64, 4096),
    # What no model above asks for, so that every tuned size is compiled.
    ("fp8", "8b_k"): (32, 128),
    ("int4", "8b_k"): (32, 128),
    ("fp8_a16", "8b_k"): (8, 32, 128),
    # Outputs of twice the bytes, in every tile.
    ("fp8", "70b_head"): (8, 16, 32, 64, 128, 256, 512, 4096),
    ("int8", "70b_head"): (64, 512),
    ("int4", "70b_head"): (8, 16, 32, 64, 128),
    ("fp8_a16", "70b_head"): (8, 16, 32, 64, 128),
    ("mxfp8", "70b_head"): (64,),
    ("nvfp4", "70b_head"): (64,),
    ("fp8", "70b_down_of_4"): (64,),
    ("int4", "70b_down_of_4"): (64,),
}


# Layers that meet the same activations.
TOGETHER = {
    "70b_qkv": ("70b_q", "70b_k", "70b_k"), "70b_gate_up": ("70b_gate", "70b_gate"), "8b_qkv": ("8b_q", "8b_k", "8b_k"),
}  # fmt: skip


def _matmul_cases() -> Iterator[Case]:
    for (format_name, weight_name), rows in _ROWS.items():
        for num_rows in rows:
            yield matmul_case(format_name, weight_name, num_rows)
    for name in TOGETHER:
        for num_rows in (64, 1536):
            yield matmuls_case("fp8", name, num_rows)


def _product_case(
    operation: Operation, name: str, format: WeightFormat | None, arguments: Callable[..., Any],
    call: Callable[..., Any], *, flops: float,
) -> Case:  # fmt: skip
    """A case of weights of a format, which says what bounds it and how exact it is."""
    arithmetic = _ARITHMETIC[format.activations if format else "own"]
    return Case(
        operation=operation, name=name, arguments=arguments, call=call, flops=flops, arithmetic=arithmetic,
        tolerance=_tolerance(format),
    )  # fmt: skip


def matmul_case(format_name: str, weight_name: str, num_rows: int) -> Case:
    """One linear layer of `num_rows` bfloat16 rows."""
    format, (out_dim, in_dim) = _FORMATS[format_name], WEIGHTS[weight_name]
    out_dtype = jnp.float32 if weight_name in _FLOAT32_OUT else jnp.bfloat16

    def arguments(key: jax.Array) -> tuple[Any, ...]:
        of_x, of_weight = jax.random.split(key)  # rows like channels would add up as no sum of a model does
        return _normal(of_x, (num_rows, in_dim)), _weight(of_weight, (out_dim, in_dim), format)

    def call(kernels: KernelChoices, x: jax.Array, weight: Any) -> jax.Array:
        return matmul(x, weight, kernels=kernels, out_dtype=out_dtype)

    return _product_case(
        "quantized_matmul",
        f"{format_name} {weight_name} M={num_rows}",
        format,
        arguments,
        call,
        flops=2.0 * num_rows * out_dim * in_dim,
    )


def matmuls_case(format_name: str, name: str, num_rows: int) -> Case:
    """Linear layers that meet the same rows."""
    format, shapes = _FORMATS[format_name], [WEIGHTS[each] for each in TOGETHER[name]]

    def arguments(key: jax.Array) -> tuple[Any, ...]:
        of_x, *of_weights = jax.random.split(key, 1 + len(shapes))
        weights = [_weight(of_weight, shape, format) for of_weight, shape in zip(of_weights, shapes, strict=True)]
        return _normal(of_x, (num_rows, shapes[0][1])), weights

    def call(kernels: KernelChoices, x: jax.Array, weights: Any) -> list[jax.Array]:
        return matmuls(x, weights, kernels=kernels)

    return _product_case(
        "quantized_matmul",
        f"{format_name} {name} M={num_rows}",
        format,
        arguments,
        call,
        flops=sum(2.0 * num_rows * out_dim * in_dim for out_dim, in_dim in shapes),
    )


def _gated_cases() -> Iterator[Case]:
    for weight_name, num_rows in (("70b_down", 64), ("70b_down", 1536), ("8b_down", 64), ("8b_down", 1536)):
        yield gated_case("fp8", weight_name, num_rows)


def gated_case(format_name: str, weight_name: str, num_rows: int) -> Case:
    """The down projection of a gated MLP."""
    format, (out_dim, in_dim) = _FORMATS[format_name], WEIGHTS[weight_name]

    def arguments(key: jax.Array) -> tuple[Any, ...]:
        of_gate, of_up, of_weight = jax.random.split(key, 3)
        gate, up = (_normal(each, (num_rows, in_dim)) for each in (of_gate, of_up))
        return gate, up, _weight(of_weight, (out_dim, in_dim), format)

    def call(kernels: KernelChoices, gate: jax.Array, up: jax.Array, weight: Any) -> jax.Array:
        return gated_matmul(gate, up, weight, activation="silu", kernels=kernels)

    return _product_case(
        "gated_matmul",
        f"gated {format_name} {weight_name} M={num_rows}",
        format,
        arguments,
        call,
        flops=2.0 * num_rows * out_dim * in_dim,
    )


# Experts: number, experts of a token, width of the MLP and of the model; the last are the first with float32 outputs.
EXPERTS = {
    "qwen3_30b": (128, 8, 768, 2048), "gpt_oss": (32, 4, 2880, 2880), "qwen3_30b_float32": (128, 8, 768, 2048),
}  # fmt: skip
_GROUPED_ROWS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("bf16", "qwen3_30b"): (16, 32, 256, 512, 1024, 2048, 4096),
    ("fp8", "qwen3_30b"): (16, 32, 256, 512, 1024, 2048, 4096),
    ("int4", "qwen3_30b"): (32,),
    ("mxfp4", "gpt_oss"): (32, 2048),
    ("bf16", "qwen3_30b_float32"): (32, 4096),
    ("fp8", "qwen3_30b_float32"): (32, 4096),
    ("int4", "qwen3_30b_float32"): (32,),
}


def _grouped_cases() -> Iterator[Case]:
    for (format_name, model), tokens in _GROUPED_ROWS.items():
        for num_tokens in tokens:
            yield grouped_case(format_name, model, num_tokens)


def grouped_case(format_name: str, model: str, num_tokens: int) -> Case:
    """The up projection of a layer's experts for so many tokens, which pick experts at random."""
    format, (num_experts, num_picks, out_dim, in_dim) = _FORMATS[format_name], EXPERTS[model]
    num_rows = num_tokens * num_picks
    out_dtype = jnp.float32 if model.endswith("float32") else jnp.bfloat16

    def arguments(key: jax.Array) -> tuple[Any, ...]:
        of_x, of_weight, of_picks = jax.random.split(key, 3)
        picks = jax.random.randint(of_picks, (num_rows,), 0, num_experts)
        sizes = jnp.bincount(picks, length=num_experts).astype(jnp.int32)
        return _normal(of_x, (num_rows, in_dim)), _weight(of_weight, (num_experts, out_dim, in_dim), format), sizes

    def call(kernels: KernelChoices, x: jax.Array, weight: Any, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(x, weight, sizes, kernels=kernels, out_dtype=out_dtype)

    return _product_case(
        "grouped_matmul",
        f"{format_name} {model} T={num_tokens}",
        format,
        arguments,
        call,
        flops=2.0 * num_rows * out_dim * in_dim,
    )


def _attention_cases() -> Iterator[Case]:
    for cache in ("bfloat16", "float8_e4m3fn", "int8"):
        yield attention_case(f"decode {cache} 256 x 2k", cache, [(1, 2048)] * 256)
        yield attention_case(f"decode {cache} 4 x 64k", cache, [(1, 65536)] * 4)
    for length in (4096, 16384):
        yield attention_case(f"prefill bfloat16 {length // 1024}k", "bfloat16", [(length, length)])
    yield attention_case("prefill float8_e4m3fn 4k", "float8_e4m3fn", [(4096, 4096)])
    mixed = [(1, 2048)] * 255 + [(1024, 3072)]
    yield attention_case("mixed bfloat16 255 x 2k and 1k of 3k", "bfloat16", mixed)
    decode = [(1, 2048)] * 64
    yield attention_case("decode window 512", "bfloat16", decode, window=512)
    yield attention_case("decode soft cap, head 256", "bfloat16", decode, heads=(16, 8, 256), soft_cap=50.0)
    yield attention_case("decode sinks, head 64", "bfloat16", decode, heads=(64, 8, 64), has_sinks=True)
    for heads in ((32, 32, 80), (32, 32, 96), (32, 1, 128)):
        yield attention_case("decode heads {} / {} of {}".format(*heads), "bfloat16", decode, heads=heads)
    for head_dim in (64, 80, 96, 128, 256):
        for cache in ("bfloat16", "float8_e4m3fn", "int8"):
            heads = (32, 8, head_dim)
            yield attention_case(f"decode {cache}, head {head_dim}", cache, [(1, 2048)] * 64, heads=heads)
            yield attention_case(f"prefill {cache}, head {head_dim}", cache, [(1024, 2048)], heads=heads)


def attention_case(
    name: str, cache_dtype: str, slots: Iterable[tuple[int, int]], *, heads: tuple[int, int, int] = (64, 8, 128),
    page_size: int = 32, has_sinks: bool = False, **spec: Any,
) -> Case:  # fmt: skip
    """Slots of (queries, keys) whose pages lie scattered; `heads` are N, K and H."""
    slots = tuple(slots)
    num_heads, num_kv_heads, head_dim = heads
    pages_per_slot = -(-max(keys for _, keys in slots) // page_size)
    num_queries = sum(queries for queries, _ in slots)
    is_decode = all(queries == 1 for queries, _ in slots)
    attention = PagedAttentionSpec(scale=head_dim**-0.5, one_query_per_slot=is_decode, **spec)

    def arguments(key: jax.Array) -> tuple[Any, ...]:
        num_pages = len(slots) * pages_per_slot
        key, of_cache = jax.random.split(key)
        cache = _cache(of_cache, (1, num_pages, 2, num_kv_heads, page_size, head_dim), cache_dtype)
        tables = jax.random.permutation(key, num_pages).reshape(len(slots), -1).astype(jnp.int32)
        starts = np.cumsum([0, *(queries for queries, _ in slots)])
        batch = PagedBatch(tables, jnp.asarray(starts, jnp.int32), jnp.array([keys for _, keys in slots], jnp.int32))
        sinks = _normal(key, (num_heads,)) if has_sinks else None
        return _normal(key, (num_queries, num_heads, head_dim)), cache, jnp.int32(0), batch, sinks

    def call(kernels: KernelChoices, q: jax.Array, cache: Any, layer: jax.Array, batch: Any, sinks: Any) -> jax.Array:
        return paged_attention(q, cache, layer, batch, spec=attention, kernels=kernels, sinks=sinks)

    window = attention.window or 2**31
    pairs = sum(sum(min(window, keys - i) for i in range(queries)) for queries, keys in slots)
    token_bytes = 2 * num_kv_heads * (head_dim * jnp.dtype(cache_dtype).itemsize + 4 * (cache_dtype == "int8"))
    seen = sum(min(keys, window + queries - 1) for queries, keys in slots)
    return Case(
        operation="paged_attention",
        name=name,
        arguments=arguments,
        call=call,
        flops=4.0 * pairs * num_heads * head_dim,
        arithmetic="bfloat16",
        tolerance=2e-2,  # one of bfloat16's steps on either side
        cache_bytes=seen * token_bytes,
        is_decode=is_decode,
    )


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _weight(key: jax.Array, shape: tuple[int, ...], format: WeightFormat | None) -> Any:
    """Of variance 1 / fan-in; experts are quantized one after the other, which takes less memory."""
    plain = _normal(key, shape) * jnp.bfloat16(shape[-1] ** -0.5)
    if format is None:
        return plain
    make = functools.partial(quantize, format=format)
    return make(plain) if plain.ndim == 2 else jax.lax.map(make, plain)


def _cache(key: jax.Array, shape: tuple[int, ...], dtype: str) -> KvCache[jax.Array]:
    if dtype != "int8":
        return KvCache(_normal(key, shape).astype(dtype), None)
    return KvCache(jax.random.randint(key, shape, -127, 128, jnp.int8), jnp.full(shape[:-1], 0.02, jnp.float32))


def _tolerance(format: WeightFormat | None) -> float:
    """Weights are the same on both sides; activations that are quantized on the fly may fall to either side."""
    return 1e-2 if format is None or format.activations == "own" else 3e-2
