"""`millrace convert SRC DST`: write a Hugging Face checkpoint, or a store in another dtype, as a store.

--quantization makes plain weights int8, fp8, int4, int4_a8, nvfp4, mxfp4, mxfp8 or fp8_block; without it they stay
as they are, quantized ones included. Embeddings, norms and routers stay plain, a head of its own gets 8 bits. With
--calibrate they are rounded to what the model computes of a text, which costs a forward over it and keeps more of the
model's quality.

SRC is a folder, a .gguf file, a store or org/name on the hub; DST a new or empty folder, or a URL such as
gs://bucket/model. The store is there once its manifest is, which is written last. An interrupted conversion goes on
where it was when the same command is run again. The store's place goes to stdout, all else to stderr.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ...errors import ConfigError
from ..config import PLAIN, Quantization, dtype_of_weights
from ..flags import LOG_LEVEL, PROGRESS, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from . import OpenRuntime

GROUPS = (
    Group(
        "Conversion",
        (
            Option("source", "text", "a checkpoint folder, a .gguf file, a store, or org/name on the Hugging Face hub"),
            Option("destination", "text", "a new or empty folder, or a URL; or this conversion's own, to go on"),
            Option("revision", "text", "branch, tag or commit of a source on the hub"),
            Option("dtype", "text", "bfloat16 (bf16), float16 (fp16) or float32 (fp32); the source's own by default"),
            Option(
                "quantization", "text", f"what plain weights are made: {', '.join(get_args(Quantization))}; or none"
            ),
            Option(
                "group_size",
                "integer",
                "inputs that share a scale: 32, 64 or 128, in int4, int4_a8 (64) and fp8_block (128)",
            ),
            Option("calibrate", "text", "a file of text that quantized weights are fitted to; 4,096 tokens at least"),
            PROGRESS,
            LOG_LEVEL,
        ),
    ),
)
POSITIONALS = ("source", "destination")


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code, 0."""
    if not values["source"] or not values["destination"]:
        raise ConfigError("expected a source and a destination, as in: millrace convert path/to/checkpoint path/to/new")
    name = dtype_of_weights(values["dtype"])
    format_name = None if values["quantization"] == PLAIN else values["quantization"]
    if values["group_size"] is not None and format_name is None:
        raise ConfigError("group_size goes with quantization, as in --quantization=int4 --group_size=128")
    with interrupts_wait():
        import jax.numpy as jnp

        from ...models.families.quantization import wanted_format
        from ..convert import convert
        from ..model_source import open_weights

    source = open_weights(values["source"], values["revision"])
    dtype = None if name is None else jnp.dtype(name)
    quantization = wanted_format(source.config, format_name, values["group_size"], values["source"])
    store = convert(
        source,
        values["destination"],
        dtype=dtype,
        quantization=quantization,
        calibrate=None if values["calibrate"] is None else Path(values["calibrate"]),
        show_progress=values["progress"],
    )
    print(store.url)
    return 0
