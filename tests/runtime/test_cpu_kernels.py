"""The line that a start says of native kernels, and that a runtime without them serves."""

import pytest

from millrace import SamplingParams
from millrace.pallas_kernels import native
from millrace.runtime.cpu_kernels import prepare_kernels, usable_kernels

REASON = "there is no C++ compiler on the PATH."


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "_outcome", [f"{REASON}\nmore"])


def test_a_start_without_native_kernels_says_why_whether_it_shows_progress_or_not(without_kernels):
    for shows in (True, False):
        line = prepare_kernels("cpu", show_progress=shows)
        assert line == f"no native CPU kernels, XLA serves instead: {REASON}"
    assert usable_kernels() == REASON


def test_a_start_with_native_kernels_names_the_instruction_set(monkeypatch):
    sets = ("avx512_bf16", "avx512_vnni", "avx512", "avx2")
    library = native.Library(path=native.Path("x"), compiler="c++", instruction_sets=sets, left_out=(), targets=())
    monkeypatch.setattr(native, "_outcome", [library])
    assert prepare_kernels("cpu", show_progress=True) == "native CPU kernels for avx512_bf16"
    assert prepare_kernels("cpu", show_progress=False) is None
    assert usable_kernels() == sets


def test_gpus_need_no_native_kernels(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda _: pytest.fail("built for a GPU"))
    monkeypatch.setattr(native, "_outcome", [])
    assert prepare_kernels("gpu", show_progress=True) is None


def test_a_runtime_without_native_kernels_says_so_once_and_serves(without_kernels, open_tiny, capfd):
    with open_tiny() as runtime:
        outputs = runtime.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 3
    assert capfd.readouterr().err.count(f"millrace: no native CPU kernels, XLA serves instead: {REASON}\n") == 1
