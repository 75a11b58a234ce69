"""Millrace: a JAX/XLA compiled inference runtime.

    from millrace import Runtime, SamplingParams
    with Runtime.from_pretrained("embedded") as runtime:
        print(runtime.generate("def fibonacci(n):", SamplingParams(max_tokens=64))[0].outputs[0].text)

The names below are the whole public interface. Those that need jax are imported at their first use, so that
`import millrace` and `millrace --help` answer at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    ConfigError,
    GroupError,
    InvalidRequestError,
    KernelError,
    MillraceError,
    NativeError,
    OutOfMemoryError,
    ProgramError,
    RuntimeClosedError,
    StepError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .runtime.api import Runtime
    from .runtime.config import RuntimeConfig
    from .runtime.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "GroupError",
    "InvalidRequestError",
    "KernelError",
    "Logprob",
    "MillraceError",
    "NativeError",
    "OutOfMemoryError",
    "ProgramError",
    "RequestOutput",
    "Runtime",
    "RuntimeClosedError",
    "RuntimeConfig",
    "SamplingParams",
    "StepError",
    "UnsupportedModelError",
    "__version__",
]

_LAZY_HOMES = {
    "Runtime": ".runtime.api",
    "RuntimeConfig": ".runtime.config",
    "CompletionOutput": ".runtime.request",
    "Logprob": ".runtime.request",
    "RequestOutput": ".runtime.request",
    "SamplingParams": ".runtime.request",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module at its first use (PEP 562)."""
    if name not in _LAZY_HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
