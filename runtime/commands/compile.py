"""`millrace compile --config=NAME --target=gb300:1x18x4 --out=DIR`: compile a deployment's programs into an artifact.

The target's hardware need not be here: for GPUs jax's CUDA compiler must be installed (the cuda extra), no driver and
no GPU. Without --target it is this machine. `--artifact=DIR` then starts a runtime without compiling anything.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..config import RuntimeConfig
from ..flags import RUNTIME, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from ..artifacts import Manifest
    from . import OpenRuntime

GROUPS = (
    Group("Compilation", (Option("out", "text", "folder for the artifact: new, empty, or an artifact to replace"),)),
    RUNTIME,
)
POSITIONALS = ("out",)
_GIB = 2**30


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code, 0."""
    if not values["out"]:
        raise ConfigError("expected a folder for the artifact, as in: millrace compile --config=embedded --out=DIR")
    from ..overrides import resolve

    started = time.perf_counter()
    manifest = compile_artifact(resolve(values), Path(values["out"]).expanduser())
    print(_table(manifest))
    print(f"\n{values['out']}: {manifest.num_bytes / 1e6:.1f} MB for {manifest.target}, "
          f"compiled in {time.perf_counter() - started:.0f} s")  # fmt: skip
    return 0


def compile_artifact(config: RuntimeConfig, folder: Path) -> "Manifest":
    """Compile for the config's target, or for this machine where it names none.

    Raises:
      ConfigError, KernelError, OutOfMemoryError: what is wrong and what mends it.
    """
    with interrupts_wait():
        import jax

        from ...sharding.mesh import make_mesh
        from ...sharding.targets import parse_target, stay_on_cpus
        from ..artifacts import write_artifact
        from ..deployment import deploy, platform_of
        from ..gpu_pool import claim_memory
        from ..model_source import open_model_config
        from ..sizes import device_memory
        from ..weight_choice import choose_weights

    machine = None if config.target is None else parse_target(config.target)
    claim_memory()
    if machine is not None:
        stay_on_cpus(machine.num_devices if machine.target.platform == "cpu" else 1)
    mesh = make_mesh(dict(config.mesh or ()), machine.compile_devices() if machine else None)
    model = open_model_config(config.model, config.revision, config.quantization)
    choice = choose_weights(config, model, platform_of(mesh))
    if choice.line is not None:
        print(f"millrace: {choice.line}", file=sys.stderr)
    deployment = deploy(
        choice.config, choice.model, mesh, machine.target.pool_bytes if machine else device_memory(mesh)
    )
    return write_artifact(
        folder,
        deployment,
        str(machine) if machine else f"{mesh.size} x {jax.devices()[0].device_kind}",
        show_progress=config.progress,
        compiler_options=machine.target.compiler_options if machine else None,
    )


def _table(manifest: "Manifest") -> str:
    """Memory of each program on each device, as the compiler counts it, and how long it took."""
    width = max(len(name) for name in manifest.programs)
    lines = [f"{'GiB of each device':<{width}}  arguments   in place  temporaries  file, KB  seconds"]
    for name, entry in manifest.programs.items():
        sizes = (entry.arguments / _GIB, entry.in_place / _GIB, entry.temporaries / _GIB, entry.num_bytes / 1e3)
        lines.append("{:<{w}}  {:9.3f}  {:9.3f}  {:11.3f}  {:8.0f}  {:7.1f}".format(
            name, *sizes, entry.compile_s, w=width))  # fmt: skip
    return "\n".join(lines)
