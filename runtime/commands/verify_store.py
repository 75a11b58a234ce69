"""`millrace verify-store DIR`: read every byte of a store and compare it with the manifest.

A line on stdout for each fault: damaged or missing chunks, arrays and files that are not those that were saved, files
that do not belong. The exit code is 1 where there is one.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..flags import LOG_LEVEL, PROGRESS, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from . import OpenRuntime

GROUPS = (
    Group(
        "Verification",
        (
            Option("store", "text", "a store's folder or URL"),
            PROGRESS,
            LOG_LEVEL,
        ),
    ),
)
POSITIONALS = ("store",)


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code: 1 where something is wrong."""
    if not values["store"]:
        raise ConfigError("expected a store, as in: millrace verify-store path/to/store")
    with interrupts_wait():
        from ..store_verify import verify_store

    faults = verify_store(values["store"], show_progress=values["progress"])
    for fault in faults:
        print(" ".join(fault.split()))
    verdict = f"faults: {len(faults)}" if faults else "every byte is as it was saved"
    print(f"millrace: {values['store']}: {verdict}", file=sys.stderr)
    return int(bool(faults))
