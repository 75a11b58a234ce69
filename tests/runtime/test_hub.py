"""Models by name, against a hub that lives in this process."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save

from millrace.errors import CheckpointError
from millrace.runtime.checkpoint import INDEX_FILE, open_checkpoint
from millrace.runtime.hub import download
from millrace.runtime.store import open_store
from millrace.runtime.store_writer import save_store
from millrace.sharding.specs import ParamSpec

WEIGHTS = save({"a": np.arange(4, dtype=np.float32)})
SINGLE = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same once more",
    "README.md": b"# A model",
}
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
REVISIONS = {"main": NEW, "v1": OLD, NEW: NEW, OLD: OLD}


class Hub(http.server.ThreadingHTTPServer):
    """The four routes that huggingface_hub asks; `repositories` holds files by (name, commit)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Route)
        self.repositories, self.fetched, self.status = {}, [], None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Route(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urllib.parse.unquote(self.path.split("?")[0]).strip("/").split("/")
        if self.server.status is not None:
            return self.answer(self.server.status)
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]), *parts[4:6])
        return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def listing(self, name, kind, revision):
        files = self.server.repositories.get((name, REVISIONS.get(revision)))
        if files is None:
            known = any(name == other for other, _ in self.server.repositories)
            return self.answer(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        if kind == "tree":
            rows = [{"type": "file", "path": path, "size": len(c), "oid": etag(c)} for path, c in files.items()]
            return self.answer(200, {}, json.dumps(rows).encode())
        siblings = [{"rfilename": path} for path in files]
        return self.answer(200, {}, json.dumps({"id": name, "sha": REVISIONS[revision], "siblings": siblings}).encode())

    def file(self, name, revision, path):
        commit = REVISIONS[revision]
        content = self.server.repositories[name, commit].get(path)
        if content is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if self.command == "GET":
            self.server.fetched.append(path)
        return self.answer(200, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit}, content)

    def answer(self, status, headers=(), content=b""):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def etag(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetch(hub, tmp_path):
    """Downloads from the hub at hand to a cache that starts empty."""
    return lambda name, revision=None: download(name, revision, cache_dir=tmp_path / "cache", endpoint=hub.url)


def test_model_of_the_hub_opens_like_a_directory(hub, fetch):
    hub.repositories["org/name", NEW] = SINGLE
    checkpoint = open_checkpoint(fetch("org/name"))
    np.testing.assert_array_equal(checkpoint.read("a"), np.arange(4, dtype=np.float32))
    assert checkpoint.tokenizer_files.keys() == {"tokenizer.json"}


def test_only_what_is_needed_is_fetched(hub, fetch):
    hub.repositories["org/name", NEW] = SINGLE
    fetch("org/name")
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_shards_are_fetched_as_the_index_names_them(hub, fetch):
    index = {"weight_map": {"a": "shards/one.safetensors"}}
    files = {"config.json": b"{}", INDEX_FILE: json.dumps(index).encode(), "shards/one.safetensors": WEIGHTS}
    hub.repositories["org/name", NEW] = files | {"other.safetensors": b""}
    assert open_checkpoint(fetch("org/name")).tensor_names == {"a"}
    assert "other.safetensors" not in hub.fetched


def test_store_of_the_hub_opens(hub, fetch, tmp_path):
    params, specs = {"a": {"b": np.ones(3, np.float32)}}, {"a": {"b": ParamSpec((3,), np.dtype(np.float32), (None,))}}
    save_store(tmp_path / "store", params, specs, {}, {"training.json": b"{}"})
    files = [file for file in (tmp_path / "store").rglob("*") if file.is_file()]
    hub.repositories["org/name", NEW] = {str(f.relative_to(tmp_path / "store")): f.read_bytes() for f in files}
    np.testing.assert_array_equal(open_store(fetch("org/name")).read("a/b", (slice(0, 3),)), np.ones(3))


@pytest.mark.parametrize("revision, expected", [(None, "new"), ("main", "new"), ("v1", "old"), (OLD, "old")])
def test_revision_is_a_branch_a_tag_or_a_commit(revision, expected, hub, fetch):
    for commit, kind in ((OLD, "old"), (NEW, "new")):
        hub.repositories["org/name", commit] = SINGLE | {"config.json": json.dumps({"kind": kind}).encode()}
    assert open_checkpoint(fetch("org/name", revision)).config == {"kind": expected}


def test_model_in_the_cache_opens_when_the_hub_is_gone(hub, tmp_path):
    hub.repositories["org/name", NEW] = SINGLE
    path = download("org/name", cache_dir=tmp_path, endpoint=hub.url)
    assert download("org/name", cache_dir=tmp_path, endpoint="http://127.0.0.1:9") == path


def test_hub_out_of_reach_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="org/name at revision main: cannot be fetched, .* Check the network"):
        download("org/name", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")


def test_download_that_was_cut_off_is_refused_offline(hub, fetch, monkeypatch):
    hub.repositories["org/name", NEW] = SINGLE
    (fetch("org/name") / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="org/name"):
        fetch("org/name")


def test_hub_that_fails_is_one_clear_error(hub, fetch):
    hub.status = 403
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        fetch("org/name")


def test_unknown_model_is_refused(fetch):
    with pytest.raises(CheckpointError, match="org/nmae at revision main: the hub has no such model"):
        fetch("org/nmae")


def test_unknown_revision_is_refused(hub, fetch):
    hub.repositories["org/name", NEW] = SINGLE
    with pytest.raises(CheckpointError, match="org/name at revision v9: the model has no such revision"):
        fetch("org/name", "v9")


def test_repository_without_safetensors_is_refused(hub, fetch):
    hub.repositories["org/name", NEW] = {name: SINGLE[name] for name in ("config.json", "pytorch_model.bin")}
    with pytest.raises(CheckpointError, match="pickles above all, are never fetched"):
        fetch("org/name")
    assert hub.fetched == ["config.json"]


def test_repository_without_config_is_refused(hub, fetch):
    hub.repositories["org/name", NEW] = {"README.md": b"a data set"}
    with pytest.raises(CheckpointError, match="has no config.json"):
        fetch("org/name")


@pytest.mark.parametrize("name", ["name", "org/name/more", "../name", "org/..", "", "org name/x", "-org/x\n"])
def test_name_that_no_repository_can_have_is_refused(name, hub, fetch):
    with pytest.raises(CheckpointError, match="expected org/name"):
        fetch(name)


def test_hub_is_found_by_its_environment_variable(hub, tmp_path):
    """In a process of its own: huggingface_hub reads HF_ENDPOINT once."""
    hub.repositories["org/name", NEW] = SINGLE
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    code = "from millrace.runtime.hub import download; print(download('org/name'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith(NEW), done.stderr
    assert str(tmp_path) in done.stdout
