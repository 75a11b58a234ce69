"""A checkpoint is converted when it is first opened, and not again until it changes."""

import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from millrace import SamplingParams
from millrace.errors import CheckpointError, ConfigError
from millrace.models.families import config_from_hf
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.store_cache import cached_store, find_cached, list_cached, remove_cached
from millrace.runtime.store_verify import verify_store

F32 = np.dtype(np.float32)


@pytest.fixture
def checkpoint_dir(fixture_checkpoints, tmp_path):
    return Path(shutil.copytree(fixture_checkpoints / "llama_default", tmp_path / "llama"))


def open_cached(folder, cache_dir, dtype=F32):
    checkpoint = open_checkpoint(folder)
    model = config_from_hf(dict(checkpoint.config))
    return cached_store(checkpoint, model, dtype, cache_dir, show_progress=False)


def test_first_use_converts_and_says_so_and_the_second_does_not(checkpoint_dir, tmp_path, capsys):
    store = open_cached(checkpoint_dir, tmp_path / "cache")
    assert f"converting {checkpoint_dir} into a store, once, in {store.path} (--no-store" in capsys.readouterr().err
    again = open_cached(checkpoint_dir, tmp_path / "cache")
    assert again.path == store.path and not capsys.readouterr().err
    assert store.path.name.startswith("llama-") and verify_store(store.path, show_progress=False) == []


def test_another_dtype_or_a_changed_file_is_another_store(checkpoint_dir, tmp_path):
    cache = tmp_path / "cache"
    first = open_cached(checkpoint_dir, cache)
    narrow = open_cached(checkpoint_dir, cache, jnp.dtype("bfloat16"))
    os.utime(checkpoint_dir / "model.safetensors", ns=(1, 1))
    touched = open_cached(checkpoint_dir, cache)
    assert len({first.path, narrow.path, touched.path}) == 3
    assert [store.dtype for store in list_cached(cache)].count("bfloat16") == 1


def test_revision_of_the_hub_is_named(checkpoint_dir, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    checkpoint_dir.rename(snapshot)
    store = open_cached(snapshot, tmp_path / "cache")
    assert (store.source["name"], store.source["revision"]) == ("org/tiny", "0123abc")
    (listed,) = list_cached(tmp_path / "cache")
    assert listed.name.startswith("org--tiny-") and listed.source == "org/tiny at 0123abc"


def test_several_at_once_convert_once(checkpoint_dir, tmp_path):
    stores = []
    threads = [
        threading.Thread(target=lambda: stores.append(open_cached(checkpoint_dir, tmp_path / "cache")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3 and len({store.path for store in stores}) == 1 == len(list_cached(tmp_path / "cache"))


def test_interrupted_conversion_is_listed_and_goes_on(checkpoint_dir, tmp_path):
    store = open_cached(checkpoint_dir, tmp_path / "cache")
    (store.path / "manifest.json").unlink()
    (interrupted,) = list_cached(tmp_path / "cache")
    assert interrupted.source is None
    (store.path / "params" / "embed.weight" / "c" / "0" / "0").unlink()
    with pytest.raises(CheckpointError, match="this one holds something.*--no-store"):
        open_cached(checkpoint_dir, tmp_path / "cache")  # neither manifest nor journal: not ours to overwrite
    remove_cached(interrupted)
    assert open_cached(checkpoint_dir, tmp_path / "cache").arrays == store.arrays


def test_damaged_store_of_the_cache_says_how_to_begin_again(checkpoint_dir, tmp_path):
    store = open_cached(checkpoint_dir, tmp_path / "cache")
    (store.path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"SHA-256.*millrace cache remove {store.path.name} begins again"):
        open_cached(checkpoint_dir, tmp_path / "cache")


def test_cache_that_cannot_be_written_names_the_options(checkpoint_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="--store_cache_dir=DIR puts it elsewhere, --no-store"):
        open_cached(checkpoint_dir, tmp_path / "file")


def test_wrong_checkpoint_is_not_blamed_on_the_cache(checkpoint_dir, tmp_path):
    config = (checkpoint_dir / "config.json").read_text()
    (checkpoint_dir / "config.json").write_text(config.replace('"vocab_size": 160', '"vocab_size": 161'))
    with pytest.raises(CheckpointError, match="Weights and config.json are of different models") as caught:
        open_cached(checkpoint_dir, tmp_path / "cache")
    assert "--no-store" not in str(caught.value)


def test_stores_are_listed_found_and_removed_by_name(checkpoint_dir, tmp_path):
    cache = tmp_path / "cache"
    assert list_cached(cache) == []
    store = open_cached(checkpoint_dir, cache)
    (listed,) = list_cached(cache)
    assert (listed.name, listed.source, listed.dtype) == (store.path.name, "llama", "float32")
    assert listed.num_bytes == sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    with pytest.raises(ConfigError, match=f"expected the name of a store .*{listed.name}"):
        find_cached(cache, [listed.name[:-1]])
    for found in find_cached(cache, [listed.name]):
        remove_cached(found)
    assert list_cached(cache) == []


def test_store_with_a_damaged_manifest_is_listed_and_can_be_removed(checkpoint_dir, tmp_path):
    store = open_cached(checkpoint_dir, tmp_path / "cache")
    (store.path / "manifest.json").write_text("not JSON")
    (listed,) = list_cached(tmp_path / "cache")
    assert listed.source is None and listed.name == store.path.name
    remove_cached(listed)
    assert list_cached(tmp_path / "cache") == []


def test_default_caches_that_cannot_be_written_are_done_without(open_tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with open_tiny(store_cache_dir=None, compile_cache_dir=None) as runtime:
        assert runtime.config.compile_cache_dir == ""
        assert runtime.generate([4, 5], SamplingParams(max_tokens=1), use_tqdm=False)
    lines = capsys.readouterr().err.splitlines()
    assert [sum(f"--{name}_cache_dir=DIR" in line for line in lines) for name in ("store", "compile")] == [1, 1]


def test_a_named_compile_cache_that_cannot_be_made_is_an_error(open_tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="compile_cache_dir .*file cannot be made"):
        open_tiny(compile_cache_dir=str(tmp_path / "file"))
