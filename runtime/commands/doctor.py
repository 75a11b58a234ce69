"""`millrace doctor`: devices, memory, versions, caches; what is wrong, and how to mend it.

Every line is a finding: ok, note (worth knowing), warn (works, but not as it could) or FAIL. The exit code is 1
where a finding is FAIL.
"""

import dataclasses
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..flags import RUNTIME
from ..folders import unwritable

if TYPE_CHECKING:
    from ..config import RuntimeConfig
    from . import OpenRuntime

GROUPS = (RUNTIME,)

GIB = 2**30
LOWEST_JAX, FIRST_JAX_TOO_NEW = (0, 11, 2), (0, 13)
PACKAGES = ("flax", "orbax-checkpoint", "tensorstore", "optax", "numpy", "tokenizers", "sentencepiece")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do where something is not ok."""

    level: Literal["ok", "note", "warn", "FAIL"]
    subject: str
    detail: str
    remedy: str = ""


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """Print every finding; the exit code is 1 where one is FAIL."""
    from ..overrides import resolve

    config = resolve(values)
    num_failed = 0
    for check in CHECKS:
        for finding in _findings(check, config):
            num_failed += finding.level == "FAIL"
            print(f"{finding.level:<5}{finding.subject:<16}{finding.detail}", flush=True)
            if finding.remedy:
                print(f"{'':<21}-> {finding.remedy}")
    print("\nNothing stands in the way." if not num_failed else f"\n{num_failed} to mend; the arrows say how.")
    return int(num_failed > 0)


def _findings(check: "Check", config: "RuntimeConfig") -> Iterator[Finding]:
    """What a check finds; a check that breaks is a finding itself, so that the rest is still reported."""
    try:
        yield from check(config)
    except Exception as error:
        yield Finding("FAIL", check.__name__.strip("_"), f"{type(error).__name__}: {' '.join(str(error).split())}")


def _python(_: "RuntimeConfig") -> Iterator[Finding]:
    from ... import __version__

    yield Finding("ok", "millrace", f"{__version__} in {Path(__file__).parents[2]}")
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")


def _versions(_: "RuntimeConfig") -> Iterator[Finding]:
    versions = {name: _version(name) for name in ("jax", "jaxlib", *PACKAGES)}
    for name, version in versions.items():
        if version is None:
            yield Finding("FAIL", name, "not installed", f"pip install {name}")
    if versions.pop("jax") and versions.pop("jaxlib"):
        import jax
        import jaxlib.version

        yield _judge_jax(jax.__version__, jaxlib.version.__version__)
    yield Finding("ok", "packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _judge_jax(jax: str, jaxlib: str) -> Finding:
    """Older releases miscompile (jax#39103); newer ones were never tried."""
    detail = f"{jax}, jaxlib {jaxlib}"
    numbers = tuple(int(part) for part in jax.split(".") if part.isdigit())
    if not LOWEST_JAX <= numbers < FIRST_JAX_TOO_NEW:
        lowest, highest = (".".join(map(str, bound)) for bound in (LOWEST_JAX, FIRST_JAX_TOO_NEW))
        return Finding("FAIL", "jax", detail, f"pip install 'jax>={lowest},<{highest}'")
    if jax.split(".")[:2] != jaxlib.split(".")[:2]:
        return Finding("FAIL", "jax", detail, f"the two must agree: pip install jax=={jax} jaxlib=={jax}")
    return Finding("ok", "jax", detail)


def _settings(_: "RuntimeConfig") -> Iterator[Finding]:
    """Variables that change what jax does; a forgotten one explains many a surprise."""
    for name, value in sorted(os.environ.items()):
        if name.startswith(("JAX_", "XLA_", "CUDA_VISIBLE")):
            yield Finding("note", "environment", f"{name}={value}")


def _devices(_: "RuntimeConfig") -> Iterator[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        remedy = "unset JAX_PLATFORMS, or install the driver that it asks for"
        yield Finding("FAIL", "devices", " ".join(str(error).split()), remedy)
        return
    for device in devices:
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f", {(limit - stats.get('bytes_in_use', 0)) / GIB:.1f} of {limit / GIB:.1f} GiB free" if limit else ""
        yield Finding("ok", "device", f"{device.platform}:{device.id} {device.device_kind}{memory}")
    if all(device.platform == "cpu" for device in devices) and _has_nvidia_driver():
        yield Finding(
            "warn", "devices", "an NVIDIA driver is here, but jax sees only the CPU", "pip install 'millrace[cuda]'"
        )
    total = float(jax.jit(lambda x: x.sum())(jax.numpy.ones(8)))
    yield Finding("ok" if total == 8 else "FAIL", "compiler", f"a compiled sum of 8 ones gives {total:g}")


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _host(_: "RuntimeConfig") -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = int(text) if limit.exists() and (text := limit.read_text().strip()).isdigit() else total
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "host", f"{cores} cores, {min(allowed, total) / GIB:.1f} GiB of memory, {platform.machine()}")


def _native_kernels(_: "RuntimeConfig") -> Iterator[Finding]:
    """What computes on a CPU, built now where it is not yet."""
    import jax

    from ...errors import NativeError
    from ...pallas_kernels import native

    if jax.default_backend() != "cpu":
        return
    try:
        library = native.library(show_progress=True)
    except NativeError as error:
        first, *more = str(error).splitlines()
        yield Finding("warn", "native kernels", f"none, XLA computes instead: {first}", *more[:1])
        return
    sets = ", ".join(library.instruction_sets)
    yield Finding("ok", "native kernels", f"{sets}; built by {library.compiler} in {library.path.parent}")
    for reason in library.left_out:
        yield Finding("note", "native kernels", f"without {reason}")


def _compile_cache(config: "RuntimeConfig") -> Iterator[Finding]:
    from ..config import programs_folder

    try:
        folder = programs_folder(config.compile_cache_dir)
    except RuntimeError as error:
        remedy = "--compile_cache_dir=FOLDER with one that you may write"
        yield Finding("warn", "compile cache", f"{error} every start compiles again", remedy)
        return
    if folder is None:
        yield Finding("warn", "compile cache", "off: every start compiles again", "leave --compile_cache_dir away")
        return
    if (reason := unwritable(folder)) is not None:
        remedy = f"chmod u+w {folder}, or --compile_cache_dir=FOLDER with one that you may write"
        if config.compile_cache_dir is not None and not folder.is_dir():
            yield Finding("FAIL", "compile cache", f"{folder}: {reason}; no model can be opened", remedy)
        else:
            yield Finding("warn", "compile cache", f"{folder}: {reason}; every start compiles again", remedy)
        return
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    yield Finding("ok", "compile cache", f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.0f} MiB")


def _store_cache(config: "RuntimeConfig") -> Iterator[Finding]:
    from ...errors import ConfigError
    from ..config import stores_folder

    is_optional = config.store_cache_dir is None and config.weights == "resident"
    effect = "are loaded directly" if is_optional else "that it does not hold cannot be opened"
    if not config.store:
        yield Finding("note", "store cache", "off: checkpoints are loaded directly")
        return
    try:
        folder = stores_folder(config.store_cache_dir)
    except ConfigError as error:
        yield Finding("warn", "store cache", f"checkpoints {effect}: {error}", "--store_cache_dir=FOLDER")
        return
    if (reason := unwritable(folder)) is None:
        yield Finding("ok", "store cache", str(folder))
    else:
        remedy = f"chmod u+w {folder}, or --store_cache_dir=FOLDER with one that you may write"
        yield Finding("warn", "store cache", f"{folder}: {reason}; checkpoints {effect}", remedy)


def _embedded(_: "RuntimeConfig") -> Iterator[Finding]:
    store = Path(__file__).parents[2] / "models" / "embedded" / "store"
    if (store / "manifest.json").exists():
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        yield Finding("ok", "embedded model", f"{size / 2**20:.1f} MiB in {store}")
    else:
        yield Finding("FAIL", "embedded model", f"not in {store}", "install again, from a complete clone or wheel")


def _hub(_: "RuntimeConfig") -> Iterator[Finding]:
    from huggingface_hub import constants

    mode = "offline: only models already there" if constants.HF_HUB_OFFLINE else f"downloads from {constants.ENDPOINT}"
    yield Finding("ok", "models by name", f"kept in {constants.HF_HUB_CACHE}, {mode}")


Check = Callable[["RuntimeConfig"], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    _python, _versions, _settings, _devices, _host, _native_kernels, _compile_cache, _store_cache, _embedded, _hub,
)  # fmt: skip
