"""Hugging Face directories as people have them open; whatever is wrong in one is named before a weight is read."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from millrace.errors import CheckpointError
from millrace.runtime.checkpoint import INDEX_FILE, open_checkpoint

TENSORS = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.float16), "c": np.zeros(2, np.int8)}


def write_json(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def single(tmp_path):
    """One file of weights."""
    write_json(tmp_path / "config.json", {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}})
    (tmp_path / "evil.py").write_text("raise SystemExit('a checkpoint must never run code')")
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(directory, weight_map):
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def refuses(directory, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_read_back(kind, request):
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    assert checkpoint.tensor_names == TENSORS.keys()
    for name, values in TENSORS.items():
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (values.shape, values.dtype)
        np.testing.assert_array_equal(checkpoint.read(name), values)


def test_configs_and_tokenizer_files_are_found(single):
    write_json(single / "generation_config.json", {"eos_token_id": [1, 2]})
    write_json(single / "tokenizer.json", {})
    checkpoint = open_checkpoint(single)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.tokenizer_files == {"tokenizer.json": single.resolve() / "tokenizer.json"}


def test_directory_without_optional_files_opens(single):
    checkpoint = open_checkpoint(single)
    assert not checkpoint.generation_config and not checkpoint.tokenizer_files


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1, "a": 2}'])
def test_malformed_config_is_refused(name, text, single):
    write_json(single / name, text)
    refuses(single, f"{name}: .*")


def test_directory_that_is_not_there_is_refused(tmp_path):
    refuses(tmp_path / "nowhere", "expected a model's directory")


def test_directory_without_config_is_refused(tmp_path):
    refuses(tmp_path, "expected a config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(name, single):
    (single / "model.safetensors").unlink()
    (single / name).mkdir()  # opening it would raise something else
    refuses(single, f"pickle files \\({name}\\), which can run code")


def test_other_formats_are_refused_by_name(single):
    (single / "model.safetensors").rename(single / "model.gguf")
    refuses(single, "found model.gguf")


def test_weights_without_tensors_are_refused(single):
    save_file({}, single / "model.safetensors")
    refuses(single, "hold no tensor")


def test_missing_shard_is_refused(sharded):
    (sharded / "two.safetensors").unlink()
    refuses(sharded, "two.safetensors: expected a file; there is none")


def test_tensor_that_its_shard_lacks_is_refused(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    refuses(sharded, "'b' should be in one.safetensors; it is in two.safetensors")


def test_tensor_that_no_shard_has_is_refused(sharded):
    write_index(sharded, {"a": "one.safetensors", "z": "one.safetensors"})
    refuses(sharded, "'z' should be in one.safetensors; it is in no shard")


def test_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / "one.safetensors")
    refuses(sharded, "'b' is in one.safetensors and in two.safetensors")


def test_tensor_that_the_index_leaves_out_stays_out(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"})
    assert open_checkpoint(sharded).tensor_names == {"a", "b"}


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}])
def test_malformed_weight_map_is_refused(weight_map, sharded):
    write_index(sharded, weight_map)
    refuses(sharded, "expected weight_map, an object of file names")


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/one.safetensors", "x/../../one.safetensors", "..\\one.safetensors"]
)
def test_weight_map_that_leaves_its_directory_is_refused(name, sharded):
    directory = sharded / "inner"
    directory.mkdir()
    write_json(directory / "config.json", {})
    write_index(directory, {"a": name})
    refuses(directory, "expected a file name inside the directory")


@pytest.mark.parametrize("name", ["pytorch_model-00001.bin", "one.safetensors.pkl", ""])
def test_weight_map_of_other_files_is_refused(name, sharded):
    write_index(sharded, {"a": name})
    refuses(sharded, "shards should be .safetensors files")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_link_that_leaves_the_directory_is_refused(name, single, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "file"
    outside.write_bytes((single / name).read_bytes() if (single / name).exists() else b"{}")
    (single / name).unlink(missing_ok=True)
    (single / name).symlink_to(outside)
    refuses(single, f"{name}: a link may lead")


def test_link_to_nothing_is_refused(single):
    (single / "tokenizer.json").symlink_to(single / "absent")
    refuses(single, "tokenizer.json: expected a file; there is none")


def test_link_to_itself_is_refused(single):
    (single / "tokenizer.json").symlink_to("tokenizer.json")
    refuses(single, "tokenizer.json: expected a file; there is none")


def test_snapshot_of_the_hub_cache_links_to_its_blobs(single, tmp_path_factory):
    repository = tmp_path_factory.mktemp("models--org--name")
    snapshot, blobs = repository / "snapshots" / "1234", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (single / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    np.testing.assert_array_equal(open_checkpoint(snapshot).read("a"), TENSORS["a"])
