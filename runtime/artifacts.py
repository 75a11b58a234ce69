"""An artifact: a folder with a deployment's programs as machine code, loaded at start in place of compiling them.

    NAME.xla          one program, as XLA serializes it, for all devices of the mesh
    manifest.json     written last: what the programs were made of, what each takes of a device's memory, and SHA-256

An artifact is for one model, mesh, kind of device, jax and source of Millrace. Whatever is different where it is
loaded is refused, all of it at once. Nothing is pickled; but what is loaded is machine code, which no digest makes
trustworthy: take artifacts from those whom you would trust with a program.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.stages import Compiled

from ..errors import CheckpointError, ConfigError
from ..models.config import ModelConfig
from ..pallas_kernels import native
from ..sharding.mesh import mesh_sizes
from .config import RuntimeConfig
from .cpu_kernels import prepare_kernels, usable_kernels
from .deployment import Deployment
from .executables import LoadedProgram, compiled_anew, compiler_flags, processor, serialize, used_leaves
from .json_files import read_object
from .program_specs import program_specs
from .programs import CompilerOptions, Programs, compile_each, join_programs

MANIFEST_FILE = "manifest.json"
SUFFIX = ".xla"
FORMAT_NAME = "millrace-artifact"
FORMAT_VERSION = 1
_PACKAGE = Path(__file__).parent.parent
_ROOMS = ("pallas_kernels", "sharding", "models", "runtime")  # whose source programs are made of
_SOURCES = ("*.py", "tuning/*.json", "native/*.cc", "native/*.h")
# What shapes the programs, of RuntimeConfig; an artifact decides those that are left open (None).
_OPTIONS = (
    "dtype", "quantization", "max_context_len", "num_slots", "page_size", "max_step_tokens", "kv_cache_bytes",
    "kv_cache_dtype", "mesh", "max_decode_steps", "weights", "kernels",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramEntry:
    """What the manifest says of one program; `arguments` to `temporaries` are bytes of one device, as XLA counts."""

    num_bytes: int  # of its file
    sha256: str
    used: Sequence[int]  # numbers of the leaves of its arguments that it takes
    arguments: int
    in_place: int  # of the arguments, donated to outputs
    temporaries: int
    compile_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact holds; `facts` must be those of the place where it is loaded."""

    target: str
    kernels: tuple[tuple[str, str], ...]  # operations, and the implementations that were chosen
    compiler_options: CompilerOptions
    facts: Mapping[str, Any]
    programs: Mapping[str, ProgramEntry]

    @property
    def num_bytes(self) -> int:
        """Of all programs."""
        return sum(entry.num_bytes for entry in self.programs.values())


def write_artifact(
    folder: Path,
    deployment: Deployment,
    target: str,
    *,
    show_progress: bool,
    compiler_options: CompilerOptions | None = None,
) -> Manifest:
    """Compile a deployment's programs and write them; an artifact that is there is replaced.

    Raises:
      ConfigError: the folder holds something else, or cannot be written.
    """
    try:
        _make_room(folder)
        platform = deployment.model.kernels.platform
        entries, calls_native = {}, False
        prepare_kernels(platform, show_progress=show_progress)
        specs = program_specs(deployment.model, deployment.buckets, streams=deployment.streams)
        with compiled_anew():
            each = compile_each(specs, show_progress=show_progress, compiler_options=compiler_options)
            for name, compiled, compile_s in each:
                content = serialize(compiled)
                (folder / f"{name}{SUFFIX}").write_bytes(content)
                entries[name] = _entry(compiled, content, compile_s)
                calls_native |= platform == "cpu" and _calls_native(compiled)
        manifest = Manifest(
            target=target,
            kernels=deployment.model.kernels.made,
            compiler_options=dict(compiler_options or {}),
            facts={**facts_of(deployment), **({} if calls_native else {"native_kernels": None})},
            programs=entries,
        )
        content = _format(manifest)
        (folder / MANIFEST_FILE).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"artifact {folder} cannot be written ({error}). Choose another folder.") from error
    return manifest


def with_options_of(config: RuntimeConfig) -> RuntimeConfig:
    """The config of a runtime that loads an artifact: what shapes programs and is left open is as in the artifact.

    Raises:
      ConfigError: there is no artifact, or it cannot be understood.
    """
    if config.artifact is None:
        return config
    options = read_manifest(Path(config.artifact).expanduser()).facts.get("options")
    if not isinstance(options, dict):
        raise ConfigError(f"artifact {config.artifact}: its manifest names no options. Compile it again.")
    return config.replace(**{name: options.get(name) for name in _OPTIONS if getattr(config, name) is None})


def load_programs(
    folder: Path, deployment: Deployment, *, before_each: Callable[[], object] = lambda: None
) -> Programs:
    """The programs of an artifact, for the devices of the deployment's mesh; nothing is traced or compiled.

    Raises:
      ConfigError: with everything in which the artifact differs from what is needed here, damaged files included.
    """
    streams = deployment.streams
    manifest, specs = read_manifest(folder), program_specs(deployment.model, deployment.buckets, streams=streams)
    contents, damaged = {}, []
    for name in specs:
        content = _read(folder / f"{name}{SUFFIX}", manifest.programs.get(name))
        if isinstance(content, str):
            damaged.append(content)
        else:
            contents[name] = content
    if problems := [*differences(manifest.facts, facts_of(deployment)), *damaged]:
        raise ConfigError(
            f"artifact {folder} does not fit: {'; '.join(problems)}. Compile it again with millrace compile, or start "
            "with the options, model and machine that it was compiled for."
        )
    made = {}
    for name, spec in specs.items():
        before_each()
        try:
            made[name] = LoadedProgram(spec, contents.pop(name), manifest.programs[name].used)
        except (RuntimeError, IndexError, TypeError) as error:
            raise ConfigError(f"artifact {folder}: XLA does not load {name} ({error}). Compile it again.") from error
    return join_programs(deployment.model, deployment.buckets, made, streams=streams)


# ---- what must be the same


def facts_of(deployment: Deployment) -> dict[str, Any]:
    """All that decides what the programs of a deployment are, as JSON."""
    mesh = deployment.model.placement.mesh
    device, devices = mesh.devices.flat[0], mesh.devices.flat
    facts = {
        "options": {name: getattr(deployment.config, name) for name in _OPTIONS},
        "model": _model_facts(deployment.model.decoder.config),
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "mesh": mesh_sizes(mesh),
            "processes": [device.process_index for device in devices],
        },
        "buckets": [str(bucket) for bucket in deployment.buckets],
        "jax": {
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "enable_x64": jax.config.jax_enable_x64,
            "default_matmul_precision": jax.config.jax_default_matmul_precision,
        },
        "compiler_flags": compiler_flags(),
        "source": source_digest(),
        "processor": processor() if device.platform == "cpu" else None,
        "native_kernels": usable_kernels() if device.platform == "cpu" else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _calls_native(compiled: Compiled) -> bool:
    """Whether a program calls the library of native kernels."""
    if native.unavailable() is not None:
        return False
    text = compiled.as_text() or ""
    return any(f'custom_call_target="{target}"' in text for target in native.library().targets)


def _model_facts(model: ModelConfig) -> dict[str, Any]:
    """The architecture; the dtype is an option, whatever the checkpoint declares."""
    facts = dataclasses.asdict(dataclasses.replace(model, layers=()))
    facts["layers"] = [
        {"times": stage.num_repeats, "period": [dataclasses.asdict(layer) for layer in stage.period]}
        for stage in model.stages
    ]
    del facts["dtype"]
    return facts


def source_digest() -> str:
    """SHA-256 of the code that programs are made of or call, and of the tuned sizes of kernels."""
    total = hashlib.sha256()
    for room in _ROOMS:
        for path in (path for pattern in _SOURCES for path in sorted((_PACKAGE / room).rglob(pattern))):
            total.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Each fact in which an artifact and this place differ; more features or instruction sets than needed are fine."""
    if path == "processor.features" and isinstance(there, list) and isinstance(here, list):
        if missing := sorted({str(feature) for feature in there} - set(here)):
            yield f"{path}: the artifact needs {' '.join(missing)}, which this processor has not"
    elif path == "native_kernels":
        needed, found = there if isinstance(there, list) else [], here if isinstance(here, list) else []
        if missing := [str(name) for name in needed if name not in found]:
            words = f"those for {' '.join(found)}" if found else f"none: {here}" if here else "none"
            yield f"{path}: the artifact's programs may call those for {' '.join(missing)}; here there are {words}"
    elif isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, pair in enumerate(zip(there, here, strict=True)):
            yield from differences(*pair, f"{path}.{number}")
    elif there != here:
        yield f"{path}: {_short(there)} in the artifact, {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# ---- files


def _make_room(folder: Path) -> None:
    """Make the folder; what is left of a former artifact goes, its manifest first."""
    folder.mkdir(parents=True, exist_ok=True)
    there = list(folder.iterdir())
    if others := sorted(path.name for path in there if path.name != MANIFEST_FILE and path.suffix != SUFFIX):
        raise ConfigError(f"artifact {folder}: expected a new or empty folder; it holds {others[0]}. Choose another.")
    for path in sorted(there, key=lambda path: path.name != MANIFEST_FILE):
        path.unlink()


def _entry(compiled: Compiled, content: bytes, compile_s: float) -> ProgramEntry:
    memory: Any = compiled.memory_analysis()
    return ProgramEntry(
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        used=used_leaves(compiled),
        arguments=memory.argument_size_in_bytes,
        in_place=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        compile_s=round(compile_s, 3),
    )


def _format(manifest: Manifest) -> bytes:
    fields = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    return (json.dumps(fields, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """What an artifact says of itself.

    Raises:
      ConfigError: there is none, it is damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ConfigError(
            f"artifact {folder}: expected a folder with {MANIFEST_FILE}, which is written last; there is none. Was "
            "millrace compile interrupted? Run it again."
        )
    try:
        fields = read_object(path)
        version = fields.pop("format_version", None)
        if fields.pop("format", None) != FORMAT_NAME or version != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: expected {FORMAT_NAME} of version {FORMAT_VERSION}; it is of version {version!r}. Compile it "
                "again with this version of Millrace."
            )
        programs = {name: ProgramEntry(**entry) for name, entry in fields.pop("programs").items()}
        manifest = Manifest(programs=programs, **fields)
        if not isinstance(manifest.facts, dict):
            raise TypeError("facts is no object")
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Compile it again.") from error
    return manifest


def _read(path: Path, entry: ProgramEntry | None) -> bytes | str:
    """The file's content, or what is wrong with it."""
    if entry is None:
        return f"{path.name}: the manifest does not name it"
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path.name}: it cannot be read ({error})"
    if len(content) != entry.num_bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        return f"{path.name}: it is damaged (expected {entry.num_bytes} bytes of SHA-256 {entry.sha256:.12})"
    return content
