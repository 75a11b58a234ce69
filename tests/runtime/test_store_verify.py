"""Verification reads every byte and names every fault, not only the first."""

import json
import re

import numpy as np
import pytest

from millrace.runtime.store import open_store
from millrace.runtime.store_verify import verify_store
from millrace.runtime.store_writer import save_store
from millrace.sharding.specs import ParamSpec

F32 = np.dtype(np.float32)
SPECS = {
    "q": ParamSpec((3, 8, 6), F32, ("layers", "heads", "embed")),
    "up": ParamSpec((2, 6, 8), F32, ("layers", "embed", "mlp")),
    "scale": ParamSpec((4,), F32, ("embed",)),
}
random = np.random.default_rng(0)
PARAMS = {path: random.normal(size=spec.shape).astype(F32) for path, spec in SPECS.items()}


@pytest.fixture
def saved(tmp_path):
    save_store(tmp_path / "store", PARAMS, SPECS, {"model_type": "llama"}, {}, min_chunk_bytes=48)
    return tmp_path / "store"


def faults_of(place):
    return verify_store(place, show_progress=False)


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_sound_store_has_no_faults(saved):
    assert faults_of(saved) == []


def test_store_in_memory_is_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the mirror of its small files goes
    save_store("memory://test_store_verify/x", PARAMS, SPECS, {"model_type": "llama"}, {}, min_chunk_bytes=48)
    assert faults_of("memory://test_store_verify/x") == []


def test_every_fault_is_named(saved):
    q, up = saved / "params/q/c", saved / "params/up/c"
    flip_byte(q / "0/1/0")
    (q / "2/3/0").unlink()
    flip_byte(up / "1/0/2")
    (saved / "notes.txt").write_text("mine")
    (saved / "params/up/c/0/0/9").write_bytes(b"")
    patterns = [
        r"q\[0, 2:4, 0:6\] cannot be read .*is damaged: its CRC32C",
        r"q\[2, 6:8, 0:6\] cannot be read .*is missing",
        r"up\[1, 0:6, 4:6\] cannot be read .*is damaged: its CRC32C",
        r"notes.txt: expected only files that the manifest lists",
        r"params/up/c/0/0/9: expected only files",
    ]
    faults = faults_of(saved)
    assert len(faults) == len(patterns)
    assert all(re.search(pattern, fault) for pattern, fault in zip(patterns, faults, strict=True)), faults


def test_values_that_were_written_again_are_found_by_their_digest(saved, tmp_path):
    save_store(
        tmp_path / "other", {**PARAMS, "scale": PARAMS["scale"] + 1}, SPECS, {"model_type": "llama"}, {},
        min_chunk_bytes=48,
    )  # fmt: skip
    (saved / "params/scale/c/0").write_bytes((tmp_path / "other/params/scale/c/0").read_bytes())
    np.testing.assert_array_equal(open_store(saved).read("scale", (slice(0, 4),)), PARAMS["scale"] + 1)
    (fault,) = faults_of(saved)
    assert re.search(r"scale: expected values of SHA-256", fault)


def test_store_that_does_not_open_has_that_fault(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    (fault,) = faults_of(saved)
    assert "A newer Millrace wrote it" in fault
