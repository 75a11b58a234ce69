"""`millrace export STORE DST`: write a store as a Hugging Face checkpoint, which transformers loads.

STORE is a folder, a URL, org/name on the hub, or embedded; DST a new or empty folder. Names and layouts are those of
the family's published checkpoints, the dtype is the store's; weights that were quantized in the checkpoint it was
converted from are written as plain numbers. DST is there once it is whole. Its place goes to stdout, all else to
stderr.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, ConfigError
from ..flags import LOG_LEVEL, PROGRESS, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from . import OpenRuntime

GROUPS = (
    Group(
        "Export",
        (
            Option("store", "text", "a store's folder or URL, org/name on the Hugging Face hub, or embedded"),
            Option("destination", "text", "a new or empty folder"),
            PROGRESS,
            LOG_LEVEL,
        ),
    ),
)
POSITIONALS = ("store", "destination")


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code, 0."""
    if not values["store"] or not values["destination"]:
        raise ConfigError("expected a store and a destination, as in: millrace export path/to/store path/to/new")
    with interrupts_wait():
        from ..export import export
        from ..model_source import open_weights
        from ..store import Store

    store = open_weights(values["store"], None)
    if not isinstance(store, Store):
        raise CheckpointError(f"{store.path}: expected a store; this is a Hugging Face checkpoint already. Copy it.")
    print(export(store, values["destination"], show_progress=values["progress"]))
    return 0
