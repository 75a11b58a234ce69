import subprocess
import sys

import pytest

import millrace
from millrace import errors

NAMES = {
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
}


def test_the_exported_names_are_these():
    assert set(millrace.__all__) == NAMES
    assert set(millrace.__dir__()) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_exported_name_resolves(name):
    assert getattr(millrace, name) is not None


def test_every_error_is_exported():
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {kind.__name__ for kind in kinds} <= NAMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Runtme"):
        _ = millrace.Runtme


def test_importing_millrace_imports_no_jax():
    script = "import sys, millrace; millrace.SamplingParams; millrace.RuntimeConfig; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
