"""Weights that are replaced and saved while a runtime goes on: the same tokens as from a runtime opened with them."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from millrace import CheckpointError, ConfigError, MillraceError, Runtime, RuntimeClosedError, SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.models.partition import partition
from millrace.runtime import live_weights
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.executor import Executor
from millrace.runtime.loop import StepLoop
from millrace.runtime.param_tree import flatten
from millrace.runtime.sampling_params import OnWeightsUpdate
from millrace.runtime.store import open_store
from millrace.runtime.store_writer import save_store
from millrace.runtime.weight_streaming import plan_stream
from millrace.sharding.mesh import make_mesh

OpenTiny = Callable[..., Runtime]
pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[3 + i] * (2 + 5 * i) for i in range(4)]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
DOWN, NORM = "stages/0/0/mlp/down/weight", "final_norm/scale"


@pytest.fixture(scope="module")
def config(fixture_checkpoints: Path) -> dict[str, Any]:
    return dict(open_checkpoint(fixture_checkpoints / "llama_default").config)


@pytest.fixture(scope="module")
def decoder(config: dict[str, Any]) -> AbstractDecoder:
    return AbstractDecoder(config_from_hf(config), np.dtype("float32"))


@pytest.fixture(scope="module")
def arrays(decoder: AbstractDecoder) -> dict[str, np.ndarray]:
    """Random weights by path, which bfloat16 holds exactly."""
    random = np.random.default_rng(7)
    specs = flatten(decoder.specs)[0]
    drawn = {path: random.normal(size=spec.shape) * 0.3 for path, spec in specs.items()}
    return {path: values.astype(ml_dtypes.bfloat16).astype(np.float32) for path, values in drawn.items()}


@pytest.fixture(scope="module")
def store(
    arrays: dict[str, np.ndarray],
    decoder: AbstractDecoder,
    config: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The arrays as a store."""
    place = tmp_path_factory.mktemp("stores") / "new"
    save_store(place, nested(arrays), decoder.specs, config, {})
    return place


@pytest.fixture(scope="module")
def new_tokens(store: Path, open_tiny: OpenTiny) -> list[list[int]]:
    """What a runtime answers that was opened with the arrays."""
    with open_tiny(store) as opened:
        return tokens(opened)


@pytest.fixture(scope="module")
def old_tokens(open_tiny: OpenTiny) -> list[list[int]]:
    with open_tiny() as opened:
        return tokens(opened)


@pytest.fixture
def runtime(open_tiny: OpenTiny) -> Iterator[Runtime]:
    with open_tiny() as opened:
        yield opened


def tokens(runtime: Runtime, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in runtime.generate(prompts, GREEDY, use_tqdm=False)]


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = array
    return tree


def executor_of(runtime: Runtime) -> Executor:
    return runtime._loop._executor


def live_params(runtime: Runtime) -> dict[str, jax.Array]:
    return flatten(executor_of(runtime).params)[0]


def placed(runtime: Runtime, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    executor = executor_of(runtime)
    return {p: jax.device_put(a, executor.placement.sharding(executor.specs[p].axes)) for p, a in arrays.items()}


def streamed(open_tiny: OpenTiny, store: Path, decoder: AbstractDecoder) -> Runtime:
    """A runtime that streams, with a budget of two layers."""
    sizes = plan_stream(decoder, partition(decoder.config, make_mesh({})), 2**40)
    return open_tiny(store, weights="stream", weights_memory=sizes.top_bytes + 2 * sizes.layer_bytes)


# ---- what comes in


@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.large)], ids=["one device", "mesh"]
)
def test_updated_weights_give_the_tokens_of_a_runtime_opened_with_them(
    open_tiny: OpenTiny,
    arrays: dict[str, np.ndarray],
    store: Path,
    new_tokens: list[list[int]],
    old_tokens: list[list[int]],
    mesh: dict[str, int],
) -> None:
    with open_tiny(mesh=mesh) as runtime:
        old = jax.tree.map(np.array, live_params(runtime))
        forms: list[Any] = [
            nested(arrays),
            {path: jnp.asarray(values, jnp.bfloat16) for path, values in arrays.items()},
            {path: np.asfortranarray(values.astype(np.float64)) for path, values in arrays.items()},
            placed(runtime, arrays),
            store,
            str(store),
        ]
        for number, weights in enumerate(forms):
            assert tokens(runtime) == old_tokens
            assert runtime.update_weights(weights) == runtime.weights_version == 2 * number + 1
            assert tokens(runtime) == new_tokens
            assert runtime.update_weights(old) == 2 * number + 2
        assert tokens(runtime) == old_tokens


def test_an_update_of_some_arrays_leaves_the_others(runtime: Runtime, arrays: dict[str, np.ndarray]) -> None:
    before = jax.tree.map(np.array, live_params(runtime))
    runtime.update_weights({"stages": {"0": {"0": {"mlp": {"down": {"weight": arrays[DOWN]}}}}}})
    after = live_params(runtime)
    assert [p for p in before if not np.array_equal(before[p], after[p])] == [DOWN]
    np.testing.assert_array_equal(after[DOWN], arrays[DOWN])


def test_nothing_compiles_in_an_update(runtime: Runtime, arrays: dict[str, np.ndarray], store: Path) -> None:
    forms = [arrays, {path: jnp.asarray(a, jnp.bfloat16) for path, a in arrays.items()}, placed(runtime, arrays), store]
    compiled: list[str] = []

    def count(name: str, duration: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for weights in forms:
            runtime.update_weights(weights)
            tokens(runtime)
        jax.jit(lambda x: x * 3 + 1).lower(np.float32(1)).compile()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1, "the listener sees the one at the end"


def test_an_update_needs_room_for_one_array_more(
    runtime: Runtime, arrays: dict[str, np.ndarray], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    place = live_weights.place_leaves

    def counted(*arguments: Any, **options: Any) -> dict[str, jax.Array]:
        made = place(*arguments, **options)
        counts.append(sum(array.nbytes for array in jax.live_arrays()))
        return made

    monkeypatch.setattr(live_weights, "place_leaves", counted)
    tokens(runtime)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    for weights in (arrays, store):
        runtime.update_weights(weights)
    assert len(counts) == 2 * len(arrays)
    assert before < max(counts) <= before + max(array.nbytes for array in arrays.values())


def test_arrays_are_copied_unless_they_are_where_they_belong(runtime: Runtime, arrays: dict[str, np.ndarray]) -> None:
    given = {DOWN: arrays[DOWN].copy()}
    runtime.update_weights(given)
    given[DOWN][:] = 0
    np.testing.assert_array_equal(live_params(runtime)[DOWN], arrays[DOWN])
    other = jnp.asarray(arrays[DOWN] * 2, jnp.bfloat16)
    runtime.update_weights({DOWN: other})
    other.delete()
    np.testing.assert_array_equal(live_params(runtime)[DOWN], arrays[DOWN] * 2)
    ready = placed(runtime, {DOWN: arrays[DOWN]})
    runtime.update_weights(ready)
    assert live_params(runtime)[DOWN] is ready[DOWN]


# ---- what runs meanwhile


@pytest.mark.parametrize("running", ["drain", "immediate"])
def test_running_requests_end_on_the_weights_that_were_declared(
    runtime: Runtime, arrays: dict[str, np.ndarray], new_tokens: list[list[int]], running: OnWeightsUpdate
) -> None:
    params = GREEDY.replace(max_tokens=60)
    expected = runtime.generate(PROMPTS[3], params, use_tqdm=False)[0].outputs[0]
    handle = runtime.submit(PROMPTS[3], params)
    next(iter(handle))
    assert runtime.update_weights(arrays, running=running) == 1
    assert handle.finished or running == "immediate"
    output = handle.result().outputs[0]
    assert output.first_weights_version == expected.weights_version == 0
    if running == "drain":
        assert (output.token_ids, output.weights_version) == (expected.token_ids, 0)
    pieces = [piece.outputs[0] for piece in handle]
    old = [token for piece in pieces if piece.weights_version == 0 for token in piece.token_ids]
    assert old and old == expected.token_ids[: len(old)] and output.token_ids[: len(old)] == old
    assert tokens(runtime) == new_tokens


def test_pages_of_the_old_weights_are_not_found(
    runtime: Runtime, arrays: dict[str, np.ndarray], new_tokens: list[list[int]]
) -> None:
    assert tokens(runtime) == tokens(runtime)
    runtime.update_weights(arrays)
    outputs = runtime.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == new_tokens
    assert [output.num_cached_tokens for output in outputs] == [0] * 4
    assert [output.outputs[0].weights_version for output in outputs] == [1] * 4
    assert runtime.generate(PROMPTS[3], GREEDY, use_tqdm=False)[0].num_cached_tokens == 16


def test_an_interrupted_wait_withdraws_the_update(
    runtime: Runtime, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            raise KeyboardInterrupt

    future = Interrupted()
    monkeypatch.setattr(StepLoop, "update_weights", lambda *_: future)
    with pytest.raises(KeyboardInterrupt):
        runtime.update_weights(arrays)
    assert future.cancelled()


# ---- what is refused


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(np.float64)
    changed.flat[5] = value
    return changed


WRONG: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "unknown": (lambda a: {"final_norm/scal": a}, r"no 'final_norm/scal'; did you mean final_norm/scale\?"),
    "shape": (lambda a: {NORM: a[:-1]}, r"final_norm/scale should have the shape \[\d+\]; got \[\d+\]"),
    "integers": (lambda a: {NORM: a.astype(np.int32)}, "final_norm/scale should be float32, .* got int32"),
    "NaN": (lambda a: {NORM: with_value(a, np.nan)}, "final_norm/scale.*NaN"),
    "infinity on a device": (lambda a: {NORM: jnp.asarray(with_value(a, np.inf))}, "final_norm/scale.*infinity"),
    "overflow": (lambda a: {NORM: with_value(a, 1e300)}, "final_norm/scale.*infinity"),
    "list": (lambda a: {NORM: a.tolist()}, "final_norm/scale should be a numpy or jax array"),
    "nothing": (lambda a: {}, "expected at least one array"),
    "twice": (lambda a: {NORM: a, "final_norm": {"scale": a}}, "final_norm/scale is there twice"),
    "number": (lambda a: 5, "dict of arrays, or a store's path"),
}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_a_wrong_update_changes_nothing(
    runtime: Runtime, arrays: dict[str, np.ndarray], old_tokens: list[list[int]]
) -> None:
    for make, message in WRONG.values():
        made = make(arrays[NORM])
        weights = {DOWN: arrays[DOWN], **made} if isinstance(made, dict) and made else made
        with pytest.raises((ConfigError, CheckpointError), match=message):
            runtime.update_weights(weights)
    deleted = jnp.asarray(arrays[NORM])
    deleted.delete()
    with pytest.raises(ConfigError, match=r"final_norm/scale was deleted"):
        runtime.update_weights({NORM: deleted})
    with pytest.raises(ConfigError, match='"drain" or "immediate"'):
        runtime.update_weights(arrays, running="now")  # type: ignore[arg-type]
    assert (runtime.weights_version, tokens(runtime)) == (0, old_tokens)


def damaged(store: Path, to: Path) -> Path:
    shutil.copytree(store, to)
    chunk = next(file for file in sorted((to / "params" / DOWN.replace("/", ".") / "c").rglob("*")) if file.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    return to


@pytest.mark.parametrize("weights", ["resident", "stream"])
def test_a_wrong_store_changes_nothing(
    open_tiny: OpenTiny,
    store: Path,
    decoder: AbstractDecoder,
    arrays: dict[str, np.ndarray],
    config: dict[str, Any],
    new_tokens: list[list[int]],
    tmp_path: Path,
    weights: str,
) -> None:
    save_store(tmp_path / "rope", nested(arrays), decoder.specs, {**config, "rope_theta": 77.0}, {})
    specs = {"embed": flatten(decoder.specs)[0]["embed/weight"]}
    save_store(tmp_path / "other", {"embed": arrays["embed/weight"]}, dict(specs), config, {})
    wrong = {
        damaged(store, tmp_path / "damaged"): DOWN,
        tmp_path / "rope": "its layers is",
        tmp_path / "other": "lacks",
        tmp_path: "expected a store",
    }
    with open_tiny(store) if weights == "resident" else streamed(open_tiny, store, decoder) as runtime:
        for place, message in wrong.items():
            with pytest.raises(CheckpointError, match=message):
                runtime.update_weights(place)
        assert (runtime.weights_version, tokens(runtime)) == (0, new_tokens)


def test_an_update_that_fails_before_its_first_array_leaves_the_old_weights_and_a_later_one_ends_the_runtime(
    runtime: Runtime, arrays: dict[str, np.ndarray], old_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, left = live_weights.place_leaves, [0]

    def failing(*arguments: Any, **options: Any) -> dict[str, jax.Array]:
        if not left[0]:
            raise MemoryError("no room on the device")
        left[0] -= 1
        return place(*arguments, **options)

    monkeypatch.setattr(live_weights, "place_leaves", failing)
    with pytest.raises(CheckpointError, match=r"old ones stand: no room on the device"):
        runtime.update_weights(arrays)
    assert (runtime.weights_version, tokens(runtime)) == (0, old_tokens)
    left[0] = 2
    with pytest.raises(RuntimeClosedError, match=r"some weights were replaced .* no room on the device"):
        runtime.update_weights(arrays)
    for call in (lambda: tokens(runtime), lambda: runtime.save_weights("memory://broken/")):
        with pytest.raises(MillraceError, match="open a new Runtime"):
            call()


def test_a_closed_runtime_neither_updates_nor_saves(
    open_tiny: OpenTiny, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    runtime = open_tiny()
    runtime.close()
    for call in (lambda: runtime.update_weights(arrays), lambda: runtime.save_weights(tmp_path / "saved")):
        with pytest.raises(RuntimeClosedError):
            call()
    assert not (tmp_path / "saved").exists()


# ---- what goes out


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_saved_weights_are_those_that_run(
    open_tiny: OpenTiny,
    arrays: dict[str, np.ndarray],
    old_tokens: list[list[int]],
    config: dict[str, Any],
    tmp_path: Path,
    mesh: dict[str, int],
) -> None:
    with open_tiny(mesh=mesh) as runtime:
        runtime.save_weights(tmp_path / "before")
        runtime.update_weights({DOWN: arrays[DOWN], NORM: arrays[NORM]})
        mixed = tokens(runtime)
        runtime.save_weights(str(tmp_path / "after"))
    assert open_store(tmp_path / "before").config == config
    for name, expected in (("before", old_tokens), ("after", mixed)):
        with open_tiny(tmp_path / name) as opened:
            assert tokens(opened) == expected


def test_what_is_saved_are_the_weights_of_the_moment_of_the_call(
    runtime: Runtime, arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = np.array(live_params(runtime)[DOWN])
    save = live_weights.save_store

    def update_first(*arguments: Any, **options: Any) -> None:
        runtime.update_weights({DOWN: arrays[DOWN]})
        save(*arguments, **options)

    monkeypatch.setattr(live_weights, "save_store", update_first)
    runtime.save_weights(tmp_path / "saved")
    saved = open_store(tmp_path / "saved").read(DOWN, tuple(slice(0, size) for size in old.shape))
    np.testing.assert_array_equal(saved, old)


def test_a_place_that_holds_something_is_refused(runtime: Runtime, store: Path) -> None:
    with pytest.raises(CheckpointError, match="new or empty place"):
        runtime.save_weights(store)
    assert open_store(store)


# ---- streamed weights


def test_streamed_weights_are_updated_from_a_store_and_saved_from_it(
    open_tiny: OpenTiny,
    store: Path,
    decoder: AbstractDecoder,
    arrays: dict[str, np.ndarray],
    old_tokens: list[list[int]],
    new_tokens: list[list[int]],
    tmp_path: Path,
) -> None:
    with open_tiny() as resident:
        resident.save_weights(tmp_path / "old")
    with streamed(open_tiny, tmp_path / "old", decoder) as runtime:
        assert tokens(runtime) == old_tokens
        with pytest.raises(ConfigError, match="path or URL"):
            runtime.update_weights(arrays)
        assert runtime.update_weights(store) == 1
        assert tokens(runtime) == new_tokens
        runtime.save_weights(tmp_path / "saved")
    with open_tiny(tmp_path / "saved") as opened:
        assert tokens(opened) == new_tokens
