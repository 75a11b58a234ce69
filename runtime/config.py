"""RuntimeConfig: everything that one deployment decides, and nothing that one request does. Imports no jax."""

import dataclasses
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError
from .spelling import shown

DType = Literal["float32", "bfloat16", "float16"]
CacheDType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]
WeightsPlace = Literal["resident", "stream", "host"]
WeightsIo = Literal["auto", "cached", "direct"]
# The formats of pallas_kernels/quantized_matmul/contract, which imports jax; a test compares.
Quantization = Literal[
    "int8", "int8_a16", "fp8", "fp8_a16", "fp8_block", "int4", "int4_a8", "mxfp4", "mxfp8", "nvfp4"
]  # fmt: skip
PLAIN = "none"  # the quantization that leaves plain weights as the checkpoint has them
_DTYPE_SPELLINGS: dict[str, DType] = {
    "float32": "float32", "fp32": "float32", "f32": "float32", "float": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "f16": "float16", "half": "float16",
}  # fmt: skip
_CACHE_DTYPE_SPELLINGS: dict[str, CacheDType] = {
    **_DTYPE_SPELLINGS,
    "float8_e4m3fn": "float8_e4m3fn", "float8_e4m3": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
    "float8": "float8_e4m3fn", "fp8": "float8_e4m3fn",
    "int8": "int8",
}  # fmt: skip
DEFAULT_CONTEXT_LEN = 8192
DEFAULT_STEP_TOKENS = 512
DEFAULT_NUM_SLOTS = 32
# A step that streams weights takes as long for few tokens as for many.
STREAMED_STEP_TOKENS = 2048
STREAMED_NUM_SLOTS = 64
DEFAULT_CACHE_DIR = Path("~/.cache/millrace/programs")
DEFAULT_STORE_CACHE_DIR = Path("~/.cache/millrace/stores")


def programs_folder(directory: str | None) -> Path | None:
    """Where programs are kept: what compile_cache_dir names, None where that is "", which keeps none."""
    return None if directory == "" else Path(directory or DEFAULT_CACHE_DIR).expanduser()


def stores_folder(directory: str | None) -> Path:
    """Where stores of checkpoints are kept: what store_cache_dir names. Raises ConfigError without a home folder."""
    try:
        return Path(directory or DEFAULT_STORE_CACHE_DIR).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"store_cache_dir should name a folder, as there is no home folder ({error}).") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a model is served. None stands for the default in the comment; `Runtime.config` holds what was chosen.

    Raises:
      ConfigError: on construction, for an option of a wrong type or out of range.
    """

    model: str = "embedded"  # "embedded", a directory (Hugging Face or store), a .gguf file, or org/name
    revision: str | None = None  # of org/name: the main branch
    dtype: str | None = None  # of weights and activations: the checkpoint's own
    # What plain weights are made (int8, fp8, int4 ...), or "none", which leaves them: int8 on a CPU where dtype is None
    # too, else "none".
    quantization: str | None = None
    # Prompt and output, in tokens: the checkpoint's own, at most 8192, and at most what its rope was trained on where
    # a longer context changes the frequencies (dynamic, longrope).
    max_context_len: int | None = None
    num_slots: int | None = None  # sequences that run at once, on each data shard: 32, or 64 where weights are streamed
    page_size: int = 16  # tokens of a KV cache page
    # Query tokens of one step, on each data shard: 512, or 2048 where weights are streamed; twice num_slots if more.
    max_step_tokens: int | None = None
    kv_cache_bytes: int | None = None  # on each device: what num_slots full contexts need, within the free memory
    # As dtype; float8_e4m3fn (fp8) and int8, which has a scale for each token and head, take half of 16 bits.
    kv_cache_dtype: str | None = None
    mesh: tuple[tuple[str, int], ...] | None = None  # sizes of mesh axes: every axis 1
    target: str | None = None  # hardware that plan and compile assume, as gb300:1x18x4: this machine's devices
    artifact: str | None = None  # folder of compiled programs to load instead of compiling, from millrace compile
    # A group of processes, each with some devices of the mesh: one process, unless Slurm, Open MPI or Kubernetes say
    # otherwise.
    num_processes: int | None = None
    process_id: int | None = None
    coordinator_address: str | None = None  # host:port of process 0
    seed: int | None = None  # of the seeds that requests without one draw: fresh every time
    prefix_caching: bool = True  # pages of equal beginnings are computed once
    max_decode_steps: int = 8  # decode steps of one dispatch when nothing waits; 1 where weights are streamed
    # Where weights are while the runtime serves: "resident" on the devices; "stream": on disk, read layer by layer in
    # every step; "host": in the host's memory, moved to devices that have their own.
    weights: str = "resident"
    weights_memory: int | None = None  # bytes of weights on each device where they are not resident: half of its memory
    weights_io: str = "auto"  # read a store through the page cache ("cached"), past it ("direct"), or as suits ("auto")
    store: bool = True  # convert a Hugging Face checkpoint into a store when it is first opened
    store_cache_dir: str | None = None  # where such stores are kept: ~/.cache/millrace/stores
    compile_cache_dir: str | None = None  # compiled programs: ~/.cache/millrace/programs; "" keeps none
    kernels: tuple[tuple[str, str], ...] = ()  # (operation, implementation) pairs to force
    progress: bool = True  # bars on stderr for loading and compiling

    def __post_init__(self) -> None:
        _check_text(self, "model", "revision", "compile_cache_dir", "store_cache_dir", "weights", "weights_io")
        _check_text(self, "target", "artifact", "coordinator_address")
        if not self.model:
            raise ConfigError('model must be "embedded", a directory, a .gguf file or org/name; it is empty.')
        for name, low, high in _INTEGERS:
            value = _integer(name, getattr(self, name), low, high, optional=name in _OPTIONAL)
            object.__setattr__(self, name, value)
        for name, spellings in (("dtype", _DTYPE_SPELLINGS), ("kv_cache_dtype", _CACHE_DTYPE_SPELLINGS)):
            object.__setattr__(self, name, _dtype(name, getattr(self, name), spellings))
        for name, choices in (("weights", get_args(WeightsPlace)), ("weights_io", get_args(WeightsIo))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {shown(getattr(self, name))}.")
        if self.quantization not in (None, PLAIN, *get_args(Quantization)):
            formats = ", ".join(get_args(Quantization))
            raise ConfigError(f"quantization must be one of {formats}, {PLAIN}, got {shown(self.quantization)}.")
        if self.weights == "resident" and self.weights_memory is not None:
            raise ConfigError("weights_memory goes with weights=stream or weights=host; resident ones are all there.")
        for name in ("prefix_caching", "progress", "store"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {shown(getattr(self, name))}.")
        object.__setattr__(self, "mesh", None if self.mesh is None else _pairs("mesh", self.mesh, int))
        for axis, size in self.mesh or ():
            _integer(f"mesh axis {axis}", size, 1, _MAX_MESH_SIZE, optional=False)
        object.__setattr__(self, "kernels", _pairs("kernels", self.kernels, str))
        if self.max_step_tokens is not None and self.num_slots is not None and self.max_step_tokens <= self.num_slots:
            raise ConfigError(
                f"max_step_tokens ({self.max_step_tokens}) must be more than num_slots ({self.num_slots}), so that a "
                "step holds a token of every sequence and some of a prompt. Raise max_step_tokens or lower num_slots."
            )

    def replace(self, **changes: Any) -> "RuntimeConfig":
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)


_INTEGERS = (
    ("max_context_len", 2, 2**24),
    ("num_slots", 1, 2**16),
    ("page_size", 1, 1024),
    ("max_step_tokens", 2, 2**20),
    ("kv_cache_bytes", 1, 2**50),
    ("weights_memory", 1, 2**50),
    ("max_decode_steps", 1, 256),
    ("seed", 0, 2**64 - 1),
    ("num_processes", 1, 2**16),
    ("process_id", 0, 2**16 - 1),
)
_MAX_MESH_SIZE = 2**20
_OPTIONAL = (
    "max_context_len", "num_slots", "max_step_tokens", "kv_cache_bytes", "weights_memory", "seed", "num_processes",
    "process_id",
)  # fmt: skip


def _check_text(config: RuntimeConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, Path) and name != "revision":
            object.__setattr__(config, name, str(value))
        elif not isinstance(value, str) and not (value is None and name not in ("model", "weights", "weights_io")):
            raise ConfigError(f"{name} must be a string, got {shown(value)}.")


def _integer(name: str, value: Any, low: int, high: int, *, optional: bool) -> int | None:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}.")
    return int(value)


def dtype_of_weights(value: object) -> str | None:
    """The canonical spelling of a dtype option; raises ConfigError where it is none."""
    return _dtype("dtype", value, _DTYPE_SPELLINGS)


def _dtype(name: str, value: object, spellings: Mapping[str, str]) -> str | None:
    """The canonical spelling."""
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in spellings:
        return spellings[value.lower()]
    choices = dict.fromkeys(spellings.values())
    short = [spelling for spelling in ("bf16", "fp16", "fp32", "fp8") if spelling in spellings]
    raise ConfigError(f"{name} must be one of {', '.join(choices)} ({', '.join(short)} too), got {shown(value)}.")


def _pairs(name: str, value: object, kind: type) -> tuple[tuple[str, Any], ...]:
    """A dict or a sequence of pairs, as a tuple of pairs."""
    items = value.items() if isinstance(value, dict) else value
    try:
        pairs = tuple((key, item) for key, item in items)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must hold (name, value) pairs, got {shown(value)}.") from None
    for key, item in pairs:
        if not isinstance(key, str) or isinstance(item, bool) or not isinstance(item, kind):
            raise ConfigError(f"{name} must hold pairs of a name and {kind.__name__}, got {shown((key, item))}.")
    if len({key for key, _ in pairs}) < len(pairs):
        raise ConfigError(f"{name} names something twice: {shown(value)}.")
    return pairs
