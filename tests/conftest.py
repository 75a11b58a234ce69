"""Settings of every test: several CPU devices, and one cache of compiled programs for the session."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from millrace import Runtime

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parent / "fixtures"))  # for what makes fixtures while tests run


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For files that compile much and compute little: XLA does not optimize what it compiles for the CPU."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for compiled programs, shared by the runtimes of a session: equal programs compile once."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="session")
def store_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for the stores of converted checkpoints, shared by the runtimes of a session."""
    return str(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def fixture_checkpoints() -> Path:
    """The committed tiny random checkpoints, a directory each."""
    return Path(__file__).parent / "fixtures" / "checkpoints"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--checkpoints DIR`: where the parity test finds its checkpoints."""
    default = Path(__file__).parent / "fixtures" / "checkpoints"
    parser.addoption("--checkpoints", default=str(default), help="tiny checkpoints with transformers' answers")


@pytest.fixture(scope="session")
def open_tiny(program_cache: str, store_cache: str, fixture_checkpoints: Path) -> Callable[..., Runtime]:
    """Opens a tiny float32 runtime; its tokens have no text."""

    def open_runtime(checkpoint: str = "llama_default", **options: Any) -> Runtime:
        small = {"num_slots": 4, "page_size": 8, "max_step_tokens": 32, "max_context_len": 96, "dtype": "float32"}
        caches = {"compile_cache_dir": program_cache, "store_cache_dir": store_cache}
        settings = {**small, **caches, "progress": False, **options}
        return Runtime.from_pretrained(str(fixture_checkpoints / checkpoint), **settings)

    return open_runtime
