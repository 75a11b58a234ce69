"""Every error that Millrace raises on purpose, one tree. A message says what was expected, what came, what to change.

MillraceError
├── ConfigError               a runtime option, a flag, a mesh or a config file (also a ValueError)
├── InvalidRequestError       one request; the runtime goes on (also a ValueError)
├── CheckpointError           a checkpoint or store that cannot be trusted or understood (also a ValueError)
│   └── UnsupportedModelError     a model family or a config key that Millrace does not implement
├── KernelError               a named kernel implementation that cannot serve, with its reason
│   └── NativeError               the CPU kernels' library cannot be built or loaded; XLA serves instead
├── ProgramError              a step for which no program was compiled
├── StepError                 a step that could not be computed; the requests that it touched fail, the runtime goes on
├── OutOfMemoryError          the plan does not fit the device
├── GroupError                a process of the group failed, died or went its own way: all of them end
└── RuntimeClosedError        a call after close(), or after the step loop died
"""


class MillraceError(Exception):
    """The root of the tree."""


class ConfigError(MillraceError, ValueError):
    """A runtime option, a flag, a mesh or a config file is wrong."""


class InvalidRequestError(MillraceError, ValueError):
    """One request is wrong; nothing of it was run and the runtime goes on."""


class CheckpointError(MillraceError, ValueError):
    """A checkpoint or store cannot be trusted or understood; no weight of it was placed."""


class UnsupportedModelError(CheckpointError):
    """A model family, or a key of its config, that Millrace does not implement."""


class KernelError(MillraceError):
    """A kernel implementation was named that cannot serve; the message carries its reason."""


class NativeError(KernelError):
    """The library of native CPU kernels cannot be built or loaded here; the message carries its reason."""


class ProgramError(MillraceError):
    """A step has a shape for which no program was compiled."""


class StepError(MillraceError):
    """A step could not be computed; the requests that it touched fail, and the runtime goes on."""


class OutOfMemoryError(MillraceError):
    """The memory plan does not fit the device; the message says by how much and which flag mends it."""


class GroupError(MillraceError):
    """A process of the group failed, died or went its own way; all of them end, and can be started again together."""


class RuntimeClosedError(MillraceError):
    """The runtime was closed, or its step loop died."""
