"""A checkpoint, converted and exported, is the same checkpoint; an export that fails leaves nothing behind."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from millrace.errors import CheckpointError
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf, tensor_plan
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.convert import convert
from millrace.runtime.export import export
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import Store, open_store
from millrace.runtime.weights import checkpoint_leaves
from millrace.runtime.weights import convert as to_dtype

CHECKPOINTS = Path(__file__).parent.parent / "fixtures" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
SPELLED_ANEW = {"gemma3_nested", "gpt_oss_mxfp4"}  # part of a multimodal model; packed
QUERY = "params/stages.0.0.attention.q.weight/c/1/0/0"


@pytest.fixture
def store(tmp_path):
    """Of a tiny Llama."""
    return convert(open_checkpoint(CHECKPOINTS / "llama_default"), tmp_path / "store", show_progress=False)


@pytest.fixture
def room(tmp_path):
    """A folder that holds nothing."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture(scope="module")
def round_trip(request, tmp_path_factory):
    """A committed checkpoint, and the export of its store, both opened."""
    original, folder = open_checkpoint(CHECKPOINTS / request.param), tmp_path_factory.mktemp("trip")
    store = convert(original, folder / "store", show_progress=False)
    return original, open_checkpoint(export(store, folder / "exported", show_progress=False))


def parameters(checkpoint):
    """Every part of every parameter, as (path, index) -> values in the dtype that the config declares."""
    model = config_from_hf(dict(checkpoint.config))
    specs, _ = flatten(AbstractDecoder(model, jnp.dtype(model.dtype)).specs)
    leaves = list(checkpoint_leaves(checkpoint, tensor_plan(model, checkpoint.tensor_names, checkpoint.config), specs))
    parts = ((leaf, part) for leaf in leaves for part in leaf.parts)
    return {
        (leaf.path, part.index): to_dtype(part.read([(...,)])[0], leaf.spec.dtype, leaf.path) for leaf, part in parts
    }


def tensors(checkpoint):
    return {name: (checkpoint.dtype(name), checkpoint.read(name).tobytes()) for name in checkpoint.tensor_names}


@pytest.mark.parametrize("round_trip", [name for name in NAMES if name != "gpt_oss_mxfp4"], indirect=True)
def test_every_parameter_comes_back_bit_for_bit(round_trip):
    original, exported = map(parameters, round_trip)
    assert original.keys() == exported.keys()
    for key, values in original.items():
        assert values.dtype == exported[key].dtype and values.tobytes() == exported[key].tobytes(), key


@pytest.mark.parametrize("round_trip", [name for name in NAMES if name not in SPELLED_ANEW], indirect=True)
def test_a_plain_checkpoint_comes_back_tensor_for_tensor(round_trip):
    original, exported = round_trip
    assert tensors(original) == tensors(exported)
    assert (original.config, original.generation_config) == (exported.config, exported.generation_config)


@pytest.mark.parametrize("round_trip", ["gpt_oss_mxfp4"], indirect=True)
def test_packed_experts_come_back_as_what_they_stand_for(round_trip):
    original, exported = round_trip
    halves = np.asarray([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # of what a nibble stands for
    for name in ("gate_up_proj", "down_proj"):
        tensor = f"model.layers.1.mlp.experts.{name}"
        blocks, exponents = original.read(f"{tensor}_blocks"), original.read(f"{tensor}_scales")
        nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*exponents.shape, 32)
        values = halves[nibbles] * np.exp2(exponents[..., None] - 128.0)
        wide = values.reshape(*exponents.shape[:2], -1).swapaxes(1, 2)
        np.testing.assert_array_equal(exported.read(tensor).astype(np.float32), wide)
    assert "quantization_config" not in exported.config


def test_the_export_has_the_dtype_of_the_store(tmp_path, room):
    original = open_checkpoint(CHECKPOINTS / "llama_default")
    store = convert(original, tmp_path / "store", dtype=jnp.dtype("bfloat16"), show_progress=False)
    exported = open_checkpoint(export(store, room, show_progress=False))
    assert {str(exported.dtype(name)) for name in exported.tensor_names} == {"bfloat16"}
    assert config_from_hf(exported.config).dtype == "bfloat16"


def test_files_beside_the_weights_come_along(tmp_path):
    shutil.copytree(CHECKPOINTS / "llama_default", tmp_path / "original")
    (tmp_path / "original" / "tokenizer.json").write_text("{}")
    store = convert(open_checkpoint(tmp_path / "original"), tmp_path / "store", show_progress=False)
    folder = export(store, tmp_path / "exported", show_progress=False)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_the_safetensors_library_reads_a_file_and_its_format(store, room):
    folder = export(store, room, show_progress=False)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        values = file.get_tensor("model.layers.2.self_attn.q_proj.weight")
    expected = store.read("stages/0/0/attention/q/weight", (slice(2, 3), *(slice(0, size) for size in values.shape)))
    np.testing.assert_array_equal(values, expected[0])


def test_shards_are_bounded_and_their_index_names_every_tensor(store, room):
    folder = export(store, room, max_shard_bytes=40_000, show_progress=False)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 40_000 + 4_000 for file in files)  # and a header
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": store.num_bytes}
    assert tensors(open_checkpoint(folder)) == tensors(open_checkpoint(CHECKPOINTS / "llama_default"))


def test_a_tensor_above_the_bound_has_a_shard_of_its_own(store, room):
    folder = export(store, room, max_shard_bytes=1, show_progress=False)
    exported = open_checkpoint(folder)
    assert len(list(folder.glob("*.safetensors"))) == len(exported.tensor_names)


def test_folders_above_the_destination_are_made(store, room):
    assert export(store, room / "a" / "b", show_progress=False) == room / "a" / "b"
    assert open_checkpoint(room / "a" / "b").tensor_names
    assert [path.name for path in room.iterdir()] == ["a"]


def test_a_destination_that_holds_something_is_left_as_it_is(store, room):
    (room / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="new or empty folder; this one holds something"):
        export(store, room, show_progress=False)
    with pytest.raises(CheckpointError, match="new or empty folder"):
        export(store, room / "notes.txt", show_progress=False)
    assert [path.name for path in room.iterdir()] == ["notes.txt"] and (room / "notes.txt").read_text() == "mine"


def test_a_url_is_no_destination(store):
    with pytest.raises(CheckpointError, match="this is a URL"):
        export(store, "memory://exported", show_progress=False)


def test_the_destination_appears_when_it_is_whole(store, room, monkeypatch):
    seen = []
    read = Store.start_read

    def look(self, *args):
        seen.append((room / "exported").exists())
        return read(self, *args)

    monkeypatch.setattr(Store, "start_read", look)
    export(store, room / "exported", show_progress=False)
    assert seen and not any(seen) and (room / "exported").is_dir()


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), CheckpointError("damaged"), OSError(28, "No space left")])
def test_an_export_that_stops_leaves_nothing_behind(fault, store, room, monkeypatch):
    num_reads = 0
    read = Store.start_read

    def stop(self, *args):
        nonlocal num_reads
        num_reads += 1
        if num_reads == 12:
            raise fault
        return read(self, *args)

    monkeypatch.setattr(Store, "start_read", stop)
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else CheckpointError):
        export(store, room / "exported", show_progress=False)
    assert not list(room.iterdir())


def test_a_disk_without_room_is_told_before_anything_is_written(store, room, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2_000, 1_000, 1_000))
    with pytest.raises(CheckpointError, match=r"bytes are to be written, 1,000 free.*The disk is full: make room"):
        export(store, room / "exported", show_progress=False)
    assert not list(room.iterdir())


def test_a_damaged_array_is_named_and_nothing_is_left(store, room):
    file = store.path / QUERY
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"stages/0/0/attention/q/weight\[1, .*cannot be read"):
        export(open_store(store.path), room / "exported", show_progress=False)
    assert not list(room.iterdir())


def test_a_store_unlike_its_config_is_refused(tmp_path):
    shutil.copytree(CHECKPOINTS / "llama_default", tmp_path / "original")
    store = convert(open_checkpoint(tmp_path / "original"), tmp_path / "store", show_progress=False)
    store.config["num_hidden_layers"] = 2
    with pytest.raises(CheckpointError, match="config.json asks for"):
        export(store, tmp_path / "exported", show_progress=False)
