"""What is written is what was given, in chunks that a layer or a shard reads alone, and nothing else is there."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from millrace.errors import CheckpointError
from millrace.runtime.store import open_store
from millrace.runtime.store_journal import Origin
from millrace.runtime.store_writer import chunk_shape, open_writer, save_store
from millrace.sharding.specs import ParamSpec

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SPECS = {
    "q": ParamSpec((3, 8, 6), F32, ("layers", "heads", "embed")),
    "o": ParamSpec((3, 6, 8), F32, ("layers", "embed", "heads")),
    "moe": {"up": ParamSpec((2, 12, 8, 6), F32, ("layers", "experts", "mlp", "embed"))},
    "norm": ParamSpec((6,), BF16, ("embed",)),
    "scale": ParamSpec((), F32, ()),
}
random = np.random.default_rng(0)
PARAMS = jax.tree.map(lambda spec: random.normal(size=spec.shape).astype(spec.dtype), SPECS)
FLAT_SPECS = {"moe/up": SPECS["moe"]["up"], **{path: SPECS[path] for path in ("norm", "o", "q", "scale")}}
FLAT = {"moe/up": PARAMS["moe"]["up"], **{path: PARAMS[path] for path in ("norm", "o", "q", "scale")}}
CONFIG = {"model_type": "llama"}
ORIGIN = Origin({"name": "model", "revision": "1", "fingerprint": "f"}, "float32")
CHUNK_BYTES = pytest.mark.parametrize("chunk_bytes", [1 << 20, 200, 64, 16])


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def holds(store, flat=FLAT):
    for path, values in flat.items():
        read = store.read(path, tuple(slice(0, size) for size in values.shape))
        assert read.dtype == values.dtype and read.tobytes() == values.tobytes(), path


def write_parts(writer, paths=tuple(FLAT)):
    """Array by array; experts one by one."""
    for path in paths:
        leading = 2 if path == "moe/up" else 1 if path in ("q", "o") else 0
        for index in np.ndindex(FLAT[path].shape[:leading]):
            writer.write_part(path, index, FLAT[path][index])


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((4, 64, 8), ("layers", "heads", "embed"), (1, 8, 8)),
        ((4, 8, 64), ("layers", "embed", "mlp"), (1, 8, 8)),
        ((4, 24, 8), ("layers", "kv_heads", "embed"), (1, 3, 8)),
        ((63, 8), ("vocab", "embed"), (63, 8)),  # nothing divides it evenly
        ((4, 12, 8, 8), ("layers", "experts", "mlp", "embed"), (1, 1, 2, 8)),
        ((4, 12, 2, 2), ("layers", "experts", "mlp", "embed"), (1, 3, 2, 2)),  # an expert is less than a chunk
        ((4, 8), ("layers", "embed"), (1, 8)),
        ((8,), ("embed",), (8,)),
    ],
)
def test_chunk_is_a_layer_and_a_piece_of_what_a_mesh_shards(shape, axes, expected):
    assert chunk_shape(ParamSpec(shape, F32, axes), min_bytes=48 if 2 in shape else 64) == expected


def test_array_that_is_no_larger_than_the_least_chunk_stays_whole():
    assert chunk_shape(ParamSpec((1024, 256), F32, ("vocab", "embed"))) == (1024, 256)
    assert chunk_shape(ParamSpec((2048, 256), F32, ("vocab", "embed"))) == (1024, 256)


@CHUNK_BYTES
def test_parts_and_whole_arrays_make_equal_stores(chunk_bytes, tmp_path):
    save_store(tmp_path / "whole", PARAMS, SPECS, CONFIG, {}, min_chunk_bytes=chunk_bytes)
    with open_writer(tmp_path / "parts", ORIGIN, FLAT_SPECS, min_chunk_bytes=chunk_bytes) as writer:
        write_parts(writer)
        writer.finish({"config.json": (tmp_path / "whole" / "config.json").read_bytes()})
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.pop("manifest.json") != parts.pop("manifest.json")  # they name their sources
    assert whole == parts
    assert open_store(tmp_path / "whole").arrays == open_store(tmp_path / "parts").arrays
    holds(open_store(tmp_path / "parts"))


@CHUNK_BYTES
@pytest.mark.parametrize("num_devices", [2, 8])
def test_sharded_arrays_make_the_same_store(chunk_bytes, num_devices, tmp_path):
    mesh = jax.make_mesh((num_devices,), ("x",), devices=jax.devices()[:num_devices])
    specs = {"q": (None, "x"), "o": (None, None, "x"), "moe": {"up": (None, None, "x")}, "norm": (), "scale": ()}
    sharded = jax.tree.map(
        lambda axes, values: jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes))), specs, PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    save_store(tmp_path / "numpy", PARAMS, SPECS, CONFIG, {}, min_chunk_bytes=chunk_bytes)
    save_store(tmp_path / "jax", sharded, SPECS, CONFIG, {}, min_chunk_bytes=chunk_bytes)
    assert files_of(tmp_path / "numpy") == files_of(tmp_path / "jax")


def test_equal_weights_make_equal_bytes_without_times_or_paths(tmp_path):
    for name in ("one", "two"):
        save_store(tmp_path / name, PARAMS, SPECS, CONFIG, {"tokenizer.json": b"{}"})
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_finished_store_holds_no_lock_and_no_journal(tmp_path):
    save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {})
    names = set(files_of(tmp_path / "store"))
    assert {name for name in names if not name.startswith("params/")} == {"config.json", "manifest.json"}
    assert not any("lock" in name for name in names)


def test_orbax_restores_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), PARAMS)
    restored = handler.restore(tmp_path / "store" / "params", args=ocp.args.PyTreeRestore(restore_args=args))
    handler.close()
    jax.tree.map(np.testing.assert_array_equal, restored, PARAMS)


ORBAX_ONLY = """
import sys, numpy, orbax.checkpoint as ocp
with ocp.PyTreeCheckpointer() as checkpointer:
    params = checkpointer.restore(sys.argv[1])
assert not any(name.split(".")[0] == "millrace" for name in sys.modules)
numpy.savez(sys.argv[2], up=params["moe"]["up"], norm=params["norm"].view("u2"), scale=params["scale"])
"""


def test_orbax_alone_restores_a_plain_tree(tmp_path):
    save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {}, min_chunk_bytes=64)
    command = [sys.executable, "-c", ORBAX_ONLY, str(tmp_path / "store" / "params"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, cwd=tmp_path)
    with np.load(tmp_path / "out.npz") as restored:
        np.testing.assert_array_equal(restored["up"], PARAMS["moe"]["up"])
        np.testing.assert_array_equal(restored["norm"], PARAMS["norm"].view("u2"))
        assert restored["scale"] == PARAMS["scale"]


def test_place_that_holds_something_is_not_overwritten(tmp_path):
    save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {})
    before = files_of(tmp_path / "store")
    with pytest.raises(CheckpointError, match="it holds a store already, of"):
        save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {})
    assert files_of(tmp_path / "store") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"this one holds something: \['notes.txt'\]"):
        save_store(tmp_path / "other", PARAMS, SPECS, CONFIG, {})
    assert files_of(tmp_path / "other") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("place", ["{path}/store", "memory://test_store_writer/failed"])
def test_save_that_fails_leaves_nothing(place, tmp_path):
    bad = {**PARAMS, "scale": np.float32(np.nan)}
    for _ in range(2):
        with pytest.raises(CheckpointError, match="scale should hold finite numbers"):
            save_store(place.format(path=tmp_path), bad, SPECS, CONFIG, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        save_store(place.format(path=tmp_path), PARAMS, SPECS, CONFIG, {"tokenizer.json": tmp_path / "absent"})
    assert not list(tmp_path.iterdir())
    save_store(place.format(path=tmp_path), PARAMS, SPECS, CONFIG, {})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sharded_array_that_is_not_finite_is_refused(value, tmp_path):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    bad = PARAMS["q"].copy()
    bad[2, 7, 5] = value
    bad = jax.device_put(bad, NamedSharding(mesh, PartitionSpec(None, "x")))
    with pytest.raises(CheckpointError, match="q should hold finite numbers"):
        save_store(tmp_path / "store", {**PARAMS, "q": bad}, SPECS, CONFIG, {})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "nested dicts of arrays"),
        ({"a.b": np.ones(2)}, "keys without dots"),
        ({"a": {"b": np.ones(2)}, "a/b": np.ones(2)}, "keys of params should be without slashes"),
        ({"a": np.ones(2)}, "a should be None, as its spec says"),
        ({**PARAMS, "q": PARAMS["q"][:2]}, r"q should be \(\(3, 8, 6\), .* got \(\(2, 8, 6\)"),
    ],
)
def test_params_unlike_a_store_or_their_specs_are_refused(params, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"(?i){message}"):
        save_store(tmp_path / "store", params, SPECS, CONFIG, {})


@pytest.mark.parametrize(
    "name", ["manifest.json", "config.json", "conversion.json", ".lock", "params", "../x", "a/b", ""]
)
def test_file_names_that_cannot_lie_beside_the_arrays_are_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="files are plain names"):
        save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {name: b""})


@pytest.mark.parametrize("place", ["{path}/store", "memory://test_store_writer/resumed"])
def test_interrupted_writer_goes_on_with_the_arrays_that_are_not_finished(place, tmp_path):
    place = place.format(path=tmp_path)
    with open_writer(place, ORIGIN, FLAT_SPECS) as writer:
        write_parts(writer, ("moe/up", "q"))
        writer.write_part("o", (0,), FLAT["o"][0])
    with pytest.raises(CheckpointError, match="an interrupted conversion"):
        open_store(place)
    with open_writer(place, ORIGIN, FLAT_SPECS) as writer:
        assert writer.unfinished == ["norm", "o", "scale"]
        write_parts(writer, ("norm", "o", "scale"))
        writer.finish({"config.json": b"{}"})
    holds(open_store(place, mirror_dir=tmp_path / "mirror"))
    with open_writer(place, ORIGIN, FLAT_SPECS) as writer:
        assert writer is None


@pytest.mark.parametrize(
    "origin", [Origin({**ORIGIN.source, "fingerprint": "g"}, "float32"), Origin(ORIGIN.source, "bfloat16")]
)
def test_interrupted_conversion_of_another_source_is_refused(origin, tmp_path):
    with open_writer(tmp_path, ORIGIN, FLAT_SPECS) as writer:
        write_parts(writer, ("q",))
    with (
        pytest.raises(CheckpointError, match="it holds an interrupted conversion of"),
        open_writer(tmp_path, origin, FLAT_SPECS),
    ):
        pass


def test_writer_elsewhere_than_in_a_folder_gives_up_when_another_takes_over():
    place = "memory://test_store_writer/two"
    with open_writer(place, ORIGIN, FLAT_SPECS) as first:
        write_parts(first, ("q",))
        with open_writer(place, ORIGIN, FLAT_SPECS) as second:
            with pytest.raises(CheckpointError, match="another process is converting into it"):
                write_parts(first, ("o",))
            assert second.unfinished == ["moe/up", "norm", "o", "scale"]


def test_what_a_killed_writer_left_is_swept(tmp_path):
    with open_writer(tmp_path, ORIGIN, FLAT_SPECS) as writer:
        write_parts(writer)
        left = ["params/q/c/0/0/0.__lock", "params/gone/c/0", "config.json.__lock"]
        for name in left:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        writer.finish({"config.json": b"{}"})
    (tmp_path / "manifest.json.__lock").write_bytes(b"")
    (tmp_path / "conversion.json").write_bytes(b"{}")
    with open_writer(tmp_path, ORIGIN, FLAT_SPECS) as writer:
        assert writer is None
    names = set(files_of(tmp_path))
    assert {name for name in names if not name.startswith("params/")} == {"config.json", "manifest.json"}
    assert not names & set(left)


def test_manifest_is_sorted_and_names_every_file_that_is_not_a_chunk(tmp_path):
    save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, {"tokenizer.json": b"{}"})
    text = (tmp_path / "store" / "manifest.json").read_text()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    assert set(manifest["files"]) == {name for name in files_of(tmp_path / "store") if "/c/" not in name
                                      and not name.endswith("/c")} - {"manifest.json"}  # fmt: skip
