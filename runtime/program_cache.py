"""Programs of deployments that were opened before, found by all that they are made of: a start on a CPU traces nothing.

jax's own cache saves XLA's work but not the tracing: its key is what was traced. Here it is what an artifact's manifest
holds. A folder below `compile_cache_dir` for each deployment, a file for each program:
a line of JSON, then machine code. What is missing, damaged or not taken by XLA is compiled again.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.stages import Compiled

from .artifacts import facts_of
from .deployment import Deployment
from .executables import LoadedProgram, compiled_anew, serialize, usable_cores, used_leaves
from .program_specs import ProgramSpec, program_specs
from .programs import Program, Programs, compile_each, join_programs

FOLDER = "deployments"
SUFFIX = ".program"
_MAX_KEPT = 64  # deployments; those that were opened longest ago go first
_KEY_LEN = 24
_compiling = threading.Lock()  # `compiled_anew` is for the whole process

_logger = logging.getLogger(__name__)


def kept_programs(
    deployment: Deployment, cache_dir: Path, *, show_progress: bool, before_each: Callable[[], object] = lambda: None
) -> Programs:
    """The programs of a deployment on this process' CPU devices: what was kept, and the rest compiled and kept.

    `before_each` is called before each program, and may raise to stop.
    """
    specs = program_specs(deployment.model, deployment.buckets, streams=deployment.streams)
    folder = cache_dir / FOLDER / _key(deployment)
    made: dict[str, Program] = _load(specs, folder, before_each)
    missing = {name: spec for name, spec in specs.items() if name not in made}
    if missing:
        with _compiling, compiled_anew():
            for name, compiled, _ in compile_each(missing, show_progress=show_progress, before_each=before_each):
                made[name] = compiled
                _keep(folder / f"{name}{SUFFIX}", compiled)
        _remove_oldest(folder.parent)
    return join_programs(deployment.model, deployment.buckets, made, streams=deployment.streams)


def _key(deployment: Deployment) -> str:
    """A digest of what programs depend on besides their names, which say the bucket."""
    facts = facts_of(deployment)
    del facts["buckets"], facts["options"]["max_step_tokens"]
    facts["optimizations"] = not jax.config.read("jax_disable_most_optimizations")
    facts["cores"] = usable_cores()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY_LEN]


def _load(specs: Mapping[str, ProgramSpec], folder: Path, before_each: Callable[[], object]) -> dict[str, Program]:
    """Those that were kept and are sound."""

    def load(name: str) -> Program | None:
        before_each()
        return _read(folder / f"{name}{SUFFIX}", specs[name])

    if not folder.is_dir():
        return {}
    with contextlib.suppress(OSError):
        os.utime(folder)
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="millrace-programs") as loaders:
        loaded = dict(zip(specs, loaders.map(load, specs), strict=True))
    return {name: program for name, program in loaded.items() if program is not None}


def _read(file: Path, spec: ProgramSpec) -> LoadedProgram | None:
    """The program of a file; None where it is missing or of no use."""
    try:
        head, _, content = file.read_bytes().partition(b"\n")
        facts: Any = json.loads(head)
        if facts["sha256"] != hashlib.sha256(content).hexdigest():
            raise ValueError("its bytes are not those that were written")
        return LoadedProgram(spec, content, facts["used"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        _logger.warning("%s is of no use and is compiled again: %s", file, error)
        return None


def _keep(file: Path, compiled: Compiled) -> None:
    """Write a program, whole or not at all."""
    content = serialize(compiled)
    head = {"sha256": hashlib.sha256(content).hexdigest(), "used": used_leaves(compiled)}
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(json.dumps(head).encode() + b"\n" + content)
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # half of a program where the disk is full
        _logger.warning("%s cannot be kept, so that the next start compiles it again: %s", file, error)


def _remove_oldest(folder: Path) -> None:
    """Keep the deployments that were opened last; another process may do the same at the same time."""
    with contextlib.suppress(OSError):
        kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_MAX_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
