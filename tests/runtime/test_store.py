"""A store vouches for itself: what was saved is what opens, and whatever was changed since is named."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from millrace.errors import CheckpointError
from millrace.runtime import store_writer
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import is_store, open_store
from millrace.runtime.store_writer import save_store

random = np.random.default_rng(0)
PARAMS = {
    "embed": {"weight": random.normal(size=(8, 4)).astype(ml_dtypes.bfloat16)},
    "stages": {"0": {"0": {"q": {"weight": random.normal(size=(3, 4, 6)).astype(np.float32)}}}},
    "scale": np.zeros(4, np.float16),
    "packed": np.arange(4, dtype=np.int8),
}
QUERY = "stages/0/0/q/weight"
FIRST_CHUNK = "stages.0.0.q.weight/c/0/0/0"
CONFIG = {"model_type": "llama", "vocab_size": 8}
FILES = {"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": 2}'}


@pytest.fixture
def saved(tmp_path):
    save_store(tmp_path / "store", PARAMS, CONFIG, FILES)
    return tmp_path / "store"


@pytest.fixture
def by_layer(tmp_path, monkeypatch):
    """A store whose stacked array has a file per layer, as large ones have."""
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 200)
    save_store(tmp_path / "layers", PARAMS, CONFIG, {})
    return tmp_path / "layers"


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def edit_manifest(path, edit):
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def chunk(path, name=FIRST_CHUNK):
    return path / "params" / name


def refuses(path, message):
    with pytest.raises(CheckpointError, match=message):
        open_store(path)


def test_arrays_read_back_bit_for_bit(saved):
    store = open_store(saved)
    for path, values in flatten(PARAMS)[0].items():
        read = store.read(path, whole(values.shape))
        assert read.dtype == values.dtype and read.tobytes() == values.tobytes()


def test_files_beside_the_arrays_are_found(saved):
    store = open_store(saved)
    assert store.config == CONFIG
    assert store.generation_config == {"eos_token_id": 2}
    assert store.tokenizer_files.keys() == {"tokenizer.json"}


def test_region_reads_only_its_part(saved):
    region = (slice(1, 2), slice(0, 4), slice(2, 5))
    np.testing.assert_array_equal(
        open_store(saved).read(QUERY, region), PARAMS["stages"]["0"]["0"]["q"]["weight"][region]
    )


def test_jax_arrays_make_the_same_chunks_as_numpy_arrays(saved, tmp_path):
    save_store(tmp_path / "other", jax.tree.map(jax.device_put, PARAMS), CONFIG, FILES)
    chunks = [file.relative_to(saved) for file in saved.glob("params/*/**/*") if file.is_file()]
    assert chunks and all((saved / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in chunks)


def test_equal_weights_make_equal_bytes_without_times_or_paths(saved, tmp_path):
    save_store(tmp_path / "again", PARAMS, CONFIG, FILES)
    files = [file.relative_to(saved) for file in saved.rglob("*") if file.is_file()]
    assert all((saved / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_orbax_restores_the_arrays(saved):
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), PARAMS)
    restored = handler.restore(saved / "params", args=ocp.args.PyTreeRestore(restore_args=args))
    handler.close()
    jax.tree.map(np.testing.assert_array_equal, restored, PARAMS)


def test_arrays_are_compressed(tmp_path):
    save_store(tmp_path / "store", {"w": np.tile(np.arange(64, dtype=np.float32), 4096)}, CONFIG, {})
    assert chunk(tmp_path / "store", "w/c/0").stat().st_size < 2**20 / 10


def test_directory_that_holds_something_is_not_overwritten(saved):
    with pytest.raises(CheckpointError, match="this one holds something"):
        save_store(saved, PARAMS, CONFIG, {})
    open_store(saved)


def test_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_store(tmp_path / "store", PARAMS, CONFIG, {"tokenizer.json": tmp_path / "absent"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "params, message",
    [
        ({}, "nested dicts of arrays"),
        ({"a.b": np.ones(2)}, "keys without dots"),
        ({"a": {"b": np.ones(2)}, "a/b": np.ones(2)}, "keys of params should be without slashes"),
    ],
)
def test_params_without_plain_names_are_refused(params, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"(?i){message}"):
        save_store(tmp_path / "store", params, CONFIG, {})


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "params", "../x", "a/b", ""])
def test_file_names_that_cannot_lie_beside_the_arrays_are_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="files are plain names"):
        save_store(tmp_path / "store", PARAMS, CONFIG, {name: b""})


def test_store_is_known_by_its_manifest(saved, tmp_path):
    assert is_store(saved) and not is_store(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "generation_config.json"])
def test_malformed_json_is_refused(name, saved):
    (saved / name).write_text("{")
    refuses(saved, f"{name}: expected JSON")


@pytest.mark.parametrize("key, value", [("format", "zarr"), ("version", 2), ("version", None)])
def test_other_format_is_refused(key, value, saved):
    edit_manifest(saved, lambda manifest: manifest.update({key: value}))
    refuses(saved, "expected format millrace-store version 1")


@pytest.mark.parametrize("key", ["arrays", "files"])
@pytest.mark.parametrize("value", [None, [], {"a": 1}])
def test_malformed_manifest_is_refused(key, value, saved):
    edit_manifest(saved, lambda manifest: manifest.update({key: value}))
    refuses(saved, f"{key} should be an object of objects")


def test_manifest_without_arrays_is_refused(saved):
    edit_manifest(saved, lambda manifest: manifest.update(arrays={}))
    refuses(saved, "it lists none")


@pytest.mark.parametrize("name", ["../config.json", "/config.json"])
def test_manifest_that_leaves_params_is_refused(name, saved):
    edit_manifest(saved, lambda manifest: manifest["files"].update({name: {"num_bytes": 1, "sha256": ""}}))
    refuses(saved, "expected num_bytes and sha256 of a file below params")


def test_truncated_file_is_refused_on_opening(saved):
    chunk(saved).write_bytes(chunk(saved).read_bytes()[:-1])
    refuses(saved, r"c/0/0/0: expected a file of \d+ bytes; it has \d+")


def test_missing_array_is_refused_on_opening(saved):
    chunk(saved).unlink()
    refuses(saved, "c/0/0/0: .* there is none")


def test_array_that_the_files_lack_is_refused(saved):
    edit_manifest(saved, lambda manifest: manifest["arrays"].update(more={"shape": [1], "dtype": "float32"}))
    refuses(saved, "should list more/zarr.json")


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"shape": [4, 8]}])
def test_manifest_that_disagrees_with_an_array_is_refused(change, saved):
    edit_manifest(saved, lambda manifest: manifest["arrays"]["embed/weight"].update(change))
    refuses(saved, "embed/weight should have the shape and dtype that manifest.json lists")


def test_changed_array_metadata_are_refused(saved):
    flip_byte(saved / "params" / "embed.weight" / "zarr.json")
    refuses(saved, "zarr.json: expected SHA-256")


def test_damaged_file_is_refused_when_read(saved):
    flip_byte(chunk(saved))
    with pytest.raises(CheckpointError, match="c/0/0/0: expected SHA-256"):
        open_store(saved).read(QUERY, whole((3, 4, 6)))


def test_layer_reads_whatever_became_of_its_neighbour(by_layer):
    flip_byte(chunk(by_layer))
    store, weight = open_store(by_layer), PARAMS["stages"]["0"]["0"]["q"]["weight"]
    second = (slice(1, 2), slice(0, 4), slice(0, 6))
    np.testing.assert_array_equal(store.read(QUERY, second), weight[second])
    with pytest.raises(CheckpointError, match="c/0/0/0: expected SHA-256"):
        store.read(QUERY, whole((3, 4, 6)))


def test_chunk_that_the_manifest_leaves_out_is_not_read_as_zeros(by_layer):
    name = str(chunk(by_layer).relative_to(by_layer / "params"))
    chunk(by_layer).unlink()
    edit_manifest(by_layer, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"should list {name}"):
        open_store(by_layer).read(QUERY, whole((3, 4, 6)))


def test_array_with_nan_is_refused_when_read(tmp_path):
    save_store(tmp_path / "store", {"w": np.float32([1, np.nan])}, CONFIG, {})
    with pytest.raises(CheckpointError, match="w should hold finite numbers"):
        open_store(tmp_path / "store").read("w", (slice(0, 2),))
