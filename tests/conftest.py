"""Settings of every test: several CPU devices, and one cache of compiled programs for the session."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace import Runtime
from millrace.models.config import AttentionSpec, ModelConfig
from millrace.models.decoder import AbstractDecoder, Params
from millrace.models.step import Step, rope_tables
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parent / "fixtures"))  # for what makes fixtures while tests run
# Nothing is timed: other work on the machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


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
    parser.addoption("--checkpoints", help="tiny checkpoints with transformers' answers, if not the committed ones")


def attend_to_itself(
    q: Any, k: Any, v: Any, cache: Any, layer: Any, spec: AttentionSpec, sinks: Any
) -> tuple[Any, Any]:
    """A sequence over itself, by the definition."""
    groups = spec.num_heads // spec.num_kv_heads
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = jnp.einsum("rtnh,rsnh->rnts", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    sees = (distance >= 0) & (distance < (spec.window or q.shape[1]))
    scores = jnp.where(sees, scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores)[..., : q.shape[1]]
    return jnp.einsum("rnts,rsnh->rtnh", weights, v), cache


def log_probabilities(
    model: ModelConfig, params: Params, tokens: list[int], max_context_len: int | None = None
) -> np.ndarray:
    """[T, V] behind each token of a sequence, in one pass without a runtime, a cache or its attention."""

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None]
        ropes = rope_tables(model, positions, max_context_len or model.max_context_len)
        step = Step(
            placement=Placement(make_mesh()), kernels=KernelChoices("cpu"), attend=attend_to_itself, ropes=ropes
        )
        decoder = AbstractDecoder(model, jnp.dtype("float32")).bind(params)
        hidden, _ = decoder.run_layers(decoder.embed_tokens(tokens, step), None, step)
        return jax.nn.log_softmax(decoder.logits(hidden, step)[0])

    return np.asarray(jax.jit(forward)(params, jnp.asarray([tokens])))


@pytest.fixture(scope="session")
def forward() -> Callable[..., np.ndarray]:
    """`log_probabilities`, which compiles in a fraction of a runtime's time."""
    return log_probabilities


@pytest.fixture(scope="session")
def open_tiny(program_cache: str, store_cache: str, fixture_checkpoints: Path) -> Callable[..., Runtime]:
    """Opens a tiny float32 runtime; its tokens have no text."""

    def open_runtime(checkpoint: str = "llama_default", **options: Any) -> Runtime:
        small = {"num_slots": 4, "page_size": 8, "max_step_tokens": 32, "max_context_len": 96, "dtype": "float32"}
        caches = {"compile_cache_dir": program_cache, "store_cache_dir": store_cache}
        settings = {**small, **caches, "progress": False, **options}
        return Runtime.from_pretrained(str(fixture_checkpoints / checkpoint), **settings)

    return open_runtime
