"""Programs that an earlier start left are found again; what is damaged or made otherwise is compiled anew."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from millrace import Runtime, SamplingParams
from millrace.runtime import program_cache
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.deployment import deploy
from millrace.runtime.executables import LoadedProgram
from millrace.runtime.model_source import open_model_config
from millrace.runtime.program_cache import FOLDER, SUFFIX
from millrace.sharding.mesh import make_mesh

OpenTiny = Callable[..., Runtime]
SMALL: dict[str, Any] = {"num_slots": 2, "max_step_tokens": 8, "max_context_len": 48}
NAMES = {"decode-1", "decode-2", "mixed-8", "install", "initial-state"}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def programs(runtime: Runtime) -> list[Any]:
    made = runtime._loop._executor._programs
    return [*made.steps.values(), made.install, made.initial_state]


def tokens(runtime: Runtime) -> list[int]:
    with runtime:
        return list(runtime.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


@pytest.fixture(scope="module")
def first(open_tiny: OpenTiny, quick_compilation: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A cache as one start left it, and what that answered."""
    folder = tmp_path_factory.mktemp("programs")
    return folder, tokens(open_tiny(**SMALL, compile_cache_dir=str(folder)))


@pytest.fixture
def cache(first: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(first[0], tmp_path / "programs"))


@pytest.fixture
def num_compiled() -> Iterator[Callable[[], int]]:
    """How many programs were compiled in this test."""
    events: list[str] = []

    def listen(name: str, duration_s: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(listen)


def kept(cache: Path) -> dict[str, Path]:
    (deployment,) = (cache / FOLDER).iterdir()
    return {file.name.removesuffix(SUFFIX): file for file in deployment.iterdir()}


def test_a_second_start_traces_and_compiles_nothing_and_gives_the_same_tokens(
    open_tiny: OpenTiny, first: tuple[Path, Any], cache: Path, num_compiled: Callable[[], int]
) -> None:
    assert set(kept(cache)) == NAMES
    runtime = open_tiny(**SMALL, compile_cache_dir=str(cache))
    assert all(isinstance(program, LoadedProgram) for program in programs(runtime))
    assert tokens(runtime) == first[1] and num_compiled() == 0


def test_a_larger_step_adds_its_program_and_finds_the_others(
    open_tiny: OpenTiny, cache: Path, num_compiled: Callable[[], int]
) -> None:
    open_tiny(**{**SMALL, "max_step_tokens": 16}, compile_cache_dir=str(cache)).close()
    assert set(kept(cache)) == {*NAMES, "mixed-16"} and num_compiled() == 1


def test_damaged_programs_are_compiled_again(
    open_tiny: OpenTiny, first: tuple[Path, Any], cache: Path, num_compiled: Callable[[], int]
) -> None:
    files = kept(cache)
    sound = {name: file.read_bytes() for name, file in files.items()}
    files["decode-1"].write_bytes(sound["decode-1"][:-100])
    files["install"].write_bytes(b"")
    files["initial-state"].write_bytes(b'{"used": [0]}\nx')
    assert tokens(open_tiny(**SMALL, compile_cache_dir=str(cache))) == first[1]
    assert num_compiled() == 3 and all(len(file.read_bytes()) > 1000 for file in files.values())


def test_without_a_cache_nothing_is_kept(open_tiny: OpenTiny) -> None:
    with open_tiny(**SMALL, compile_cache_dir="") as runtime:
        assert not any(isinstance(program, LoadedProgram) for program in programs(runtime))


def test_the_key_is_of_all_that_shapes_programs_but_the_buckets(
    fixture_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model_config(str(fixture_checkpoints / "llama_default"), None)
    config = RuntimeConfig(**SMALL, dtype="float32")

    def key(**changes: Any) -> str:
        changed = config.replace(**changes)
        return program_cache._key(deploy(changed, model, make_mesh(dict(changed.mesh or ())), 2**30))

    assert key() == key(max_step_tokens=32, seed=5, prefix_caching=False)
    others = ({"dtype": "bfloat16"}, {"page_size": 8}, {"num_slots": 3}, {"mesh": {"data": 2}}, {"max_decode_steps": 2})
    keys = {key(), *(key(**changes) for changes in others)}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99), raising=False)  # XLA splits loops for them
    assert len({*keys, key()}) == 2 + len(others)


def test_the_deployments_opened_longest_ago_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_cache, "_MAX_KEPT", 2)
    for number, name in enumerate("cab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"x")
        os.utime(tmp_path / name, (number, number))
    program_cache._remove_oldest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
