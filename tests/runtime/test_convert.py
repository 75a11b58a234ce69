"""A conversion ends with the same store however often it was interrupted, and holds what the checkpoint holds."""

import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from millrace.errors import CheckpointError
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.runtime import convert as module
from millrace.runtime import store_journal
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.convert import convert
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import open_store
from millrace.runtime.store_journal import exclusively
from millrace.runtime.store_root import open_root, remedy
from millrace.runtime.weights import load_params
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

# Fused tensors, an expert in tensors of its own, all experts in one, unpacked from 4 bits.
FAMILIES = ("phi3_long", "mixtral_default", "gpt_oss_plain", "gpt_oss_mxfp4", "gemma3_text", "qwen3_moe_mixed")
NUM_KILLS = 20


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def quietly(source, place, **options):
    return convert(source, place, show_progress=False, **options)


def whole(store, path):
    return store.read(path, tuple(slice(0, size) for size in store.arrays[path].shape))


@pytest.fixture
def checkpoint_dir(fixture_checkpoints, tmp_path):
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(fixture_checkpoints / "llama_default", tmp_path / "llama"))


@pytest.mark.parametrize("name", FAMILIES)
def test_store_holds_what_the_checkpoint_loads(name, fixture_checkpoints, tmp_path):
    checkpoint = open_checkpoint(fixture_checkpoints / name)
    model = config_from_hf(dict(checkpoint.config))
    specs = AbstractDecoder(model, jnp.dtype("float32")).specs
    loaded = load_params(checkpoint, model, specs, Placement(make_mesh()), show_progress=False)
    store = quietly(checkpoint, tmp_path / "store", dtype=np.dtype("float32"))
    for path, values in flatten(loaded)[0].items():
        np.testing.assert_array_equal(whole(store, path), np.asarray(values), err_msg=path)
    assert store.config == checkpoint.config and store.source["name"] == name


def test_dtype_is_converted_and_served_from_then_on(checkpoint_dir, tmp_path):
    from millrace.runtime.model_source import open_model

    wide = quietly(open_checkpoint(checkpoint_dir), tmp_path / "wide", dtype=jnp.dtype("float32"))
    narrow = quietly(open_checkpoint(checkpoint_dir), tmp_path / "narrow", dtype=jnp.dtype("bfloat16"))
    again = quietly(wide, tmp_path / "again", dtype=jnp.dtype("bfloat16"))
    expected = whole(wide, "embed/weight").astype(jnp.bfloat16)
    np.testing.assert_array_equal(whole(narrow, "embed/weight"), expected)
    assert again.arrays == narrow.arrays and (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert open_model(str(tmp_path / "narrow"), None).config.dtype == "bfloat16"


def test_two_conversions_are_equal_byte_for_byte(checkpoint_dir, tmp_path):
    for name in ("one", "two"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_finished_conversion_is_left_as_it_is(checkpoint_dir, tmp_path, capsys):
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    assert "holds this conversion already: nothing to do" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}


def test_place_of_another_checkpoint_is_refused(checkpoint_dir, fixture_checkpoints, tmp_path):
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    with pytest.raises(CheckpointError, match="it holds a store already, of"):
        quietly(open_checkpoint(fixture_checkpoints / "gemma2_plain"), tmp_path / "store")
    with pytest.raises(CheckpointError, match="it holds a store already, of"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "store", dtype=jnp.dtype("float16"))


def test_checkpoint_that_changed_is_another_one(checkpoint_dir, tmp_path):
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    tensors = load_file(checkpoint_dir / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2}, checkpoint_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match="it holds a store already"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")


def test_place_that_is_a_file_is_refused(checkpoint_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder that can be written to"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "file")


def test_weight_that_is_not_finite_leaves_no_store(checkpoint_dir, tmp_path):
    tensors = load_file(checkpoint_dir / "model.safetensors")
    bad = np.full_like(tensors["lm_head.weight"], np.nan)
    save_file({**tensors, "lm_head.weight": bad}, checkpoint_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match="'lm_head.weight' should hold finite numbers"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    with pytest.raises(CheckpointError, match="an interrupted conversion"):
        open_store(tmp_path / "store")


def test_store_of_the_memory_driver_is_a_destination(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the mirror of its small files goes
    local = quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    stored = quietly(local, "memory://test_convert/store")
    assert stored.arrays == local.arrays and stored.url == "memory://test_convert/store"


Usage = collections.namedtuple("Usage", "total used free")


def test_disk_without_room_is_refused_before_anything_is_written(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    with pytest.raises(CheckpointError, match="bytes are still to be written; the disk has 1,000 free. Make room"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    assert not (tmp_path / "store" / "params").exists()


def test_disk_that_fills_up_says_how_much_is_needed_and_the_conversion_goes_on(checkpoint_dir, tmp_path, monkeypatch):
    write_part, num_calls = module.StoreWriter.write_part, []

    def fill_up(self, path, index, values):
        num_calls.append(path)
        if len(num_calls) == 10:
            cause = ValueError("RESOURCE_EXHAUSTED: No space left on device")
            raise CheckpointError(f"{path} cannot be written. {remedy(cause)}") from cause
        write_part(self, path, index, values)

    monkeypatch.setattr(module.StoreWriter, "write_part", fill_up)
    with pytest.raises(CheckpointError, match=r"The disk is full: make room.* The arrays take [\d,]+ bytes in all"):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "other")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "other")


def test_second_converter_waits_and_says_so(checkpoint_dir, tmp_path, monkeypatch):
    is_told = threading.Event()
    said = []

    def note(text, **_):
        said.append(text)
        is_told.set()

    monkeypatch.setattr(store_journal, "print", note, raising=False)
    second = threading.Thread(target=quietly, args=(open_checkpoint(checkpoint_dir), tmp_path / "store"))
    with exclusively(open_root(tmp_path / "store")):
        second.start()
        assert is_told.wait(60)
        assert not (tmp_path / "store" / "conversion.json").exists()
    second.join()
    assert said == [f"millrace: {tmp_path / 'store'} is being written by another process; waiting for it"]
    open_store(tmp_path / "store")


def test_two_converters_at_once_make_one_store(checkpoint_dir, tmp_path):
    checkpoint = open_checkpoint(checkpoint_dir)
    threads = [threading.Thread(target=quietly, args=(checkpoint, tmp_path / "store")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quietly(checkpoint, tmp_path / "other")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "other")


def test_part_that_is_larger_than_the_budget_goes_alone():
    budget, held, most = module._Budget(10), [0], [0]
    lock = threading.Lock()

    def use(num_bytes):
        with budget.hold(num_bytes):
            with lock:
                held[0] += num_bytes
                assert held[0] == num_bytes or held[0] <= 10
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= num_bytes

    threads = [threading.Thread(target=use, args=(size,)) for size in (4, 4, 25, 3, 12, 7) * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 25 and held[0] == 0


@pytest.fixture
def converter(fixture_checkpoints):
    """Converts mixtral_default in a process of its own: place, and the line at which it is killed -> its answer."""
    command = [
        sys.executable,
        str(Path(__file__).parent / "converter.py"),
        str(fixture_checkpoints / "mixtral_default"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(place, kill_at=0):
            process.stdin.write(json.dumps({"place": str(place), "kill_at": kill_at}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def test_converter_killed_at_any_moment_ends_with_the_same_store(converter, tmp_path):
    undisturbed = converter(tmp_path / "undisturbed")
    assert undisturbed["status"] == 0
    expected, moments, num_killed = files_of(tmp_path / "undisturbed"), random.Random(0), 0
    for number in range(NUM_KILLS):
        place = tmp_path / f"killed-{number}"
        killed = converter(place, moments.randrange(1, undisturbed["num_lines"]))
        num_killed += killed["status"] == -signal.SIGKILL
        assert converter(place)["status"] == 0
        assert files_of(place) == expected
    assert num_killed >= NUM_KILLS - 1  # threads take turns as they like, so that the last lines may differ


def test_finished_arrays_are_not_written_again(checkpoint_dir, tmp_path, monkeypatch):
    write_part, written = module.StoreWriter.write_part, collections.Counter()

    def stop_at(self, path, index, values):
        if len(written) == 6 and path not in written:
            raise KeyboardInterrupt
        written[path] += 1
        write_part(self, path, index, values)

    monkeypatch.setattr(module, "_NUM_WORKERS", 1)
    monkeypatch.setattr(module.StoreWriter, "write_part", stop_at)
    with pytest.raises(KeyboardInterrupt):
        quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    monkeypatch.setattr(module.StoreWriter, "write_part", write_part)
    finished = set(json.loads((tmp_path / "store" / "conversion.json").read_text())["arrays"])
    assert finished == set(written)
    chunks = [file for file in (tmp_path / "store" / "params").rglob("c/**/*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in chunks}
    quietly(open_checkpoint(checkpoint_dir), tmp_path / "store")
    assert before == {file: file.stat().st_mtime_ns for file in chunks}
