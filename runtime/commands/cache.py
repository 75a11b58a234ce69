"""`millrace cache [list|verify|remove] [NAME...]`: the stores of checkpoints that were opened before.

list    a line each: name, source, dtype, size and age; then the total
verify  every byte of those named, or of all; the exit code is 1 where something is wrong
remove  those named, or --all
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..flags import LOG_LEVEL, PROGRESS, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from ..store_cache import CachedStore
    from . import OpenRuntime

ACTIONS = ("list", "verify", "remove")
GROUPS = (
    Group(
        "Cache",
        (
            Option("action", "text", "what to do", "list", ACTIONS),
            Option("name", "texts", "a store of the cache; may be repeated"),
            Option("all", "switch", "remove every store", False),
            Option("store_cache_dir", "text", "where the stores are kept"),
            PROGRESS,
            LOG_LEVEL,
        ),
    ),
)
POSITIONALS = ("action", "name")
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code: 1 where verification finds something wrong."""
    if values["action"] not in ACTIONS:
        raise ConfigError(f"expected {', '.join(ACTIONS)}; got {values['action']!r}")
    with interrupts_wait():
        from ..config import stores_folder
        from ..store_cache import find_cached, list_cached

    cache_dir = stores_folder(values["store_cache_dir"])
    names = values["name"] or []
    stores = find_cached(cache_dir, names) if names else list_cached(cache_dir)
    if values["action"] == "verify":
        return _verify(stores, values["progress"])
    if values["action"] == "remove":
        return _remove(stores, bool(names), values["all"])
    for store in stores:
        what = f"{store.source}  {store.dtype}" if store.source else "(interrupted or damaged)"
        print(f"{store.name}  {what}  {store.num_bytes / 2**20:.1f} MiB  {_age(store.age_s)}")
    total = sum(store.num_bytes for store in stores)
    print(f"{len(stores)} stores, {total / 2**20:.1f} MiB in {cache_dir}")
    return 0


def _verify(stores: "list[CachedStore]", show_progress: bool) -> int:
    from ..store_verify import verify_store

    num_faults = 0
    for store in stores:
        faults = verify_store(store.path, show_progress=show_progress)
        print(f"{store.name}: {f'faults: {len(faults)}' if faults else 'ok'}")
        for fault in faults:
            print(f"  {' '.join(fault.split())}")
        num_faults += len(faults)
    return int(num_faults > 0)


def _remove(stores: "list[CachedStore]", are_named: bool, wants_all: bool) -> int:
    from ..store_cache import remove_cached

    if are_named == wants_all:
        raise ConfigError("remove takes names, as `millrace cache` lists them, or --all")
    for store in stores:
        remove_cached(store)
        print(f"removed {store.name}")
    return 0


def _age(age_s: float) -> str:
    unit_s, unit = next((pair for pair in _AGES if age_s >= pair[0]), _AGES[-1])
    return f"{age_s / unit_s:.0f} {unit} old"
