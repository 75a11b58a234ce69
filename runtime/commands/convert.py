"""`millrace convert SRC DST`: write a Hugging Face checkpoint, or a store in another dtype, as a store.

SRC is a folder, a store or org/name on the hub; DST a new or empty folder, or a URL such as gs://bucket/model. The
store is there once its manifest is, which is written last. An interrupted conversion goes on where it was when the
same command is run again. The store's place goes to stdout, all else to stderr.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..flags import Group, Option

if TYPE_CHECKING:
    from . import OpenRuntime

GROUPS = (
    Group(
        "Conversion",
        (
            Option("source", "text", "a checkpoint folder, a store, or org/name on the Hugging Face hub"),
            Option("destination", "text", "a new or empty folder, or a URL; or this conversion's own, to go on"),
            Option("revision", "text", "branch, tag or commit of a source on the hub"),
            Option("dtype", "text", "bfloat16 (bf16), float16 (fp16) or float32 (fp32); the source's own by default"),
            Option("progress", "switch", "a progress bar on stderr", True),
            Option("log_level", "text", "what is logged on stderr", "warning", ("debug", "info", "warning", "error")),
        ),
    ),
)
POSITIONALS = ("source", "destination")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code, 0."""
    if not values["source"] or not values["destination"]:
        raise ConfigError("expected a source and a destination, as in: millrace convert path/to/checkpoint path/to/new")
    name = DTYPES.get(values["dtype"], values["dtype"])
    if name is not None and name not in DTYPES.values():
        raise ConfigError(f"dtype should be one of {', '.join(DTYPES.values())}; got {name!r}")
    import jax.numpy as jnp

    from ..convert import convert
    from ..model_source import open_weights

    source = open_weights(values["source"], values["revision"])
    dtype = None if name is None else jnp.dtype(name)
    store = convert(source, values["destination"], dtype=dtype, show_progress=values["progress"])
    print(store.url)
    return 0
