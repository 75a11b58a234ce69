"""A store vouches for itself: what was saved is what opens, and whatever was changed since is named."""

import functools
import hashlib
import http.server
import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from millrace.errors import CheckpointError
from millrace.runtime import store_root
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import PendingRead, is_store, open_store
from millrace.runtime.store_writer import save_store
from millrace.sharding.specs import ParamSpec

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SPECS = {
    "embed": {"weight": ParamSpec((8, 4), BF16, ("vocab", "embed"))},
    "stages": {"0": {"0": {"q": {"weight": ParamSpec((3, 4, 6), F32, ("layers", "heads", "embed"))}}}},
    "scale": ParamSpec((4,), np.dtype(np.float16), ("embed",)),
    "packed": ParamSpec((4,), np.dtype(np.int8), (None,)),
}
random = np.random.default_rng(0)
QUERY_WEIGHT = random.normal(size=(3, 4, 6)).astype(F32)
PARAMS = {
    "embed": {"weight": random.normal(size=(8, 4)).astype(BF16)},
    "stages": {"0": {"0": {"q": {"weight": QUERY_WEIGHT}}}},
    "scale": np.zeros(4, np.float16),
    "packed": np.arange(4, dtype=np.int8),
}
QUERY = "stages/0/0/q/weight"
SECOND_LAYER = (slice(1, 2), slice(0, 4), slice(0, 6))
CHUNK = "params/stages.0.0.q.weight/c/1/0/0"
CONFIG = {"model_type": "llama", "vocab_size": 8}
FILES = {"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": 2}'}


@pytest.fixture
def saved(tmp_path):
    save_store(tmp_path / "store", PARAMS, SPECS, CONFIG, FILES)
    return tmp_path / "store"


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def edit_manifest(path, edit):
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_file(path, name, content):
    """A file that the manifest vouches for, with other content."""
    (path / name).write_bytes(content)
    row = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: row}))


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def refuses(path, message):
    with pytest.raises(CheckpointError, match=message):
        open_store(path)


def refuses_to_read(path, message):
    with pytest.raises(CheckpointError, match=message):
        open_store(path).read(QUERY, whole((3, 4, 6)))


def reads_back(store):
    for path, values in flatten(PARAMS)[0].items():
        read = store.read(path, whole(values.shape))
        assert read.dtype == values.dtype and read.tobytes() == values.tobytes()


@pytest.mark.parametrize("direct_io", [False, True])
def test_arrays_read_back_bit_for_bit(direct_io, saved):
    reads_back(open_store(saved, direct_io=direct_io))


def test_manifest_says_what_the_store_holds(saved):
    store = open_store(saved)
    assert (store.config, store.generation_config) == (CONFIG, {"eos_token_id": 2})
    assert store.tokenizer_files == {"tokenizer.json": saved / "tokenizer.json"}
    assert (store.source["name"], store.dtype, store.quantization) == ("saved", "float32", None)
    entry = store.arrays[QUERY]
    assert (entry.shape, entry.dtype, entry.chunk_shape, entry.layout) == ((3, 4, 6), F32, (1, 4, 6), "plain")
    assert entry.sha256 == hashlib.sha256(QUERY_WEIGHT.tobytes()).hexdigest()
    assert store.num_bytes == sum(values.nbytes for values in flatten(PARAMS)[0].values())


def test_region_reads_only_its_part(saved):
    region = (slice(1, 2), slice(0, 4), slice(2, 5))
    for other in (0, 2):
        (saved / f"params/stages.0.0.q.weight/c/{other}/0/0").unlink()
    np.testing.assert_array_equal(open_store(saved).read(QUERY, region), QUERY_WEIGHT[region])


def test_several_regions_go_straight_into_the_callers_buffers(saved):
    store, room = open_store(saved), np.zeros((3, 4, 6), F32)
    reads = [
        store.start_read(QUERY, (slice(layer, layer + 1), *whole((4, 6))), room[layer : layer + 1])
        for layer in range(3)
    ]
    for read in reads:
        read.result()
    np.testing.assert_array_equal(room, QUERY_WEIGHT)


def test_page_cache_holds_what_was_just_written(saved):
    assert open_store(saved).is_cached()


@pytest.mark.parametrize("url", ["file://{path}", "{path}"])
def test_a_path_and_its_url_are_one(url, saved):
    store = open_store(url.format(path=saved))
    assert store.url == str(saved) and store.path == saved
    reads_back(store)


def test_store_in_memory_has_a_mirror_of_its_small_files(tmp_path):
    save_store("memory://test_store/mirror", PARAMS, SPECS, CONFIG, FILES)
    store = open_store("memory://test_store/mirror", mirror_dir=tmp_path)
    assert store.path.parent == tmp_path and store.tokenizer_files["tokenizer.json"].read_bytes() == b"{}"
    reads_back(store)
    assert open_store("memory://test_store/mirror", mirror_dir=tmp_path).path == store.path


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_store_is_read_over_http(saved, tmp_path):
    handler = functools.partial(_Quiet, directory=saved)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            reads_back(open_store(f"http://127.0.0.1:{server.server_port}", mirror_dir=tmp_path / "mirror"))
        finally:
            server.shutdown()
            thread.join()


def test_url_that_does_not_answer_is_refused():
    refuses("http://127.0.0.1:9/store", "manifest.json cannot be read .*Check that the place can be reached")


def test_url_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(store_root, "ANSWER_S", 0.1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Quiet) as server:  # it never accepts
        refuses(f"http://127.0.0.1:{server.server_port}", "no answer within")


@pytest.mark.parametrize("url", ["nothing://x", "memory:/"])
def test_url_of_no_kind_is_refused(url):
    refuses(url, "expected a")


def test_store_is_known_by_its_manifest_or_its_journal(saved, tmp_path):
    assert is_store(saved) and is_store("gs://bucket/model") and not is_store(tmp_path)
    (saved / "manifest.json").rename(saved / "conversion.json")
    assert is_store(saved)


def test_interrupted_conversion_says_how_to_go_on(saved):
    (saved / "manifest.json").rename(saved / "conversion.json")
    refuses(saved, "an interrupted conversion.* run millrace convert again, it resumes")


def test_folder_without_a_manifest_is_no_store(tmp_path):
    refuses(tmp_path, "there is no manifest.json")


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "generation_config.json"])
def test_malformed_json_is_refused(name, saved):
    if name == "manifest.json":
        (saved / name).write_text("{")
    else:
        replace_file(saved, name, b"{")
    refuses(saved, f"{name}: expected JSON")


@pytest.mark.parametrize(
    ("key", "value", "mend"),
    [
        ("format", "zarr", "Convert the model again"),
        ("version", 1, "Convert the model again"),
        ("version", 3, "A newer Millrace wrote it: update this one"),
        ("version", None, "Convert the model again"),
    ],
)
def test_other_format_is_refused(key, value, mend, saved):
    edit_manifest(saved, lambda manifest: manifest.update({key: value}))
    refuses(saved, f"expected format millrace-store version 2; got .*{mend}")


@pytest.mark.parametrize("key", ["arrays", "files"])
@pytest.mark.parametrize("value", [None, [], {"a": 1}])
def test_malformed_manifest_is_refused(key, value, saved):
    edit_manifest(saved, lambda manifest: manifest.update({key: value}))
    refuses(saved, f"{key} should be an object of objects")


@pytest.mark.parametrize(("key", "value"), [("source", None), ("dtype", "float8"), ("quantization", {"bits": 4})])
def test_manifest_of_an_unknown_kind_is_refused(key, value, saved):
    edit_manifest(saved, lambda manifest: manifest.update({key: value}))
    refuses(saved, "expected source, the arrays' dtype and the quantization of config.json, None")


def test_manifest_without_arrays_is_refused(saved):
    edit_manifest(saved, lambda manifest: manifest.update(arrays={}))
    refuses(saved, "it lists none")


@pytest.mark.parametrize("name", ["config.json", "params/embed.weight/zarr.json"])
def test_file_that_the_manifest_leaves_out_is_refused(name, saved):
    edit_manifest(saved, lambda manifest: manifest["files"].pop(name))
    refuses(saved, f"should list {name}")


@pytest.mark.parametrize("name", ["../config.json", "/config.json", ""])
def test_manifest_that_leaves_the_store_is_refused(name, saved):
    edit_manifest(saved, lambda manifest: manifest["files"].update({name: {"num_bytes": 1, "sha256": ""}}))
    refuses(saved, "expected num_bytes and sha256 of a file inside")


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"shape": [4, 8]}])
def test_manifest_of_another_model_is_refused(change, saved):
    edit_manifest(saved, lambda manifest: manifest["arrays"]["embed/weight"].update(change))
    refuses(saved, "embed/weight should have the shape and dtype that manifest.json lists.*of another model")


def test_config_of_another_model_is_refused(saved):
    (saved / "config.json").write_text('{"model_type": "gemma2"}')
    refuses(saved, "config.json: expected .* SHA-256 .* another model's")


def test_array_packed_for_a_kernel_is_refused(saved):
    layout = {"packed_for": "wgmma_fp8", "plain_sha256": "0"}
    edit_manifest(saved, lambda manifest: manifest["arrays"]["embed/weight"].update(layout=layout))
    refuses(saved, "embed/weight is packed for the kernel 'wgmma_fp8'; this version reads plain arrays only")


@pytest.mark.parametrize("change", [{"layout": "rows"}, {"sha256": None}])
def test_array_of_an_unknown_layout_or_digest_is_refused(change, saved):
    edit_manifest(saved, lambda manifest: manifest["arrays"]["embed/weight"].update(change))
    refuses(saved, "expected layout and sha256 of embed/weight")


@pytest.mark.parametrize("name", ["params/embed.weight/zarr.json", "params/_METADATA", "tokenizer.json"])
def test_changed_file_is_refused_on_opening(name, saved):
    flip_byte(saved / name)
    refuses(saved, f"{name}: expected .* SHA-256")


@pytest.mark.parametrize("name", ["params/embed.weight/zarr.json", "tokenizer.json"])
def test_missing_file_is_refused_on_opening(name, saved):
    (saved / name).unlink()
    refuses(saved, f"{name}: expected a file; there is none")


def test_array_with_codecs_of_its_own_is_refused(saved):
    name = "params/embed.weight/zarr.json"
    metadata = json.loads((saved / name).read_text())
    metadata["codecs"] = metadata["codecs"][:1]
    replace_file(saved, name, json.dumps(metadata).encode())
    refuses(saved, "embed/weight/zarr.json has codecs or chunks unlike a store's")


def test_flipped_byte_is_named_with_its_array_and_layer(saved):
    flip_byte(saved / CHUNK)
    refuses_to_read(saved, r"stages/0/0/q/weight\[0:3, 0:4, 0:6\] cannot be read .*c/1/0/0 is damaged: its CRC32C")
    with pytest.raises(CheckpointError, match=r"stages/0/0/q/weight\[1, 0:4, 0:6\] cannot be read"):
        open_store(saved).read(QUERY, SECOND_LAYER)


def test_truncated_chunk_is_refused(saved):
    (saved / CHUNK).write_bytes((saved / CHUNK).read_bytes()[:-8])
    refuses_to_read(saved, "c/1/0/0.*fetch the store or convert the model again")


def test_missing_chunk_is_not_read_as_zeros(saved):
    (saved / CHUNK).unlink()
    refuses_to_read(saved, "c/1/0/0 is missing.*fetch the store or convert the model again")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), (b"short", "Not enough data"), (bytes(100), "Digest mismatch")]
)
def test_chunk_elsewhere_than_in_a_folder_is_checked_too(content, message, tmp_path):
    place = f"memory://test_store/damaged/{message.split()[0]}"
    save_store(place, PARAMS, SPECS, CONFIG, FILES)
    store = open_store(place, mirror_dir=tmp_path)
    store.root.keys.write(CHUNK, content).result()
    with pytest.raises(CheckpointError, match=rf"q/weight\[1, 0:4, 0:6\] cannot be read .*{message}"):
        store.read(QUERY, SECOND_LAYER)


@pytest.fixture
def unprivileged():
    """The rights of nobody, for a test that root runs."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def readable_but_for(saved):
    """Opens the way to the store for everybody, and closes one file of it."""
    open_store(saved).read(QUERY, SECOND_LAYER)  # imports what nobody else may read
    for folder in (saved, *saved.parents):
        mode = folder.stat().st_mode
        if mode & 0o055 != 0o055:
            folder.chmod(mode | 0o055)
    return lambda name: (saved / name).chmod(0)


@pytest.mark.parametrize("name", [CHUNK, "manifest.json", "params/_METADATA"])
def test_forbidden_file_is_refused(name, saved, readable_but_for, request):
    readable_but_for(name)
    request.getfixturevalue("unprivileged")
    refuses_to_read(saved, f"(?i)(?=.*{name.split('.')[-1]}).*permission.*Check its permissions")


def test_a_read_that_fails_waits_for_whatever_still_writes_to_its_buffer(saved):
    store = open_store(saved)
    failed, slow = Future(), Future()
    failed.set_exception(ValueError("a chunk is damaged"))
    read = PendingRead(store.root, QUERY, SECOND_LAYER, [failed, slow])
    with ThreadPoolExecutor(1) as waiter:
        waiting = waiter.submit(read.result)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        slow.set_result(None)
        with pytest.raises(CheckpointError, match="a chunk is damaged"):
            waiting.result()
