"""Arrays of a store as they lie in the page cache: those that are read, checked, read-only, there while held."""

import gc
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import CheckpointError
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.runtime.chunk_files import _are_in_order
from millrace.runtime.mapped_files import can_map, map_files
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import Store, open_store
from millrace.runtime.store_format import ArrayEntry
from millrace.runtime.store_writer import save_store
from millrace.runtime.weights import load_params
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux alone")
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 128,
    "num_hidden_layers": 3, "rms_norm_eps": 1e-6, "eos_token_id": 1,
}  # fmt: skip
UP, NORM = "stages/0/0/mlp/up/weight", "final_norm/scale"  # whole pages a layer, and less than one


@pytest.fixture
def store(tmp_path: Path) -> Store:
    specs = AbstractDecoder(config_from_hf(CONFIG), jnp.dtype("float32")).specs
    random = np.random.default_rng(0)
    params = {path: random.standard_normal(spec.shape, np.float32) for path, spec in flatten(specs)[0].items()}
    save_store(tmp_path / "store", params, flatten(specs)[0], CONFIG, {}, name="random")
    return open_store(tmp_path / "store")


def test_a_mapped_array_is_the_one_that_is_read_and_nobody_writes_to_it(store: Store) -> None:
    whole = tuple(slice(0, size) for size in store.arrays[UP].shape)
    mapped = store.map(UP)
    assert mapped is not None and not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, store.read(UP, whole))


def test_chunks_that_are_no_whole_pages_and_direct_reads_are_not_mapped(store: Store) -> None:
    assert store.map(NORM) is None and store.with_direct_io().map(UP) is None
    assert not can_map(0) and not can_map(4097) and can_map(1 << 20)


@pytest.mark.parametrize(
    ("shape", "chunks", "is_in_order"),
    [
        ((4, 8), (1, 8), True), ((4, 8), (2, 8), True), ((4, 8), (3, 8), False), ((4, 8), (4, 4), False),
        ((2, 3, 8), (1, 1, 8), True), ((2, 3, 8), (1, 3, 8), True), ((2, 4, 8), (1, 2, 8), True),
        ((2, 4, 8), (2, 2, 8), False), ((1, 8), (1, 1), True), ((), (), False),
    ],
)  # fmt: skip
def test_chunks_make_an_array_where_they_follow_each_other(
    shape: tuple[int, ...], chunks: tuple[int, ...], is_in_order: bool
) -> None:
    entry = ArrayEntry(shape=shape, dtype=np.dtype("int8"), chunk_shape=chunks, sha256="")
    assert _are_in_order(entry) == is_in_order


def test_loaded_weights_are_the_store_s_own_memory(store: Store) -> None:
    model = config_from_hf(dict(store.config))
    specs = AbstractDecoder(model, jnp.dtype("float32")).specs
    params = load_params(store, model, specs, Placement(make_mesh()), show_progress=False)
    loaded = flatten(params)[0]
    for path, entry in store.arrays.items():
        expected = store.read(path, tuple(slice(0, size) for size in entry.shape))
        np.testing.assert_array_equal(np.asarray(loaded[path]), expected)
    place = loaded[UP].unsafe_buffer_pointer()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(store.path) in line]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in lines]
    assert any(start <= place < end for start, end in ranges), "the weight was copied"
    del params, loaded
    gc.collect()
    left = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(store.path) in line]
    assert not left, "what nobody holds any more is still mapped"


@pytest.mark.parametrize("damage", ["a bit", "short", "missing"])
def test_a_damaged_chunk_is_named(damage: str, store: Store) -> None:
    file = store.path / "params" / UP.replace("/", ".") / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "a bit" else content[:-9])
    expected = {"a bit": "its CRC32C is", "short": "bytes, and should have", "missing": "missing"}
    with pytest.raises(CheckpointError, match=expected[damage]) as raised:
        open_store(store.path).map(UP)
    assert UP in str(raised.value)


def test_files_lie_one_behind_the_other_and_stay_when_they_are_removed(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 4096 + b"tail")
    array = map_files(files, 4096)
    for file in files:
        file.unlink()
    np.testing.assert_array_equal(array, np.repeat(np.arange(3, dtype=np.uint8), 4096))
    with pytest.raises(OSError):
        map_files(files, 4096)
